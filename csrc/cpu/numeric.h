// Scalar number formats. Included by translation units that are compiled for different
// instruction sets, so everything is in an anonymous namespace: a shared inline function would
// let the linker keep the AVX-512 copy for every CPU.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline float bf16_to_f32(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; a NaN stays a quiet NaN.
inline uint16_t f32_to_bf16(float f) {
  const uint32_t u = bits_of(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u | (u >> 16) : rounded);
}

inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t mag = h & 0x7fffu;
  if (mag >= 0x7c00u) return float_of(sign | 0x7f800000u | ((mag & 0x3ffu) << 13));
  if (mag >= 0x0400u) return float_of(sign | ((mag << 13) + (112u << 23)));
  const float sub = static_cast<float>(mag) * 5.9604644775390625e-08f;  // 2^-24
  return float_of(sign | bits_of(sub));
}

inline uint16_t f32_to_f16(float f) {
  const uint32_t u = bits_of(f);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return sign | 0x7e00u;
  if (mag >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or more
  if (mag < 0x38800000u) {                        // below 2^-14: a subnormal, in steps of 2^-24
    const float shifted = float_of(mag) + 0.5f;   // 0.5 has an ulp of 2^-24: rounds to even
    return sign | static_cast<uint16_t>(bits_of(shifted) - 0x3f000000u);
  }
  const uint32_t rounded = mag - (112u << 23) + 0xfffu + ((mag >> 13) & 1u);
  return sign | static_cast<uint16_t>(rounded >> 13);
}

// float8 e4m3fn: 1 sign, 4 exponent (bias 7), 3 mantissa bits; 0x7f is NaN, no infinity.
inline float f8_to_f32(uint8_t b) {
  const uint32_t sign = static_cast<uint32_t>(b & 0x80u) << 24;
  const uint32_t mag = b & 0x7fu;
  if (mag == 0x7fu) return float_of(sign | 0x7fc00000u);
  if (mag >= 8u) return float_of(sign | ((mag << 20) + (120u << 23)));
  return float_of(sign | bits_of(static_cast<float>(mag) * 0.001953125f));  // 2^-9
}

}  // namespace
