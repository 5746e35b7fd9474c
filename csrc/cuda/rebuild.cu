// What a backward pass reads of a normalised or activated tensor, made of what went in, in one pass over it. Of codes:
// the values of dequantize.cuh go through a map that is affine by channel or by row, or through an activation, and are
// stored once. Of values: in place. Every operation is rounded as it would be in a pass of its own.
#include <stdexcept>

#include "dequantize.cuh"

namespace hf_actnn {
namespace {

// Division of numbers below 2^31 by one that the host knows: a multiplication and a shift (Granlund and Montgomery,
// "Division by invariant integers using multiplication", 1994).
struct Divider {
  uint32_t by, magic;
  int shift;

  explicit Divider(int64_t divisor) : by((uint32_t)divisor), shift(0) {
    while ((uint64_t{1} << shift) < by) ++shift;
    magic = (uint32_t)(((((uint64_t{1} << shift) - by) << 32) / by) + 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return ((uint32_t)((uint64_t)n * magic >> 32) + n) >> shift;
  }
};

// The coefficients of V neighbours that share no more than an address divisible by 16.
template <int V>
__device__ __forceinline__ void load_floats(const float* from, uint32_t at, float (&to)[V]) {
#pragma unroll
  for (int j = 0; j < V / 4; ++j) {
    const uint4 four = load_vec(from, (int64_t)(at / 4 + j));
#pragma unroll
    for (int i = 0; i < 4; ++i) to[4 * j + i] = float_of(word_of(four, i));
  }
}

struct Nothing {};

// ---------------------------------------------------------------- by channel

// Where a value of a tensor [N, channels, ...] finds its channel: `inner` values of one lie side by side.
struct Channels {
  Divider inner, channels;

  __device__ __forceinline__ uint32_t of(uint32_t position, uint32_t& in_run) const {
    const uint32_t run = inner.quotient(position);
    in_run = position - run * inner.by;
    return run - channels.quotient(run) * channels.by;
  }
};

// A mask as masks.cu cuts it: bit e / 32 of byte e % 32 of a full group of 256.
struct Bits {
  const uint8_t* codes;  // or none
  uint32_t full;         // elements in full groups
  int rest;              // bytes of the last group, if it is not full

  __device__ __forceinline__ bool at(uint32_t position) const {
    const uint32_t e = position % kMaskGroup;
    const uint8_t* const group = codes + position / kMaskGroup * (kMaskGroup / 8);
    return position < full ? (group[e % 32] >> (e / 32) & 1) != 0 : (group[e % rest] >> (e / rest) & 1) != 0;
  }
  // Of V neighbours from a multiple of V on.
  template <int V>
  __device__ __forceinline__ void scale(float (&y)[V], uint32_t position, float on, float off) const {
    if (position + V <= full) {
      const uint32_t e = position % kMaskGroup;
      const Bytes<V> bytes = load_bytes<V>(codes + position / kMaskGroup * (kMaskGroup / 8) + e % 32);
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] *= (bytes.w[i / 4] >> (8 * (i % 4) + e / 32) & 1u) != 0 ? on : off;
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] *= at(position + (uint32_t)i) ? on : off;
    }
  }
};

enum Way : int {
  kOneByOne,    // the channels of a vector are found one by one
  kOneChannel,  // a vector lies in one channel
  kSideBySide,  // channels side by side, and a vector's coefficients are vectors
};

// Of values that are not rounded to their dtype yet, as those of codes, or that are.
template <class T, bool Raw>
struct ByChannel {
  using Element = T;
  using Source = T;
  using OnlyStored = std::false_type;
  const float *scale, *shift;
  Channels where;
  int way;
  Bits bits;
  float on, off;
  bool signs;  // the mask's, of the values; else it scales what is stored
  T* out;

  bool aligned() const { return hf_actnn::aligned(out, 16) && hf_actnn::aligned(bits.codes, 8); }
  __device__ __forceinline__ Nothing ahead(int64_t) const { return {}; }

  template <int V>
  __device__ __forceinline__ uint4 of(float (&y)[V], int64_t index, Nothing) const {
    const uint32_t position = (uint32_t)index * V;
    uint32_t in_run, channel = where.of(position, in_run);
    if constexpr (Raw) round_to<T>(y);
    if (signs) bits.scale(y, position, 1.0f, -1.0f);
    if (way == kOneChannel) {
      const float a = scale[channel], b = shift[channel];
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = y[i] * a + b;
    } else if (way == kSideBySide) {
      float a[V], b[V];
      load_floats(scale, channel, a);
      load_floats(shift, channel, b);
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = y[i] * a[i] + b[i];
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        y[i] = y[i] * scale[channel] + shift[channel];
        if (++in_run == where.inner.by) {
          in_run = 0;
          if (++channel == where.channels.by) channel = 0;
        }
      }
    }
    if (bits.codes == nullptr || signs) return vec_of_floats<T, false>(y);
    const uint4 stored = vec_of_floats<T, false>(y);  // what is stored without a mask
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = element(T{}, stored, i);
    bits.scale(y, position, on, off);
    return vec_of_floats<T, false>(y);
  }
  __device__ __forceinline__ T of(T value, int64_t at) const {
    const uint32_t position = (uint32_t)at;
    uint32_t in_run;
    const uint32_t channel = where.of(position, in_run);
    const float signed_value = signs && !bits.at(position) ? -to_float(value) : to_float(value);
    const T y = rounded(T{}, signed_value * scale[channel] + shift[channel]);
    if (bits.codes == nullptr || signs) return y;
    return rounded(T{}, to_float(y) * (bits.at(position) ? on : off));
  }
};

// ---------------------------------------------------------------- by row

template <class T, class S>
struct ByRow {
  using Element = T;
  using Source = S;
  using OnlyStored = std::false_type;
  const float *mean, *factor, *weight, *bias;
  Divider width;
  bool vectors;  // a vector lies in one row, and weights can be read as vectors
  T* out;

  bool aligned() const { return hf_actnn::aligned(out, 16); }
  __device__ __forceinline__ Nothing ahead(int64_t) const { return {}; }

  template <int V>
  __device__ __forceinline__ uint4 of(float (&y)[V], int64_t index, Nothing) const {
    const uint32_t position = (uint32_t)index * V;
    uint32_t row = width.quotient(position), column = position - row * width.by;
    round_to<S>(y);
    if (vectors) {
      const float m = mean[row], f = factor[row];
      float a[V];
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = (y[i] - m) * f;
      if (weight != nullptr) {
        load_floats(weight, column, a);
#pragma unroll
        for (int i = 0; i < V; ++i) y[i] *= a[i];
      }
      if (bias != nullptr) {
        load_floats(bias, column, a);
#pragma unroll
        for (int i = 0; i < V; ++i) y[i] += a[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        y[i] = one(y[i], row, column);
        if (++column == width.by) {
          column = 0;
          ++row;
        }
      }
    }
    return vec_of_floats<T, false>(y);
  }
  __device__ __forceinline__ T of(S value, int64_t at) const {
    const uint32_t position = (uint32_t)at, row = width.quotient(position);
    return rounded(T{}, one(to_float(value), row, position - row * width.by));
  }

 private:
  __device__ __forceinline__ float one(float x, uint32_t row, uint32_t column) const {
    float y = (x - mean[row]) * factor[row];
    if (weight != nullptr) y *= weight[column];
    if (bias != nullptr) y += bias[column];
    return y;
  }
};

// ---------------------------------------------------------------- activations

// In the operations of torch's kernels.
template <int F>
__device__ __forceinline__ float activated(float x) {
  if constexpr (F == kSilu) {
    return x / (1.0f + std::exp(-x));
  } else if constexpr (F == kGelu) {
    return x * 0.5f * (1.0f + std::erf(x * 0.70710678118654752f));  // sqrt(1/2)
  } else {
    const float a = 0.79788456080286536f, b = 0.044715f;  // a: sqrt(2 / pi)
    return 0.5f * x * (1.0f + std::tanh(a * (x + b * (x * x * x))));
  }
}

template <class T, int F>
struct Activated {
  using Element = T;
  using Source = T;
  using OnlyStored = std::false_type;
  T* out;

  bool aligned() const { return hf_actnn::aligned(out, 16); }
  __device__ __forceinline__ Nothing ahead(int64_t) const { return {}; }
  template <int V>
  __device__ __forceinline__ uint4 of(float (&y)[V], int64_t, Nothing) const {
    round_to<T>(y);
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = activated<F>(y[i]);
    return vec_of_floats<T, false>(y);
  }
  __device__ __forceinline__ T of(T value, int64_t) const { return rounded(T{}, activated<F>(to_float(value))); }
};

template <int F>
void forward_of(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, void* out,
                const Target& target) {
  with_narrow(dtype, [&](auto type) {
    using T = decltype(type);
    dequantize_for(Activated<T, F>{(T*)out}, codes, meta, groups_of(cut), target);
  });
}

// ---------------------------------------------------------------- of values

// Times `on` where a mask's bit is set, and times 0 elsewhere.
template <class T>
struct ByMask {
  using Element = T;
  Bits bits;
  float on, off;
  T* out;

  bool aligned() const { return hf_actnn::aligned(out, 16) && hf_actnn::aligned(bits.codes, 8); }
  template <int V>
  __device__ __forceinline__ uint4 of(float (&y)[V], int64_t index, Nothing) const {
    bits.scale(y, (uint32_t)index * V, on, off);
    return vec_of_floats<T, false>(y);
  }
  __device__ __forceinline__ T of(T value, int64_t at) const {
    return rounded(T{}, to_float(value) * (bits.at((uint32_t)at) ? on : off));
  }
};

// A thread makes a vector, or as many elements one by one. `from` may be where they go.
template <class Use>
__global__ void __launch_bounds__(kThreads)
    apply(int64_t numel, bool vectors, const typename Use::Element* from, Use use) {
  using T = typename Use::Element;
  constexpr int V = Vec<T>::kElements;
  const int64_t index = block_index() * kThreads + thread_index(), first = index * V;
  if (vectors && first + V <= numel) {
    const uint4 v = load_vec(from, index);
    float y[V];
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = element(T{}, v, i);
    store_vec(use.out, index, use.of(y, index, Nothing{}));
    return;
  }
  for (int64_t at = first; at < numel && at < first + V; ++at) use.out[at] = use.of(from[at], at);
}

template <class Use>
void apply_to(int64_t numel, const void* from, const Use& use, const Target& target) {
  using T = typename Use::Element;
  const int64_t threads = ceil_div(numel, Vec<T>::kElements);
  launch(apply<Use>, ceil_div(threads, kThreads), 0, target, numel, use.aligned() && aligned(from, 16), (const T*)from,
         use);
}

// ----------------------------------------------------------------

void check_size(int64_t numel) {
  if (numel >= int64_t{1} << 31) throw std::invalid_argument("rebuilding in one pass: 2^31 elements or more");
}

Bits bits_of_mask(const uint8_t* codes, int64_t numel) {
  const int64_t full = numel / kMaskGroup * kMaskGroup;
  return Bits{codes, (uint32_t)full, (int)ceil_div(numel - full, 8)};
}

template <class T, bool Raw>
ByChannel<T, Raw> by_channel(const float* scale, const float* shift, int64_t channels, int64_t inner, const Bits& bits,
                             double on, double off, bool signs, void* out) {
  constexpr int V = Vec<T>::kElements;
  const bool neighbours = inner == 1 && channels % V == 0 && aligned(scale, 16) && aligned(shift, 16);
  const int way = inner % V == 0 ? kOneChannel : neighbours ? kSideBySide : kOneByOne;
  const Channels where{Divider(inner), Divider(channels)};
  return ByChannel<T, Raw>{scale, shift, where, way, bits, (float)on, (float)off, signs, (T*)out};
}

template <class T, class S>
ByRow<T, S> by_row(const float* mean, const float* factor, const float* weight, const float* bias, int64_t width,
                   void* out) {
  const bool vectors = width % Vec<T>::kElements == 0 && aligned(weight, 16) && aligned(bias, 16);
  return ByRow<T, S>{mean, factor, weight, bias, Divider(width), vectors, (T*)out};
}

}  // namespace

void rebuild_by_channel(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, const float* scale,
                        const float* shift, int64_t channels, int64_t inner, const uint8_t* mask, double on, bool signs,
                        void* out, const Target& target) {
  if (cut.numel == 0) return;
  check_size(cut.numel);
  with_narrow(dtype, [&](auto type) {
    const auto use = by_channel<decltype(type), true>(scale, shift, channels, inner, bits_of_mask(mask, cut.numel), on,
                                                      0.0, signs && mask != nullptr, out);
    dequantize_for(use, codes, meta, groups_of(cut), target);
  });
}

void rebuild_by_row(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, int out_dtype,
                    const float* mean, const float* factor, const float* weight, const float* bias, int64_t width,
                    void* out, const Target& target) {
  if (cut.numel == 0) return;
  check_size(cut.numel);
  if (dtype != out_dtype && dtype != kFloat32)
    throw std::invalid_argument("rebuilding by row: another dtype than that of the values, which are not fp32");
  with_narrow(out_dtype, [&](auto type) {
    using T = decltype(type);
    const Groups groups = groups_of(cut);
    if (dtype == out_dtype)
      dequantize_for(by_row<T, T>(mean, factor, weight, bias, width, out), codes, meta, groups, target);
    else
      dequantize_for(by_row<T, float>(mean, factor, weight, bias, width, out), codes, meta, groups, target);
  });
}

void rebuild_activation(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, int function, void* out,
                        const Target& target) {
  if (cut.numel == 0) return;
  switch (function) {
    case kGelu:
      return forward_of<kGelu>(codes, meta, cut, dtype, out, target);
    case kGeluTanh:
      return forward_of<kGeluTanh>(codes, meta, cut, dtype, out, target);
    default:
      return forward_of<kSilu>(codes, meta, cut, dtype, out, target);
  }
}

void affine(const void* values, int dtype, int64_t numel, int64_t channels, int64_t inner, const float* scale,
            const float* shift, const uint8_t* mask, double on, double off, void* out, const Target& target) {
  if (numel == 0) return;
  check_size(numel);
  with_narrow(dtype, [&](auto type) {
    const Bits bits = bits_of_mask(mask, numel);
    const auto use = by_channel<decltype(type), false>(scale, shift, channels, inner, bits, on, off, false, out);
    apply_to(numel, values, use, target);
  });
}

void normalize(float* values, int64_t numel, int64_t width, const float* mean, const float* factor, const float* weight,
               const float* bias, const Target& target) {
  if (numel == 0) return;
  check_size(numel);
  apply_to(numel, values, by_row<float, float>(mean, factor, weight, bias, width, values), target);
}

void scale_by_mask(void* values, int dtype, const uint8_t* codes, int64_t numel, double on, double off,
                   const Target& target) {
  if (numel == 0) return;
  check_size(numel);
  with_narrow(dtype, [&](auto type) {
    using T = decltype(type);
    apply_to(numel, values, ByMask<T>{bits_of_mask(codes, numel), (float)on, (float)off, (T*)values}, target);
  });
}

}  // namespace hf_actnn
