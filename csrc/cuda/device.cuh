// What the kernels need of a device: launching, lanes that work together, vectors of 16 bytes, and the few operations
// that C++ has no word for. With HF_ACTNN_SHIM all of it runs on a CPU (tests/cuda/shim.h), so that the very kernel
// sources are tested there.
#pragma once

#if defined(HF_ACTNN_SHIM)
#include "shim.h"
#else
#include <cuda_runtime.h>
#endif

#include <stdexcept>
#include <string>

#include "../codec.h"
#include "kernels.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define HF_ACTNN_SM80 1
#endif

namespace hf_actnn {

constexpr int kThreads = 256;  // of a block
constexpr int kWarp = 32;
constexpr int64_t kSharedBytes = 48 * 1024;  // of a block, without asking for more

#if !defined(HF_ACTNN_SHIM)
// Throws what the runtime says of a failure, and where.
inline void check(cudaError_t status, const char* what, int device) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " on CUDA device " + std::to_string(device) + ": " +
                           cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int64_t shared_bytes, const Target& target, Args... args) {
  // This runtime is not torch's, and keeps its own account of which device is current.
  check(cudaSetDevice(target.device), "cudaSetDevice", target.device);
  kernel<<<dim3((unsigned)blocks), dim3(kThreads), (size_t)shared_bytes, (cudaStream_t)target.stream>>>(args...);
  check(cudaGetLastError(), "launch", target.device);
}
#endif

__device__ __forceinline__ int64_t block_index() { return (int64_t)blockIdx.x; }
__device__ __forceinline__ int thread_index() { return (int)threadIdx.x; }

// Integer division is long on a device, and in 64 bits four times as long.
HF_ACTNN_HD int64_t quotient(int64_t a, int64_t b) {
  if (((uint64_t)a | (uint64_t)b) >> 32 == 0) return (int64_t)((uint32_t)a / (uint32_t)b);
  return a / b;
}

// ---------------------------------------------------------------- least and greatest

// The lesser; nan if either is.
__device__ __forceinline__ float min_nan(float a, float b) {
#if defined(HF_ACTNN_SM80)
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return (a < b || a != a) ? a : b;
#endif
}

// The greater; of a nan and a number either.
__device__ __forceinline__ float max_of(float a, float b) { return fmaxf(a, b); }

// Least and greatest value of what a lane has seen; the least is nan if one of them was.
struct Range {
  float lo, hi;

  __device__ __forceinline__ void see(float x) {
    lo = min_nan(x, lo);
    hi = max_of(x, hi);
  }
};

__device__ __forceinline__ Range no_range() {
  const float inf = float_of(0x7F800000u);
  return Range{inf, -inf};
}

// Of all lanes whose numbers differ in the bits below lanes, a power of two. The whole warp must call it.
__device__ __forceinline__ Range across(Range r, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    const float lo = __shfl_xor_sync(0xFFFFFFFFu, r.lo, offset), hi = __shfl_xor_sync(0xFFFFFFFFu, r.hi, offset);
    r.lo = min_nan(lo, r.lo);
    r.hi = max_of(hi, r.hi);
  }
  return r;
}

// ---------------------------------------------------------------- element types

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(double x) { return double_to_float(x); }
__device__ __forceinline__ float to_float(BFloat16 x) { return bf16_to_float(x.bits); }
__device__ __forceinline__ float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
#else
  return half_to_float(x.bits);
#endif
}

// Two values side by side in a word, the first in the low half, to nearest. What is beyond the largest half becomes
// inf.
__device__ __forceinline__ uint32_t two(BFloat16, float low, float high) {
#if defined(HF_ACTNN_SM80)
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return float_to_bf16(low) | (uint32_t)float_to_bf16(high) << 16;
#endif
}
__device__ __forceinline__ uint32_t two(Half, float low, float high) {
#if defined(HF_ACTNN_SM80)
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#elif defined(__CUDA_ARCH__)
  uint16_t a, b;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(a) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(high));
  return a | (uint32_t)b << 16;
#else
  return float_to_half(low) | (uint32_t)float_to_half(high) << 16;
#endif
}

// What to round instead of a value that is not nan, so that it stays finite: a dequantised one may lie a rounding
// beyond the largest half.
template <class T>
__device__ __forceinline__ float finite(T, float x) {
  return x;
}
__device__ __forceinline__ float finite(Half, float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }

__device__ __forceinline__ float rounded(float, float x) { return x; }
template <class T>
__device__ __forceinline__ T rounded(T, float x) {
  return T{(uint16_t)two(T{}, x, x)};
}

// Of the pairs in two words: the lesser, nan if either is; the greater.
template <class T>
__device__ __forceinline__ uint32_t min2_nan(T, uint32_t a, uint32_t b) {
  const auto lesser = [](uint16_t x, uint16_t y) {
    const float p = to_float(T{x}), q = to_float(T{y});
    return (p < q || p != p) ? x : y;
  };
  return lesser((uint16_t)a, (uint16_t)b) | (uint32_t)lesser((uint16_t)(a >> 16), (uint16_t)(b >> 16)) << 16;
}
template <class T>
__device__ __forceinline__ uint32_t max2(T, uint32_t a, uint32_t b) {
  const auto greater = [](uint16_t x, uint16_t y) { return to_float(T{x}) > to_float(T{y}) ? x : y; };
  return greater((uint16_t)a, (uint16_t)b) | (uint32_t)greater((uint16_t)(a >> 16), (uint16_t)(b >> 16)) << 16;
}
#if defined(HF_ACTNN_SM80)
#define HF_ACTNN_TWO(name, type, instruction)                              \
  __device__ __forceinline__ uint32_t name(type, uint32_t a, uint32_t b) { \
    uint32_t r;                                                            \
    asm(instruction " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));            \
    return r;                                                              \
  }
HF_ACTNN_TWO(min2_nan, BFloat16, "min.NaN.bf16x2")
HF_ACTNN_TWO(max2, BFloat16, "max.bf16x2")
HF_ACTNN_TWO(min2_nan, Half, "min.NaN.f16x2")
HF_ACTNN_TWO(max2, Half, "max.f16x2")
#undef HF_ACTNN_TWO
#endif

// A run of 16 bytes. Thirty-two elements are kLanes of them, one for each lane that works on a group.
template <class T>
struct Vec {
  static constexpr int kElements = 16 / (int)sizeof(T);
  static constexpr int kLanes = 32 / kElements;
};

template <class T>
__device__ __forceinline__ uint4 load_vec(const T* x, int64_t index) {
  return reinterpret_cast<const uint4*>(x)[index];
}

template <class T>
__device__ __forceinline__ void store_vec(T* x, int64_t index, uint4 value) {
  reinterpret_cast<uint4*>(x)[index] = value;
}

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Element i of a vector, which the compiler knows.
__device__ __forceinline__ float element(float, const uint4& v, int i) { return float_of(word_of(v, i)); }
__device__ __forceinline__ float element(BFloat16, const uint4& v, int i) {
  const uint32_t word = word_of(v, i / 2);
  return float_of(i % 2 == 0 ? word << 16 : word & 0xFFFF0000u);
}
__device__ __forceinline__ float element(Half, const uint4& v, int i) {
  const uint32_t word = word_of(v, i / 2);
  return to_float(Half{(uint16_t)(i % 2 == 0 ? word : word >> 16)});
}

// A vector of its elements, each rounded; where they have to stay finite, none is nan.
template <class T, bool Finite>
__device__ __forceinline__ uint4 vec_of_floats(const float (&y)[Vec<T>::kElements]) {
  constexpr int V = Vec<T>::kElements;
  const auto word = [&](int i) {
    if constexpr (V == 4)
      return bits_of(y[i]);
    else if constexpr (Finite)
      return two(T{}, finite(T{}, y[i]), finite(T{}, y[i + 1]));
    else
      return two(T{}, y[i], y[i + 1]);
  };
  return make_uint4(word(0), word(V / 4), word(V / 2), word(3 * V / 4));
}

// Calls body with a value of the type that a floating dtype of 32 bits or fewer names.
template <class Body>
void with_narrow(int dtype, const Body& body) {
  switch (dtype) {
    case kFloat32:
      return body(float());
    case kFloat16:
      return body(Half());
    case kBFloat16:
      return body(BFloat16());
    default:
      throw std::invalid_argument("dtype " + std::to_string(dtype) + " where fp32, fp16 or bf16 is expected");
  }
}

// The same for all of them.
template <class Body>
void with_float(int dtype, const Body& body) {
  if (dtype == kFloat64) return body(double());
  with_narrow(dtype, body);
}

inline bool aligned(const void* p, int bytes) { return (uintptr_t)p % (uintptr_t)bytes == 0; }

}  // namespace hf_actnn
