// The codec's arithmetic, one group and one value at a time, for host and device.
//
// hf_actnn/codec/reference.py defines it and docs/codec.md explains it; every kernel must give the same bytes. Compile
// with floating-point contraction off (-ffp-contract=off, nvcc: -fmad=false): a fused multiply-add rounds once where
// the definition rounds twice.
//
// Everything is static: the CPU kernels compile this header several times for different instruction sets, and a linker
// that merged the copies could hand AVX-512 code to a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define HF_ACTNN_HD static __host__ __device__ __forceinline__
#else
#define HF_ACTNN_HD static inline
#endif
// Where a device's instructions are at hand, or a stand-in for them (tests/cuda/shim.h).
#if defined(__CUDA_ARCH__) || defined(HF_ACTNN_SHIM)
#define HF_ACTNN_DEVICE 1
#endif

namespace hf_actnn {

// As hf_actnn/codec/ops.py numbers them.
enum Dtype : int { kFloat32, kFloat16, kBFloat16, kFloat64, kBool, kUInt8, kInt32, kInt64 };
enum Predicate : int { kNotLe, kGt, kInside, kStrictInside, kNonzero };
enum Function : int { kGelu, kGeluTanh, kSilu };

constexpr int kMaxGroup = 4096;
constexpr int kMaskGroup = 256;
constexpr int kDitherBlock = 256;     // elements that four generator calls serve
constexpr int64_t kImageFrom = 4096;  // rows of so many values are taken for images, shorter ones for tokens
constexpr int kDitherRun = 64;        // of them, those that take one run of words: dither_word's k
constexpr int kRounds = 10;
constexpr float kExactFrom = 0x1p126f;
constexpr float kSmallStep = 0x1p-64f;
constexpr float kScaleUp = 0x1p64f;

HF_ACTNN_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

HF_ACTNN_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

HF_ACTNN_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------- where things lie

// Widths of the planes that make up a code, lowest bits first; 0 ends the list.
struct Planes {
  int width[4];
};

HF_ACTNN_HD Planes planes_of(int bits) {
  Planes p = {{0, 0, 0, 0}};
  int n = 0;
  for (int width = 8; width >= 1; width /= 2)
    if (bits & width) p.width[n++] = width;
  return p;
}

HF_ACTNN_HD int64_t group_bytes(int64_t group, int bits) {
  int64_t total = 0;
  for (int width = 8; width >= 1; width /= 2)
    if (bits & width) total += ceil_div(group * width, 8);
  return total;
}

// Sizes in elements or bytes; the last group of every row may be shorter than the others.
struct Layout {
  int64_t row_length;
  int64_t groups_per_row;
  int64_t group, tail;
  int64_t group_bytes, tail_bytes, row_bytes;
  int64_t n_groups;
  int64_t blocks;         // of dither, per group
  int64_t rows_mirrored;  // groups of a row where rows mirror each other, 0 where elements of a row do
};

HF_ACTNN_HD Layout make_layout(int64_t numel, int64_t row_length, int64_t group_size, int bits) {
  Layout at;
  at.row_length = row_length;
  at.group = ceil_div(row_length, ceil_div(row_length, group_size));
  at.groups_per_row = ceil_div(row_length, at.group);
  at.tail = row_length - (at.groups_per_row - 1) * at.group;
  at.group_bytes = group_bytes(at.group, bits);
  at.tail_bytes = group_bytes(at.tail, bits);
  at.row_bytes = (at.groups_per_row - 1) * at.group_bytes + at.tail_bytes;
  at.n_groups = numel / row_length * at.groups_per_row;
  at.blocks = ceil_div(at.group, kDitherBlock);
  at.rows_mirrored = row_length < kImageFrom ? at.groups_per_row : 0;
  return at;
}

// ---------------------------------------------------------------- a group's minimum and step

// Both directions of rounding to bf16 leave the result as fp32; the upward one is for non-negative values only.
HF_ACTNN_HD float bf16_down(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t bump = ((bits & 0xFFFFu) != 0 && (bits >> 31) != 0) ? 0x10000u : 0u;
  return float_of((bits & 0xFFFF0000u) + bump);
}

HF_ACTNN_HD float bf16_up(float x) {
  const uint32_t bits = bits_of(x);
  return float_of((bits & 0xFFFF0000u) + ((bits & 0xFFFFu) != 0 ? 0x10000u : 0u));
}

// What rounding a group's values needs. scale * reciprocal is 1 / step; both are 0 where every code is 0.
struct GroupScale {
  float minimum,
      step;  // exactly as bf16 holds them; (nan, nan) with nan or inf inside, (nan, -1) for a group kept exact
  float scale, reciprocal;
};

// A choice by bits: gcc makes branches of the conditional operator here, and then vectorises no loop over groups.
HF_ACTNN_HD float either(bool first, float a, float b) {
  const uint32_t mask = 0u - (uint32_t)first;
  return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

HF_ACTNN_HD GroupScale group_scale(float lo, float hi, bool has_nan, int bits) {
  const float nan = float_of(0x7FC00000u), inf = float_of(0x7F800000u);
  const bool broken = has_nan | (hi == inf) | (lo == -inf);
  const bool exact = (!broken) & ((hi >= kExactFrom) | (lo <= -kExactFrom));
  const bool bad = broken | exact;
  const float top = (float)((1 << bits) - 1);
  const float minimum = bf16_down(lo) + 0.0f;  // -0 becomes +0: its sign would depend on the order of the reduction
  const float span = hi - minimum + 0.0f;
  // A subnormal quotient would lose bits, even become 0: small ones are taken scaled up, and rounded upwards by hand.
  const bool small = span < kSmallStep;
  const float quotient = span * either(small, kScaleUp, 1.0f) / top;
  const float nearest = quotient * either(small, kSmallStep, 1.0f);
  const bool below = small & (nearest * kScaleUp < quotient);
  const float step = bf16_up(float_of(bits_of(nearest) + (uint32_t)below));
  const bool tiny = step < kSmallStep;
  const bool zero = bad | (step == 0.0f);
  const float scale = either(tiny, kScaleUp, 1.0f);
  GroupScale s;
  s.minimum = either(bad, nan, minimum);
  s.step = either(broken, nan, either(exact, -1.0f, step));
  s.scale = either(zero, 0.0f, scale);
  s.reciprocal = either(zero, 0.0f, 1.0f / either(zero, 1.0f, step * scale));
  return s;
}

// maximum - minimum; 0 for a group whose values no step serves.
HF_ACTNN_HD float group_range(float lo, float hi, bool has_nan) {
  const bool coded = (!has_nan) & (lo > -kExactFrom) & (hi < kExactFrom);
  return either(coded, hi - lo, 0.0f);
}

// ---------------------------------------------------------------- dither

// The keys of all rounds of a seed: the same for every call of the generator.
struct PhiloxKeys {
  uint32_t k0[kRounds], k1[kRounds];
};

HF_ACTNN_HD PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  for (int round = 0; round < kRounds; ++round) {
    keys.k0[round] = (uint32_t)seed + (uint32_t)round * 0x9E3779B9u;
    keys.k1[round] = (uint32_t)(seed >> 32) + (uint32_t)round * 0xBB67AE85u;
  }
  return keys;
}

// Philox4x32-10 (Salmon et al., SC 2011): counter (q, stream).
HF_ACTNN_HD void philox(uint64_t q, uint64_t stream, const PhiloxKeys& keys, uint32_t out[4]) {
  uint32_t c0 = (uint32_t)q, c1 = (uint32_t)(q >> 32), c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ keys.k0[round];
    c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ keys.k1[round];
    c3 = (uint32_t)a;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// Word w of the four whose bytes are the dither of elements 4 c + w of a call's run k, k from 0 to 3: where rows mirror
// each other the call's own words, from run 1 on xor the words that stand there when the call's sixteen bytes are
// turned by k. Where elements do, runs 0 and 1 have two of the call's words each, runs 2 and 3 have them xor the words
// turned by one, and words 2 and 3 mirror words 0 and 1. Two bytes that are no mirror images are never functions of one
// another: docs/codec.md, "Dither".
template <bool RowsMirrored>
HF_ACTNN_HD uint32_t dither_word(const uint32_t call[4], int w, int k) {
  const int from = RowsMirrored ? w : 2 * (k % 2) + w % 2, turn = RowsMirrored ? k : k / 2;
  const uint32_t a = call[from];
  const uint32_t word = turn == 0 ? a : a ^ (a >> 8 * turn | call[(from + 1) % 4] << (32 - 8 * turn));
  return RowsMirrored || w < 2 ? word : ~word;
}

// ---------------------------------------------------------------- one value

// x - minimum towards zero, for x no less than the minimum: to nearest, then one down where the exact remainder
// (Knuth's two-sum) says that this went up.
HF_ACTNN_HD float difference(float x, float minimum) {
#if defined(HF_ACTNN_DEVICE)
  return __fsub_rz(x, minimum);
#else
  const float d = x - minimum, back = d - x;
  const float rest = (x - (d - back)) + (-minimum - back);
  return float_of(bits_of(d) - (rest < 0.0f ? 1u : 0u));
#endif
}

// floor(d * r + u) without rounding on the way, u = (byte + 1/2) / 256: the product of two floats is exact in double,
// and so are the sides of the comparison. The largest result is the largest code: see docs/codec.md.
HF_ACTNN_HD int round_at_random(float d, float r, uint8_t byte) {
  const double t = (double)d * (double)r;
  const int below = (int)t;
  return below + (t - below >= 1.0 - ((double)byte + 0.5) * 0x1p-8 ? 1 : 0);
}

HF_ACTNN_HD float dequantize_value(int code, float minimum, float step) { return minimum + (float)code * step; }

// ---------------------------------------------------------------- a mask's bit

template <int P, class T>
HF_ACTNN_HD bool holds(T x, T lo, T hi) {
  if (P == kNotLe) return !(x <= lo);
  if (P == kGt) return x > lo;
  if (P == kInside) return !(x <= lo || x >= hi);
  if (P == kStrictInside) return x > lo && x < hi;
  return x != 0;
}

// ---------------------------------------------------------------- 64-bit floats

// A finite double beyond fp32 becomes the largest float, not inf: its group is kept exact, not declared broken.
HF_ACTNN_HD float double_to_float(double v) {
  const double most = (double)float_of(0x7F7FFFFFu);
  const bool finite = v - v == 0.0;
  return (float)(finite && v > most ? most : finite && v < -most ? -most : v);
}

// ---------------------------------------------------------------- 16-bit floats, to nearest even

HF_ACTNN_HD float bf16_to_float(uint16_t x) { return float_of((uint32_t)x << 16); }

HF_ACTNN_HD uint16_t float_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7FC0;
  return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

HF_ACTNN_HD float half_to_float(uint16_t x) {
  const uint32_t sign = (uint32_t)(x & 0x8000u) << 16, exponent = (x >> 10) & 31u, mantissa = x & 0x3FFu;
  if (exponent == 31u) return float_of(sign | 0x7F800000u | (mantissa << 13) | (mantissa != 0 ? 0x400000u : 0u));
  if (exponent == 0u) return float_of(sign | bits_of((float)mantissa * 0x1p-24f));
  return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

HF_ACTNN_HD uint16_t float_to_half(float x) {
  if (x != x) return 0x7E00;
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  uint32_t bits = bits_of(x) & 0x7FFFFFFFu;
  if (bits >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);  // half-way to the power of two that half has not
  if (bits < 0x38800000u) {  // a subnormal half: adding 1/2 leaves the rounded multiple of 2^-24 in the lowest bits
    return (uint16_t)(sign | (bits_of(float_of(bits) + 0.5f) - 0x3F000000u));
  }
  bits += 0xFFFu + ((bits >> 13) & 1u);
  return (uint16_t)(sign | ((bits - 0x38000000u) >> 13));
}

// Saturates at the largest finite half: dequantised values may lie a rounding beyond the largest input.
HF_ACTNN_HD uint16_t float_to_finite_half(float x) {
  const uint16_t half = float_to_half(x);
  return (uint16_t)(half - ((half & 0x7FFFu) == 0x7C00u ? 1 : 0));
}

// ---------------------------------------------------------------- dtypes

HF_ACTNN_HD int64_t item_size(int dtype) {
  return dtype == kFloat64 || dtype == kInt64   ? 8
         : dtype == kFloat32 || dtype == kInt32 ? 4
         : dtype <= kBFloat16                   ? 2
                                                : 1;
}

// The bits that hold a value in a dtype, for what a mask's bit stands for. Infinities stay what they are, and nan has
// one pattern, float's own.
HF_ACTNN_HD uint64_t pattern(double value, int dtype) {
  uint64_t bits;
  if (value != value) value = (double)float_of(0x7FC00000u);
  if (dtype == kFloat64)
    memcpy(&bits, &value, 8);
  else if (dtype == kFloat32)
    bits = bits_of((float)value);
  else if (dtype == kFloat16)
    bits = float_to_half((float)value);
  else if (dtype == kBFloat16)
    bits = float_to_bf16((float)value);
  else if (dtype == kBool)
    bits = value != 0.0;
  else
    bits = (uint8_t)(int64_t)value;
  return bits;
}

}  // namespace hf_actnn
