// The vector operations of the kernels in plain C++: sixteen lanes, in loops that compilers vectorise for whatever the
// target has.
#pragma once

#include "../codec.h"

namespace hf_actnn {
namespace {

struct Simd {
  static constexpr int W = 16;       // floats of a vector
  static constexpr int kBytes = 16;  // bytes of a byte vector

  struct F {
    float v[W];
  };
  struct B {
    uint8_t v[kBytes];
  };

#define HF_ACTNN_LANES(expression)                   \
  F r;                                               \
  for (int i = 0; i < W; ++i) r.v[i] = (expression); \
  return r

  static F load(const float* p) { HF_ACTNN_LANES(p[i]); }
  static F set1(float x) { HF_ACTNN_LANES(x); }
  static F add(F a, F b) { HF_ACTNN_LANES(a.v[i] + b.v[i]); }
  static F sub(F a, F b) { HF_ACTNN_LANES(a.v[i] - b.v[i]); }
  static F mul(F a, F b) { HF_ACTNN_LANES(a.v[i] * b.v[i]); }
  static F min(F a, F b) { HF_ACTNN_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
  static F max(F a, F b) { HF_ACTNN_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
  static F dither(const uint8_t* p) { HF_ACTNN_LANES(dither_of(p[i])); }
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

  // Truncates values in [0, 2^15) to bytes of at most top.
  static void to_codes(F a, int top, uint8_t* out) {
    for (int i = 0; i < W; ++i) {
      // The lanes beyond a short group hold anything; converting that to int would be undefined.
      const float y = a.v[i] < 1e3f ? a.v[i] : 1e3f;
      const int code = y > 0.0f ? (int)y : 0;
      out[i] = (uint8_t)(code < top ? code : top);
    }
  }
  static void to_codes4(F a, F b, F c, F d, int top, uint8_t* out) {
    to_codes(a, top, out);
    to_codes(b, top, out + W);
    to_codes(c, top, out + 2 * W);
    to_codes(d, top, out + 3 * W);
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
    for (int i = 0; i < W; ++i) p[i] = float_to_half(a.v[i]);
  }

  // Copies whole 64-byte lines to an aligned address.
  static void stream_lines(void* out, const void* in, int64_t lines) { memcpy(out, in, (size_t)lines * 64); }
  static void stream_done() {}

  // The 256 dither bytes of each superblock: sixteen calls side by side, word by word.
  static void philox_blocks(uint64_t block, int64_t count, uint64_t seed, uint64_t stream, uint8_t* out) {
    for (int64_t n = 0; n < count; ++n, out += 256) {
      uint32_t words[4][16];
      for (int call = 0; call < 16; ++call) {
        uint32_t w[4];
        philox((block + (uint64_t)n) * 16 + (uint64_t)call, stream, seed, w);
        for (int k = 0; k < 4; ++k) words[k][call] = w[k];
      }
      memcpy(out, words, 256);
    }
  }
};

}  // namespace
}  // namespace hf_actnn
