// The 4-bit float kernels for float16 activations.
#include "fp4a16.cuh"

namespace quantkit::cuda::fp4 {

int linear_f16(const qk_fp4a16_args& a, cudaStream_t stream) { return linear<f16>(a, stream); }

}  // namespace quantkit::cuda::fp4
