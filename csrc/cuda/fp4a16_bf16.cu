// The 4-bit float kernels for bfloat16 activations.
#include "fp4a16.cuh"

namespace quantkit::cuda::fp4 {

int linear_bf16(const qk_fp4a16_args& a, cudaStream_t stream) { return linear<bf16>(a, stream); }

}  // namespace quantkit::cuda::fp4
