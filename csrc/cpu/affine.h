// Values times a scale plus a shift, of their channel or of their row and place. Include after the Simd of a variant.
#pragma once

#include "kernels.h"

namespace hf_actnn {
namespace {

void affine(const AffineArgs& args, int64_t first, int64_t last) {
  constexpr int W = Simd::W;
  if (args.inner == 1) {  // channels side by side: a run of them at a time
    for (int64_t at = first; at < last;) {
      const int64_t channel = at % args.channels;
      const int64_t n = args.channels - channel < last - at ? args.channels - channel : last - at;
      float* x = args.values + at;
      const float *a = args.scale + channel, *b = args.shift + channel;
      int64_t i = 0;
      for (; i + W <= n; i += W)
        Simd::store(x + i, Simd::add(Simd::mul(Simd::load(x + i), Simd::load(a + i)), Simd::load(b + i)));
      for (; i < n; ++i) x[i] = x[i] * a[i] + b[i];
      at += n;
    }
    return;
  }
  for (int64_t run = first; run < last; ++run) {
    const int64_t channel = run % args.channels;
    const float a = args.scale[channel], b = args.shift[channel];
    const Simd::F scale = Simd::set1(a), shift = Simd::set1(b);
    float* x = args.values + run * args.inner;
    int64_t i = 0;
    for (; i + W <= args.inner; i += W) Simd::store(x + i, Simd::add(Simd::mul(Simd::load(x + i), scale), shift));
    for (; i < args.inner; ++i) x[i] = x[i] * a + b;
  }
}

template <bool Weight, bool Bias>
void normalize_rows(const NormalizeArgs& args, int64_t first, int64_t last) {
  constexpr int W = Simd::W;
  for (int64_t row = first; row < last; ++row) {
    const float m = args.mean[row], f = args.factor[row];
    const Simd::F mean = Simd::set1(m), factor = Simd::set1(f);
    float* x = args.values + row * args.width;
    int64_t i = 0;
    for (; i + W <= args.width; i += W) {
      Simd::F v = Simd::mul(Simd::sub(Simd::load(x + i), mean), factor);
      if (Weight) v = Simd::mul(v, Simd::load(args.weight + i));
      if (Bias) v = Simd::add(v, Simd::load(args.bias + i));
      Simd::store(x + i, v);
    }
    for (; i < args.width; ++i) {
      float v = (x[i] - m) * f;
      if (Weight) v *= args.weight[i];
      if (Bias) v += args.bias[i];
      x[i] = v;
    }
  }
}

void normalize(const NormalizeArgs& args, int64_t first, int64_t last) {
  if (args.weight != nullptr && args.bias != nullptr)
    normalize_rows<true, true>(args, first, last);
  else if (args.weight != nullptr)
    normalize_rows<true, false>(args, first, last);
  else if (args.bias != nullptr)
    normalize_rows<false, true>(args, first, last);
  else
    normalize_rows<false, false>(args, first, last);
}

}  // namespace
}  // namespace hf_actnn
