// The kernels for AVX-512 F, BW, DQ, VL and VNNI.
#include "simd_avx512.h"

#include "activations.h"
#include "w8a8.h"
#include "weight_only.h"

namespace quantkit {

const KernelTable& avx512_kernels() {
  static const KernelTable table = {
      "avx512", weight_only_kernel<F32Math, W4ToF32, I8ToF32, F8ToF32>(),
      {}, w8a8_kernel(), quantize_row, dequantize_row};
  return table;
}

}  // namespace quantkit
