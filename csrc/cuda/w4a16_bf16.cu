// The W4A16 kernels for bfloat16 activations.
#include "w4a16.cuh"

namespace quantkit::cuda::w4a16 {

int linear_bf16(const qk_w4a16_args& a, cudaStream_t stream) { return linear<bf16>(a, stream); }

}  // namespace quantkit::cuda::w4a16
