// The kernels in plain C++: whatever vectors the base architecture has.
#include "simd_portable.h"

#include "attention.h"
#include "int8_linear.h"

namespace quantkit {

const KernelTable& generic_kernels() {
  static const KernelTable table = {
      "generic",
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
