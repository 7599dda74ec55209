// 4- and 8-bit codes of a word to pairs of 16-bit floats, exactly, in registers.
#pragma once

#include "ptx.cuh"

namespace quantkit::cuda {

// Eight 4-bit codes of a word to four pairs of (code - zero), exactly; pair j holds the codes at
// bits 4j and 16 + 4j. Pairs 0 and 2 have one zero point and pairs 1 and 3 another: the two rows of
// a lane's fragment of mma.m16n8k16. A code becomes mantissa bits of 1024 + code (f16) or
// 128 + code (bf16), from which the same number of its zero point is subtracted. zeros takes the two
// zero points, 0 to 15, from bytes kByte and kByte + 1 of a word.
//
// Source: Kim et al., "Who Says Elephants Can't Run", arXiv 2211.10017, section 4; the bf16 form is
// Marlin's (github.com/IST-DASLab/marlin).
struct Int4Zeros {
  uint32_t even, odd;
};
template <class T>
struct Int4;
template <>
struct Int4<f16> {
  template <int kByte>
  __device__ __forceinline__ static Int4Zeros zeros(uint32_t bytes) {
    // Pairs 1 and 3 lie four bits higher, as 1024 + 16 code: (1024 + 16 code) / 16 - 64 - zero.
    return {permute_bytes(bytes, 0x64646464u, 0x4040u + kByte * 0x0101u),
            permute_bytes(bytes << 4, 0xd4d4d4d4u, 0x4040u + (kByte + 1) * 0x0101u)};
  }
  __device__ __forceinline__ static void decode(uint32_t word, Int4Zeros zero, uint32_t (&out)[4]) {
    constexpr uint32_t kSixteenth = 0x2c002c00u;
    const uint32_t next = word >> 8;
    out[0] = Pair<f16>::sub(lop3<0xea>(word, 0x000f000fu, 0x64006400u), zero.even);
    out[1] = Pair<f16>::fma(lop3<0xea>(word, 0x00f000f0u, 0x64006400u), kSixteenth, zero.odd);
    out[2] = Pair<f16>::sub(lop3<0xea>(next, 0x000f000fu, 0x64006400u), zero.even);
    out[3] = Pair<f16>::fma(lop3<0xea>(next, 0x00f000f0u, 0x64006400u), kSixteenth, zero.odd);
  }
};
template <>
struct Int4<bf16> {
  template <int kByte>
  __device__ __forceinline__ static Int4Zeros zeros(uint32_t bytes) {
    return {permute_bytes(bytes, 0x43434343u, 0x4040u + kByte * 0x0101u),
            permute_bytes(bytes, 0x43434343u, 0x4040u + (kByte + 1) * 0x0101u)};
  }
  __device__ __forceinline__ static void decode(uint32_t word, Int4Zeros zero, uint32_t (&out)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out[j] = Pair<bf16>::sub(lop3<0xea>(word >> (4 * j), 0x000f000fu, 0x43004300u),
                               j % 2 == 0 ? zero.even : zero.odd);
    }
  }
};

// Four 8-bit codes of a word to two pairs of T, exactly: codes 0 and 1, then 2 and 3.
//
// Source: the magic numbers are those of Int4; the bf16 form splits two's complement into its low
// seven bits and minus 128 for the sign, since 128 + code needs eight bits of mantissa.
template <class T>
struct Int8;
template <>
struct Int8<f16> {
  __device__ __forceinline__ static void decode(uint32_t word, uint32_t& low, uint32_t& high) {
    const uint32_t codes = word ^ 0x80808080u;  // code + 128
    low = Pair<f16>::sub(permute_bytes(codes, 0x64646464u, 0x4140u), 0x64806480u);
    high = Pair<f16>::sub(permute_bytes(codes, 0x64646464u, 0x4342u), 0x64806480u);
  }
};
template <>
struct Int8<bf16> {
  __device__ __forceinline__ static void decode(uint32_t word, uint32_t& low, uint32_t& high) {
    // 0x4300 is 128: with the low bits 128 + low, with the sign bit 256.
    const uint32_t first = permute_bytes(word, 0x43434343u, 0x4140u);
    const uint32_t second = permute_bytes(word, 0x43434343u, 0x4342u);
    low = Pair<bf16>::sub(first & 0xff7fff7fu, first & 0xff80ff80u);
    high = Pair<bf16>::sub(second & 0xff7fff7fu, second & 0xff80ff80u);
  }
};

template <class T>
struct Fp8;
template <>
struct Fp8<f16> {
  __device__ __forceinline__ static void decode(uint32_t word, uint32_t& low, uint32_t& high) {
    low = e4m3x2_to_f16x2(static_cast<uint16_t>(word));
    high = e4m3x2_to_f16x2(static_cast<uint16_t>(word >> 16));
  }
};
template <>
struct Fp8<bf16> {
  __device__ __forceinline__ static void decode(uint32_t word, uint32_t& low, uint32_t& high) {
    Fp8<f16>::decode(word, low, high);
    const float2 first = Pair<f16>::to_floats(low), second = Pair<f16>::to_floats(high);
    low = Pair<bf16>::from_floats(first.x, first.y);
    high = Pair<bf16>::from_floats(second.x, second.y);
  }
};

}  // namespace quantkit::cuda
