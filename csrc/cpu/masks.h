// Masks and small integers in groups of 256 elements. Include after the Simd of a variant.
#pragma once

#include "convert.h"
#include "planes.h"

namespace hf_actnn {
namespace {

inline int64_t mask_group_size(int64_t group, int64_t numel) {
  const int64_t left = numel - group * kMaskGroup;
  return left < kMaskGroup ? left : kMaskGroup;
}

template <int P>
void test_floats(const float* x, int64_t n, float lo, float hi, uint8_t* out) {
  constexpr int W = Simd::W;
  const Simd::F l = Simd::set1(lo), h = Simd::set1(hi);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    Simd::template compare4<P>(Simd::load(x + i), Simd::load(x + i + W), Simd::load(x + i + 2 * W),
                               Simd::load(x + i + 3 * W), l, h, out + i);
  for (; i < n; ++i) out[i] = holds<P>(x[i], lo, hi);
}

template <int P>
void pack_mask_with(const PackMaskArgs& args, int64_t first, int64_t last) {
  alignas(64) float values[kMaskGroup + kPad];
  alignas(64) uint8_t tests[kMaskGroup + 2 * kSlack];
  for (int64_t g = first; g < last; ++g) {
    const int64_t at = g * kMaskGroup, n = mask_group_size(g, args.numel);
    if (args.dtype == kFloat64) {
      const double* x = (const double*)args.x + at;
      for (int64_t i = 0; i < n; ++i) tests[i] = holds<P>(x[i], args.lo, args.hi);
    } else if (args.dtype == kBool || args.dtype == kUInt8) {
      const uint8_t* x = (const uint8_t*)args.x + at;
      for (int64_t i = 0; i < n; ++i) tests[i] = x[i] != 0;
    } else {
      test_floats<P>(as_floats(args.x, args.dtype, at, n, values), n, (float)args.lo, (float)args.hi, tests);
    }
    memset(tests + n, 0, 16);
    pack_group<1>(tests, n, args.codes + g * (kMaskGroup / 8));
  }
}

void pack_mask(const PackMaskArgs& args, int64_t first, int64_t last) {
  switch (args.predicate) {
    case kNotLe:
      return pack_mask_with<kNotLe>(args, first, last);
    case kGt:
      return pack_mask_with<kGt>(args, first, last);
    case kInside:
      return pack_mask_with<kInside>(args, first, last);
    case kStrictInside:
      return pack_mask_with<kStrictInside>(args, first, last);
    default:
      return pack_mask_with<kNonzero>(args, first, last);
  }
}

// T is an unsigned integer as wide as the dtype: the two values are chosen as bit patterns.
template <class T>
void choose(const uint8_t* bits, int64_t n, T on, T off, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bits[i] != 0 ? on : off;
}

// Calls put(e, value) for every vector of a full group: bit J of its byte i is element 32 * J + i.
template <int J = 0, class Put>
ALWAYS_INLINE void each_choice(const uint8_t* codes, Simd::F on, Simd::F off, const Put& put) {
  for (int i = 0; i < 32; i += Simd::W) put(32 * J + i, Simd::template choose<J>(codes + i, on, off));
  if constexpr (J < 7) each_choice<J + 1>(codes, on, off, put);
}

void unpack_mask(const UnpackMaskArgs& args, int64_t first, int64_t last) {
  alignas(64) uint8_t bits[kMaskGroup + 2 * kSlack];
  const uint64_t on = pattern(args.on, args.dtype), off = pattern(args.off, args.dtype);
  const int64_t size = item_size(args.dtype);
  const Simd::F float_on = Simd::set1(float_of((uint32_t)on)), float_off = Simd::set1(float_of((uint32_t)off));
  for (int64_t g = first; g < last; ++g) {
    const int64_t n = mask_group_size(g, args.numel);
    const uint8_t* codes = args.codes + g * (kMaskGroup / 8);
    char* out = (char*)args.out + g * kMaskGroup * size;
    if (size == 4 && n == kMaskGroup) {
      float* to = (float*)out;
      each_choice(codes, float_on, float_off, [&](int e, Simd::F v) { Simd::store(to + e, v); });
      continue;
    }
    unpack_group<1>(codes, n, bits);
    if (size == 8)
      choose(bits, n, on, off, (uint64_t*)out);
    else if (size == 4)
      choose(bits, n, (uint32_t)on, (uint32_t)off, (uint32_t*)out);
    else if (size == 2)
      choose(bits, n, (uint16_t)on, (uint16_t)off, (uint16_t*)out);
    else
      choose(bits, n, (uint8_t)on, (uint8_t)off, (uint8_t*)out);
  }
}

void scale_by_mask(const ScaleByMaskArgs& args, int64_t first, int64_t last) {
  alignas(64) uint8_t bits[kMaskGroup + 2 * kSlack];
  const Simd::F on = Simd::set1(args.on), off = Simd::set1(args.off);
  for (int64_t g = first; g < last; ++g) {
    const int64_t n = mask_group_size(g, args.numel);
    const uint8_t* codes = args.codes + g * (kMaskGroup / 8);
    float* x = args.values + g * kMaskGroup;
    if (n == kMaskGroup) {
      each_choice(codes, on, off, [&](int e, Simd::F v) { Simd::store(x + e, Simd::mul(Simd::load(x + e), v)); });
    } else {
      unpack_group<1>(codes, n, bits);
      for (int64_t i = 0; i < n; ++i) x[i] *= bits[i] != 0 ? args.on : args.off;
    }
  }
}

template <int J = 0>
ALWAYS_INLINE void select_full(const uint8_t* codes, const float* x, float* out) {
  for (int i = 0; i < 32; i += Simd::W)
    Simd::store(out + 32 * J + i, Simd::template choose<J>(codes + i, Simd::load(x + 32 * J + i), Simd::set1(0.0f)));
  if constexpr (J < 7) select_full<J + 1>(codes, x, out);
}

// T is an unsigned integer as wide as the dtype: nan is handed on as it is.
template <class T>
void select_bits(const uint8_t* bits, const char* x, int64_t n, char* out) {
  for (int64_t i = 0; i < n; ++i) ((T*)out)[i] = bits[i] != 0 ? ((const T*)x)[i] : (T)0;
}

void select_by_mask(const SelectByMaskArgs& args, int64_t first, int64_t last) {
  alignas(64) uint8_t bits[kMaskGroup + 2 * kSlack];
  const int64_t size = item_size(args.dtype);
  for (int64_t g = first; g < last; ++g) {
    const int64_t n = mask_group_size(g, args.numel);
    const uint8_t* codes = args.codes + g * (kMaskGroup / 8);
    const char* x = (const char*)args.x + g * kMaskGroup * size;
    char* out = (char*)args.out + g * kMaskGroup * size;
    if (size == 4 && n == kMaskGroup) {
      select_full(codes, (const float*)x, (float*)out);
      continue;
    }
    unpack_group<1>(codes, n, bits);
    if (size == 8)
      select_bits<uint64_t>(bits, x, n, out);
    else if (size == 4)
      select_bits<uint32_t>(bits, x, n, out);
    else if (size == 2)
      select_bits<uint16_t>(bits, x, n, out);
    else
      select_bits<uint8_t>(bits, x, n, out);
  }
}

void pack_uint(const PackUintArgs& args, int64_t first, int64_t last) {
  alignas(64) uint8_t codes[kMaskGroup + 2 * kSlack];
  const PackGroup pack = packer(args.bits);
  const int64_t nbytes = group_bytes(kMaskGroup, args.bits);
  for (int64_t g = first; g < last; ++g) {
    const int64_t n = mask_group_size(g, args.numel);
    memcpy(codes, args.values + g * kMaskGroup, (size_t)n);
    memset(codes + n, 0, 16);
    pack(codes, n, args.codes + g * nbytes);
  }
}

template <class T>
void widen(const uint8_t* codes, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = codes[i];
}

void unpack_uint(const UnpackUintArgs& args, int64_t first, int64_t last) {
  alignas(64) uint8_t codes[kMaskGroup + 2 * kSlack];
  const UnpackGroup unpack = unpacker(args.bits);
  const int64_t nbytes = group_bytes(kMaskGroup, args.bits), size = item_size(args.dtype);
  for (int64_t g = first; g < last; ++g) {
    const int64_t n = mask_group_size(g, args.numel);
    unpack(args.codes + g * nbytes, n, codes);
    char* out = (char*)args.out + g * kMaskGroup * size;
    if (size == 8)
      widen(codes, n, (int64_t*)out);
    else if (size == 4)
      widen(codes, n, (int32_t*)out);
    else
      widen(codes, n, (uint8_t*)out);
  }
}

}  // namespace
}  // namespace hf_actnn
