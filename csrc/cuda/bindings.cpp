// The Python module hf_actnn._native_cuda: addresses and sizes in, checked by hf_actnn/codec/ops.py; nothing of torch
// in here. The last two arguments of every kernel are the device and the stream to run on. Loading it asks nothing of a
// driver.
#include <pybind11/pybind11.h>

#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace hf_actnn {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Cut uniform(int64_t numel, int64_t row_length, int64_t group_size, int bits) {
  return Cut{numel, row_length, group_size, bits, 0, nullptr};
}

// Samples of their own widths, which lie in host memory; places is room for as many numbers in device memory.
Cut mixed(int64_t numel, int64_t row_length, int64_t group_size, uintptr_t widths, int64_t samples, uintptr_t places,
          const Target& target) {
  const uint8_t* width = pointer<const uint8_t>(widths);
  const int64_t rows = numel / samples / row_length;
  std::vector<int64_t> host((size_t)samples);
  int64_t byte = 0;
  for (int64_t s = 0; s < samples; ++s) {
    host[(size_t)s] = byte << 4 | width[s];
    byte += rows * make_layout(numel, row_length, group_size, width[s]).row_bytes;
  }
  place_samples(host.data(), samples, pointer<int64_t>(places), target);
  return Cut{numel, row_length, group_size, 0, samples, pointer<const int64_t>(places)};
}

void quantize_uniform(uintptr_t x, int dtype, int64_t numel, int64_t row_length, int64_t group_size, int bits,
                      int64_t seed, int64_t stream, uintptr_t advance, uintptr_t codes, uintptr_t meta, uintptr_t exact,
                      int device, uintptr_t queue) {
  quantize(pointer<const void>(x), dtype, uniform(numel, row_length, group_size, bits),
           Draw{(uint64_t)seed, (uint64_t)stream, pointer<const int64_t>(advance)}, pointer<uint8_t>(codes),
           pointer<uint32_t>(meta), pointer<int>(exact), Target{device, queue});
}

void quantize_mixed(uintptr_t x, int dtype, int64_t numel, int64_t row_length, int64_t group_size, uintptr_t widths,
                    int64_t samples, uintptr_t places, int64_t seed, int64_t stream, uintptr_t advance, uintptr_t codes,
                    uintptr_t meta, uintptr_t exact, int device, uintptr_t queue) {
  if (numel == 0) return;
  const Target target{device, queue};
  quantize(pointer<const void>(x), dtype, mixed(numel, row_length, group_size, widths, samples, places, target),
           Draw{(uint64_t)seed, (uint64_t)stream, pointer<const int64_t>(advance)}, pointer<uint8_t>(codes),
           pointer<uint32_t>(meta), pointer<int>(exact), target);
}

void dequantize_uniform(uintptr_t codes, uintptr_t meta, int64_t numel, int64_t row_length, int64_t group_size,
                        int bits, int dtype, uintptr_t out, int device, uintptr_t queue) {
  dequantize(pointer<const uint8_t>(codes), pointer<const uint32_t>(meta), uniform(numel, row_length, group_size, bits),
             dtype, pointer<void>(out), Target{device, queue});
}

void dequantize_mixed(uintptr_t codes, uintptr_t meta, int64_t numel, int64_t row_length, int64_t group_size,
                      uintptr_t widths, int64_t samples, uintptr_t places, int dtype, uintptr_t out, int device,
                      uintptr_t queue) {
  if (numel == 0) return;
  const Target target{device, queue};
  dequantize(pointer<const uint8_t>(codes), pointer<const uint32_t>(meta),
             mixed(numel, row_length, group_size, widths, samples, places, target), dtype, pointer<void>(out), target);
}

void activation_backward_uniform(uintptr_t codes, uintptr_t meta, int64_t numel, int64_t row_length, int64_t group_size,
                                 int bits, int dtype, int function, uintptr_t grad, uintptr_t out, int device,
                                 uintptr_t queue) {
  activation_backward(pointer<const uint8_t>(codes), pointer<const uint32_t>(meta),
                      uniform(numel, row_length, group_size, bits), dtype, function, pointer<const void>(grad),
                      pointer<void>(out), Target{device, queue});
}

void activation_backward_mixed(uintptr_t codes, uintptr_t meta, int64_t numel, int64_t row_length, int64_t group_size,
                               uintptr_t widths, int64_t samples, uintptr_t places, int dtype, int function,
                               uintptr_t grad, uintptr_t out, int device, uintptr_t queue) {
  if (numel == 0) return;
  const Target target{device, queue};
  activation_backward(pointer<const uint8_t>(codes), pointer<const uint32_t>(meta),
                      mixed(numel, row_length, group_size, widths, samples, places, target), dtype, function,
                      pointer<const void>(grad), pointer<void>(out), target);
}

// Of the codes of a tensor, whichever kind of cut it has: without widths all of them have the same bits.
Cut any_cut(int64_t numel, int64_t row_length, int64_t group_size, int bits, uintptr_t widths, int64_t samples,
            uintptr_t places, const Target& target) {
  if (widths == 0 || numel == 0) return uniform(numel, row_length, group_size, bits);
  return mixed(numel, row_length, group_size, widths, samples, places, target);
}

void rebuild_by_channel_of(uintptr_t codes, uintptr_t meta, int64_t numel, int64_t row_length, int64_t group_size,
                           int bits, uintptr_t widths, int64_t samples, uintptr_t places, int dtype, uintptr_t scale,
                           uintptr_t shift, int64_t channels, int64_t inner, uintptr_t mask, double on, bool signs,
                           uintptr_t out, int device, uintptr_t queue) {
  const Target target{device, queue};
  rebuild_by_channel(pointer<const uint8_t>(codes), pointer<const uint32_t>(meta),
                     any_cut(numel, row_length, group_size, bits, widths, samples, places, target), dtype,
                     pointer<const float>(scale), pointer<const float>(shift), channels, inner,
                     pointer<const uint8_t>(mask), on, signs, pointer<void>(out), target);
}

void rebuild_by_row_of(uintptr_t codes, uintptr_t meta, int64_t numel, int64_t row_length, int64_t group_size, int bits,
                       uintptr_t widths, int64_t samples, uintptr_t places, int dtype, int out_dtype, uintptr_t mean,
                       uintptr_t factor, uintptr_t weight, uintptr_t bias, int64_t width, uintptr_t out, int device,
                       uintptr_t queue) {
  const Target target{device, queue};
  rebuild_by_row(pointer<const uint8_t>(codes), pointer<const uint32_t>(meta),
                 any_cut(numel, row_length, group_size, bits, widths, samples, places, target), dtype, out_dtype,
                 pointer<const float>(mean), pointer<const float>(factor), pointer<const float>(weight),
                 pointer<const float>(bias), width, pointer<void>(out), target);
}

void rebuild_activation_of(uintptr_t codes, uintptr_t meta, int64_t numel, int64_t row_length, int64_t group_size,
                           int bits, uintptr_t widths, int64_t samples, uintptr_t places, int dtype, int function,
                           uintptr_t out, int device, uintptr_t queue) {
  const Target target{device, queue};
  rebuild_activation(pointer<const uint8_t>(codes), pointer<const uint32_t>(meta),
                     any_cut(numel, row_length, group_size, bits, widths, samples, places, target), dtype, function,
                     pointer<void>(out), target);
}

void affine_of(uintptr_t values, int dtype, int64_t numel, int64_t channels, int64_t inner, uintptr_t scale,
               uintptr_t shift, uintptr_t mask, double on, double off, uintptr_t out, int device, uintptr_t queue) {
  affine(pointer<const void>(values), dtype, numel, channels, inner, pointer<const float>(scale),
         pointer<const float>(shift), pointer<const uint8_t>(mask), on, off, pointer<void>(out), Target{device, queue});
}

void normalize_of(uintptr_t values, int64_t numel, int64_t width, uintptr_t mean, uintptr_t factor, uintptr_t weight,
                  uintptr_t bias, int device, uintptr_t queue) {
  normalize(pointer<float>(values), numel, width, pointer<const float>(mean), pointer<const float>(factor),
            pointer<const float>(weight), pointer<const float>(bias), Target{device, queue});
}

void scale_by_mask_of(uintptr_t values, int dtype, uintptr_t codes, int64_t numel, double on, double off, int device,
                      uintptr_t queue) {
  scale_by_mask(pointer<void>(values), dtype, pointer<const uint8_t>(codes), numel, on, off, Target{device, queue});
}

void spread(uintptr_t x, int dtype, int64_t numel, int64_t row_length, int64_t group_size, int64_t samples,
            uintptr_t ranges, uintptr_t out, int device, uintptr_t queue) {
  sample_spread(pointer<const void>(x), dtype, Cut{numel, row_length, group_size, 1, samples, nullptr},
                pointer<float>(ranges), pointer<double>(out), Target{device, queue});
}

void rounding_variance_of(uintptr_t x, int dtype, uintptr_t meta, int64_t numel, int64_t row_length, int64_t group_size,
                          uintptr_t out, int device, uintptr_t queue) {
  rounding_variance(pointer<const void>(x), dtype, pointer<const uint32_t>(meta),
                    uniform(numel, row_length, group_size, 1), pointer<double>(out), Target{device, queue});
}

void pack_mask_of(uintptr_t x, int dtype, int64_t numel, int predicate, double lo, double hi, uintptr_t codes,
                  int device, uintptr_t queue) {
  pack_mask(pointer<const void>(x), dtype, numel, predicate, lo, hi, pointer<uint8_t>(codes), Target{device, queue});
}

void unpack_mask_of(uintptr_t codes, int64_t numel, int dtype, double on, double off, uintptr_t out, int device,
                    uintptr_t queue) {
  unpack_mask(pointer<const uint8_t>(codes), numel, dtype, on, off, pointer<void>(out), Target{device, queue});
}

void select_by_mask_of(uintptr_t x, int dtype, uintptr_t codes, int64_t numel, uintptr_t out, int device,
                       uintptr_t queue) {
  select_by_mask(pointer<const void>(x), dtype, pointer<const uint8_t>(codes), numel, pointer<void>(out),
                 Target{device, queue});
}

void pack_uint_of(uintptr_t values, int64_t numel, int bits, uintptr_t codes, int device, uintptr_t queue) {
  pack_uint(pointer<const uint8_t>(values), numel, bits, pointer<uint8_t>(codes), Target{device, queue});
}

void unpack_uint_of(uintptr_t codes, int64_t numel, int bits, int dtype, uintptr_t out, int device, uintptr_t queue) {
  unpack_uint(pointer<const uint8_t>(codes), numel, bits, dtype, pointer<void>(out), Target{device, queue});
}

}  // namespace
}  // namespace hf_actnn

PYBIND11_MODULE(_native_cuda, m) {
  using namespace hf_actnn;
  m.def("architectures", [] { return HF_ACTNN_ARCHITECTURES; });
  m.def("probe", &probe);
  m.def("quantize", &quantize_uniform);
  m.def("dequantize", &dequantize_uniform);
  m.def("quantize_mixed", &quantize_mixed);
  m.def("dequantize_mixed", &dequantize_mixed);
  m.def("activation_backward", &activation_backward_uniform);
  m.def("activation_backward_mixed", &activation_backward_mixed);
  m.def("rebuild_by_channel", &rebuild_by_channel_of);
  m.def("rebuild_by_row", &rebuild_by_row_of);
  m.def("rebuild_activation", &rebuild_activation_of);
  m.def("affine", &affine_of);
  m.def("normalize", &normalize_of);
  m.def("scale_by_mask", &scale_by_mask_of);
  m.def("sample_spread", &spread);
  m.def("rounding_variance", &rounding_variance_of);
  m.def("pack_mask", &pack_mask_of);
  m.def("unpack_mask", &unpack_mask_of);
  m.def("select_by_mask", &select_by_mask_of);
  m.def("pack_uint", &pack_uint_of);
  m.def("unpack_uint", &unpack_uint_of);
}
