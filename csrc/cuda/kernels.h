// What the CUDA kernels offer to the bindings, and to the tests that run them on a CPU. Every call puts its work on the
// caller's stream and returns; nothing waits for the device. Addresses are of device memory, flat, and may be aligned
// to one element only.
#pragma once

#include <cstdint>

#include "../codec.h"

namespace hf_actnn {

// Where the work goes: a device's number and a stream's handle, as torch gives them. The device is the caller's current
// one.
struct Target {
  int device;
  uintptr_t stream;
};

// How a flat tensor is cut. With widths, samples equal parts have each their own number of bits, and places
// [samples] says in device memory where the codes of each begin: byte * 16 + bits.
struct Cut {
  int64_t numel, row_length, group_size;
  int bits;
  int64_t samples;
  const int64_t* places;
};

// The generator's key and sequence. What advance points to, if anything, is added to the sequence when the kernel runs:
// a captured graph that counts there draws other numbers in each replay.
struct Draw {
  uint64_t seed, stream;
  const int64_t* advance;
};

void quantize(const void* x, int dtype, const Cut& cut, const Draw& draw, uint8_t* codes, uint32_t* meta, int* exact,
              const Target& target);
void dequantize(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, void* out, const Target& target);
// out = grad * f'(x), x what dequantize gives in the dtype, f the activation of that number.
void activation_backward(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, int function,
                         const void* grad, void* out, const Target& target);
// What a normalisation or an activation makes of the values that dequantize gives in the dtype, each of its operations
// rounded to fp32 and the result to the dtype, which is fp32, fp16 or bf16. By channel and by row: fewer than 2^31
// elements.
//
// value * scale[c] + shift[c], c the channel: `inner` values of one lie side by side, after them those of the next.
// With a mask of as many bits what is stored is times `on`, an fp32 number, where a bit is set, and times 0 elsewhere.
// Or, where the mask holds `signs`, a value whose bit is not set is negative: times -1 before it is scaled.
void rebuild_by_channel(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, const float* scale,
                        const float* shift, int64_t channels, int64_t inner, const uint8_t* mask, double on, bool signs,
                        void* out, const Target& target);
// (value - mean[r]) * factor[r] * weight[i] + bias[i], r the row and i the place in it; weight and bias may be missing.
// Of fp32 values the result may be of any of the dtypes.
void rebuild_by_row(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, int out_dtype,
                    const float* mean, const float* factor, const float* weight, const float* bias, int64_t width,
                    void* out, const Target& target);
void rebuild_activation(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, int function, void* out,
                        const Target& target);
// The same of values, in place: by channel, by row, and times a mask. By channel out of place too, `out` then being
// other memory; with a mask what is stored is times `on` where a bit is set and times `off` elsewhere.
void affine(const void* values, int dtype, int64_t numel, int64_t channels, int64_t inner, const float* scale,
            const float* shift, const uint8_t* mask, double on, double off, void* out, const Target& target);
void normalize(float* values, int64_t numel, int64_t width, const float* mean, const float* factor, const float* weight,
               const float* bias, const Target& target);
void scale_by_mask(void* values, int dtype, const uint8_t* codes, int64_t numel, double on, double off,
                   const Target& target);
// Writes places from numbers of the host, which travel as arguments of the launch: no copy that a stream would have to
// wait for, or a captured graph would repeat from memory that is gone.
void place_samples(const int64_t* host, int64_t samples, int64_t* places, const Target& target);
void sample_spread(const void* x, int dtype, const Cut& cut, float* ranges, double* out, const Target& target);
// The variance that the codes of x have over the dither, summed over the elements of each group: out [groups].
void rounding_variance(const void* x, int dtype, const uint32_t* meta, const Cut& cut, double* out,
                       const Target& target);
void pack_mask(const void* x, int dtype, int64_t numel, int predicate, double lo, double hi, uint8_t* codes,
               const Target& target);
void unpack_mask(const uint8_t* codes, int64_t numel, int dtype, double on, double off, void* out,
                 const Target& target);
// out = x where the mask's bit is set, and 0 elsewhere, whatever x is there.
void select_by_mask(const void* x, int dtype, const uint8_t* codes, int64_t numel, void* out, const Target& target);
void pack_uint(const uint8_t* values, int64_t numel, int bits, uint8_t* codes, const Target& target);
void unpack_uint(const uint8_t* codes, int64_t numel, int bits, int dtype, void* out, const Target& target);

// Throws if the device cannot run these kernels, with what the runtime says: no driver, one that is too old, or a
// device of an architecture that was not built for.
void probe(int device);

}  // namespace hf_actnn
