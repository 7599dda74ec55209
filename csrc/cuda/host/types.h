// CUDA's vector and 16-bit float types, with their rounding, for a compiler without CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace quantkit::cuda {

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

namespace twin {

// The value nearest to v among those with `fraction` bits after the leading one and exponents from
// `lowest` (subnormals below); ties to even. Exact in a double for every 16- and 8-bit float.
inline double round_to(double v, int fraction, int lowest) {
  if (v == 0.0 || !std::isfinite(v)) return v;
  const int exponent = std::ilogb(v) > lowest ? std::ilogb(v) : lowest;
  const double unit = std::ldexp(1.0, exponent - fraction);
  return std::nearbyint(v / unit) * unit;
}

// a * b + c rounded to odd in double: rounding that again to at most 24 bits is rounding once.
inline double fma_to_odd(double a, double b, double c) {
  const double product = a * b;  // exact: 16-bit floats
  const double sum = product + c;
  if (!std::isfinite(sum)) return sum;
  const double rest = sum - product;
  const double lost = (product - (sum - rest)) + (c - rest);
  if (lost == 0.0 || (bits_as<uint64_t>(sum) & 1u)) return sum;
  return std::nextafter(sum, lost > 0 ? INFINITY : -INFINITY);
}

}  // namespace twin

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return bits_as<float>(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(f16 v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const float sign = v.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return exponent == 0 ? sign * std::ldexp(static_cast<float>(fraction), -24)
                       : sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

namespace twin {

inline bf16 to_bf16(double v) {
  if (std::isnan(v)) return {0x7fff};
  const double rounded = round_to(v, 7, -126);
  // Past the largest finite value the conversion to float gives an infinity.
  const float f = std::fabs(rounded) >= std::ldexp(1.0, 128) ? std::copysign(INFINITY, v)
                                                               : static_cast<float>(rounded);
  return {static_cast<uint16_t>(bits_as<uint32_t>(f) >> 16)};
}

inline f16 to_f16(double v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (std::isnan(v)) return {0x7fff};
  const double rounded = std::fabs(round_to(v, 10, -14));
  if (rounded >= 65536.0) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (rounded < std::ldexp(1.0, -14)) {
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::ldexp(rounded, 24)))};
  }
  const int exponent = std::ilogb(rounded);
  const int fraction = static_cast<int>(std::ldexp(rounded, 10 - exponent)) - 1024;
  return {static_cast<uint16_t>(sign | (exponent + 15) << 10 | fraction)};
}

template <class T>
T round_as(double v);
template <>
inline f16 round_as<f16>(double v) {
  return to_f16(v);
}
template <>
inline bf16 round_as<bf16>(double v) {
  return to_bf16(v);
}

inline float e4m3_to_float(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const float sign = code & 0x80 ? -1.0f : 1.0f;
  if (exponent == 15 && fraction == 7) return NAN;
  return exponent == 0 ? sign * std::ldexp(static_cast<float>(fraction), -9)
                       : sign * std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
}

inline uint8_t float_to_e4m3(float v) {
  const uint8_t sign = std::signbit(v) ? 0x80 : 0;
  if (std::isnan(v)) return sign | 0x7f;
  double rounded = std::fabs(round_to(v, 3, -6));
  if (rounded > 448.0) rounded = 448.0;  // also infinities
  if (rounded < std::ldexp(1.0, -6)) {
    return static_cast<uint8_t>(sign | static_cast<int>(std::ldexp(rounded, 9)));
  }
  const int exponent = std::ilogb(rounded);
  const int fraction = static_cast<int>(std::ldexp(rounded, 3 - exponent)) - 8;
  return static_cast<uint8_t>(sign | (exponent + 7) << 3 | fraction);
}

}  // namespace twin

template <class T>
T from_float(float v) {
  return twin::round_as<T>(v);
}
template <>
inline float from_float<float>(float v) {
  return v;
}

}  // namespace quantkit::cuda
