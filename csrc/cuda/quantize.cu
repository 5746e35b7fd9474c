// Values to codes.
//
// Even groups (all of the same size, a multiple of 32, at most 256: almost every tensor) stay in registers. A group
// belongs to 8 lanes in fp32 and to 4 in 16 bits; a lane reads eight vectors of 16 bytes, which interleave with those
// of its neighbours, and the elements it so holds are those that one call of the generator serves per four of a vector.
// Every other group goes through shared memory, element by element.
#include "groups.cuh"
#include "planes.cuh"

namespace hf_actnn {
namespace {

// The group whose dither a group has, and what its words are xored with: all ones where it mirrors another.
struct Drawn {
  int64_t group;
  uint32_t mirror;
};

template <bool RowsMirrored>
__device__ __forceinline__ Drawn drawn_for(const Layout& at, int64_t group) {
  if (!RowsMirrored) return Drawn{group, 0u};
  const int32_t mirror = -(int32_t)(quotient(group, at.rows_mirrored) >> 1 & 1);
  return Drawn{group - (2 * at.rows_mirrored & (int64_t)mirror), (uint32_t)mirror};
}

// What dither is drawn from.
struct Source {
  PhiloxKeys keys;
  uint64_t stream;
  const int64_t* advance;

  explicit Source(const Draw& draw) : keys(philox_keys(draw.seed)), stream(draw.stream), advance(draw.advance) {}
  __device__ __forceinline__ uint64_t sequence() const {
    return stream + (advance == nullptr ? 0 : (uint64_t)*advance);
  }
};

// ---------------------------------------------------------------- even groups

// Blocks of a multiprocessor with its 65,536 registers, 64 of them for each thread.
constexpr int kResident = 65536 / (64 * kThreads);

template <class T>
__device__ __forceinline__ Range range_of(const uint4 (&v)[kRuns], int runs) {
  if constexpr (sizeof(T) == 4) {
    Range range = no_range();
#pragma unroll
    for (int m = 0; m < kRuns; ++m)
      if (m < runs)
#pragma unroll
        for (int i = 0; i < 4; ++i) range.see(element(T{}, v[m], i));
    return range;
  } else {
    uint32_t lo = v[0].x, hi = v[0].x;
#pragma unroll
    for (int m = 0; m < kRuns; ++m)
      if (m < runs)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          lo = min2_nan(T{}, word_of(v[m], i), lo);
          hi = max2(T{}, word_of(v[m], i), hi);
        }
    return Range{min_nan(to_float(T{(uint16_t)lo}), to_float(T{(uint16_t)(lo >> 16)})),
                 max_of(to_float(T{(uint16_t)hi}), to_float(T{(uint16_t)(hi >> 16)}))};
  }
}

// 2^m + u for a byte of the dither, u = (byte + 1/2) / 256: with d * r added towards zero, the code is on top of the
// mantissa (docs/codec.md, "Codes"). With m = 7 the byte lies on a byte's border, which one instruction can do, and the
// code in bits 16 to 22. Codes of 8 bits take m = 8, and theirs is in bits 15 to 22.
template <bool Wide>
struct Dithered {
  static constexpr uint32_t kFirst = Wide ? 0x4440u : 0x7504u, kStep = Wide ? 0x1u : 0x10u;
  static __device__ __forceinline__ float above(uint32_t word, uint32_t select) {
    if (Wide) return float_of((__byte_perm(word, 0, select) << 7) + 0x43800040u);
    return float_of(__byte_perm(word, 0x43000080u, select));
  }
  // The code in bits 16 to 23.
  static __device__ __forceinline__ uint32_t code(float sum) { return Wide ? bits_of(sum) << 1 : bits_of(sum); }
};

// Codes of a lane's values, one a byte. Element 32 m + V lane + i takes the dither of run 2 m + V lane / 16 of sixteen.
template <class T, bool RowsMirrored, bool Wide, bool Scaled>
__device__ __forceinline__ void round_lane(const uint4 (&v)[kRuns], const GroupScale& s, int lane, const Drawn& drawn,
                                           const Source& source, Bytes<Vec<T>::kElements> (&codes)[kRuns]) {
  constexpr int V = Vec<T>::kElements, Calls = V / 4;
  using Dither = Dithered<Wide>;
  const uint64_t stream = source.sequence();
  uint32_t calls[Calls][4];
#pragma unroll
  for (int c = 0; c < Calls; ++c)
    philox((uint64_t)drawn.group * 4 + (uint64_t)(V * lane % 16 / 4 + c), stream, source.keys, calls[c]);
  const uint32_t first = Dither::kFirst + Dither::kStep * (uint32_t)(V * lane / 16);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t words[Calls][4];
#pragma unroll
    for (int c = 0; c < Calls; ++c)
#pragma unroll
      for (int w = 0; w < 4; ++w) words[c][w] = dither_word<RowsMirrored>(calls[c], w, k) ^ drawn.mirror;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = 2 * k + half;
      const uint32_t select = first + Dither::kStep * (uint32_t)(2 * half);
#pragma unroll
      for (int c = 0; c < Calls; ++c) {
        uint32_t sum[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float d = difference(element(T{}, v[m], 4 * c + i), s.minimum);
          if (Scaled) d *= s.scale;
          sum[i] = Dither::code(__fmaf_rz(d, s.reciprocal, Dither::above(words[c][i], select)));
        }
        codes[m].w[c] = __byte_perm(__byte_perm(sum[0], sum[1], 0x0062), __byte_perm(sum[2], sum[3], 0x0062), 0x5410);
      }
    }
  }
}

// Packs codes that lie one a byte in shared memory, in words, the lanes of the group in turns.
__device__ __forceinline__ void pack_staged(const uint32_t* codes, int runs, int bits, int lane, int lanes,
                                            uint32_t* out) {
  int shift = 0;
#pragma unroll
  for (int width = 8; width >= 1; width /= 2) {
    if ((bits & width) == 0) continue;
    const int words = runs * width;
    for (int i = lane; i < words; i += lanes) {
      uint32_t word = 0;
      for (int t = 0; t < 8 / width; ++t) word |= bytes_masked(codes[i + t * words] >> shift, width) << (width * t);
      out[i] = word;
    }
    shift += width;
    out += words;
  }
}

template <class T, bool Staged, bool RowsMirrored>
__global__ void __launch_bounds__(kThreads, kResident)
    quantize_even(const T* x, Groups groups, Source source, uint8_t* out, uint32_t* meta, int* exact) {
  constexpr int V = Vec<T>::kElements, Lanes = Vec<T>::kLanes;
  const int lane = thread_index() % Lanes;
  const int64_t wanted = block_index() * (kThreads / Lanes) + thread_index() / Lanes;
  const bool mine = wanted < groups.at.n_groups;
  const int64_t group = mine ? wanted : groups.at.n_groups - 1;  // all lanes take part in what the warp does together
  const int runs = Staged ? (int)groups.at.group / 32 : kRuns;
  const Drawn drawn = drawn_for<RowsMirrored>(groups.at, group);

  uint4 v[kRuns];
#pragma unroll
  for (int m = 0; m < kRuns; ++m)
    v[m] = m < runs ? load_vec(x, (group * runs + m) * Lanes + lane) : make_uint4(0, 0, 0, 0);

  const Range range = across(range_of<T>(v, runs), Lanes);
  const Sample sample = sample_of(groups, group);
  const GroupScale s = group_scale(range.lo, range.hi, range.lo != range.lo, sample.bits);
  if (mine && lane == 0) {
    meta[group] = (bits_of(s.minimum) >> 16) | (bits_of(s.step) & 0xFFFF0000u);
    if (exact != nullptr && s.step == -1.0f) atomicAdd(exact, 1);
  }

  uint8_t* const to = out + sample.byte + (group - sample.first) * (runs * 4 * sample.bits);
  Bytes<V> codes[kRuns];
  if (sizeof(T) == 4 || std::is_same<T, BFloat16>::value) {
    // No step of fp16 is that small.
    if (s.scale == kScaleUp)
      round_lane<T, RowsMirrored, true, true>(v, s, lane, drawn, source, codes);
    else if (sample.bits == 8)
      round_lane<T, RowsMirrored, true, false>(v, s, lane, drawn, source, codes);
    else
      round_lane<T, RowsMirrored, false, false>(v, s, lane, drawn, source, codes);
  } else if (sample.bits == 8) {
    round_lane<T, RowsMirrored, true, false>(v, s, lane, drawn, source, codes);
  } else {
    round_lane<T, RowsMirrored, false, false>(v, s, lane, drawn, source, codes);
  }
  if (s.minimum != s.minimum) {
#pragma unroll
    for (int m = 0; m < kRuns; ++m)
#pragma unroll
      for (int q = 0; q < V / 4; ++q) codes[m].w[q] = 0;
  }

  if constexpr (Staged) {
    uint8_t* const staged = (uint8_t*)shared_memory() + thread_index() / Lanes * (32 * runs);
#pragma unroll
    for (int m = 0; m < kRuns; ++m)
      if (m < runs) store_bytes<V>(staged + 32 * m + V * lane, codes[m]);
    __syncwarp();
    if (mine) pack_staged((const uint32_t*)staged, runs, sample.bits, lane, Lanes, (uint32_t*)to);
  } else if (mine) {
    with_bits(sample.bits, [&](auto bits) { pack_runs<decltype(bits)::value, V>(codes, lane, to); });
  }
}

// ---------------------------------------------------------------- any group

// Shared memory of one group: its values, the generator's calls for each of its blocks, its codes.
struct Scratch {
  int64_t values, calls, codes;  // bytes
  int64_t total() const { return values + calls + codes; }
};

inline Scratch scratch_of(const Layout& at) {
  const int64_t padded = ceil_div(at.group, 16) * 16;
  return {padded * 4, at.blocks * 64, padded};
}

// The byte of element e, from the words of its block's four calls.
template <bool RowsMirrored>
__device__ __forceinline__ uint8_t dither_byte(const uint32_t* calls, int e, uint32_t mirror) {
  const uint32_t* call = calls + e / kDitherBlock * 16 + e % 16 / 4 * 4;
  const uint32_t word = dither_word<RowsMirrored>(call, e % 4, e / kDitherRun % 4) ^ mirror;
  return (uint8_t)(word >> (8 * (e / 16 % 4)));
}

template <class T, bool RowsMirrored>
__global__ void __launch_bounds__(kThreads)
    quantize_any(const T* x, Groups groups, Source source, int lanes, int in_block, Scratch scratch, uint8_t* out,
                 uint32_t* meta, int* exact) {
  const int slot = thread_index() / lanes, lane = thread_index() % lanes;
  const int64_t group = slot < in_block ? block_index() * in_block + slot : groups.at.n_groups;
  const Spot spot = spot_of(groups, group);
  char* const mine = shared_memory() + (slot < in_block ? slot : 0) * (scratch.values + scratch.calls + scratch.codes);
  float* const values = (float*)mine;
  uint32_t* const calls = (uint32_t*)(mine + scratch.values);
  uint8_t* const codes = (uint8_t*)(mine + scratch.values + scratch.calls);

  Range range = no_range();
#pragma unroll 4
  for (int e = lane; e < spot.size; e += lanes) {
    const float value = to_float(x[spot.position + e]);
    values[e] = value;
    range.see(value);
  }
  const uint64_t stream = source.sequence();
  const Drawn drawn = drawn_for<RowsMirrored>(groups.at, group);
  const int full = spot.size / kDitherBlock * 4, rest = spot.size % kDitherBlock;
  const int n_calls = full + (rest < 16 ? (rest + 3) / 4 : 4);  // a block of few elements needs not all four
  for (int c = lane; c < n_calls; c += lanes)
    philox((uint64_t)(drawn.group * groups.at.blocks) * 4 + (uint64_t)c, stream, source.keys, calls + 4 * c);

  range = across(range, lanes);
  const GroupScale s = group_scale(range.lo, range.hi, range.lo != range.lo, spot.bits);
  if (spot.size != 0 && lane == 0) {
    meta[group] = (bits_of(s.minimum) >> 16) | (bits_of(s.step) & 0xFFFF0000u);
    if (exact != nullptr && s.step == -1.0f) atomicAdd(exact, 1);
  }
  __syncwarp();  // calls
  for (int e = lane; e < spot.size; e += lanes) {
    const float d = difference(values[e], s.minimum) * s.scale;
    const float above = float_of(((uint32_t)dither_byte<RowsMirrored>(calls, e, drawn.mirror) << 7) +
                                 0x43800040u);  // as in Dithered<true>
    const uint32_t code = bits_of(__fmaf_rz(d, s.reciprocal, above)) >> 15 & 0xFFu;
    codes[e] = (uint8_t)(s.reciprocal == 0.0f ? 0u : code);
  }
  __syncwarp();  // codes
  uint8_t* to = out + spot.byte;
  int shift = 0;
  for (int width = 8; width >= 1; width /= 2) {
    if ((spot.bits & width) == 0) continue;
    const int bytes = (spot.size * width + 7) / 8;
    for (int i = lane; i < bytes; i += lanes) to[i] = packed_byte(codes, spot.size, width, shift, i);
    to += bytes;
    shift += width;
  }
}

// ---------------------------------------------------------------- launches

template <class T, bool RowsMirrored>
void quantize_as(const T* x, const Groups& groups, const Draw& draw, uint8_t* codes, uint32_t* meta, int* exact,
                 const Target& target) {
  if constexpr (sizeof(T) < 8) {
    constexpr int in_block = kThreads / Vec<T>::kLanes;
    if (even(groups) && aligned(x, 16) && aligned(codes, 16)) {
      const int64_t blocks = ceil_div(groups.at.n_groups, in_block);
      if (groups.at.group == kDitherBlock)
        launch(quantize_even<T, false, RowsMirrored>, blocks, 0, target, x, groups, Source(draw), codes, meta, exact);
      else
        launch(quantize_even<T, true, RowsMirrored>, blocks, in_block * groups.at.group, target, x, groups,
               Source(draw), codes, meta, exact);
      return;
    }
  }
  const int lanes = lanes_for(groups.at.group);
  const Scratch scratch = scratch_of(groups.at);
  const int64_t room = kSharedBytes / scratch.total();
  const int in_block = (int)(room < kThreads / lanes ? room : kThreads / lanes);
  launch(quantize_any<T, RowsMirrored>, ceil_div(groups.at.n_groups, in_block), in_block * scratch.total(), target, x,
         groups, Source(draw), lanes, in_block, scratch, codes, meta, exact);
}

}  // namespace

void quantize(const void* x, int dtype, const Cut& cut, const Draw& draw, uint8_t* codes, uint32_t* meta, int* exact,
              const Target& target) {
  if (cut.numel == 0) return;
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    const Groups groups = groups_of(cut);
    if (groups.at.rows_mirrored != 0)
      quantize_as<T, true>((const T*)x, groups, draw, codes, meta, exact, target);
    else
      quantize_as<T, false>((const T*)x, groups, draw, codes, meta, exact, target);
  });
}

}  // namespace hf_actnn
