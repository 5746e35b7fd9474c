// Between the tensor's dtype and fp32, a run of values at a time. Include after the Simd of a variant.
#pragma once

#include "kernels.h"

namespace hf_actnn {
namespace {

// Values of a batch, which stay in the first-level cache between its passes; no less than the widest group.
constexpr int64_t kBatch = 4096;
constexpr int64_t kPad = 64;  // floats that vector loops may touch beyond a buffer's end

inline void bf16_to_floats(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + Simd::W <= n; i += Simd::W) Simd::store(out + i, Simd::load_bf16(x + i));
  for (; i < n; ++i) out[i] = bf16_to_float(x[i]);
}

inline void half_to_floats(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + Simd::W <= n; i += Simd::W) Simd::store(out + i, Simd::load_half(x + i));
  for (; i < n; ++i) out[i] = half_to_float(x[i]);
}

inline void doubles_to_floats(const double* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = double_to_float(x[i]);
}

// The values [at, at + n) of a tensor in fp32: where they lie if they are fp32, else in buffer.
inline const float* as_floats(const void* x, int dtype, int64_t at, int64_t n, float* buffer) {
  if (dtype == kFloat32) return (const float*)x + at;
  if (dtype == kBFloat16) bf16_to_floats((const uint16_t*)x + at, n, buffer);
  if (dtype == kFloat16) half_to_floats((const uint16_t*)x + at, n, buffer);
  if (dtype == kFloat64) doubles_to_floats((const double*)x + at, n, buffer);
  return buffer;
}

inline void floats_to_bf16(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + Simd::W <= n; i += Simd::W) Simd::store_bf16(out + i, Simd::load(x + i));
  for (; i < n; ++i) out[i] = float_to_bf16(x[i]);
}

inline void floats_to_half(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + Simd::W <= n; i += Simd::W) Simd::store_half(out + i, Simd::load(x + i));
  for (; i < n; ++i) out[i] = float_to_finite_half(x[i]);
}

// Writes bytes around the caches: whole lines by themselves, the ends as usual.
inline void stream_out(char* out, const char* in, int64_t nbytes) {
  int64_t head = (int64_t)(-(uintptr_t)out & 63);
  if (head > nbytes) head = nbytes;
  memcpy(out, in, (size_t)head);
  const int64_t lines = (nbytes - head) / 64;
  Simd::stream_lines(out + head, in + head, lines);
  const int64_t done = head + 64 * lines;
  memcpy(out + done, in + done, (size_t)(nbytes - done));
}

}  // namespace
}  // namespace hf_actnn
