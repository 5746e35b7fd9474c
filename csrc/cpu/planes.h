// Codes in bytes to planes of bits, and back. Include after the Simd of a variant.
#pragma once

#include "kernels.h"

namespace hf_actnn {
namespace {

// Room that the vector loops need around a buffer of a group's codes, in bytes.
constexpr int kSlack = 128;

// Visits parts J = 0 .. N - 1 of a plane as compile-time constants: shift counts must be immediates to be cheap.
template <int J, int N>
struct Parts {
  template <int Width, int Shift>
  static Simd::B gather(const uint8_t* codes, int64_t n, Simd::B sum) {
    Simd::B part = Simd::load_bytes(codes + J * n);
    if constexpr (Shift != 0) part = Simd::template right<Shift>(part);
    if constexpr (Width < 8) part = Simd::and_(part, (1 << Width) - 1);
    if constexpr (J != 0) part = Simd::template left<J * Width>(part);
    return Parts<J + 1, N>::template gather<Width, Shift>(codes, n, Simd::or_(sum, part));
  }
  // Part after part, each from its start: what a vector writes beyond its part, the next part overwrites.
  template <int Width>
  static void scatter(const uint8_t* packed, int64_t n, uint8_t* codes) {
    int64_t i = 0;
    for (; i + Simd::kBytes <= n; i += Simd::kBytes)
      Simd::store_bytes(codes + i, take<Width>(Simd::load_bytes(packed + i)));
    if (i < n) Simd::store_bytes(codes + i, take<Width>(Simd::load_bytes_of(packed + i, n - i)));
    Parts<J + 1, N>::template scatter<Width>(packed, n, codes + n);
  }
  // Parts of n bytes, each in runs of sixteen, as what a table says of them.
  template <bool Streaming, class Table, class T>
  static void look_up(const Table& table, const uint8_t* packed, int64_t n, T* out) {
    for (int64_t i = 0; i < n; i += 16) table.template write<J, Streaming>(packed + i, out + i);
    Parts<J + 1, N>::template look_up<Streaming>(table, packed, n, out + n);
  }
  template <int Width>
  static Simd::B take(Simd::B plane) {
    if constexpr (J != 0) plane = Simd::template right<J * Width>(plane);
    if constexpr (Width < 8) plane = Simd::and_(plane, (1 << Width) - 1);
    return plane;
  }
};
template <int N>
struct Parts<N, N> {
  template <int Width, int Shift>
  static Simd::B gather(const uint8_t*, int64_t, Simd::B sum) {
    return sum;
  }
  template <int Width>
  static void scatter(const uint8_t*, int64_t, uint8_t*) {}
  template <bool Streaming, class Table, class T>
  static void look_up(const Table&, const uint8_t*, int64_t, T*) {}
};

// One plane: bits Shift .. Shift + Width - 1 of every code. codes has zeros from group on and kSlack readable bytes.
template <int Width, int Shift>
int64_t pack_plane(const uint8_t* codes, int64_t group, uint8_t* out) {
  const int64_t n = ceil_div(group * Width, 8);
  int64_t i = 0;
  for (; i + Simd::kBytes <= n; i += Simd::kBytes)
    Simd::store_bytes(out + i, Parts<0, 8 / Width>::template gather<Width, Shift>(codes + i, n, Simd::zero_bytes()));
  if (i < n)
    Simd::store_bytes_of(out + i, n - i,
                         Parts<0, 8 / Width>::template gather<Width, Shift>(codes + i, n, Simd::zero_bytes()));
  return n;
}

template <int Bits>
void pack_group(const uint8_t* codes, int64_t group, uint8_t* out) {
  constexpr int high = Bits >= 8 ? 8 : Bits >= 4 ? 4 : Bits >= 2 ? 2 : 1;
  out += pack_plane<high, 0>(codes, group, out);
  constexpr int rest = Bits - high;
  constexpr int middle = rest >= 2 ? 2 : rest;
  if constexpr (middle != 0) out += pack_plane<middle, high>(codes, group, out);
  if constexpr (rest - middle != 0) pack_plane<1, high + middle>(codes, group, out);
}

// One plane of group codes; what lies in codes from group on, up to kSlack bytes, is lost.
template <int Width>
int64_t unpack_plane(const uint8_t* packed, int64_t group, uint8_t* codes) {
  const int64_t n = ceil_div(group * Width, 8);
  Parts<0, 8 / Width>::template scatter<Width>(packed, n, codes);
  return n;
}

template <int Width, int Shift>
int64_t unpack_more(const uint8_t* packed, int64_t group, uint8_t* codes) {
  uint8_t part[kMaxGroup + kSlack];
  const int64_t n = unpack_plane<Width>(packed, group, part);
  for (int64_t i = 0; i < group; i += Simd::kBytes)
    Simd::store_bytes(codes + i,
                      Simd::or_(Simd::load_bytes(codes + i), Simd::template left<Shift>(Simd::load_bytes(part + i))));
  return n;
}

template <int Bits>
void unpack_group(const uint8_t* packed, int64_t group, uint8_t* codes) {
  constexpr int high = Bits >= 8 ? 8 : Bits >= 4 ? 4 : Bits >= 2 ? 2 : 1;
  packed += unpack_plane<high>(packed, group, codes);
  constexpr int rest = Bits - high;
  constexpr int middle = rest >= 2 ? 2 : rest;
  if constexpr (middle != 0) packed += unpack_more<middle, high>(packed, group, codes);
  if constexpr (rest - middle != 0) unpack_more<1, high + middle>(packed, group, codes);
}

// The tables that a run-time width picks from.
using PackGroup = void (*)(const uint8_t* codes, int64_t group, uint8_t* out);
using UnpackGroup = void (*)(const uint8_t* packed, int64_t group, uint8_t* codes);

inline PackGroup packer(int bits) {
  static const PackGroup table[] = {pack_group<1>, pack_group<2>, pack_group<3>, pack_group<4>,
                                    pack_group<5>, pack_group<6>, pack_group<7>, pack_group<8>};
  return table[bits - 1];
}

inline UnpackGroup unpacker(int bits) {
  static const UnpackGroup table[] = {unpack_group<1>, unpack_group<2>, unpack_group<3>, unpack_group<4>,
                                      unpack_group<5>, unpack_group<6>, unpack_group<7>, unpack_group<8>};
  return table[bits - 1];
}

}  // namespace
}  // namespace hf_actnn
