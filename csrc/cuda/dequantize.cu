// Codes to values that are stored as they are.
#include "dequantize.cuh"

namespace hf_actnn {
namespace {

template <class T>
struct Stored {
  using Element = T;
  using Source = T;
  using OnlyStored = std::true_type;
  struct Nothing {};
  T* out;

  bool aligned() const { return hf_actnn::aligned(out, 16); }
  __device__ __forceinline__ Nothing ahead(int64_t) const { return {}; }
  template <int V>
  __device__ __forceinline__ uint4 of(const float (&y)[V], int64_t, Nothing) const {
    return vec_of_floats<T, true>(y);
  }
  __device__ __forceinline__ T of(T value, int64_t) const { return value; }
};

}  // namespace

void dequantize(const uint8_t* codes, const uint32_t* meta, const Cut& cut, int dtype, void* out,
                const Target& target) {
  if (cut.numel == 0) return;
  with_float(dtype, [&](auto type) {
    using T = decltype(type);
    dequantize_for(Stored<T>{(T*)out}, codes, meta, groups_of(cut), target);
  });
}

}  // namespace hf_actnn
