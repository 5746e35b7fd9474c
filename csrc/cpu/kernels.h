// What each compiled variant of the CPU kernels offers. A call works on a range of groups, so any split over threads
// gives the same bytes.
#pragma once

#include "../codec.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace hf_actnn {

struct QuantizeArgs {
  const void* x;
  int dtype;
  Layout at;
  int bits;
  uint64_t seed, stream;
  uint8_t* codes;
  uint32_t* meta;  // [n_groups] pairs of bf16, the minimum in the low half
};

struct RangesArgs {
  const void* x;
  int dtype;
  Layout at;
  float* ranges;  // [n_groups], maximum - minimum; 0 for a group whose values no step serves
};

struct DequantizeArgs {
  const uint8_t* codes;
  const uint16_t* meta;
  Layout at;
  int bits;
  int dtype;
  void* out;
  bool streaming;  // write around the caches
};

struct PackMaskArgs {
  const void* x;
  int dtype;
  int64_t numel;
  int predicate;
  double lo, hi;
  uint8_t* codes;
};

struct UnpackMaskArgs {
  const uint8_t* codes;
  int64_t numel;
  int dtype;
  double on, off;
  void* out;
};

struct ScaleByMaskArgs {
  const uint8_t* codes;
  int64_t numel;
  float on, off;
  float* values;  // times on or off, in place
};

struct SelectByMaskArgs {
  const void* x;
  int dtype;
  const uint8_t* codes;
  int64_t numel;
  void* out;  // x where the bit is set, 0 elsewhere
};

struct AffineArgs {
  const float* scale;  // [channels], and shift too
  const float* shift;
  int64_t channels, inner;  // values of a channel that lie side by side
  float* values;            // [..., channels, inner], in place
};

struct NormalizeArgs {
  const float *mean, *factor;  // [rows]
  const float *weight, *bias;  // [width], or null
  int64_t width;
  float* values;  // [rows, width], in place
};

struct PackUintArgs {
  const uint8_t* values;
  int64_t numel;
  int bits;
  uint8_t* codes;
};

struct UnpackUintArgs {
  const uint8_t* codes;
  int64_t numel;
  int bits;
  int dtype;
  void* out;
};

struct Kernels {
  const char* name;
  int64_t (*quantize)(const QuantizeArgs&, int64_t first, int64_t last);  // returns how many groups must be kept exact
  void (*ranges)(const RangesArgs&, int64_t first, int64_t last);
  void (*dequantize)(const DequantizeArgs&, int64_t first, int64_t last);
  void (*pack_mask)(const PackMaskArgs&, int64_t first, int64_t last);  // groups of 256 elements, here and below
  void (*unpack_mask)(const UnpackMaskArgs&, int64_t first, int64_t last);
  void (*scale_by_mask)(const ScaleByMaskArgs&, int64_t first, int64_t last);
  void (*select_by_mask)(const SelectByMaskArgs&, int64_t first, int64_t last);
  void (*affine)(const AffineArgs&, int64_t first, int64_t last);        // runs of inner values
  void (*normalize)(const NormalizeArgs&, int64_t first, int64_t last);  // rows
  void (*pack_uint)(const PackUintArgs&, int64_t first, int64_t last);
  void (*unpack_uint)(const UnpackUintArgs&, int64_t first, int64_t last);
};

extern const Kernels kPortable;
#if defined(HF_ACTNN_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The first calls of blocks of dither, one after the other: all from a block on, or runs of them, after each of which
// as many are left out.
class DitherBlocks {
 public:
  explicit DitherBlocks(int64_t block, int64_t run = INT64_MAX) : call_(4 * (uint64_t)block), left_(run), run_(run) {}

  // That of the next block, of which so many follow each other: a divisor of the run.
  template <int Blocks>
  uint64_t next() {
    const uint64_t call = call_;
    call_ += 4 * Blocks;
    if ((left_ -= Blocks) == 0) {
      call_ += 4 * (uint64_t)run_;
      left_ = run_;
    }
    return call;
  }

 private:
  uint64_t call_;
  int64_t left_, run_;
};

}  // namespace hf_actnn
