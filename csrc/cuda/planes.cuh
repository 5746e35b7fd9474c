// Codes in bytes to planes of bits, and back, in registers. A full group of 256 elements is eight runs of 32; a lane
// holds V neighbours of each run, at V * lane, in words of four bytes.
//
// A plane of width w has 32 w bytes: element 32 m + V lane + i is at bit w (m / w) of byte 32 (m % w) + V lane + i. So
// what a lane reads and writes of a plane are V neighbouring bytes of each of w runs, whole, and no lane needs another.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace hf_actnn {

constexpr int kRuns = 8;

template <int V>
struct Bytes {
  static constexpr int kWords = (V + 3) / 4;
  uint32_t w[kWords];
};

template <int V>
__device__ __forceinline__ Bytes<V> load_bytes(const uint8_t* p) {
  Bytes<V> b;
  if constexpr (V == 2) {
    b.w[0] = *reinterpret_cast<const uint16_t*>(p);
  } else if constexpr (V == 4) {
    b.w[0] = *reinterpret_cast<const uint32_t*>(p);
  } else if constexpr (V == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    b.w[0] = v.x, b.w[1] = v.y;
  } else {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    b.w[0] = v.x, b.w[1] = v.y, b.w[2] = v.z, b.w[3] = v.w;
  }
  return b;
}

template <int V>
__device__ __forceinline__ void store_bytes(uint8_t* p, const Bytes<V>& b) {
  if constexpr (V == 2) {
    *reinterpret_cast<uint16_t*>(p) = (uint16_t)b.w[0];
  } else if constexpr (V == 4) {
    *reinterpret_cast<uint32_t*>(p) = b.w[0];
  } else if constexpr (V == 8) {
    *reinterpret_cast<uint2*>(p) = make_uint2(b.w[0], b.w[1]);
  } else {
    *reinterpret_cast<uint4*>(p) = make_uint4(b.w[0], b.w[1], b.w[2], b.w[3]);
  }
}

// The same bits of each of a word's four bytes.
HF_ACTNN_HD uint32_t bytes_masked(uint32_t word, int bits) { return word & ((1u << bits) - 1u) * 0x01010101u; }

// Calls body(width, shift) for each plane of a code, as constants.
template <int Bits, class Body>
__device__ __forceinline__ void each_plane(const Body& body) {
  constexpr int high = Bits >= 8 ? 8 : Bits >= 4 ? 4 : Bits >= 2 ? 2 : 1;
  constexpr int rest = Bits - high, middle = rest >= 2 ? 2 : rest;
  body(std::integral_constant<int, high>(), std::integral_constant<int, 0>());
  if constexpr (middle != 0) body(std::integral_constant<int, middle>(), std::integral_constant<int, high>());
  if constexpr (rest - middle != 0)
    body(std::integral_constant<int, 1>(), std::integral_constant<int, high + middle>());
}

// Calls body with the number of bits as a constant.
template <class Body>
__device__ __forceinline__ void with_bits(int bits, const Body& body) {
  switch (bits) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    case 4:
      return body(std::integral_constant<int, 4>());
    case 5:
      return body(std::integral_constant<int, 5>());
    case 6:
      return body(std::integral_constant<int, 6>());
    case 7:
      return body(std::integral_constant<int, 7>());
    default:
      return body(std::integral_constant<int, 8>());
  }
}

// A lane's codes, below 2^Bits, to the planes of its group, which begin at out.
template <int Bits, int V>
__device__ __forceinline__ void pack_runs(const Bytes<V> (&codes)[kRuns], int lane, uint8_t* out) {
  out += V * lane;
  each_plane<Bits>([&](auto width, auto shift) {
    constexpr int w = decltype(width)::value, s = decltype(shift)::value;
#pragma unroll
    for (int p = 0; p < w; ++p) {
      Bytes<V> plane;
#pragma unroll
      for (int q = 0; q < Bytes<V>::kWords; ++q) {
        uint32_t word = 0;
#pragma unroll
        for (int t = 0; t < 8 / w; ++t) {
          const uint32_t code = codes[p + w * t].w[q];
          word += (w == Bits ? code : bytes_masked(code >> s, w)) << (w * t);
        }
        plane.w[q] = word;
      }
      store_bytes<V>(out + 32 * p, plane);
    }
    out += 32 * w;
  });
}

template <int Bits, int V>
__device__ __forceinline__ void unpack_runs(const uint8_t* packed, int lane, Bytes<V> (&codes)[kRuns]) {
  packed += V * lane;
  each_plane<Bits>([&](auto width, auto shift) {
    constexpr int w = decltype(width)::value, s = decltype(shift)::value;
#pragma unroll
    for (int p = 0; p < w; ++p) {
      const Bytes<V> plane = load_bytes<V>(packed + 32 * p);
#pragma unroll
      for (int t = 0; t < 8 / w; ++t) {
#pragma unroll
        for (int q = 0; q < Bytes<V>::kWords; ++q) {
          const uint32_t part = bytes_masked(plane.w[q] >> (w * t), w) << s;
          codes[p + w * t].w[q] = s == 0 ? part : codes[p + w * t].w[q] | part;
        }
      }
    }
    packed += 32 * w;
  });
}

// ---------------------------------------------------------------- groups of any size, a byte or a word at a time

// Byte i of the planes of a group of n codes, one a byte.
__device__ __forceinline__ uint8_t packed_byte(const uint8_t* codes, int n, int width, int shift, int i) {
  const int bytes = (n * width + 7) / 8;
  uint32_t byte = 0;
  for (int t = 0, e = i; e < n; ++t, e += bytes) byte |= ((codes[e] >> shift) & ((1u << width) - 1u)) << (width * t);
  return (uint8_t)byte;
}

// Code e of a group of n, from its planes.
__device__ __forceinline__ uint32_t unpacked_code(const uint8_t* packed, int n, int bits, int e) {
  uint32_t code = 0;
  int shift = 0;
#pragma unroll
  for (int width = 8; width >= 1; width /= 2) {
    if ((bits & width) == 0) continue;
    const int bytes = (n * width + 7) / 8;
    const int t = e / bytes;
    code |= ((packed[e - t * bytes] >> (width * t)) & ((1u << width) - 1u)) << shift;
    shift += width;
    packed += bytes;
  }
  return code;
}

}  // namespace hf_actnn
