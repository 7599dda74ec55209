// The few device primitives that the kernels use, and a host twin of each.
//
// nvcc compiles the first half. With QK_HOST_TWIN defined, g++ compiles the same kernels against
// the second half: the threads of a block are fibers that yield at barriers and exchange values at
// shuffles. That finds wrong indices, layouts and tails on a machine without a GPU; it says nothing
// about races between blocks, alignment, or speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "quantkit/quantkit.h"

#ifndef QK_HOST_TWIN

namespace quantkit::cuda {

__device__ inline void barrier() { __syncthreads(); }
__device__ inline float shuffle_xor(float v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}

// Weights are read once: keep them out of the way of x and the scales in L1.
__device__ inline uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
template <class T>
__device__ inline T load_shared_by_many(const T* p) {
  return __ldg(p);
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
           const Arguments&... arguments) {
  kernel<<<grid, threads, 0, stream>>>(arguments...);
  return cudaGetLastError() == cudaSuccess ? QK_OK : QK_LAUNCH_FAILED;
}

}  // namespace quantkit::cuda

#else

#include <cmath>
#include <cstring>
#include <functional>

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __shared__ static  // blocks run one after another, their threads in one thread
#define __launch_bounds__(threads)

namespace quantkit::cuda {

extern dim3 threadIdx, blockIdx;  // of the fiber that is running

void barrier();
float shuffle_xor(float v, int mask);

inline uint4 load_once(const void* p) {
  uint4 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
T load_shared_by_many(const T* p) {
  return *p;
}

void run_grid(dim3 grid, int threads, const std::function<void()>& kernel);

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t,
           const Arguments&... arguments) {
  run_grid(grid, threads, [&] { kernel(arguments...); });
  return QK_OK;
}

}  // namespace quantkit::cuda

#endif
