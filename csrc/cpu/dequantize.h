// Dequantise ranges of groups. Include after the Simd of a variant.
#pragma once

#include "cursor.h"

namespace hf_actnn {
namespace {

inline void level_group(const uint8_t* codes, int64_t n, float minimum, float step, float* out) {
  const Simd::F m = Simd::set1(minimum), s = Simd::set1(step);
  int64_t i = 0;
  for (; i + Simd::W <= n; i += Simd::W) Simd::store(out + i, Simd::add(m, Simd::mul(Simd::from_codes(codes + i), s)));
  for (; i < n; ++i) out[i] = dequantize_value(codes[i], minimum, step);
}

void dequantize(const DequantizeArgs& args, int64_t first, int64_t last) {
  alignas(64) float values[kBatch + kPad];
  alignas(64) uint16_t halves[kBatch + kPad];
  alignas(64) uint8_t codes[kMaxGroup + 2 * kSlack];
  const UnpackGroup unpack = unpacker(args.bits);
  const bool direct = args.dtype == kFloat32 && !args.streaming;
  Cursor cursor(args.at, first);
  for (int64_t g = first; g < last;) {
    const int64_t start = cursor.position;
    float* const floats = direct ? (float*)args.out + start : values;
    int64_t total = 0;
    for (; g < last && total + cursor.size() <= kBatch; ++g, cursor.next()) {
      const int64_t n = cursor.size();
      const float minimum = bf16_to_float(args.meta[2 * g]), step = bf16_to_float(args.meta[2 * g + 1]);
      unpack(args.codes + cursor.byte, n, codes);
      if (args.dtype == kFloat64) {
        double* out = (double*)args.out + cursor.position;
        for (int64_t i = 0; i < n; ++i) out[i] = (double)minimum + (double)codes[i] * (double)step;
      } else {
        level_group(codes, n, minimum, step, floats + total);
      }
      total += n;
    }
    if (args.dtype == kFloat32 && args.streaming)
      stream_out((char*)((float*)args.out + start), (const char*)values, total * 4);
    if (args.dtype == kBFloat16 || args.dtype == kFloat16) {
      uint16_t* out = (uint16_t*)args.out + start;
      uint16_t* to = args.streaming ? halves : out;
      if (args.dtype == kBFloat16)
        floats_to_bf16(values, total, to);
      else
        floats_to_half(values, total, to);
      if (args.streaming) stream_out((char*)out, (const char*)halves, total * 2);
    }
  }
  if (args.streaming) Simd::stream_done();
}

}  // namespace
}  // namespace hf_actnn
