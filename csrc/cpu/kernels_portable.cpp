// The CPU kernels, portable variant; setup.py gives this file the compiler flags that it needs.
#include "simd_portable.h"
// The kernels are written against the Simd that the line above defines.
#include "affine.h"
#include "dequantize.h"
#include "masks.h"
#include "quantize.h"

namespace hf_actnn {

extern const Kernels kPortable = {"portable",    quantize,       ranges, dequantize, pack_mask, unpack_mask,
                                  scale_by_mask, select_by_mask, affine, normalize,  pack_uint, unpack_uint};

}  // namespace hf_actnn
