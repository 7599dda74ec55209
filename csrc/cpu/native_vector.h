// fp32 vectors as wide as the registers of the instruction set that a file is compiled for, in the
// compiler's vector extension: 16 lanes with AVX-512, 8 with AVX2, 4 otherwise. And rounding to
// the codes of solvers.h.
//
// Solvers include this in files compiled with -ffp-contract=off: a fused product only where it says
// fma, so that codes are those of separate multiplications and additions.
#pragma once

#include <cstdint>
#include <cstring>

#include "quantkit/solvers.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace quantkit {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif
constexpr int kVecLanes = kVecBytes / 4;

typedef float Vec __attribute__((vector_size(kVecBytes)));
typedef int32_t VecI __attribute__((vector_size(kVecBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));

inline Vec load_vec(const float* p) {
  Vec v;
  std::memcpy(&v, p, kVecBytes);
  return v;
}
inline void store_vec(float* p, Vec v) { std::memcpy(p, &v, kVecBytes); }
inline Vec splat_vec(float f) { return f - Vec{}; }  // not + : that would turn -0 into +0

// c + a * b and c - a * b, rounded once where the instruction set can.
inline Vec fma_vec(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
inline Vec minus_product_vec(Vec c, Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_fnmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fnmadd_ps(a, b, c);
#else
  return c - a * b;
#endif
}

// The larger of v and `low`; a NaN in v passes.
inline Vec at_least_vec(Vec v, float low) {
#if defined(__AVX512F__)
  return _mm512_max_ps(splat_vec(low), v);
#elif defined(__AVX2__)
  return _mm256_max_ps(splat_vec(low), v);
#else
  return v < splat_vec(low) ? splat_vec(low) : v;
#endif
}

// v times 2 to the n, integers between -126 and 127 (bits: n + 1.5 * 2^23).
inline Vec times_power_vec(Vec v, Vec n, Vec bits) {
#if defined(__AVX512F__)
  (void)bits;
  return _mm512_scalef_ps(v, n);
#else
  (void)n;
  const VecU power = (reinterpret_cast<VecU>(bits) << 23) + 0x3f800000u;
  return v * reinterpret_cast<Vec>(power);
#endif
}

// 2 to the x to about 2 ulp, for x at most 0: below -125 it is 2^-125. x = n + r, a polynomial of
// degree 5 in r (minimax of relative error, 1 at 0), times 2^n. A NaN stays one.
inline Vec exp2_vec(Vec x) {
  x = at_least_vec(x, -125.0f);
  const Vec bits = x + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Vec n = bits - 12582912.0f;
  const Vec r = x - n;
  Vec p = fma_vec(r, splat_vec(1.3264727313e-3f), splat_vec(9.6715129912e-3f));
  p = fma_vec(p, r, splat_vec(5.5507335812e-2f));
  p = fma_vec(p, r, splat_vec(2.4022242427e-1f));
  p = fma_vec(p, r, splat_vec(6.9314700365e-1f));
  p = fma_vec(p, r, splat_vec(1.0f));
  return times_power_vec(p, n, bits);
}

// Lane halves added to each other until one is left: a fixed order.
inline float sum_vec(Vec v) {
  float part[kVecLanes];
  store_vec(part, v);
  for (int width = kVecLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

// Comparisons with a NaN are false, so it passes.
inline Vec clamp_vec(Vec v, Vec low, Vec high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// A number whose unit in the last place is that of the code makes the addition round, ties to
// even, and is exact to subtract again. Integers share one; a float's is its power of two shifted,
// bounded below where the subnormals begin. The sum of an exponent and the shift may overflow only
// for infinities and NaN: the former are clamped away, the latter absorb whatever is added.
template <int kMantissaBits, int kMinExponent>
inline Vec round_float_vec(Vec v) {
  const VecU bits = reinterpret_cast<VecU>(v);
  const Vec magnitude = reinterpret_cast<Vec>(bits & 0x7fffffffu);
  const VecI floor = VecI{} + ((127 + kMinExponent) << 23);
  VecI exponent = reinterpret_cast<VecI>(bits & 0x7f800000u);
  exponent = exponent < floor ? floor : exponent;
  const VecU shift = VecU{} + (static_cast<uint32_t>(23 - kMantissaBits) << 23);
  const Vec magic = reinterpret_cast<Vec>(reinterpret_cast<VecU>(exponent) + shift);
  const Vec rounded = (magnitude + magic) - magic;
  return reinterpret_cast<Vec>(reinterpret_cast<VecU>(rounded) | (bits & 0x80000000u));
}

template <int kKind>
inline Vec round_code(Vec v, Vec low, Vec high) {
  v = clamp_vec(v, low, high);
  if constexpr (kKind == QK_CODE_INT) {
    const Vec magic = splat_vec(12582912.0f);  // 1.5 * 2^23
    return (v + magic) - magic;
  } else if constexpr (kKind == QK_CODE_E4M3) {
    return round_float_vec<3, -6>(v);
  } else {
    return round_float_vec<1, 0>(v);
  }
}

// Calls f(kind, has_zero) with both as types, so that each pair is its own loop.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
template <class F>
inline void for_kind(int32_t kind, bool has_zero, F&& f) {
  const auto with_zero = [&](auto k) {
    has_zero ? f(k, Constant<1>{}) : f(k, Constant<0>{});
  };
  switch (kind) {
    case QK_CODE_INT: return with_zero(Constant<QK_CODE_INT>{});
    case QK_CODE_E4M3: return with_zero(Constant<QK_CODE_E4M3>{});
    default: return with_zero(Constant<QK_CODE_E2M1>{});
  }
}

}  // namespace
}  // namespace quantkit
