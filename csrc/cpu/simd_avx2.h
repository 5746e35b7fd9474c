// The vector operations of the kernels with AVX2, FMA and F16C: eight floats, 32 bytes.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace hf_actnn {
namespace {

struct Simd {
  static constexpr int W = 8;
  static constexpr int kBytes = 32;
  using F = __m256;
  using B = __m256i;
  using I = __m256i;
  class TowardZero {
   public:
    TowardZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_ROUND_TOWARD_ZERO); }
    ~TowardZero() { _mm_setcsr(saved_); }

   private:
    unsigned saved_;
  };

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F difference(F x, F minimum) { return sub(x, minimum); }  // under TowardZero
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }

  static float quarter_min(__m128 a) {
    a = _mm_min_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_min_ss(a, _mm_movehdup_ps(a)));
  }
  static float quarter_max(__m128 a) {
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
  }
  static float hmin(F a) { return quarter_min(_mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1))); }
  static float hmax(F a) { return quarter_max(_mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1))); }

  struct NanSeen {
    __m256 any = _mm256_setzero_ps();
    void add(F a, F b) { any = _mm256_or_ps(any, _mm256_cmp_ps(a, b, _CMP_UNORD_Q)); }
    bool seen() const { return _mm256_movemask_ps(any) != 0; }
  };

  static F from_codes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  // As in simd_avx512.h.
  template <class T, int Bits>
  struct Levels;
  template <int Bits>
  struct Levels<float, Bits> {
    __m256 low, high;
    explicit Levels(const float* values) : low(_mm256_loadu_ps(values)), high(_mm256_loadu_ps(values + 8)) {}
    template <int J, bool Streaming>
    void write(const uint8_t* p, float* out) const {
      for (int half = 0; half < 16; half += 8) {
        const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + half)));
        const __m256i codes = _mm256_srli_epi32(bytes, J * Bits);
        __m256 values = _mm256_permutevar8x32_ps(low, codes);
        if constexpr (Bits == 4)
          values = _mm256_blendv_ps(values, _mm256_permutevar8x32_ps(high, codes),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
        Streaming ? _mm256_stream_ps(out + half, values) : _mm256_storeu_ps(out + half, values);
      }
    }
  };
  template <int Bits>
  struct Levels<uint16_t, Bits> {
    __m128i low, high;  // bytes of the values
    explicit Levels(const uint16_t* values) {
      const __m128i a = _mm_loadu_si128((const __m128i*)values), b = _mm_loadu_si128((const __m128i*)(values + 8));
      const __m128i mask = _mm_set1_epi16(0xFF);
      low = _mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask));
      high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    }
    template <int J, bool Streaming>
    void write(const uint8_t* p, uint16_t* out) const {
      const __m128i bytes = _mm_srli_epi16(_mm_loadu_si128((const __m128i*)p), J * Bits);
      const __m128i codes = _mm_and_si128(bytes, _mm_set1_epi8((1 << Bits) - 1));
      const __m128i a = _mm_shuffle_epi8(low, codes), b = _mm_shuffle_epi8(high, codes);
      const __m128i first = _mm_unpacklo_epi8(a, b), second = _mm_unpackhi_epi8(a, b);
      if (Streaming) {
        _mm_stream_si128((__m128i*)out, first);
        _mm_stream_si128((__m128i*)(out + 8), second);
      } else {
        _mm_storeu_si128((__m128i*)out, first);
        _mm_storeu_si128((__m128i*)(out + 8), second);
      }
    }
  };
  // As in simd_avx512.h, under TowardZero.
  template <int M>
  static I round(F d, F r, const uint32_t* words, int k) {
    constexpr int at = 15 - M;
    alignas(16) static constexpr int8_t pick[4][16] = {{-1, 0, -1, -1, -1, 4, -1, -1, -1, 8, -1, -1, -1, 12, -1, -1},
                                                       {-1, 1, -1, -1, -1, 5, -1, -1, -1, 9, -1, -1, -1, 13, -1, -1},
                                                       {-1, 2, -1, -1, -1, 6, -1, -1, -1, 10, -1, -1, -1, 14, -1, -1},
                                                       {-1, 3, -1, -1, -1, 7, -1, -1, -1, 11, -1, -1, -1, 15, -1, -1}};
    const __m256i which = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)pick[k]));
    const __m256i byte = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)words), which);  // at bit 8
    __m256i moved;
    if constexpr (at < 8)
      moved = _mm256_srli_epi32(byte, 8 - at);
    else
      moved = _mm256_slli_epi32(byte, at - 8);
    const __m256i u = _mm256_or_si256(moved, _mm256_set1_epi32((127 + M) << 23 | 1 << (at - 1)));
    return _mm256_castps_si256(_mm256_fmadd_ps(d, r, _mm256_castsi256_ps(u)));
  }
  static I no_codes() { return _mm256_setzero_si256(); }
  template <int Bit>
  static I select(I below, I rest) {
    const I mask = _mm256_set1_epi32((1 << Bit) - 1);
    return _mm256_or_si256(_mm256_and_si256(mask, below), _mm256_andnot_si256(mask, rest));
  }
  template <int Bit>
  static I join(I below, I rest) {
    return _mm256_or_si256(below, _mm256_andnot_si256(_mm256_set1_epi32((1 << Bit) - 1), rest));
  }
  static B narrow(I a, I b, I c, I d) {
    const I ab = select<8>(_mm256_srli_epi32(a, 15), _mm256_srli_epi32(b, 7));
    const I cd = select<24>(_mm256_slli_epi32(c, 1), _mm256_slli_epi32(d, 9));
    const __m128i bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const I halves = _mm256_shuffle_epi8(_mm256_blend_epi16(ab, cd, 0xAA), _mm256_broadcastsi128_si256(bytes));
    return _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }

  // Packing works within 128-bit lanes; the permutation puts the dwords back in order.
  static B join(__m256i a, __m256i b, __m256i c, __m256i d) {
    const B packed = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  template <int P>
  static __m256i test(F x, F lo, F hi) {
    __m256 r;
    if (P == kNotLe) r = _mm256_cmp_ps(x, lo, _CMP_NLE_UQ);
    if (P == kGt) r = _mm256_cmp_ps(x, lo, _CMP_GT_OQ);
    if (P == kInside) r = _mm256_and_ps(_mm256_cmp_ps(x, lo, _CMP_NLE_UQ), _mm256_cmp_ps(x, hi, _CMP_NGE_UQ));
    if (P == kStrictInside) r = _mm256_and_ps(_mm256_cmp_ps(x, lo, _CMP_GT_OQ), _mm256_cmp_ps(x, hi, _CMP_LT_OQ));
    if (P == kNonzero) r = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    return _mm256_srli_epi32(_mm256_castps_si256(r), 31);
  }
  template <int P>
  static void compare4(F a, F b, F c, F d, F lo, F hi, uint8_t* out) {
    const B bytes = join(test<P>(a, lo, hi), test<P>(b, lo, hi), test<P>(c, lo, hi), test<P>(d, lo, hi));
    _mm256_storeu_si256((__m256i*)out, bytes);
  }

  // One of two values by bit Bit of eight bytes.
  template <int Bit>
  static F choose(const uint8_t* p, F on, F off) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    return _mm256_blendv_ps(off, on, _mm256_castsi256_ps(_mm256_slli_epi32(bytes, 31 - Bit)));
  }

  static B load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static void store_bytes(uint8_t* p, B a) { _mm256_storeu_si256((__m256i*)p, a); }
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
  static B zero_bytes() { return _mm256_setzero_si256(); }
  static B or_(B a, B b) { return _mm256_or_si256(a, b); }
  static B and_(B a, int m) { return _mm256_and_si256(a, _mm256_set1_epi8((char)m)); }
  template <int N>
  static B left(B a) {
    return _mm256_slli_epi16(a, N);
  }
  template <int N>
  static B right(B a) {
    return _mm256_srli_epi16(a, N);
  }

  static F load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  // The only nan a dequantised group holds has mantissa 0x400000, which the rounding below leaves alone.
  static void store_bf16(uint16_t* p, F a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i high = _mm256_srli_epi32(sum, 16);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128((__m128i*)p, words);
  }
  // The operand order lets nan through both bounds.
  static void store_half(uint16_t* p, F a) {
    a = _mm256_max_ps(_mm256_set1_ps(-65504.0f), _mm256_min_ps(_mm256_set1_ps(65504.0f), a));
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static void stream_lines(void* out, const void* in, int64_t lines) {
    for (int64_t i = 0; i < 2 * lines; ++i)
      _mm256_stream_si256((__m256i*)((char*)out + 32 * i),
                          _mm256_loadu_si256((const __m256i*)((const char*)in + 32 * i)));
  }
  static void stream_done() { _mm_sfence(); }

  // As in simd_avx512.h, a block a vector; up to three blocks more are written.
  template <bool RowsMirrored>
  static void dither_blocks(DitherBlocks blocks, int64_t count, uint64_t seed, uint64_t stream, uint32_t* out) {
    Keys keys;
    for (uint32_t r = 0; r < kRounds; ++r) {
      keys.k0[r] = _mm256_set1_epi64x((uint32_t)seed + r * 0x9E3779B9u);
      keys.k1[r] = _mm256_set1_epi64x((uint32_t)(seed >> 32) + r * 0xBB67AE85u);
    }
    for (int64_t n = 0; n < count; n += 4, out += 4 * kDitherBlock / 4) {
      Calls x(blocks.next<1>(), stream), y(blocks.next<1>(), stream);
      Calls z(blocks.next<1>(), stream), w(blocks.next<1>(), stream);
#pragma GCC unroll 10
      for (int r = 0; r < kRounds; ++r) {
        x.round(keys, r);
        y.round(keys, r);
        z.round(keys, r);
        w.round(keys, r);
      }
      x.template store<RowsMirrored>(out);
      y.template store<RowsMirrored>(out + kDitherBlock / 4);
      z.template store<RowsMirrored>(out + 2 * kDitherBlock / 4);
      w.template store<RowsMirrored>(out + 3 * kDitherBlock / 4);
    }
  }

 private:
  struct Keys {
    __m256i k0[kRounds], k1[kRounds];
  };
  struct Calls {
    __m256i c0, c1, c2, c3;
    Calls(uint64_t q, uint64_t stream) {
      c0 = _mm256_add_epi64(_mm256_set1_epi64x((long long)q), _mm256_setr_epi64x(0, 2, 1, 3));
      c1 = _mm256_srli_epi64(c0, 32);
      c2 = _mm256_set1_epi64x((uint32_t)stream);
      c3 = _mm256_set1_epi64x((long long)(stream >> 32));
    }
    void round(const Keys& keys, int r) {
      const __m256i p0 = _mm256_mul_epu32(c0, _mm256_set1_epi64x(0xD2511F53));
      const __m256i p1 = _mm256_mul_epu32(c2, _mm256_set1_epi64x(0xCD9E8D57));
      c0 = _mm256_xor_si256(high(p1), _mm256_xor_si256(c1, keys.k0[r]));
      c2 = _mm256_xor_si256(high(p0), _mm256_xor_si256(c3, keys.k1[r]));
      c1 = p1;
      c3 = p0;
    }
    template <bool RowsMirrored>
    void store(uint32_t* out) const {
      const __m256i a = merge(c0, c1), b = merge(c2, c3);
      store_half_block<RowsMirrored>(out, _mm256_unpacklo_epi64(a, b));
      store_half_block<RowsMirrored>(out + 8, _mm256_unpackhi_epi64(a, b));
    }
    template <bool RowsMirrored>
    static void store_half_block(uint32_t* out, __m256i words) {
      const __m256i turned = _mm256_xor_si256(words, _mm256_alignr_epi8(words, words, 1));
      if constexpr (RowsMirrored) {
        _mm256_storeu_si256((__m256i*)out, words);
        _mm256_storeu_si256((__m256i*)(out + 16), turned);
        _mm256_storeu_si256((__m256i*)(out + 32), _mm256_xor_si256(words, _mm256_alignr_epi8(words, words, 2)));
        _mm256_storeu_si256((__m256i*)(out + 48), _mm256_xor_si256(words, _mm256_alignr_epi8(words, words, 3)));
      } else {
        store_mirrored(out, words);
        store_mirrored(out + 32, turned);
      }
    }
    // Words 0 and 1 of each call with their mirror images, and a run further words 2 and 3 with theirs.
    static void store_mirrored(uint32_t* out, __m256i words) {
      const __m256i mirror = _mm256_setr_epi32(0, 0, -1, -1, 0, 0, -1, -1);
      _mm256_storeu_si256((__m256i*)out, _mm256_xor_si256(_mm256_shuffle_epi32(words, 0x44), mirror));
      _mm256_storeu_si256((__m256i*)(out + 16), _mm256_xor_si256(_mm256_shuffle_epi32(words, 0xEE), mirror));
    }
  };
  // As a shuffle: products and shifts would share two ports.
  static __m256i high(__m256i product) { return _mm256_shuffle_epi32(product, 0xF5); }
  static __m256i merge(__m256i even, __m256i odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
};

}  // namespace
}  // namespace hf_actnn
