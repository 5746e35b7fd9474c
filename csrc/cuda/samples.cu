// What concerns whole samples: where their codes begin, and how far the values of their groups spread.
#include "dequantize.cuh"

namespace hf_actnn {
namespace {

// Arguments of a launch may be 4 KiB in all.
constexpr int kPlacesAtOnce = 480;

struct Places {
  int64_t of[kPlacesAtOnce];
};

__global__ void __launch_bounds__(kThreads)
    place_samples_kernel(const __grid_constant__ Places from, int count, int64_t* places) {
  for (int i = thread_index(); i < count; i += kThreads) places[i] = from.of[i];
}

template <class T>
__global__ void __launch_bounds__(kThreads) group_ranges(const T* x, Groups groups, int lanes, float* ranges) {
  const int64_t group = block_index() * (kThreads / lanes) + thread_index() / lanes;
  const Spot spot = spot_of(groups, group);
  Range range = no_range();
#pragma unroll 8
  for (int e = thread_index() % lanes; e < spot.size; e += lanes) range.see(to_float(x[spot.position + e]));
  range = across(range, lanes);
  if (spot.size != 0 && thread_index() % lanes == 0)
    ranges[group] = group_range(range.lo, range.hi, range.lo != range.lo);
}

// One block per sample; each thread sums every 256th group, then halves of the block are added: always the same order.
__global__ void __launch_bounds__(kThreads) sum_ranges(const float* ranges, Groups groups, double* out) {
  double* const sums = (double*)shared_memory();
  const int64_t first = block_index() * groups.per_sample;
  double sum = 0;
  for (int64_t i = thread_index(); i < groups.per_sample; i += kThreads) {
    const int64_t after = first + i + 1, row = quotient(after, groups.at.groups_per_row);
    const bool ends_row = row * groups.at.groups_per_row == after;
    const double n = (double)(ends_row ? groups.at.tail : groups.at.group), range = (double)ranges[first + i];
    sum += n * (range * range);
  }
  sums[thread_index()] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread_index() < half) sums[thread_index()] += sums[thread_index() + half];
  }
  if (thread_index() == 0) out[block_index()] = sums[0];
}

// An element at the fraction f of a step is rounded up with probability f: its variance is step^2 f (1 - f).
template <class T>
__global__ void __launch_bounds__(kThreads)
    group_variances(const T* x, const uint32_t* meta, Groups groups, int lanes, double* out) {
  const int64_t group = block_index() * (kThreads / lanes) + thread_index() / lanes;
  const Spot spot = spot_of(groups, group);
  const Level level = spot.size == 0 ? Level{0.0f, 0.0f} : level_of(meta[group]);
  double sum = 0;
  if (level.step > 0.0f) {  // not 0, nan, or the mark of an exact group
    const double minimum = (double)level.minimum, step = (double)level.step;
#pragma unroll 4
    for (int e = thread_index() % lanes; e < spot.size; e += lanes) {
      double f = ((double)to_float(x[spot.position + e]) - minimum) / step;
      f -= std::trunc(f);
      sum += f - f * f;
    }
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  if (spot.size != 0 && thread_index() % lanes == 0)
    out[group] = level.step > 0.0f ? sum * (double)level.step * (double)level.step : 0.0;
}

}  // namespace

void rounding_variance(const void* x, int dtype, const uint32_t* meta, const Cut& cut, double* out,
                       const Target& target) {
  if (cut.numel == 0) return;
  const Groups groups = groups_of(cut);
  const int lanes = lanes_for(groups.at.group);
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    launch(group_variances<T>, ceil_div(groups.at.n_groups, kThreads / lanes), 0, target, (const T*)x, meta, groups,
           lanes, out);
  });
}

void place_samples(const int64_t* host, int64_t samples, int64_t* places, const Target& target) {
  for (int64_t done = 0; done < samples; done += kPlacesAtOnce) {
    Places part = {};
    const int count = (int)(samples - done < kPlacesAtOnce ? samples - done : kPlacesAtOnce);
    memcpy(part.of, host + done, (size_t)count * sizeof(int64_t));
    launch(place_samples_kernel, 1, 0, target, part, count, places + done);
  }
}

void sample_spread(const void* x, int dtype, const Cut& cut, float* ranges, double* out, const Target& target) {
  if (cut.numel == 0) return;
  Groups groups = groups_of(cut);
  groups.per_sample = groups.at.n_groups / cut.samples;
  const int lanes = lanes_for(groups.at.group);
  const int64_t blocks = ceil_div(groups.at.n_groups, kThreads / lanes);
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    launch(group_ranges<T>, blocks, 0, target, (const T*)x, groups, lanes, ranges);
  });
  launch(sum_ranges, cut.samples, kThreads * (int64_t)sizeof(double), target, ranges, groups, out);
}

#if !defined(HF_ACTNN_SHIM)
void probe(int device) {
  check(cudaSetDevice(device), "cudaSetDevice", device);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, sum_ranges), "loading the kernels", device);
}
#endif

}  // namespace hf_actnn
