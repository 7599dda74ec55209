// 8-bit codes: INT8 by a shift and a conversion, e4m3 by the conversion instruction of sm_89 and
// newer (the toolkit's integer version before that).
#include "weight_only.cuh"

namespace quantkit::cuda {

int w8_linear(const qk_weight_only_args& a, cudaStream_t stream) {
  if (a.format == QK_I8) {
    return a.x_dtype == QK_F16 ? launch_linear<f16, I8>(a, stream)
                               : launch_linear<bf16, I8>(a, stream);
  }
  return a.x_dtype == QK_F16 ? launch_linear<f16, F8>(a, stream)
                             : launch_linear<bf16, F8>(a, stream);
}

int w8_dequantize(const qk_weight_only_args& a, cudaStream_t stream) {
  if (a.format == QK_I8) {
    return a.x_dtype == QK_F16 ? launch_dequantize<f16, I8>(a, stream)
                               : launch_dequantize<bf16, I8>(a, stream);
  }
  return a.x_dtype == QK_F16 ? launch_dequantize<f16, F8>(a, stream)
                             : launch_dequantize<bf16, F8>(a, stream);
}

}  // namespace quantkit::cuda
