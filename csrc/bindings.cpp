// The Python module hf_actnn._native_cpu: addresses and sizes in, checked by hf_actnn/codec/ops.py; nothing of torch in
// here.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace hf_actnn {
namespace {

// From here on other Python threads may run meanwhile; below, handing over the lock would cost more than the kernel.
constexpr int64_t kReleaseFrom = 16384;
// From here on (bytes) dequantised tensors are written around the caches: they would not stay there anyway.
constexpr int64_t kStreamFrom = 32 << 20;

bool supported(const std::string& name) {
#if defined(HF_ACTNN_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (name == "avx2") return avx2;
  if (name == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return name == "portable";
}

const Kernels& named(const std::string& name) {
#if defined(HF_ACTNN_X86)
  if (name == "avx512") return kAvx512;
  if (name == "avx2") return kAvx2;
#endif
  return kPortable;
}

const Kernels& choose() {
  const char* wanted = std::getenv("HF_ACTNN_CPU_VARIANT");
  if (wanted != nullptr && *wanted != '\0') {
    const std::string name = wanted;
    if (name != "avx512" && name != "avx2" && name != "portable")
      throw std::invalid_argument("HF_ACTNN_CPU_VARIANT is \"" + name + "\"; expected avx512, avx2 or portable");
    if (!supported(name))
      throw std::invalid_argument("HF_ACTNN_CPU_VARIANT is \"" + name +
                                  "\", which this processor or build does not support; unset it");
    return named(name);
  }
  for (const char* name : {"avx512", "avx2"})
    if (supported(name)) return named(name);
  return kPortable;
}

const Kernels* kernels = nullptr;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Runs body(first, last) on ranges of units, without the interpreter's lock where that pays.
template <class Body>
void run(int64_t units, int64_t elements, int threads, const Body& body) {
  const Work work = [](void* context, int64_t first, int64_t last) {
    (*static_cast<const Body*>(context))(first, last);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&body));
  if (elements >= kReleaseFrom) {
    py::gil_scoped_release release;
    parallel_for(units, elements, threads, work, context);
  } else if (units > 0) {
    parallel_for(units, elements, threads, work, context);
  }
}

int64_t quantize(uintptr_t x, int dtype, int64_t numel, int64_t row_length, int64_t group_size, int bits, int64_t seed,
                 int64_t stream, uintptr_t codes, uintptr_t meta, int threads) {
  if (numel == 0) return 0;
  const QuantizeArgs args{pointer<const void>(x),
                          dtype,
                          make_layout(numel, row_length, group_size, bits),
                          bits,
                          (uint64_t)seed,
                          (uint64_t)stream,
                          pointer<uint8_t>(codes),
                          pointer<uint32_t>(meta)};
  std::atomic<int64_t> exact{0};
  run(args.at.n_groups, numel, threads,
      [&](int64_t first, int64_t last) { exact += kernels->quantize(args, first, last); });
  return exact;
}

bool streams(int64_t numel, int dtype) {
  const int64_t size = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
  return numel * size >= kStreamFrom;
}

void dequantize(uintptr_t codes, uintptr_t meta, int64_t numel, int64_t row_length, int64_t group_size, int bits,
                int dtype, uintptr_t out, int threads) {
  if (numel == 0) return;
  const DequantizeArgs args{pointer<const uint8_t>(codes),
                            pointer<const uint16_t>(meta),
                            make_layout(numel, row_length, group_size, bits),
                            bits,
                            dtype,
                            pointer<void>(out),
                            streams(numel, dtype)};
  run(args.at.n_groups, numel, threads, [&](int64_t first, int64_t last) { kernels->dequantize(args, first, last); });
}

// Neighbouring samples of one width. A kernel finds a group's codes from the group's number alone, as if all groups had
// the width that it is called with; so it is given the address where group 0 would then lie.
struct Run {
  int64_t last;  // the group behind it
  int bits;
  Layout at;
  uintptr_t codes;
};

std::vector<Run> runs_of(uintptr_t codes, int64_t numel, int64_t row_length, int64_t group_size, uintptr_t widths,
                         int64_t samples) {
  const uint8_t* width = pointer<const uint8_t>(widths);
  const int64_t rows = numel / samples / row_length;
  std::vector<Run> runs;
  for (int64_t s = 0, end; s < samples; s = end) {
    for (end = s + 1; end < samples && width[end] == width[s];) ++end;
    const Layout at = make_layout(numel, row_length, group_size, width[s]);
    runs.push_back({end * rows * at.groups_per_row, width[s], at, codes - (uintptr_t)(s * rows * at.row_bytes)});
    codes += (uintptr_t)((end - s) * rows * at.row_bytes);
  }
  return runs;
}

// Calls body(run, first, last) for the part of each run that lies in [first, last).
template <class Body>
void over_runs(const std::vector<Run>& runs, int64_t first, int64_t last, const Body& body) {
  auto run = std::upper_bound(runs.begin(), runs.end(), first, [](int64_t g, const Run& r) { return g < r.last; });
  for (; first < last; first = run->last, ++run) body(*run, first, std::min(run->last, last));
}

int64_t quantize_mixed(uintptr_t x, int dtype, int64_t numel, int64_t row_length, int64_t group_size, uintptr_t widths,
                       int64_t samples, int64_t seed, int64_t stream, uintptr_t codes, uintptr_t meta, int threads) {
  if (numel == 0) return 0;
  const std::vector<Run> runs = runs_of(codes, numel, row_length, group_size, widths, samples);
  std::atomic<int64_t> exact{0};
  run(runs.back().last, numel, threads, [&](int64_t first, int64_t last) {
    over_runs(runs, first, last, [&](const Run& part, int64_t from, int64_t to) {
      exact += kernels->quantize({pointer<const void>(x), dtype, part.at, part.bits, (uint64_t)seed, (uint64_t)stream,
                                  pointer<uint8_t>(part.codes), pointer<uint32_t>(meta)},
                                 from, to);
    });
  });
  return exact;
}

void dequantize_mixed(uintptr_t codes, uintptr_t meta, int64_t numel, int64_t row_length, int64_t group_size,
                      uintptr_t widths, int64_t samples, int dtype, uintptr_t out, int threads) {
  if (numel == 0) return;
  const std::vector<Run> runs = runs_of(codes, numel, row_length, group_size, widths, samples);
  const bool streaming = streams(numel, dtype);
  run(runs.back().last, numel, threads, [&](int64_t first, int64_t last) {
    over_runs(runs, first, last, [&](const Run& part, int64_t from, int64_t to) {
      kernels->dequantize({pointer<const uint8_t>(part.codes), pointer<const uint16_t>(meta), part.at, part.bits, dtype,
                           pointer<void>(out), streaming},
                          from, to);
    });
  });
}

// For each sample the sum of n * range^2 over its groups of n values, in their order: the same for any threads.
void sample_spread(uintptr_t x, int dtype, int64_t numel, int64_t row_length, int64_t group_size, int64_t samples,
                   uintptr_t out, int threads) {
  if (numel == 0) return;
  const Layout at = make_layout(numel, row_length, group_size, 1);
  const std::unique_ptr<float[]> ranges(new float[(size_t)at.n_groups]);
  const RangesArgs args{pointer<const void>(x), dtype, at, ranges.get()};
  run(at.n_groups, numel, threads, [&](int64_t first, int64_t last) { kernels->ranges(args, first, last); });
  const int64_t groups = at.n_groups / samples;
  run(samples, at.n_groups, threads, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      double sum = 0;
      for (int64_t g = s * groups; g < (s + 1) * groups; ++g) {
        const int64_t n = (g + 1) % at.groups_per_row == 0 ? at.tail : at.group;
        sum += (double)n * ((double)ranges[g] * (double)ranges[g]);
      }
      pointer<double>(out)[s] = sum;
    }
  });
}

void pack_mask(uintptr_t x, int dtype, int64_t numel, int predicate, double lo, double hi, uintptr_t codes,
               int threads) {
  const PackMaskArgs args{pointer<const void>(x), dtype, numel, predicate, lo, hi, pointer<uint8_t>(codes)};
  run(ceil_div(numel, kMaskGroup), numel, threads,
      [&](int64_t first, int64_t last) { kernels->pack_mask(args, first, last); });
}

void unpack_mask(uintptr_t codes, int64_t numel, int dtype, double on, double off, uintptr_t out, int threads) {
  const UnpackMaskArgs args{pointer<const uint8_t>(codes), numel, dtype, on, off, pointer<void>(out)};
  run(ceil_div(numel, kMaskGroup), numel, threads,
      [&](int64_t first, int64_t last) { kernels->unpack_mask(args, first, last); });
}

void scale_by_mask(uintptr_t values, uintptr_t codes, int64_t numel, double on, double off, int threads) {
  const ScaleByMaskArgs args{pointer<const uint8_t>(codes), numel, (float)on, (float)off, pointer<float>(values)};
  run(ceil_div(numel, kMaskGroup), numel, threads,
      [&](int64_t first, int64_t last) { kernels->scale_by_mask(args, first, last); });
}

void select_by_mask(uintptr_t x, int dtype, uintptr_t codes, int64_t numel, uintptr_t out, int threads) {
  const SelectByMaskArgs args{pointer<const void>(x), dtype, pointer<const uint8_t>(codes), numel, pointer<void>(out)};
  run(ceil_div(numel, kMaskGroup), numel, threads,
      [&](int64_t first, int64_t last) { kernels->select_by_mask(args, first, last); });
}

void affine(uintptr_t values, int64_t numel, int64_t channels, int64_t inner, uintptr_t scale, uintptr_t shift,
            int threads) {
  const AffineArgs args{pointer<const float>(scale), pointer<const float>(shift), channels, inner,
                        pointer<float>(values)};
  run(numel / inner, numel, threads, [&](int64_t first, int64_t last) { kernels->affine(args, first, last); });
}

void normalize(uintptr_t values, int64_t numel, int64_t width, uintptr_t mean, uintptr_t factor, uintptr_t weight,
               uintptr_t bias, int threads) {
  const NormalizeArgs args{pointer<const float>(mean),
                           pointer<const float>(factor),
                           pointer<const float>(weight),
                           pointer<const float>(bias),
                           width,
                           pointer<float>(values)};
  run(numel / width, numel, threads, [&](int64_t first, int64_t last) { kernels->normalize(args, first, last); });
}

void pack_uint(uintptr_t values, int64_t numel, int bits, uintptr_t codes, int threads) {
  const PackUintArgs args{pointer<const uint8_t>(values), numel, bits, pointer<uint8_t>(codes)};
  run(ceil_div(numel, kMaskGroup), numel, threads,
      [&](int64_t first, int64_t last) { kernels->pack_uint(args, first, last); });
}

void unpack_uint(uintptr_t codes, int64_t numel, int bits, int dtype, uintptr_t out, int threads) {
  const UnpackUintArgs args{pointer<const uint8_t>(codes), numel, bits, dtype, pointer<void>(out)};
  run(ceil_div(numel, kMaskGroup), numel, threads,
      [&](int64_t first, int64_t last) { kernels->unpack_uint(args, first, last); });
}

}  // namespace
}  // namespace hf_actnn

PYBIND11_MODULE(_native_cpu, m) {
  using namespace hf_actnn;
  kernels = &choose();
  m.def("variant", [] { return kernels->name; });
  m.def("thread_backend", [] { return thread_backend(); });
  m.def("supported", [] {
    py::list names;
    for (const char* name : {"avx512", "avx2", "portable"})
      if (supported(name)) names.append(name);
    return names;
  });
  // For tests and benchmarks: the variants must agree in one process.
  m.def("use_variant", [](const std::string& name) {
    if (!supported(name)) throw std::invalid_argument("no such variant here: " + name);
    kernels = &named(name);
  });
  m.def("quantize", &quantize);
  m.def("dequantize", &dequantize);
  m.def("quantize_mixed", &quantize_mixed);
  m.def("dequantize_mixed", &dequantize_mixed);
  m.def("sample_spread", &sample_spread);
  m.def("pack_mask", &pack_mask);
  m.def("unpack_mask", &unpack_mask);
  m.def("scale_by_mask", &scale_by_mask);
  m.def("select_by_mask", &select_by_mask);
  m.def("affine", &affine);
  m.def("normalize", &normalize);
  m.def("pack_uint", &pack_uint);
  m.def("unpack_uint", &unpack_uint);
}
