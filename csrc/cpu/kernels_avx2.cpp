// The kernels for AVX2 + FMA + F16C.
#include "simd_portable.h"

#include "activations.h"
#include "w8a8.h"
#include "weight_only.h"

namespace quantkit {

const KernelTable& avx2_kernels() {
  static const KernelTable table = {
      "avx2", weight_only_kernel<F32Math, W4ToF32, I8ToF32, F8ToF32>(),
      {}, w8a8_kernel(), quantize_row, dequantize_row};
  return table;
}

}  // namespace quantkit
