// Quantise and dequantise ranges of groups. Include after the Simd of a variant.
#pragma once

#include "convert.h"
#include "planes.h"

namespace hf_actnn {
namespace {

constexpr int kBatchGroups = 64;

// Where a range of groups stands; groups follow each other in the values and in the codes.
struct Cursor {
  const Layout* layout;
  int64_t in_row, position, byte;

  Cursor(const Layout& at, int64_t first) : layout(&at) {
    const int64_t row = first / at.groups_per_row;
    in_row = first % at.groups_per_row;
    position = row * at.row_length + in_row * at.group;
    byte = row * at.row_bytes + in_row * at.group_bytes;
  }
  bool ends_row() const { return in_row == layout->groups_per_row - 1; }
  int64_t size() const { return ends_row() ? layout->tail : layout->group; }
  void next() {
    const bool last = ends_row();
    position += last ? layout->tail : layout->group;
    byte += last ? layout->tail_bytes : layout->group_bytes;
    in_row = last ? 0 : in_row + 1;
  }
};

// Dither bytes of a window of positions that moves upwards.
class Dither {
 public:
  Dither(uint64_t seed, uint64_t stream) : seed_(seed), stream_(stream) {}

  // Bytes of positions first .. last - 1, at most kBatch of them.
  const uint8_t* window(int64_t first, int64_t last) {
    const int64_t from = first >> 8, to = (last + 255) >> 8;
    int64_t kept = 0;
    if (end_ == from + 1) {  // the superblock that the last window ended in
      memmove(bytes_, bytes_ + (end_ - begin_ - 1) * 256, 256);
      kept = 1;
    }
    Simd::philox_blocks((uint64_t)(from + kept), to - from - kept, seed_, stream_, bytes_ + kept * 256);
    begin_ = from;
    end_ = to;
    return bytes_ + (first - from * 256);
  }

 private:
  uint64_t seed_, stream_;
  int64_t begin_ = 0, end_ = 0;
  alignas(64) uint8_t bytes_[kBatch + 2 * 256 + 64];
};

inline GroupScale scale_of(const float* x, int64_t n, int bits) {
  if (n < Simd::W) {
    float lo = x[0], hi = x[0];
    bool nan = false;
    for (int64_t i = 0; i < n; ++i) {
      lo = x[i] < lo ? x[i] : lo;
      hi = x[i] > hi ? x[i] : hi;
      nan |= x[i] != x[i];
    }
    return group_scale(lo, hi, nan, bits);
  }
  Simd::F lo = Simd::load(x), hi = lo, lo2 = lo, hi2 = lo;
  typename Simd::NanSeen nan;
  int64_t i = 0;
  for (; i + 2 * Simd::W <= n; i += 2 * Simd::W) {
    const Simd::F a = Simd::load(x + i), b = Simd::load(x + i + Simd::W);
    lo = Simd::min(a, lo);
    hi = Simd::max(a, hi);
    lo2 = Simd::min(b, lo2);
    hi2 = Simd::max(b, hi2);
    nan.add(a, b);
  }
  if (i < n) {  // the rest, overlapping what was seen already
    const int64_t j = i + Simd::W <= n ? i : n - Simd::W;
    const Simd::F a = Simd::load(x + j), b = Simd::load(x + n - Simd::W);
    lo = Simd::min(a, lo);
    hi = Simd::max(a, hi);
    lo2 = Simd::min(b, lo2);
    hi2 = Simd::max(b, hi2);
    nan.add(a, b);
  }
  return group_scale(Simd::hmin(Simd::min(lo, lo2)), Simd::hmax(Simd::max(hi, hi2)), nan.seen(), bits);
}

template <bool Scaled>
struct Rounding {
  Simd::F minimum, scale, reciprocal;
  explicit Rounding(const GroupScale& s)
      : minimum(Simd::set1(s.minimum)), scale(Simd::set1(s.scale)), reciprocal(Simd::set1(s.reciprocal)) {}
  Simd::F operator()(const float* x, const uint8_t* dither) const {
    Simd::F d = Simd::sub(Simd::load(x), minimum);
    if (Scaled) d = Simd::mul(d, scale);
    return Simd::add(Simd::mul(d, reciprocal), Simd::dither(dither));
  }
};

// Codes of one group in bytes. x and dither may be read, codes written, up to a vector beyond n; n is at least a
// vector.
template <bool Scaled>
void round_group(const float* x, int64_t n, const GroupScale& s, const uint8_t* dither, int top, uint8_t* codes) {
  const Rounding<Scaled> y(s);
  constexpr int W = Simd::W;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    Simd::to_codes4(y(x + i, dither + i), y(x + i + W, dither + i + W), y(x + i + 2 * W, dither + i + 2 * W),
                    y(x + i + 3 * W, dither + i + 3 * W), top, codes + i);
  for (; i + W <= n; i += W) Simd::to_codes(y(x + i, dither + i), top, codes + i);
  if (i < n) Simd::to_codes(y(x + n - W, dither + n - W), top, codes + n - W);
}

int64_t quantize(const QuantizeArgs& args, int64_t first, int64_t last) {
  alignas(64) float values[kBatch + kPad];
  alignas(64) uint8_t codes[kMaxGroup + 2 * kSlack];
  GroupScale scales[kBatchGroups];
  Dither dither(args.seed, args.stream);
  const PackGroup pack = packer(args.bits);
  const int top = (1 << args.bits) - 1;
  int64_t exact = 0;
  Cursor cursor(args.at, first);
  for (int64_t g = first; g < last;) {
    // A batch: first every group's range, then every group's codes, so that the divisions of one overlap the work on
    // others.
    const Cursor start = cursor;
    int count = 0;
    int64_t total = 0;
    for (Cursor c = start; count < kBatchGroups && g + count < last && total + c.size() <= kBatch; c.next(), ++count)
      total += c.size();
    const float* x = as_floats(args.x, args.dtype, start.position, total, values);
    cursor = start;
    for (int i = 0; i < count; ++i, cursor.next()) {
      GroupScale& s = scales[i];
      s = scale_of(x + (cursor.position - start.position), cursor.size(), args.bits);
      args.meta[2 * (g + i)] = (uint16_t)(bits_of(s.minimum) >> 16);
      args.meta[2 * (g + i) + 1] = (uint16_t)(bits_of(s.step) >> 16);
      exact += s.step == -1.0f;
    }
    const uint8_t* bytes = dither.window(start.position, start.position + total);
    cursor = start;
    for (int i = 0; i < count; ++i, cursor.next()) {
      const int64_t n = cursor.size(), at = cursor.position - start.position;
      const GroupScale& s = scales[i];
      const float* from = x + at;
      float few[Simd::W];
      if (n < Simd::W) {
        memcpy(few, from, (size_t)n * sizeof(float));
        for (int64_t j = n; j < Simd::W; ++j) few[j] = from[0];
        from = few;
      }
      const int64_t padded = n < Simd::W ? Simd::W : n;
      if (s.reciprocal == 0.0f) {
        memset(codes, 0, (size_t)n);
      } else if (s.scale != 1.0f) {
        round_group<true>(from, padded, s, bytes + at, top, codes);
      } else {
        round_group<false>(from, padded, s, bytes + at, top, codes);
      }
      memset(codes + n, 0, 16);  // a plane's last byte may hold fewer codes
      pack(codes, n, args.codes + cursor.byte);
    }
    g += count;
  }
  return exact;
}

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
