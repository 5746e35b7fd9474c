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

// The groups of one batch: ranges first, then for all of them what rounding needs, in a loop that vectorises.
struct Batch {
  int count;
  alignas(64) float lo[kBatchGroups], hi[kBatchGroups];
  alignas(64) uint32_t nan[kBatchGroups];
  alignas(64) float minimum[kBatchGroups], scale[kBatchGroups], reciprocal[kBatchGroups];

  void range(int group, const float* x, int64_t n) {
    if (n < Simd::W) {
      float low = x[0], high = x[0];
      uint32_t seen = 0;
      for (int64_t i = 0; i < n; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        seen |= x[i] != x[i];
      }
      lo[group] = low;
      hi[group] = high;
      nan[group] = seen;
      return;
    }
    Simd::F low = Simd::load(x), high = low, low2 = low, high2 = low;
    typename Simd::NanSeen seen;
    const auto see = [&](const float* p, const float* q) {
      const Simd::F a = Simd::load(p), b = Simd::load(q);
      low = Simd::min(a, low);
      high = Simd::max(a, high);
      low2 = Simd::min(b, low2);
      high2 = Simd::max(b, high2);
      seen.add(a, b);
    };
    int64_t i = 0;
    for (; i + 2 * Simd::W <= n; i += 2 * Simd::W) see(x + i, x + i + Simd::W);
    // The rest overlaps what was seen already.
    if (i < n) see(x + (i + Simd::W <= n ? i : n - Simd::W), x + n - Simd::W);
    lo[group] = Simd::hmin(Simd::min(low, low2));
    hi[group] = Simd::hmax(Simd::max(high, high2));
    nan[group] = seen.seen();
  }

  // Writes the metadata of every group, a pair of bf16 each; returns how many groups must be kept exact.
  int finish(int bits, uint32_t* meta) {
    int exact = 0;
    for (int g = 0; g < count; ++g) {
      const GroupScale s = group_scale(lo[g], hi[g], nan[g] != 0, bits);
      meta[g] = (bits_of(s.minimum) >> 16) | (bits_of(s.step) & 0xFFFF0000u);
      minimum[g] = s.minimum;
      scale[g] = s.scale;
      reciprocal[g] = s.reciprocal;
      exact += s.step == -1.0f;
    }
    return exact;
  }
};

template <bool Scaled>
struct Rounding {
  Simd::F minimum, scale, reciprocal;
  Rounding(const Batch& b, int group)
      : minimum(Simd::set1(b.minimum[group])),
        scale(Simd::set1(b.scale[group])),
        reciprocal(Simd::set1(b.reciprocal[group])) {}
  Simd::F operator()(const float* x, const uint8_t* dither) const {
    Simd::F d = Simd::sub(Simd::load(x), minimum);
    if (Scaled) d = Simd::mul(d, scale);
    return Simd::add(Simd::mul(d, reciprocal), Simd::dither(dither));
  }
};

// Codes of one group in bytes. x and dither may be read, codes written, up to a vector beyond n; n is at least a
// vector.
template <bool Scaled>
void round_group(const float* x, int64_t n, const Rounding<Scaled>& y, const uint8_t* dither, int top, uint8_t* codes) {
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
  Batch batch;
  Dither dither(args.seed, args.stream);
  const PackGroup pack = packer(args.bits);
  const int top = (1 << args.bits) - 1;
  const int64_t size = item_size(args.dtype);
  int64_t exact = 0;
  Cursor cursor(args.at, first);
  for (int64_t g = first; g < last; g += batch.count) {
    const Cursor start = cursor;
    batch.count = 0;
    for (; batch.count < kBatchGroups && g + batch.count < last; cursor.next(), ++batch.count)
      if (cursor.position - start.position + cursor.size() > (batch.count > 0 ? kTarget : kBatch)) break;
    const int64_t total = cursor.position - start.position;
    const float* x = as_floats(args.x, args.dtype, start.position, total, values);
    cursor = start;
    for (int i = 0; i < batch.count; ++i, cursor.next())
      batch.range(i, x + (cursor.position - start.position), cursor.size());
    exact += batch.finish(args.bits, args.meta + g);
    const uint8_t* bytes = dither.window(start.position, start.position + total);
    cursor = start;
    for (int i = 0; i < batch.count; ++i, cursor.next()) {
      const int64_t n = cursor.size(), at = cursor.position - start.position;
      const float* from = x + at;
      // The next batch on its way while this one computes: the hardware's prefetcher stops at the pauses between loads.
      const char* ahead = (const char*)args.x + (start.position + total + at) * size;
      for (int64_t j = 0; j < n * size; j += 64) __builtin_prefetch(ahead + j);
      float few[Simd::W];
      if (n < Simd::W) {
        for (int64_t j = 0; j < Simd::W; ++j) few[j] = from[j < n ? j : 0];
        from = few;
      }
      const int64_t padded = n < Simd::W ? Simd::W : n;
      if (batch.reciprocal[i] == 0.0f) {
        memset(codes, 0, (size_t)n);
      } else if (batch.scale[i] != 1.0f) {
        round_group(from, padded, Rounding<true>(batch, i), bytes + at, top, codes);
      } else {
        round_group(from, padded, Rounding<false>(batch, i), bytes + at, top, codes);
      }
      memset(codes + n, 0, 16);  // a plane's last byte may hold fewer codes
      pack(codes, n, args.codes + cursor.byte);
    }
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
