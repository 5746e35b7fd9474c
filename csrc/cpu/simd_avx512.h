// The vector operations of the kernels with AVX-512 (F, BW, VL, DQ): sixteen floats, 64 bytes.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace hf_actnn {
namespace {

struct Simd {
  static constexpr int W = 16;
  static constexpr int kBytes = 64;
  using F = __m512;
  using B = __m512i;
  using I = __m512i;
  struct TowardZero {  // instructions name their own rounding
    TowardZero() {}
  };

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F difference(F x, F minimum) {  // towards zero
    return _mm512_sub_round_ps(x, minimum, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static float quarter_min(__m128 a) {
    a = _mm_min_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_min_ss(a, _mm_movehdup_ps(a)));
  }
  static float quarter_max(__m128 a) {
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
  }
  static float hmin(F a) {
    const __m256 r = _mm256_min_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    return quarter_min(_mm_min_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1)));
  }
  static float hmax(F a) {
    const __m256 r = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    return quarter_max(_mm_max_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1)));
  }

  struct NanSeen {
    __mmask16 none = 0xFFFF;
    void add(F a, F b) { none = _mm512_mask_cmp_ps_mask(none, a, b, _CMP_ORD_Q); }
    bool seen() const { return none != 0xFFFF; }
  };

  static F from_codes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  // Looks codes of Bits bits up in sixteen values, which repeat every 2^Bits: part J of a plane's bytes is shifted
  // down, and what stands above it does not matter. Writes the values of sixteen bytes.
  template <class T, int Bits>
  struct Levels;
  template <int Bits>
  struct Levels<float, Bits> {
    __m512 table;
    explicit Levels(const float* values) : table(_mm512_loadu_ps(values)) {}
    template <int J, bool Streaming>
    void write(const uint8_t* p, float* out) const {
      const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
      const __m512 values = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, J * Bits), table);
      Streaming ? _mm512_stream_ps(out, values) : _mm512_storeu_ps(out, values);
    }
  };
  template <int Bits>
  struct Levels<uint16_t, Bits> {
    __m256i table;
    explicit Levels(const uint16_t* values) : table(_mm256_loadu_si256((const __m256i*)values)) {}
    template <int J, bool Streaming>
    void write(const uint8_t* p, uint16_t* out) const {
      const __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
      const __m256i values = _mm256_permutexvar_epi16(_mm256_srli_epi16(codes, J * Bits), table);
      Streaming ? _mm256_stream_si256((__m256i*)out, values) : _mm256_storeu_si256((__m256i*)out, values);
    }
  };
  // Codes floor(d * r + u) at bits 23 - M and up of each lane, whatever in the bits around: in a float from 2^M to
  // 2^(M + 1) those bits are worth 1, 2, 4 ..., and a fused multiply-add that rounds towards zero loses nothing above
  // them. u is byte k of the sixteen words.
  template <int M>
  static ALWAYS_INLINE I round(F d, F r, const uint32_t* words, int k) {
    constexpr int at = 15 - M;  // of the bit worth 1/256
    const I turned = turn<at>(_mm512_loadu_si512(words), k);
    const I base = _mm512_set1_epi32((127 + M) << 23 | 1 << (at - 1));
    const I u = _mm512_ternarylogic_epi32(turned, _mm512_set1_epi32(0xFF << at), base, 0xEA);  // (a & b) | c
    return _mm512_castps_si512(
        _mm512_fmadd_round_ps(d, r, _mm512_castsi512_ps(u), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
  }
  // Byte k of each word to bit At. By an immediate where the compiler knows k: there are registers for fewer counts.
  template <int At>
  static ALWAYS_INLINE I turn(I words, int k) {
    if (!__builtin_constant_p(k)) return _mm512_rolv_epi32(words, _mm512_set1_epi32(At + 32 - 8 * k));
    return k == 0   ? _mm512_rol_epi32(words, At)
           : k == 1 ? _mm512_rol_epi32(words, At + 24)
           : k == 2 ? _mm512_rol_epi32(words, At + 16)
                    : _mm512_rol_epi32(words, At + 8);
  }
  static I no_codes() { return _mm512_setzero_si512(); }
  // The bits below Bit of one, the others of the other.
  template <int Bit>
  static I select(I below, I rest) {
    // The constant last: the instruction overwrites its first operand, and a constant would be made again each time.
    return _mm512_ternarylogic_epi32(below, rest, _mm512_set1_epi32((1 << Bit) - 1), 0xE4);
  }
  // The same where one has no bits between Bit and 22, and what it has above does not matter.
  template <int Bit>
  static I join(I below, I rest) {
    return select<Bit>(below, rest);
  }
  // Bits 15 to 22 of every lane, in bytes in order.
  static B narrow(I a, I b, I c, I d) {
    const I ab = select<8>(_mm512_srli_epi32(a, 15), _mm512_srli_epi32(b, 7));
    const I cd = select<24>(_mm512_slli_epi32(c, 1), _mm512_slli_epi32(d, 9));
    const __m128i bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const I quarters = _mm512_shuffle_epi8(select<16>(ab, cd), _mm512_broadcast_i32x4(bytes));
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, quarters);
  }

  template <int P>
  static uint64_t test(F x, F lo, F hi) {
    if (P == kNotLe) return _mm512_cmp_ps_mask(x, lo, _CMP_NLE_UQ);
    if (P == kGt) return _mm512_cmp_ps_mask(x, lo, _CMP_GT_OQ);
    if (P == kInside) return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, lo, _CMP_NLE_UQ), x, hi, _CMP_NGE_UQ);
    if (P == kStrictInside) return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, lo, _CMP_GT_OQ), x, hi, _CMP_LT_OQ);
    return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  }
  template <int P>
  static void compare4(F a, F b, F c, F d, F lo, F hi, uint8_t* out) {
    const __mmask64 m =
        test<P>(a, lo, hi) | test<P>(b, lo, hi) << 16 | test<P>(c, lo, hi) << 32 | test<P>(d, lo, hi) << 48;
    _mm512_storeu_si512(out, _mm512_maskz_set1_epi8(m, 1));
  }

  // One of two values by bit Bit of sixteen bytes.
  template <int Bit>
  static F choose(const uint8_t* p, F on, F off) {
    const __mmask16 set = _mm_test_epi8_mask(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8((char)(1 << Bit)));
    return _mm512_mask_blend_ps(set, off, on);
  }

  static B load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_bytes(uint8_t* p, B a) { _mm512_storeu_si512(p, a); }
  static __mmask64 first(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }
  static B load_bytes_of(const uint8_t* p, int64_t n) { return _mm512_maskz_loadu_epi8(first(n), p); }
  static void store_bytes_of(uint8_t* p, int64_t n, B a) { _mm512_mask_storeu_epi8(p, first(n), a); }
  static B zero_bytes() { return _mm512_setzero_si512(); }
  static B or_(B a, B b) { return _mm512_or_si512(a, b); }
  static B and_(B a, int m) { return _mm512_and_si512(a, _mm512_set1_epi8((char)m)); }
  template <int N>
  static B left(B a) {
    return _mm512_slli_epi16(a, N);
  }
  template <int N>
  static B right(B a) {
    return _mm512_srli_epi16(a, N);
  }

  static F load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  // The only nan a dequantised group holds has mantissa 0x400000, which the rounding below leaves alone.
  static void store_bf16(uint16_t* p, F a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
  }
  // The operand order lets nan through both bounds.
  static void store_half(uint16_t* p, F a) {
    a = _mm512_max_ps(_mm512_set1_ps(-65504.0f), _mm512_min_ps(_mm512_set1_ps(65504.0f), a));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static void stream_lines(void* out, const void* in, int64_t lines) {
    for (int64_t i = 0; i < lines; ++i)
      _mm512_stream_si512((__m512i*)((char*)out + 64 * i), _mm512_loadu_si512((const char*)in + 64 * i));
  }
  static void stream_done() { _mm_sfence(); }

  // As in simd_portable.h; up to seven blocks more are written. A 32-bit word lives in the low half of a 64-bit lane,
  // so that a product's halves are in place for the next round (the high half of a lane is left over from before and
  // never read). Four chains hide each other's latency.
  template <bool RowsMirrored>
  static void dither_blocks(DitherBlocks blocks, int64_t count, uint64_t seed, uint64_t stream, uint32_t* out) {
    Keys keys;
    for (uint32_t r = 0; r < kRounds; ++r) {
      keys.k0[r] = _mm512_set1_epi64((uint32_t)seed + r * 0x9E3779B9u);
      keys.k1[r] = _mm512_set1_epi64((uint32_t)(seed >> 32) + r * 0xBB67AE85u);
    }
    int64_t n = 0;
    for (; n + 2 < count; n += 8, out += 8 * kDitherBlock / 4) {
      Calls x(blocks.next<2>(), stream), y(blocks.next<2>(), stream);
      Calls z(blocks.next<2>(), stream), w(blocks.next<2>(), stream);
#pragma GCC unroll 10
      for (int r = 0; r < kRounds; ++r) {
        x.round(keys, r);
        y.round(keys, r);
        z.round(keys, r);
        w.round(keys, r);
      }
      x.template store<RowsMirrored>(out);
      y.template store<RowsMirrored>(out + 2 * kDitherBlock / 4);
      z.template store<RowsMirrored>(out + 4 * kDitherBlock / 4);
      w.template store<RowsMirrored>(out + 6 * kDitherBlock / 4);
    }
    for (; n < count; n += 2, out += 2 * kDitherBlock / 4) {
      Calls x(blocks.next<2>(), stream);
#pragma GCC unroll 10
      for (int r = 0; r < kRounds; ++r) x.round(keys, r);
      x.template store<RowsMirrored>(out);
    }
  }

 private:
  struct Keys {
    __m512i k0[kRounds], k1[kRounds];
  };
  struct Calls {
    __m512i c0, c1, c2, c3;
    Calls(uint64_t q, uint64_t stream) {
      // In the order that lets store() put calls 0 to 3 and 4 to 7 side by side within 128-bit lanes.
      c0 = _mm512_add_epi64(_mm512_set1_epi64((long long)q), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
      c1 = _mm512_srli_epi64(c0, 32);
      c2 = _mm512_set1_epi64((uint32_t)stream);
      c3 = _mm512_set1_epi64((long long)(stream >> 32));
    }
    void round(const Keys& keys, int r) {
      const __m512i p0 = _mm512_mul_epu32(c0, _mm512_set1_epi64(0xD2511F53));
      const __m512i p1 = _mm512_mul_epu32(c2, _mm512_set1_epi64(0xCD9E8D57));
      c0 = _mm512_ternarylogic_epi64(high(p1), c1, keys.k0[r], 0x96);  // exclusive or of three
      c2 = _mm512_ternarylogic_epi64(high(p0), c3, keys.k1[r], 0x96);
      c1 = p1;
      c3 = p0;
    }
    template <bool RowsMirrored>
    void store(uint32_t* out) const {
      const __m512i a = merge(c0, c1), b = merge(c2, c3);
      store_block<RowsMirrored>(out, _mm512_unpacklo_epi64(a, b));
      store_block<RowsMirrored>(out + kDitherBlock / 4, _mm512_unpackhi_epi64(a, b));
    }
    template <bool RowsMirrored>
    static void store_block(uint32_t* out, __m512i words) {
      const __m512i turned = _mm512_xor_si512(words, _mm512_alignr_epi8(words, words, 1));
      if constexpr (RowsMirrored) {
        _mm512_storeu_si512(out, words);
        _mm512_storeu_si512(out + 16, turned);
        _mm512_storeu_si512(out + 32, _mm512_xor_si512(words, _mm512_alignr_epi8(words, words, 2)));
        _mm512_storeu_si512(out + 48, _mm512_xor_si512(words, _mm512_alignr_epi8(words, words, 3)));
      } else {
        store_mirrored(out, words);
        store_mirrored(out + 32, turned);
      }
    }
    // Words 0 and 1 of each call with their mirror images, and a run further words 2 and 3 with theirs.
    static void store_mirrored(uint32_t* out, __m512i words) {
      const __m512i mirror = _mm512_set4_epi32(-1, -1, 0, 0);
      _mm512_storeu_si512(out, _mm512_xor_si512(_mm512_shuffle_epi32(words, _MM_PERM_BABA), mirror));
      _mm512_storeu_si512(out + 16, _mm512_xor_si512(_mm512_shuffle_epi32(words, _MM_PERM_DCDC), mirror));
    }
  };
  // As a shuffle: shifts would share a port with the products.
  static __m512i high(__m512i product) { return _mm512_shuffle_epi32(product, _MM_PERM_DDBB); }
  static __m512i merge(__m512i even, __m512i odd) {
    return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
  }
};

}  // namespace
}  // namespace hf_actnn
