// The vector operations of the kernels in plain C++: sixteen lanes, in loops that compilers vectorise for whatever the
// target has.
#pragma once

#include "kernels.h"

namespace hf_actnn {
namespace {

struct Simd {
  static constexpr int W = 16;       // floats of a vector
  static constexpr int kBytes = 64;  // bytes of a byte vector: the codes of four vectors

  struct F {
    float v[W];
  };
  struct B {
    uint8_t v[kBytes];
  };
  struct I {
    uint32_t v[W];
  };
  struct TowardZero {
    TowardZero() {}
  };

#define HF_ACTNN_LANES(expression)                   \
  F r;                                               \
  for (int i = 0; i < W; ++i) r.v[i] = (expression); \
  return r

  static F load(const float* p) { HF_ACTNN_LANES(p[i]); }
  static F set1(float x) { HF_ACTNN_LANES(x); }
  static F add(F a, F b) { HF_ACTNN_LANES(a.v[i] + b.v[i]); }
  static F sub(F a, F b) { HF_ACTNN_LANES(a.v[i] - b.v[i]); }
  static F difference(F x, F minimum) { HF_ACTNN_LANES(hf_actnn::difference(x.v[i], minimum.v[i])); }
  static F mul(F a, F b) { HF_ACTNN_LANES(a.v[i] * b.v[i]); }
  static F min(F a, F b) { HF_ACTNN_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
  static F max(F a, F b) { HF_ACTNN_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
  static F from_codes(const uint8_t* p) { HF_ACTNN_LANES((float)p[i]); }
#undef HF_ACTNN_LANES

  static void store(float* p, F a) { memcpy(p, a.v, sizeof a.v); }

  struct NanSeen {
    uint32_t any = 0;
    void add(F a, F b) {
      for (int i = 0; i < W; ++i) any |= (uint32_t)(a.v[i] != a.v[i]) | (uint32_t)(b.v[i] != b.v[i]);
    }
    bool seen() const { return any != 0; }
  };

  static float hmin(F a) {
    float r = a.v[0];
    for (int i = 1; i < W; ++i) r = a.v[i] < r ? a.v[i] : r;
    return r;
  }
  static float hmax(F a) {
    float r = a.v[0];
    for (int i = 1; i < W; ++i) r = a.v[i] > r ? a.v[i] : r;
    return r;
  }

  // As in simd_avx512.h.
  template <class T, int Bits>
  struct Levels {
    const T* table;
    explicit Levels(const T* values) : table(values) {}
    template <int J, bool Streaming>
    void write(const uint8_t* p, T* out) const {
      for (int i = 0; i < 16; ++i) out[i] = table[p[i] >> (J * Bits) & ((1 << Bits) - 1)];
    }
  };

  // As in simd_avx512.h.
  template <int M>
  static I round(F d, F r, const uint32_t* words, int k) {
    I codes;
    for (int i = 0; i < W; ++i)
      codes.v[i] = (uint32_t)round_at_random(d.v[i], r.v[i], (uint8_t)(words[i] >> 8 * k)) << (23 - M);
    return codes;
  }
  static I no_codes() { return I{}; }
  template <int Bit>
  static I select(I below, I rest) {
    constexpr uint32_t mask = (1u << Bit) - 1;
    for (int i = 0; i < W; ++i) rest.v[i] = (below.v[i] & mask) | (rest.v[i] & ~mask);
    return rest;
  }
  template <int Bit>
  static I join(I below, I rest) {
    return select<Bit>(below, rest);
  }
  static B narrow(I a, I b, I c, I d) {
    const I parts[4] = {a, b, c, d};
    B bytes;
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < W; ++i) bytes.v[j * W + i] = (uint8_t)(parts[j].v[i] >> 15);
    return bytes;
  }

  template <int P>
  static void compare4(F a, F b, F c, F d, F lo, F hi, uint8_t* out) {
    const F x[4] = {a, b, c, d};
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < W; ++i) {
        const float v = x[j].v[i], l = lo.v[i], h = hi.v[i];
        bool r;
        if (P == kNotLe) r = !(v <= l);
        if (P == kGt) r = v > l;
        if (P == kInside) r = !(v <= l || v >= h);
        if (P == kStrictInside) r = v > l && v < h;
        if (P == kNonzero) r = v != 0.0f;
        out[j * W + i] = r;
      }
  }

  template <int Bit>
  static F choose(const uint8_t* p, F on, F off) {
    F r;
    for (int i = 0; i < W; ++i) r.v[i] = (p[i] >> Bit & 1) != 0 ? on.v[i] : off.v[i];
    return r;
  }

  static B load_bytes(const uint8_t* p) {
    B r;
    memcpy(r.v, p, kBytes);
    return r;
  }
  static void store_bytes(uint8_t* p, B a) { memcpy(p, a.v, kBytes); }
  static B load_bytes_of(const uint8_t* p, int64_t n) {
    uint8_t bytes[kBytes];
    memcpy(bytes, p, (size_t)n);
    return load_bytes(bytes);
  }
  static void store_bytes_of(uint8_t* p, int64_t n, B a) {
    uint8_t bytes[kBytes];
    store_bytes(bytes, a);
    memcpy(p, bytes, (size_t)n);
  }
  static B zero_bytes() { return B{}; }
  static B or_(B a, B b) {
    for (int i = 0; i < kBytes; ++i) a.v[i] |= b.v[i];
    return a;
  }
  static B and_(B a, int m) {
    for (int i = 0; i < kBytes; ++i) a.v[i] &= (uint8_t)m;
    return a;
  }
  // Bits that cross from byte to byte in the vector variants are masked by the callers.
  template <int N>
  static B left(B a) {
    for (int i = 0; i < kBytes; ++i) a.v[i] = (uint8_t)(a.v[i] << N);
    return a;
  }
  template <int N>
  static B right(B a) {
    for (int i = 0; i < kBytes; ++i) a.v[i] = (uint8_t)(a.v[i] >> N);
    return a;
  }

  static F load_bf16(const uint16_t* p) {
    F r;
    for (int i = 0; i < W; ++i) r.v[i] = bf16_to_float(p[i]);
    return r;
  }
  static F load_half(const uint16_t* p) {
    F r;
    for (int i = 0; i < W; ++i) r.v[i] = half_to_float(p[i]);
    return r;
  }
  static void store_bf16(uint16_t* p, F a) {
    for (int i = 0; i < W; ++i) p[i] = float_to_bf16(a.v[i]);
  }
  static void store_half(uint16_t* p, F a) {
    for (int i = 0; i < W; ++i) p[i] = float_to_finite_half(a.v[i]);
  }

  // Copies whole 64-byte lines to an aligned address.
  static void stream_lines(void* out, const void* in, int64_t lines) { memcpy(out, in, (size_t)lines * 64); }
  static void stream_done() {}

  // Dither of so many blocks of 256 elements: for each four runs of sixteen words, four of each call.
  template <bool RowsMirrored>
  static void dither_blocks(DitherBlocks blocks, int64_t count, uint64_t seed, uint64_t stream, uint32_t* out) {
    const PhiloxKeys keys = philox_keys(seed);
    for (int64_t block = 0; block < count; ++block, out += kDitherBlock / 4) {
      const uint64_t q = blocks.next<1>();
      for (int i = 0; i < 4; ++i) {
        uint32_t call[4];
        philox(q + (uint64_t)i, stream, keys, call);
        for (int k = 0; k < 4; ++k)
          for (int w = 0; w < 4; ++w) out[16 * k + 4 * i + w] = dither_word<RowsMirrored>(call, w, k);
      }
    }
  }
};

}  // namespace
}  // namespace hf_actnn
