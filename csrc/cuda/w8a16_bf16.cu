// The W8A16 kernels for bfloat16 activations.
#include "w8a16.cuh"

namespace quantkit::cuda::w8 {

int w8a16_bf16(const qk_w8a16_args& a, cudaStream_t stream) {
  return a.format == QK_I8 ? weight_only<bf16, Int8<bf16>>(a, stream)
                           : weight_only<bf16, Fp8<bf16>>(a, stream);
}

}  // namespace quantkit::cuda::w8
