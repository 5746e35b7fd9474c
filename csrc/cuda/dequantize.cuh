// Codes to values: minimum + code * step. The groups and their lanes are those of quantize.cu.
//
// What becomes of the values is up to a Use: how it makes what is stored at its out, of type Element, of the values as
// dequantisation alone would have stored them, of type Source.
//
//   OnlyStored  std::true_type if they are stored as they are
//   aligned   whether 16 bytes can be read and written at a time
//   ahead     what it reads itself for a vector, a run before it is needed
//   of        what is stored for a vector of values that are not rounded yet, its place and what was read for it;
//             or for a single value and its position
#pragma once

#include "groups.cuh"
#include "planes.cuh"

namespace hf_actnn {

// What the values of a group are made with.
struct Level {
  float minimum, step;
};

__device__ __forceinline__ Level level_of(uint32_t meta) {
  return Level{float_of(meta << 16), float_of(meta & 0xFFFF0000u)};
}

// From here on 2^23 * step might overflow.
constexpr float kLargeStep = 0x1p100f;

// The value of byte i of a word of codes. The byte becomes 2^23 + code as it stands, and one multiplication-addition,
// which rounds once, takes the 2^23 off again: code * step as the definition has it.
template <bool Large>
__device__ __forceinline__ float value_of(uint32_t codes, int i, const Level& level, float offset) {
  const float code = float_of(__byte_perm(codes, 0x4B000000u, 0x7550u + (uint32_t)i));
  const float product = Large ? (code - 0x1p23f) * level.step : __fmaf_rn(code, level.step, offset);
  return level.minimum + product;
}

__device__ __forceinline__ uint32_t nan_word(float) { return 0x7FC00000u; }
__device__ __forceinline__ uint32_t nan_word(Half) { return 0x7E007E00u; }
__device__ __forceinline__ uint32_t nan_word(BFloat16) { return 0x7FC07FC0u; }

__device__ __forceinline__ float nan_of(float) { return float_of(nan_word(float{})); }
__device__ __forceinline__ Half nan_of(Half) { return Half{(uint16_t)nan_word(Half{})}; }
__device__ __forceinline__ BFloat16 nan_of(BFloat16) { return BFloat16{(uint16_t)nan_word(BFloat16{})}; }
__device__ __forceinline__ double nan_of(double) {
  const uint64_t bits = 0x7FF8000000000000u;
  double nan;
  memcpy(&nan, &bits, 8);
  return nan;
}

// Values as they would have been stored in S.
template <class S, int V>
__device__ __forceinline__ void round_to(float (&y)[V]) {
  if constexpr (sizeof(S) == 2) {
    const uint4 stored = vec_of_floats<S, true>(y);
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = element(S{}, stored, i);
  }
}

__device__ __forceinline__ double wide(double x) { return x; }
template <class T>
__device__ __forceinline__ float wide(T x) {
  return to_float(x);
}

__device__ __forceinline__ double rounded(double, double x) { return x; }

// Takes the codes apart.
template <bool Large, class Use, int V>
__device__ __forceinline__ void write_lane(Bytes<V> (&codes)[kRuns], const Level& level, int runs, const Use& use,
                                           int64_t first) {
  using T = typename Use::Element;
  // More than to store values, done for all runs in a row, would be more instructions than a cache of them holds.
  constexpr int Lanes = Vec<T>::kLanes, Unrolled = Use::OnlyStored::value ? kRuns : 1;
  const float offset = -0x1p23f * level.step;
  auto next = use.ahead(first);
#pragma unroll Unrolled
  for (int m = 0; m < kRuns; ++m) {
    if (m < runs) {
      const auto read = next;
      if (m + 1 < runs) next = use.ahead(first + (m + 1) * Lanes);
      float y[V];
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = value_of<Large>(codes[0].w[i / 4], i % 4, level, offset);
      store_vec(use.out, first + m * Lanes, use.of(y, first + m * Lanes, read));
    }
    // The next run's codes come where these were: a loop that is not unrolled cannot choose between registers.
#pragma unroll
    for (int j = 0; j + 1 < kRuns; ++j) codes[j] = codes[j + 1];
  }
}

// A lane's codes of a group of fewer than eight runs, word by word.
template <int V>
__device__ __forceinline__ void unpack_words(const uint32_t* packed, int runs, int bits, int lane,
                                             Bytes<V> (&codes)[kRuns]) {
  int shift = 0;
#pragma unroll
  for (int m = 0; m < kRuns; ++m)
#pragma unroll
    for (int q = 0; q < V / 4; ++q) codes[m].w[q] = 0;
#pragma unroll
  for (int width = 8; width >= 1; width /= 2) {
    if ((bits & width) == 0) continue;
    const uint32_t words = (uint32_t)(runs * width);
    const uint32_t inverse = (65536u + words - 1u) / words;  // exact for quotients of numbers up to 64
#pragma unroll
    for (int m = 0; m < kRuns; ++m) {
      if (m >= runs) continue;
#pragma unroll
      for (int q = 0; q < V / 4; ++q) {
        const uint32_t at = (uint32_t)(8 * m + V / 4 * lane + q), t = at * inverse >> 16;
        codes[m].w[q] |= bytes_masked(packed[at - t * words] >> (width * t), width) << shift;
      }
    }
    shift += width;
    packed += words;
  }
}

template <class Use, bool Staged>
__global__ void __launch_bounds__(kThreads)
    dequantize_even(const uint8_t* packed, const uint32_t* meta, Groups groups, Use use) {
  using T = typename Use::Element;
  constexpr int V = Vec<T>::kElements, Lanes = Vec<T>::kLanes;
  const int lane = thread_index() % Lanes;
  const int64_t group = block_index() * (kThreads / Lanes) + thread_index() / Lanes;
  if (group >= groups.at.n_groups) return;
  const int runs = Staged ? (int)groups.at.group / 32 : kRuns;
  const Sample sample = sample_of(groups, group);
  const uint8_t* const from = packed + sample.byte + (group - sample.first) * (runs * 4 * sample.bits);
  const Level level = level_of(meta[group]);
  const int64_t first = group * runs * Lanes + lane;
  if (level.minimum != level.minimum) {
    const uint32_t nan = nan_word(T{});
    for (int m = 0; m < runs; ++m) store_vec(use.out, first + m * Lanes, make_uint4(nan, nan, nan, nan));
    return;
  }
  Bytes<V> codes[kRuns];
  if constexpr (Staged)
    unpack_words<V>((const uint32_t*)from, runs, sample.bits, lane, codes);
  else
    with_bits(sample.bits, [&](auto bits) { unpack_runs<decltype(bits)::value, V>(from, lane, codes); });
  // The shorter product is not worth a second copy of what does more than to store it.
  if (Use::OnlyStored::value && level.step < kLargeStep)
    write_lane<false>(codes, level, runs, use, first);
  else
    write_lane<true>(codes, level, runs, use, first);
}

// ---------------------------------------------------------------- any group

template <class T>
__device__ __forceinline__ T single(T, const Level& level, uint32_t code) {
  const float y = level.minimum + (float)code * level.step;
  return level.minimum != level.minimum ? nan_of(T{}) : rounded(T{}, finite(T{}, y));
}
__device__ __forceinline__ double single(double, const Level& level, uint32_t code) {
  const double y = (double)level.minimum + (double)code * (double)level.step;
  return level.minimum != level.minimum ? nan_of(double{}) : y;
}

template <class Use>
__global__ void __launch_bounds__(kThreads)
    dequantize_any(const uint8_t* packed, const uint32_t* meta, Groups groups, int lanes, Use use) {
  const int64_t group = block_index() * (kThreads / lanes) + thread_index() / lanes;
  const Spot spot = spot_of(groups, group);
  if (spot.size == 0) return;
  const Level level = level_of(meta[group]);
  for (int e = thread_index() % lanes; e < spot.size; e += lanes) {
    const uint32_t code = unpacked_code(packed + spot.byte, spot.size, spot.bits, e);
    const int64_t at = spot.position + e;
    use.out[at] = use.of(single(typename Use::Source{}, level, code), at);
  }
}

// ---------------------------------------------------------------- launches

template <class Use>
void dequantize_for(const Use& use, const uint8_t* codes, const uint32_t* meta, const Groups& groups,
                    const Target& target) {
  using T = typename Use::Element;
  if constexpr (sizeof(T) < 8) {
    if (even(groups) && use.aligned() && aligned(codes, 16)) {
      const int64_t blocks = ceil_div(groups.at.n_groups, kThreads / Vec<T>::kLanes);
      if (groups.at.group == kDitherBlock)
        launch(dequantize_even<Use, false>, blocks, 0, target, codes, meta, groups, use);
      else
        launch(dequantize_even<Use, true>, blocks, 0, target, codes, meta, groups, use);
      return;
    }
  }
  const int lanes = lanes_for(groups.at.group);
  launch(dequantize_any<Use>, ceil_div(groups.at.n_groups, kThreads / lanes), 0, target, codes, meta, groups, lanes,
         use);
}

}  // namespace hf_actnn
