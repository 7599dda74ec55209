// The device instructions that the kernels use: one thin function each, and nothing else may touch
// inline assembly, vendor intrinsics or `__shared__`.
//
// nvcc compiles the functions below. With QK_HOST_TWIN defined, g++ compiles the same kernels
// against host/ptx.h, which has the same functions and executes them on a CPU (host/machine.h).
//
// A pair of 16-bit floats is the uint32_t register that holds it, lower element in the lower half.
// Instructions of a warp (mma, ldmatrix, shuffles, sync_warp) need all 32 lanes.
// Source of every fragment layout: PTX ISA 9.0, "Matrix Fragments for mma.m16n8k16 / .m16n8k32".
#pragma once

#ifdef QK_HOST_TWIN
#include "host/ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "quantkit/quantkit.h"

namespace quantkit::cuda {

using f16 = __half;
using bf16 = __nv_bfloat16;

// ---- scalars and pairs -----------------------------------------------------------------------

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return __float2bfloat16_rn(v);
}

// Arithmetic on pairs of T = f16 or bf16, each element rounded once to nearest even.
template <class T>
struct Pair;
template <>
struct Pair<f16> {
  __device__ __forceinline__ static uint32_t add(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hadd2(bits_as<__half2>(a), bits_as<__half2>(b)));
  }
  __device__ __forceinline__ static uint32_t sub(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hsub2(bits_as<__half2>(a), bits_as<__half2>(b)));
  }
  __device__ __forceinline__ static uint32_t mul(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hmul2(bits_as<__half2>(a), bits_as<__half2>(b)));
  }
  __device__ __forceinline__ static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return bits_as<uint32_t>(
        __hfma2(bits_as<__half2>(a), bits_as<__half2>(b), bits_as<__half2>(c)));
  }
  __device__ __forceinline__ static uint32_t from_floats(float low, float high) {
    return bits_as<uint32_t>(__floats2half2_rn(low, high));
  }
  __device__ __forceinline__ static float2 to_floats(uint32_t v) {
    return __half22float2(bits_as<__half2>(v));
  }
};
template <>
struct Pair<bf16> {
  __device__ __forceinline__ static uint32_t add(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hadd2(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b)));
  }
  __device__ __forceinline__ static uint32_t sub(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hsub2(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b)));
  }
  __device__ __forceinline__ static uint32_t mul(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hmul2(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b)));
  }
  __device__ __forceinline__ static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return bits_as<uint32_t>(__hfma2(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b),
                                     bits_as<__nv_bfloat162>(c)));
  }
  __device__ __forceinline__ static uint32_t from_floats(float low, float high) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
  }
  __device__ __forceinline__ static float2 to_floats(uint32_t v) {
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
  }
};

// The product, rounded, even where a sum follows: compilers make one fma of the two otherwise.
__device__ __forceinline__ float multiply_then_round(float a, float b) { return __fmul_rn(a, b); }

// a / b to 2 ulp; 0 where b is past 2^126.
__device__ __forceinline__ float divide_nearly(float a, float b) { return __fdividef(a, b); }

// Two e4m3 codes to a pair of f16, exactly; and back with saturation to 448.
__device__ __forceinline__ uint32_t e4m3x2_to_f16x2(uint16_t codes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  // Without the instruction, the bits move to where f16 has them, with an exponent 8 too low; what
  // is 480 then was a NaN.
  const uint32_t high = __byte_perm(codes, 0, 0x1404);
  const __half2 value = __hmul2(bits_as<__half2>((high & 0x80008000u) | (high >> 1 & 0x3f803f80u)),
                                __float2half2_rn(256.0f));
  return bits_as<uint32_t>(value) | __hgt2_mask(__habs2(value), __float2half2_rn(464.0f));
#else
  return bits_as<uint32_t>(__half2(__nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3)));
#endif
}
__device__ __forceinline__ uint16_t floats_to_e4m3x2(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(float2{low, high}, __NV_SATFINITE, __NV_E4M3);
}

// ---- integers --------------------------------------------------------------------------------

// Bit b of the result is bit (4 a + 2 b + c) of the table, for the three operands' bits.
template <int kTable>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}
// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes {b, a}.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// The same, where bit 3 of a selector asks for the byte's sign in all eight bits.
__device__ __forceinline__ uint32_t permute_bytes_or_signs(uint32_t a, uint32_t b,
                                                           uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// The same number, of which the compiler knows nothing: what is made of it is made anew, and not kept
// in registers from before.
__device__ __forceinline__ int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// ---- a warp ----------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T shuffle(T v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T v, int delta) {
  return __shfl_down_sync(0xffffffffu, v, delta);
}
__device__ __forceinline__ uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// ---- tensor cores ----------------------------------------------------------------------------

// D[16, 8] = A[16, 16] B[16, 8] + D in fp32, elements of T = f16 or bf16.
// With g = lane / 4 and t = lane % 4:
//   a[0] = A[g, 2t..]  a[1] = A[g + 8, 2t..]  a[2] = A[g, 2t + 8..]  a[3] = A[g + 8, 2t + 8..]
//   b[0] = B[2t.., g]  b[1] = B[2t + 8.., g]
//   d[0], d[1] = D[g, 2t..]  d[2], d[3] = D[g + 8, 2t..]
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with k = 32 and four bytes a register: a[0] = A[g, 4t..], a[2] = A[g, 4t + 16..] and so
// on. Sums of s8 products are exact.
__device__ __forceinline__ void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  __trap();  // sm_89 and newer have it: whoever launches asks the device first
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// kCount 8 x 8 matrices of 16-bit elements. Lane 8 i + r gives the address of row r of matrix i, 16
// aligned bytes; register i is matrix i's [lane / 4][2 (lane % 4)..], of its transpose if asked.
template <int kCount, bool kTranspose = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&d)[kCount], uint32_t address) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  if constexpr (kCount == 1 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(d[0]) : "r"(address) : "memory");
  } else if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(d[0]) : "r"(address) : "memory");
  } else if constexpr (kCount == 2 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1]) : "r"(address) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1]) : "r"(address) : "memory");
  } else if constexpr (!kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
  }
}

// ---- a block ---------------------------------------------------------------------------------

__device__ __forceinline__ void barrier() { __syncthreads(); }
// Barriers 1 to 15 among `threads` of the block, a multiple of 32.
__device__ __forceinline__ void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// An array in shared memory. Addresses are those of ldmatrix and cp_async: bytes in the block's
// shared window.
template <class T>
class SharedArray {
 public:
  __device__ __forceinline__ explicit SharedArray(T* data) : data_(data) {}
  __device__ __forceinline__ T load(int i) const { return data_[i]; }
  __device__ __forceinline__ void store(int i, T v) const { data_[i] = v; }
  template <class V>  // 4, 8 or 16 aligned bytes from element i on
  __device__ __forceinline__ V load_vector(int i) const {
    return *reinterpret_cast<const V*>(data_ + i);
  }
  template <class V>
  __device__ __forceinline__ void store_vector(int i, V v) const {
    *reinterpret_cast<V*>(data_ + i) = v;
  }
  __device__ __forceinline__ uint32_t address(int i) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(data_ + i));
  }

 private:
  T* data_;
};

// Hands out the block's dynamic shared memory, one array after another, each 128 bytes aligned.
class SharedMemory {
 public:
  template <class T>
  __device__ __forceinline__ SharedArray<T> array(int count) {
    extern __shared__ __align__(128) uint8_t shared_bytes[];
    T* data = reinterpret_cast<T*>(shared_bytes + used_);
    used_ += (count * static_cast<int>(sizeof(T)) + 127) / 128 * 128;
    return SharedArray<T>(data);
  }

 private:
  int used_ = 0;
};

// Sixteen bytes from global to shared memory, the last 16 - valid of them zero. They are there
// after this thread's cp_async_wait of their group, for other threads after a barrier behind it.
__device__ __forceinline__ void cp_async_16(uint32_t address, const void* source, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(address), "l"(source), "r"(valid) : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// ---- global memory ---------------------------------------------------------------------------

template <class T>  // read-only while the kernel runs, and read by many
__device__ __forceinline__ T load_global(const T* p) {
  return __ldg(p);
}
template <class T>  // written by other blocks of this launch: past the L1 cache
__device__ __forceinline__ T load_from_l2(const T* p) {
  return __ldcg(p);
}
template <class T>
__device__ __forceinline__ void store_global(T* p, T v) {
  *p = v;
}

// Weights are read once: they leave L1 to x and the scales.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Integers only: sums of floats in the order of arrival would differ from run to run.
__device__ __forceinline__ uint32_t atomic_add(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }
__device__ __forceinline__ uint32_t atomic_max(uint32_t* p, uint32_t v) { return atomicMax(p, v); }
// This thread's writes become visible to the whole device before its later ones.
__device__ __forceinline__ void fence_device() { __threadfence(); }

// Programmatic dependent launch: the next kernel's blocks may start; and wait until the memory of
// the previous kernel is complete. Nothing on a launch without `overlap` or before sm_90.
__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- launch ----------------------------------------------------------------------------------

struct Launch {
  dim3 grid;
  int threads;       // of a block: a multiple of 32
  int shared_bytes;  // dynamic shared memory of a block
  cudaStream_t stream;
  bool overlap = false;  // may start before the previous kernel ends: see wait_for_previous
};

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Launch& at, const Arguments&... arguments) {
  if (at.shared_bytes > 48 * 1024 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, at.shared_bytes) !=
          cudaSuccess) {
    return QK_LAUNCH_FAILED;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = at.grid;
  config.blockDim = dim3(static_cast<unsigned>(at.threads));
  config.dynamicSmemBytes = static_cast<size_t>(at.shared_bytes);
  config.stream = at.stream;
  config.attrs = &attribute;
  config.numAttrs = at.overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...) == cudaSuccess
             ? QK_OK
             : QK_LAUNCH_FAILED;
}

}  // namespace quantkit::cuda

#endif  // QK_HOST_TWIN
