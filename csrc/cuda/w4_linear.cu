// 4-bit codes through a codebook in shared memory: its 16 words lie in 16 banks, so any mixture of
// indices in a warp is read without a conflict.
#include "weight_only.cuh"

namespace quantkit::cuda {

int w4_linear(const qk_weight_only_args& a, cudaStream_t stream) {
  return a.x_dtype == QK_F16 ? launch_linear<f16, W4>(a, stream)
                             : launch_linear<bf16, W4>(a, stream);
}

int w4_dequantize(const qk_weight_only_args& a, cudaStream_t stream) {
  return a.x_dtype == QK_F16 ? launch_dequantize<f16, W4>(a, stream)
                             : launch_dequantize<bf16, W4>(a, stream);
}

}  // namespace quantkit::cuda
