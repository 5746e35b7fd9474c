// Gradients of activations whose inputs are codes: the values go straight into the formula, and are never stored.
#include "dequantize.cuh"

namespace hf_actnn {
namespace {

// What of the gradient of f(x) is that of x, in the operations and the order of torch's kernels. R is float or double.
template <int F, class R>
__device__ __forceinline__ R derived(R grad, R x) {
  if constexpr (F == kSilu) {
    const R sigmoid = R(1) / (R(1) + std::exp(-x));
    return grad * sigmoid * (R(1) + x * (R(1) - sigmoid));
  } else if constexpr (F == kGelu) {
    const R cdf = R(0.5) * (R(1) + std::erf(x * R(0.70710678118654752)));  // sqrt(1/2)
    const R pdf = std::exp(R(-0.5) * x * x) * R(0.39894228040143268);      // sqrt(1 / (2 pi))
    return grad * (cdf + x * pdf);
  } else {
    // x / 2 * (1 + tanh(a (x + b x^3))), by the product rule
    const R a = R(0.79788456080286536), b = R(0.044715);  // a: sqrt(2 / pi)
    const R square = x * x, t = std::tanh(a * (x + b * (square * x)));
    const R left = R(0.5) * (R(1) + t);
    const R right = R(0.5) * x * (R(1) - t * t) * (a * (R(1) + R(3) * b * square));
    return grad * (left + right);
  }
}

template <class T, int F>
struct Derived {
  using Element = T;
  using Source = T;
  using OnlyStored = std::false_type;
  const T* grad;
  T* out;

  bool aligned() const { return hf_actnn::aligned(grad, 16) && hf_actnn::aligned(out, 16); }
  __device__ __forceinline__ uint4 ahead(int64_t index) const { return load_vec(grad, index); }
  template <int V>
  __device__ __forceinline__ uint4 of(float (&y)[V], int64_t, const uint4& grads) const {
    round_to<T>(y);
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = derived<F>(element(T{}, grads, i), y[i]);
    return vec_of_floats<T, false>(y);
  }
  __device__ __forceinline__ T of(T value, int64_t position) const {
    return rounded(T{}, derived<F>(wide(grad[position]), wide(value)));
  }
};

template <int F>
void backward_of(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, const void* grad, void* out,
                 const Target& target) {
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    dequantize_for(Derived<T, F>{(const T*)grad, (T*)out}, codes, meta, groups_of(cut), target);
  });
}

}  // namespace

void activation_backward(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, int function,
                         const void* grad, void* out, const Target& target) {
  if (cut.numel == 0) return;
  switch (function) {
    case kGelu:
      return backward_of<kGelu>(codes, meta, cut, dtype, grad, out, target);
    case kGeluTanh:
      return backward_of<kGeluTanh>(codes, meta, cut, dtype, grad, out, target);
    default:
      return backward_of<kSilu>(codes, meta, cut, dtype, grad, out, target);
  }
}

}  // namespace hf_actnn
