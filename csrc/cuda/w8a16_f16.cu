// The W8A16 kernels for float16 activations.
#include "w8a16.cuh"

namespace quantkit::cuda::w8 {

int w8a16_f16(const qk_w8a16_args& a, cudaStream_t stream) {
  return a.format == QK_I8 ? weight_only<f16, Int8<f16>>(a, stream)
                           : weight_only<f16, Fp8<f16>>(a, stream);
}

}  // namespace quantkit::cuda::w8
