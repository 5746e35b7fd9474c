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

// The levels of a group as the tensor's dtype holds them, sixteen of them, which repeat every 2^bits.
inline void levels_of(int bits, float minimum, float step, float* out) {
  alignas(16) uint8_t codes[16];
  for (int i = 0; i < 16; ++i) codes[i] = (uint8_t)(i & ((1 << bits) - 1));
  level_group(codes, 16, minimum, step, out);
}
inline void in_dtype(const float* levels, int, float* out) { memcpy(out, levels, 16 * sizeof(float)); }
inline void in_dtype(const float* levels, int dtype, uint16_t* out) {
  if (dtype == kBFloat16)
    floats_to_bf16(levels, 16, out);
  else
    floats_to_half(levels, 16, out);
}

template <class T, int Bits, bool Streaming>
void look_up(const DequantizeArgs& args, int64_t first, int64_t last) {
  alignas(64) float levels[16];
  alignas(64) T values[16];
  Cursor cursor(args.at, first);
  for (int64_t g = first; g < last; ++g, cursor.next()) {
    levels_of(Bits, bf16_to_float(args.meta[2 * g]), bf16_to_float(args.meta[2 * g + 1]), levels);
    in_dtype(levels, args.dtype, values);
    const typename Simd::template Levels<T, Bits> table(values);
    const uint8_t* codes = args.codes + cursor.byte;
    const int64_t n = cursor.size() * Bits / 8;
    Parts<0, 8 / Bits>::template look_up<Streaming>(table, codes, n, (T*)args.out + cursor.position);
  }
  if (Streaming) Simd::stream_done();
}

using Dequantize = void (*)(const DequantizeArgs&, int64_t, int64_t);

template <class T, int Bits>
Dequantize look_up_for(bool streaming) {
  return streaming ? look_up<T, Bits, true> : look_up<T, Bits, false>;
}

template <class T>
Dequantize look_up_for(int bits, bool streaming) {
  return bits == 1   ? look_up_for<T, 1>(streaming)
         : bits == 2 ? look_up_for<T, 2>(streaming)
         : bits == 4 ? look_up_for<T, 4>(streaming)
                     : nullptr;
}

// For codes of a single plane of up to four bits, in parts of whole runs of sixteen; null for the rest.
inline Dequantize look_up_for(const DequantizeArgs& args) {
  if (args.at.group * args.bits % 128 != 0 || args.at.tail * args.bits % 128 != 0) return nullptr;
  const bool streaming = args.streaming && (uintptr_t)args.out % 64 == 0;
  if (args.dtype == kFloat32) return look_up_for<float>(args.bits, streaming);
  if (args.dtype == kFloat64) return nullptr;
  return look_up_for<uint16_t>(args.bits, streaming);
}

void dequantize(const DequantizeArgs& args, int64_t first, int64_t last) {
  if (const Dequantize direct = look_up_for(args)) return direct(args, first, last);
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
