// Rows in memory, read by eight elements at a time: aligned rows by 16 bytes, others one by one.
#pragma once

#include "ptx.cuh"

namespace quantkit::cuda {

// Eight columns of a row of 16-bit floats from column k on, zero past the end. kVector: 16-byte
// aligned, and the number of columns is a multiple of 8.
template <bool kVector, class T>
__device__ __forceinline__ uint4 load_x(const T* row, int k, int columns) {
  if constexpr (kVector) {
    return k < columns ? load_global(reinterpret_cast<const uint4*>(row + k)) : uint4{0, 0, 0, 0};
  } else {
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t low = 0, high = 0;
      if (k + 2 * j < columns) low = bits_as<uint16_t>(load_global(row + k + 2 * j));
      if (k + 2 * j + 1 < columns) high = bits_as<uint16_t>(load_global(row + k + 2 * j + 1));
      pairs[j] = low | high << 16;
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

// Four elements as two pairs, zero from `count` on. kVector: 8-byte aligned, and count is at least 4
// or at most 0.
template <bool kVector, class T>
__device__ __forceinline__ uint2 load_four(const T* at, int count) {
  if constexpr (kVector) {
    return count > 0 ? load_global(reinterpret_cast<const uint2*>(at)) : uint2{0, 0};
  } else {
    uint32_t pairs[2] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j >= count) continue;
      const uint32_t element = bits_as<uint16_t>(load_global(at + j));
      pairs[j / 2] |= element << (16 * (j % 2));
    }
    return {pairs[0], pairs[1]};
  }
}

template <class T>
__device__ __forceinline__ void to_floats(const uint4& pairs, float (&out)[8]) {
  const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 both = Pair<T>::to_floats(words[j]);
    out[2 * j] = both.x;
    out[2 * j + 1] = both.y;
  }
}

template <class T>
__device__ __forceinline__ uint4 from_floats(const float (&v)[8]) {
  return {Pair<T>::from_floats(v[0], v[1]), Pair<T>::from_floats(v[2], v[3]),
          Pair<T>::from_floats(v[4], v[5]), Pair<T>::from_floats(v[6], v[7])};
}

// An element of a table whose dtype (qk_dtype) is known at run time.
__device__ __forceinline__ float load_as_float(const void* p, int dtype, int64_t i) {
  if (dtype == QK_F32) return load_global(static_cast<const float*>(p) + i);
  if (dtype == QK_F16) return to_float(load_global(static_cast<const f16*>(p) + i));
  return to_float(load_global(static_cast<const bf16*>(p) + i));
}

inline bool aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace quantkit::cuda
