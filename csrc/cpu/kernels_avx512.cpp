// The kernels for AVX-512 F, BW, DQ, VL and VNNI.
#include "simd_avx512.h"

#include "attention.h"
#include "int8_linear.h"

namespace quantkit {

const KernelTable& avx512_kernels() {
  static const KernelTable table = {
      "avx512",
      weight_only_kernel<F32Math, W4ToF32, I8ToF32, F8ToF32, B16ToF32, F32ToF32>(),
      {},
      int8_kernel(),
      row_kernels(),
      attention_kernel<F32Math, F32ToF32, B16ToF32, I8ToF32, F8ToF32>(),
      {},
      quantize_row,
      dequantize_row};
  return table;
}

}  // namespace quantkit
