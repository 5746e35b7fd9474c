// Quantise ranges of groups. Include after the Simd of a variant.
#pragma once

#include "cursor.h"

namespace hf_actnn {
namespace {

constexpr int kBatchGroups = 64;
// Blocks of dither in a batch: a group's last block may be partly used.
constexpr int64_t kBatchBlocks = kBatchGroups + kBatch / kDitherBlock;
constexpr int64_t kRunBlocks = 8;  // of two rows, up to which several pairs of rows are drawn at once

__attribute__((noinline)) int scale_groups(int count, int bits, const float* __restrict lo, const float* __restrict hi,
                                           const uint32_t* __restrict nan, float* __restrict minimum,
                                           float* __restrict scale, float* __restrict reciprocal,
                                           uint32_t* __restrict meta) {
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
    return scale_groups(count, bits, lo, hi, nan, minimum, scale, reciprocal, meta);
  }
};

// A group's values above its minimum.
struct Differences {
  const float* x;
  Simd::F minimum;
  Simd::F operator()(int64_t i) const { return Simd::difference(Simd::load(x + i), minimum); }
};

// Where a vector's dither lies: its words, and which byte of them.
struct Place {
  const uint32_t* words;
  int byte;

  static Place of(const uint32_t* words, uint64_t e) {
    return {words + (e / kDitherRun * 16 + e % 16), (int)(e / 16 % 4)};
  }
};

// A plane of Width bits has 8 / Width parts of n elements: element J * n + i goes to bit Width * J of byte i. round<M>
// leaves a code at bit 23 - M of its lane, so that the parts come out side by side in bits 15 to 22. place(e) says
// where the dither of element e lies.
template <int Width, int J, class Places>
ALWAYS_INLINE Simd::I column(const Differences& d, Simd::F r, int64_t n, int64_t i, const Places& place) {
  const Place at = place(J * n, i);
  const Simd::I part = Simd::template round<8 - Width * J>(d(J * n + i), r, at.words, at.byte);
  if constexpr (Width * (J + 1) == 8)
    return part;
  else
    return Simd::template join<15 + Width*(J + 1)>(part, column<Width, J + 1>(d, r, n, i, place));
}

// Packed codes of a group whose plane has n bytes, n a multiple of 64: every part starts with a run of dither.
template <int Width>
ALWAYS_INLINE void round_blocks(const Differences d, Simd::F r, const uint32_t* words, int64_t n, uint8_t* out) {
  constexpr int W = Simd::W;
  for (int64_t i = 0; i < n; i += kDitherRun) {
#pragma GCC unroll 2
    for (int c = 0; c < kDitherRun; c += 4 * W) {
      const auto at = [&](int k) {  // k is known to the compiler, and with it the byte
        return column<Width, 0>(d, r, n, i + k,
                                [&](int64_t part, int64_t) { return Place{words + (part + i) / 4 + k % 16, k / 16}; });
      };
      Simd::store_bytes(out + i + c, Simd::narrow(at(c), at(c + W), at(c + 2 * W), at(c + 3 * W)));
    }
  }
}

// The same for n a multiple of 16.
template <int Width>
ALWAYS_INLINE void round_plane(const Differences d, Simd::F r, const uint32_t* words, int64_t n, uint8_t* out) {
  constexpr int W = Simd::W;
  const auto at = [&](int64_t i) __attribute__((always_inline)) {
    return column<Width, 0>(d, r, n, i,
                            [&](int64_t part, int64_t k) { return Place::of(words, (uint64_t)(part + k)); });
  };
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    Simd::store_bytes(out + i, Simd::narrow(at(i), at(i + W), at(i + 2 * W), at(i + 3 * W)));
  if (i < n) {
    const Simd::I none = Simd::no_codes();
    const Simd::I second = i + W < n ? at(i + W) : none, third = i + 2 * W < n ? at(i + 2 * W) : none;
    Simd::store_bytes_of(out + i, n - i, Simd::narrow(at(i), second, third, none));
  }
}

// Codes of any group in bytes, one after the other; up to 64 of them are written beyond n.
inline void round_codes(const Differences d, Simd::F r, const uint32_t* words, int64_t n, uint8_t* codes) {
  const int64_t whole = n / kDitherRun * kDitherRun;
  round_blocks<8>(d, r, words, whole, codes);
  if (whole == n) return;
  alignas(64) float rest[kDitherRun] = {};
  memcpy(rest, d.x + whole, (size_t)(n - whole) * sizeof(float));
  round_blocks<8>(Differences{rest, d.minimum}, r, words + whole / 4, kDitherRun, codes + whole);
}

template <int Bits>
ALWAYS_INLINE void round_group(const Differences d, Simd::F r, const uint32_t* words, int64_t n, uint8_t* codes,
                               uint8_t* out) {
  if constexpr (Bits == 1 || Bits == 2 || Bits == 4 || Bits == 8) {
    const int64_t bytes = n * Bits / 8;
    if (n * Bits % (8 * kDitherRun) == 0) return round_blocks<Bits>(d, r, words, bytes, out);
    if (n * Bits % (8 * 16) == 0) return round_plane<Bits>(d, r, words, bytes, out);
  }
  round_codes(d, r, words, n, codes);
  memset(codes + n, 0, 16);  // a plane's last byte may hold fewer codes
  pack_group<Bits>(codes, n, out);
}

// (x - minimum) * scale of one group; up to a vector more is written.
inline void scaled_differences(const float* x, int64_t n, float minimum, float scale, float* out) {
  const Simd::F m = Simd::set1(minimum), s = Simd::set1(scale);
  int64_t i = 0;
  for (; i + Simd::W <= n; i += Simd::W) Simd::store(out + i, Simd::mul(Simd::difference(Simd::load(x + i), m), s));
  if (i == n) return;
  alignas(64) float rest[Simd::W] = {};
  memcpy(rest, x + i, (size_t)(n - i) * sizeof(float));
  Simd::store(out + i, Simd::mul(Simd::difference(Simd::load(rest), m), s));
}

// Brings the next batch to the second-level cache while this one computes: the hardware's prefetcher stops at the
// pauses between loads. A core has a dozen line buffers, so what it asks for has to be spread over the three passes.
class Ahead {
 public:
  Ahead(const char* first, int64_t nbytes) : next_(first), end_(first + nbytes) {}
  void fetch(int64_t nbytes) {
    const char* stop = end_ - next_ < nbytes ? end_ : next_ + nbytes;
    for (; next_ < stop; next_ += 64) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const char *next_, *end_;
};

struct Rounding {
  const QuantizeArgs& args;
  const Batch& batch;
  const Cursor start;
  const float* x;  // values of the batch
  const uint32_t* words;
  Ahead& ahead;
};

// Under TowardZero. Not inlined: the compiler knows nothing of rounding modes, and must not move arithmetic in or out.
template <int Bits>
__attribute__((noinline)) void round_batch(const Rounding& job) {
  alignas(64) uint8_t codes[kMaxGroup + 2 * kSlack];
  alignas(64) float scaled[kMaxGroup + kPad];
  const int64_t size = item_size(job.args.dtype);
  Cursor cursor = job.start;
  for (int i = 0; i < job.batch.count; ++i, cursor.next()) {
    const int64_t n = cursor.size(), at = cursor.position - job.start.position;
    job.ahead.fetch(n * size / 3);
    uint8_t* out = job.args.codes + cursor.byte;
    Differences d{job.x + at, Simd::set1(job.batch.minimum[i])};
    if (job.batch.reciprocal[i] == 0.0f) {
      memset(out, 0, (size_t)(cursor.ends_row() ? job.args.at.tail_bytes : job.args.at.group_bytes));
      continue;
    }
    if (job.batch.scale[i] != 1.0f) {
      scaled_differences(d.x, n, job.batch.minimum[i], job.batch.scale[i], scaled);
      d = Differences{scaled, Simd::set1(0.0f)};
    }
    round_group<Bits>(d, Simd::set1(job.batch.reciprocal[i]), job.words + i * job.args.at.blocks * (kDitherBlock / 4),
                      n, codes, out);
  }
}

using RoundBatch = void (*)(const Rounding&);

inline RoundBatch rounder(int bits) {
  static const RoundBatch table[] = {round_batch<1>, round_batch<2>, round_batch<3>, round_batch<4>,
                                     round_batch<5>, round_batch<6>, round_batch<7>, round_batch<8>};
  return table[bits - 1];
}

// Moves the cursor over the groups of the next batch, no more than left of them; returns how many.
inline int next_batch(Cursor& cursor, int64_t left) {
  const int64_t start = cursor.position;
  int count = 0;
  for (; count < kBatchGroups && count < left; cursor.next(), ++count)
    if (cursor.position - start + cursor.size() > kBatch) break;
  return count;
}

// The dither of so many blocks of a tensor from one on, in words; 7 blocks more are written.
template <bool RowsMirrored>
void dither_run(const QuantizeArgs& args, int64_t block, int64_t count, Ahead& ahead, uint32_t* words) {
  for (int64_t b = 0; b < count; b += 8) {
    const int64_t n = count - b < 8 ? count - b : 8;
    Simd::template dither_blocks<RowsMirrored>(DitherBlocks(block + b), n, args.seed, args.stream,
                                               words + kDitherBlock / 4 * b);
    ahead.fetch(n * kDitherBlock * item_size(args.dtype) / 3);
  }
}

// That of groups first to first + count where two rows are drawn and two mirror them.
inline void dither_rows(const QuantizeArgs& args, int64_t first, int count, Ahead& ahead, uint32_t* words) {
  const int64_t size = item_size(args.dtype), each = args.at.blocks * (kDitherBlock / 4), last = first + count;
  const int64_t two = 2 * args.at.rows_mirrored, run = two * args.at.blocks;
  if (run <= kRunBlocks) {
    // All that is drawn for these groups, several pairs of rows a call, and from there to its places.
    alignas(64) uint32_t drawn[(kBatchBlocks / 2 + 2 * kRunBlocks + 7) * kDitherBlock / 4];
    const int64_t four = first / (2 * two), fours = (last - 1) / (2 * two) - four + 1;
    const int64_t used = args.at.group < kDitherBlock ? (args.at.group + kDitherRun - 1) / kDitherRun * 16 : each;
    Simd::template dither_blocks<true>(DitherBlocks(four * 2 * run, run), fours * run, args.seed, args.stream, drawn);
    for (int64_t f = 0, g = four * 2 * two; f < fours; ++f) {
      ahead.fetch(2 * run * kDitherBlock * size / 3);
      for (uint32_t mirror = 0, n = 0; n < 2; ++n, mirror = 0xFFFFFFFFu)
        for (const uint32_t *from = drawn + f * two * each, *end = from + two * each; from != end; from += each, ++g)
          if (g >= first && g < last)
            for (int64_t j = 0; j < used; ++j) words[(g - first) * each + j] = from[j] ^ mirror;
    }
    return;
  }
  for (int64_t g = first, n = 0; g < last; g += n) {
    n = two - g % two < last - g ? two - g % two : last - g;
    const bool mirrored = g / two % 2 != 0;
    // Of longer rows a batch has few pairs whole: each row is drawn for itself.
    uint32_t* to = words + (g - first) * each;
    dither_run<true>(args, (mirrored ? g - two : g) * args.at.blocks, n * args.at.blocks, ahead, to);
    if (mirrored)
      for (int64_t j = 0; j < n * each; ++j) to[j] = ~to[j];
  }
}

int64_t quantize(const QuantizeArgs& args, int64_t first, int64_t last) {
  alignas(64) float values[kBatch + kPad];
  alignas(64) uint32_t words[(kBatchBlocks + 7) * kDitherBlock / 4];
  const RoundBatch round = rounder(args.bits);
  Batch batch;
  const int64_t size = item_size(args.dtype);
  int64_t exact = 0;
  Cursor cursor(args.at, first);
  for (int64_t g = first; g < last; g += batch.count) {
    const Cursor start = cursor;
    batch.count = next_batch(cursor, last - g);
    const int64_t total = cursor.position - start.position;
    const float* x = as_floats(args.x, args.dtype, start.position, total, values);
    Ahead ahead((const char*)args.x + (start.position + total) * size, total * size);
    Cursor each = start;
    for (int i = 0; i < batch.count; ++i, each.next()) {
      batch.range(i, x + (each.position - start.position), each.size());
      ahead.fetch(each.size() * size / 3);
    }
    exact += batch.finish(args.bits, args.meta + g);
    if (args.at.rows_mirrored != 0)
      dither_rows(args, g, batch.count, ahead, words);
    else
      dither_run<false>(args, g * args.at.blocks, batch.count * args.at.blocks, ahead, words);
    const typename Simd::TowardZero mode;
    round({args, batch, start, x, words, ahead});
  }
  return exact;
}

// Only the ranges of quantize(), with nothing coded: a pass at the memory's speed.
void ranges(const RangesArgs& args, int64_t first, int64_t last) {
  alignas(64) float values[kBatch + kPad];
  Batch batch;
  Cursor cursor(args.at, first);
  for (int64_t g = first; g < last; g += batch.count) {
    const Cursor start = cursor;
    batch.count = next_batch(cursor, last - g);
    const float* x = as_floats(args.x, args.dtype, start.position, cursor.position - start.position, values);
    Cursor each = start;
    for (int i = 0; i < batch.count; ++i, each.next())
      batch.range(i, x + (each.position - start.position), each.size());
    for (int i = 0; i < batch.count; ++i) args.ranges[g + i] = group_range(batch.lo[i], batch.hi[i], batch.nan[i] != 0);
  }
}

}  // namespace
}  // namespace hf_actnn
