// Masks and small integers: groups of 256 elements of the flat tensor, the last one shorter. A full group is eight runs
// of 32 elements, of which a lane holds 16 bytes each; the last group, and tensors that are not aligned, go element by
// element.
#include "planes.cuh"

namespace hf_actnn {
namespace {

// Where a lane works: all lanes of a group are neighbours, and V elements of a run make 16 bytes.
struct Turn {
  int64_t group;
  int lane, lanes;
  int size;  // elements of the group; 0 behind the last one

  __device__ __forceinline__ Turn(int64_t numel, int of) : lanes(of) {
    group = block_index() * (kThreads / of) + thread_index() / of;
    lane = thread_index() % of;
    const int64_t left = numel - group * kMaskGroup;
    size = (int)(left <= 0 ? 0 : left < kMaskGroup ? left : kMaskGroup);
  }
  __device__ __forceinline__ bool full() const { return size == kMaskGroup; }
};

// What a value is compared as.
template <class T>
struct Compared {
  using Type = float;
};
template <>
struct Compared<double> {
  using Type = double;
};
template <>
struct Compared<uint8_t> {
  using Type = int;
};

__device__ __forceinline__ double compared(double x) { return x; }
__device__ __forceinline__ int compared(uint8_t x) { return x; }
template <class T>
__device__ __forceinline__ float compared(T x) {
  return to_float(x);
}
__device__ __forceinline__ double compared(double, const uint4& v, int i) {
  const uint64_t bits = (uint64_t)word_of(v, 2 * i + 1) << 32 | word_of(v, 2 * i);
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
__device__ __forceinline__ int compared(uint8_t, const uint4& v, int i) {
  return (int)(word_of(v, i / 4) >> (8 * (i % 4)) & 0xFFu);
}
template <class T>
__device__ __forceinline__ float compared(T, const uint4& v, int i) {
  return element(T{}, v, i);
}

template <int P, class T, class C>
__device__ __forceinline__ void pack_mask_group(const T* x, const Turn& turn, bool vectors, C lo, C hi,
                                                uint8_t* codes) {
  constexpr int V = Vec<T>::kElements, Lanes = Vec<T>::kLanes;
  if (vectors && turn.full()) {
    Bytes<V> bits = {};
#pragma unroll
    for (int m = 0; m < kRuns; ++m) {
      const uint4 v = load_vec(x, (turn.group * kRuns + m) * Lanes + turn.lane);
#pragma unroll
      for (int i = 0; i < V; ++i)
        bits.w[i / 4] |= (holds<P>(compared(T{}, v, i), lo, hi) ? 1u : 0u) << (8 * (i % 4) + m);
    }
    store_bytes<V>(codes + turn.group * 32 + V * turn.lane, bits);
    return;
  }
  const int bytes = (turn.size + 7) / 8;
  for (int i = turn.lane; i < bytes; i += turn.lanes) {
    uint32_t byte = 0;
    for (int t = 0, e = i; e < turn.size; ++t, e += bytes)
      byte |= (holds<P>(compared(x[turn.group * kMaskGroup + e]), lo, hi) ? 1u : 0u) << t;
    codes[turn.group * 32 + i] = (uint8_t)byte;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_mask_kernel(const T* x, int64_t numel, int predicate, typename Compared<T>::Type lo,
                     typename Compared<T>::Type hi, bool vectors, uint8_t* codes) {
  const Turn turn(numel, Vec<T>::kLanes);
  switch (predicate) {
    case kNotLe:
      return pack_mask_group<kNotLe>(x, turn, vectors, lo, hi, codes);
    case kGt:
      return pack_mask_group<kGt>(x, turn, vectors, lo, hi, codes);
    case kInside:
      return pack_mask_group<kInside>(x, turn, vectors, lo, hi, codes);
    case kStrictInside:
      return pack_mask_group<kStrictInside>(x, turn, vectors, lo, hi, codes);
    default:
      return pack_mask_group<kNonzero>(x, turn, vectors, lo, hi, codes);
  }
}

// A vector made of the elements that get(i) gives, each as wide as U.
template <class U, class Get>
__device__ __forceinline__ uint4 vec_of(const Get& get) {
  constexpr int V = Vec<U>::kElements;
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const uint64_t value = (uint64_t)get(i);
    if (sizeof(U) == 8) {
      words[2 * i % 4] = (uint32_t)value;
      words[(2 * i + 1) % 4] = (uint32_t)(value >> 32);
    } else {
      words[i * (int)sizeof(U) / 4] |= (uint32_t)value << (8 * (i * (int)sizeof(U) % 4));
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// What a mask's bit chooses between. U is an unsigned integer as wide as the dtype: values are chosen as bit patterns.
//
// Two values that are the same for all elements,
template <class U>
struct Pair {
  U on, off;

  bool aligned() const { return true; }
  __device__ __forceinline__ uint4 read(int64_t) const { return make_uint4(0, 0, 0, 0); }
  template <class Bit>
  __device__ __forceinline__ uint4 of(const uint4&, const Bit& bit) const {
    return vec_of<U>([&](int i) { return bit(i) ? on : off; });
  }
  __device__ __forceinline__ U of(int64_t, bool bit) const { return bit ? on : off; }
};
// or an element of a tensor and 0.
template <class U>
struct Kept {
  const U* x;

  bool aligned() const { return hf_actnn::aligned(x, 16); }
  __device__ __forceinline__ uint4 read(int64_t index) const { return load_vec(x, index); }
  template <class Bit>
  __device__ __forceinline__ uint4 of(const uint4& v, const Bit& bit) const {
    const uint4 kept = vec_of<U>([&](int i) { return bit(i) ? (U) ~(U)0 : (U)0; });
    return make_uint4(v.x & kept.x, v.y & kept.y, v.z & kept.z, v.w & kept.w);
  }
  __device__ __forceinline__ U of(int64_t position, bool bit) const { return bit ? x[position] : (U)0; }
};

template <class U, class Choice>
__global__ void __launch_bounds__(kThreads)
    choose_kernel(const uint8_t* codes, int64_t numel, Choice choice, bool vectors, U* out) {
  constexpr int V = Vec<U>::kElements, Lanes = Vec<U>::kLanes;
  const Turn turn(numel, Lanes);
  if (vectors && turn.full()) {
    const int64_t first = turn.group * kRuns * Lanes + turn.lane;
    uint4 v[kRuns];
#pragma unroll
    for (int m = 0; m < kRuns; ++m) v[m] = choice.read(first + m * Lanes);
    const Bytes<V> bits = load_bytes<V>(codes + turn.group * 32 + V * turn.lane);
#pragma unroll
    for (int m = 0; m < kRuns; ++m)
      store_vec(out, first + m * Lanes,
                choice.of(v[m], [&](int i) { return (bits.w[i / 4] >> (8 * (i % 4) + m) & 1u) != 0; }));
    return;
  }
  const int bytes = (turn.size + 7) / 8;
  for (int e = turn.lane; e < turn.size; e += Lanes) {
    const int64_t at = turn.group * kMaskGroup + e;
    out[at] = choice.of(at, (codes[turn.group * 32 + e % bytes] >> (e / bytes) & 1) != 0);
  }
}

__global__ void __launch_bounds__(kThreads)
    pack_uint_kernel(const uint8_t* values, int64_t numel, int bits, bool vectors, uint8_t* codes) {
  constexpr int V = Vec<uint8_t>::kElements, Lanes = Vec<uint8_t>::kLanes;
  const Turn turn(numel, Lanes);
  codes += turn.group * (kMaskGroup / 8 * bits);
  if (vectors && turn.full()) {
    Bytes<V> bytes[kRuns];
#pragma unroll
    for (int m = 0; m < kRuns; ++m) {
      const uint4 v = load_vec(values, (turn.group * kRuns + m) * Lanes + turn.lane);
#pragma unroll
      for (int q = 0; q < 4; ++q) bytes[m].w[q] = bytes_masked(word_of(v, q), bits);
    }
    with_bits(bits, [&](auto known) { pack_runs<decltype(known)::value, V>(bytes, turn.lane, codes); });
    return;
  }
  int shift = 0;
  for (int width = 8; width >= 1; width /= 2) {
    if ((bits & width) == 0) continue;
    const int bytes = (turn.size * width + 7) / 8;
    for (int i = turn.lane; i < bytes; i += Lanes)
      codes[i] = packed_byte(values + turn.group * kMaskGroup, turn.size, width, shift, i);
    codes += bytes;
    shift += width;
  }
}

template <class U>
__global__ void __launch_bounds__(kThreads)
    unpack_uint_kernel(const uint8_t* codes, int64_t numel, int bits, bool vectors, U* out) {
  constexpr int V = Vec<U>::kElements, Lanes = Vec<U>::kLanes;
  const Turn turn(numel, Lanes);
  codes += turn.group * (kMaskGroup / 8 * bits);
  if (vectors && turn.full()) {
    Bytes<V> bytes[kRuns];
    with_bits(bits, [&](auto known) { unpack_runs<decltype(known)::value, V>(codes, turn.lane, bytes); });
#pragma unroll
    for (int m = 0; m < kRuns; ++m)
      store_vec(out, (turn.group * kRuns + m) * Lanes + turn.lane,
                vec_of<U>([&](int i) { return bytes[m].w[i / 4] >> (8 * (i % 4)) & 0xFFu; }));
    return;
  }
  for (int e = turn.lane; e < turn.size; e += Lanes)
    out[turn.group * kMaskGroup + e] = (U)unpacked_code(codes, turn.size, bits, e);
}

template <class U>
int64_t blocks_for(int64_t numel) {
  return ceil_div(ceil_div(numel, kMaskGroup), kThreads / Vec<U>::kLanes);
}

template <class T>
void pack_mask_as(const T* x, int64_t numel, int predicate, double lo, double hi, uint8_t* codes,
                  const Target& target) {
  using C = typename Compared<T>::Type;
  launch(pack_mask_kernel<T>, blocks_for<T>(numel), 0, target, x, numel, predicate, (C)lo, (C)hi,
         aligned(x, 16) && aligned(codes, 16), codes);
}

template <class Choice, class U>
void choose(const Choice& choice, const uint8_t* codes, int64_t numel, U* out, const Target& target) {
  launch(choose_kernel<U, Choice>, blocks_for<U>(numel), 0, target, codes, numel, choice,
         choice.aligned() && aligned(out, 16) && aligned(codes, 16), out);
}

// Calls body with an unsigned integer that is as wide as the dtype.
template <class Body>
void with_width(int dtype, const Body& body) {
  switch (item_size(dtype)) {
    case 8:
      return body(uint64_t());
    case 4:
      return body(uint32_t());
    case 2:
      return body(uint16_t());
    default:
      return body(uint8_t());
  }
}

}  // namespace

void pack_mask(const void* x, int dtype, int64_t numel, int predicate, double lo, double hi, uint8_t* codes,
               const Target& target) {
  if (numel == 0) return;
  if (dtype == kBool || dtype == kUInt8)
    return pack_mask_as((const uint8_t*)x, numel, kNonzero, 0.0, 0.0, codes, target);
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    pack_mask_as((const T*)x, numel, predicate, lo, hi, codes, target);
  });
}

void unpack_mask(const uint8_t* codes, int64_t numel, int dtype, double on, double off, void* out,
                 const Target& target) {
  if (numel == 0) return;
  with_width(dtype, [&](auto type) {
    using U = decltype(type);
    choose(Pair<U>{(U)pattern(on, dtype), (U)pattern(off, dtype)}, codes, numel, (U*)out, target);
  });
}

void select_by_mask(const void* x, int dtype, const uint8_t* codes, int64_t numel, void* out, const Target& target) {
  if (numel == 0) return;
  with_width(dtype, [&](auto type) {
    using U = decltype(type);
    choose(Kept<U>{(const U*)x}, codes, numel, (U*)out, target);
  });
}

void pack_uint(const uint8_t* values, int64_t numel, int bits, uint8_t* codes, const Target& target) {
  if (numel == 0) return;
  launch(pack_uint_kernel, blocks_for<uint8_t>(numel), 0, target, values, numel, bits,
         aligned(values, 16) && aligned(codes, 16), codes);
}

void unpack_uint(const uint8_t* codes, int64_t numel, int bits, int dtype, void* out, const Target& target) {
  if (numel == 0) return;
  with_width(dtype, [&](auto type) {
    using U = decltype(type);
    launch(unpack_uint_kernel<U>, blocks_for<U>(numel), 0, target, codes, numel, bits,
           aligned(out, 16) && aligned(codes, 16), (U*)out);
  });
}

}  // namespace hf_actnn
