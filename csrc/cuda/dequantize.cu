// Codes to values: minimum + code * step. The groups and their lanes are those of quantize.cu.
#include "groups.cuh"
#include "planes.cuh"

namespace hf_actnn {
namespace {

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

__device__ __forceinline__ uint32_t word_of_values(float, const float* y) { return bits_of(y[0]); }
__device__ __forceinline__ uint32_t word_of_values(Half, const float* y) { return two(Half{}, y[0], y[1]); }
__device__ __forceinline__ uint32_t word_of_values(BFloat16, const float* y) { return two(BFloat16{}, y[0], y[1]); }

__device__ __forceinline__ uint32_t nan_word(float) { return 0x7FC00000u; }
__device__ __forceinline__ uint32_t nan_word(Half) { return 0x7E007E00u; }
__device__ __forceinline__ uint32_t nan_word(BFloat16) { return 0x7FC07FC0u; }

template <class T, bool Large>
__device__ __forceinline__ void write_lane(const Bytes<Vec<T>::kElements> (&codes)[kRuns], const Level& level, int runs,
                                           T* out, int64_t first) {
  constexpr int V = Vec<T>::kElements, Lanes = Vec<T>::kLanes;
  const float offset = -0x1p23f * level.step;
#pragma unroll
  for (int m = 0; m < kRuns; ++m) {
    if (m >= runs) continue;
    float y[V];
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = value_of<Large>(codes[m].w[i / 4], i % 4, level, offset);
    const uint4 vec = make_uint4(word_of_values(T{}, y), word_of_values(T{}, y + V / 4), word_of_values(T{}, y + V / 2),
                                 word_of_values(T{}, y + 3 * V / 4));
    store_vec(out, first + m * Lanes, vec);
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

template <class T, bool Staged>
__global__ void __launch_bounds__(kThreads)
    dequantize_even(const uint8_t* packed, const uint32_t* meta, Groups groups, T* out) {
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
    for (int m = 0; m < runs; ++m) store_vec(out, first + m * Lanes, make_uint4(nan, nan, nan, nan));
    return;
  }
  Bytes<V> codes[kRuns];
  if constexpr (Staged)
    unpack_words<V>((const uint32_t*)from, runs, sample.bits, lane, codes);
  else
    with_bits(sample.bits, [&](auto bits) { unpack_runs<decltype(bits)::value, V>(from, lane, codes); });
  if (level.step < kLargeStep)
    write_lane<T, false>(codes, level, runs, out, first);
  else
    write_lane<T, true>(codes, level, runs, out, first);
}

// ---------------------------------------------------------------- any group

__device__ __forceinline__ void put(float* out, const Level& level, uint32_t code) {
  *out = level.minimum != level.minimum ? float_of(0x7FC00000u) : level.minimum + (float)code * level.step;
}
__device__ __forceinline__ void put(Half* out, const Level& level, uint32_t code) {
  const float y = level.minimum + (float)code * level.step;
  out->bits = level.minimum != level.minimum ? (uint16_t)0x7E00u : (uint16_t)two(Half{}, y, y);
}
__device__ __forceinline__ void put(BFloat16* out, const Level& level, uint32_t code) {
  const float y = level.minimum + (float)code * level.step;
  out->bits = level.minimum != level.minimum ? (uint16_t)0x7FC0u : (uint16_t)two(BFloat16{}, y, y);
}
__device__ __forceinline__ void put(double* out, const Level& level, uint32_t code) {
  const uint64_t nan = 0x7FF8000000000000u;
  const double y = (double)level.minimum + (double)code * (double)level.step;
  memcpy(out, &y, 8);
  if (level.minimum != level.minimum) memcpy(out, &nan, 8);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_any(const uint8_t* packed, const uint32_t* meta, Groups groups, int lanes, T* out) {
  const int64_t group = block_index() * (kThreads / lanes) + thread_index() / lanes;
  const Spot spot = spot_of(groups, group);
  if (spot.size == 0) return;
  const Level level = level_of(meta[group]);
  for (int e = thread_index() % lanes; e < spot.size; e += lanes)
    put(out + spot.position + e, level, unpacked_code(packed + spot.byte, spot.size, spot.bits, e));
}

// ---------------------------------------------------------------- launches

template <class T>
void dequantize_as(const uint8_t* codes, const uint32_t* meta, const Groups& groups, T* out, const Target& target) {
  if constexpr (sizeof(T) < 8) {
    if (even(groups) && aligned(out, 16) && aligned(codes, 16)) {
      const int64_t blocks = ceil_div(groups.at.n_groups, kThreads / Vec<T>::kLanes);
      if (groups.at.group == kDitherBlock)
        launch(dequantize_even<T, false>, blocks, 0, target, codes, meta, groups, out);
      else
        launch(dequantize_even<T, true>, blocks, 0, target, codes, meta, groups, out);
      return;
    }
  }
  const int lanes = lanes_for(groups.at.group);
  launch(dequantize_any<T>, ceil_div(groups.at.n_groups, kThreads / lanes), 0, target, codes, meta, groups, lanes, out);
}

}  // namespace

void dequantize(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, void* out,
                const Target& target) {
  if (cut.numel == 0) return;
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    dequantize_as(codes, meta, groups_of(cut), (T*)out, target);
  });
}

}  // namespace hf_actnn
