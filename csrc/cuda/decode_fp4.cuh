// 4-bit floats of a word to pairs of 16-bit floats, exactly, in registers, by tables of eight bytes
// that lie in two registers: one prmt looks up four codes.
//
// A word holds eight codes, in the order of the pairs that come out. The low three bits of code i,
// the prmt's selector, lie at bit 4i; its highest bit lies where the bytes that are looked up have
// their signs: at 8 (i % 4) + 7 for the first four codes, four bits lower for the others.
//
// benchmarks/LOG.md counts the instructions.
//
// Source: prmt as a table is get_int_from_table_16 of llama.cpp (ggml-cuda/vecdotq.cuh); the layout
// that puts signs over the bytes is ours.
#pragma once

#include "ptx.cuh"

namespace quantkit::cuda {

// Bytes of four codes, whose low three bits are the low half of `selectors`.
template <uint32_t kFirst, uint32_t kLast>
__device__ __forceinline__ uint32_t lookup(uint32_t selectors) {
  return permute_bytes_or_signs(kFirst, kLast, selectors);
}

// Low and high bytes of four 16-bit floats to two pairs.
__device__ __forceinline__ void zip_bytes(uint32_t low, uint32_t high, uint32_t& first,
                                          uint32_t& second) {
  first = permute_bytes(low, high, 0x5140u);
  second = permute_bytes(low, high, 0x7362u);
}

// E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Low bytes are all 0 in f16.
template <class T>
struct E2m1;
template <>
struct E2m1<f16> {
  __device__ __forceinline__ static uint32_t low(uint32_t) { return 0; }
  __device__ __forceinline__ static uint32_t high(uint32_t selectors) {
    return lookup<0x3e3c3800u, 0x46444240u>(selectors);
  }
};
template <>
struct E2m1<bf16> {
  __device__ __forceinline__ static uint32_t low(uint32_t selectors) {
    return lookup<0xc0800000u, 0xc0804000u>(selectors);
  }
  __device__ __forceinline__ static uint32_t high(uint32_t selectors) {
    return lookup<0x3f3f3f00u, 0x40404040u>(selectors);
  }
};

template <class T>
__device__ __forceinline__ void decode_e2m1(uint32_t word, uint32_t (&out)[4]) {
  constexpr uint32_t kSigns = 0x80808080u;
  const uint32_t selectors = word & 0x77777777u;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t four = selectors >> (16 * i), signs = word << (4 * i);
    const uint32_t high = lop3<0xf8>(E2m1<T>::high(four), signs, kSigns);  // a | (b & c)
    zip_bytes(E2m1<T>::low(four), high, out[2 * i], out[2 * i + 1]);
  }
}

// NF4: sixteen values in ascending order, the lower eight without the highest bit; low and high
// bytes of each, of the value rounded to T.
template <class T>
struct Nf4;
template <>
struct Nf4<f16> {
  __device__ __forceinline__ static uint32_t low(uint32_t four, uint32_t upper) {
    return lop3<0xd8>(lookup<0x52339200u, 0x00d4ea8du>(four),
                      lookup<0x68e02618u, 0x00c9800du>(four), upper);
  }
  __device__ __forceinline__ static uint32_t high(uint32_t four, uint32_t upper) {
    return lop3<0xd8>(lookup<0xb6b8b9bcu, 0x00adb1b4u>(four),
                      lookup<0x3533312du, 0x3c393837u>(four), upper);
  }
};
template <>
struct Nf4<bf16> {
  __device__ __forceinline__ static uint32_t low(uint32_t four, uint32_t upper) {
    return lop3<0xd8>(lookup<0xca063280u, 0x00ba3d92u>(four),
                      lookup<0xad7c25a3u, 0x803910e2u>(four), upper);
  }
  __device__ __forceinline__ static uint32_t high(uint32_t four, uint32_t upper) {
    return lop3<0xd8>(lookup<0xbebfbfbfu, 0x00bdbebeu>(four),
                      lookup<0x3e3e3e3du, 0x3f3f3f3eu>(four), upper);
  }
};

template <class T>
__device__ __forceinline__ void decode_nf4(uint32_t word, uint32_t (&out)[4]) {
  const uint32_t selectors = word & 0x77777777u;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t four = selectors >> (16 * i), signs = word << (4 * i);
    const uint32_t upper = permute_bytes_or_signs(signs, signs, 0xba98u);  // 255 for 8 to 15
    zip_bytes(Nf4<T>::low(four, upper), Nf4<T>::high(four, upper), out[2 * i], out[2 * i + 1]);
  }
}

}  // namespace quantkit::cuda
