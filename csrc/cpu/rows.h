// Operations on one row of fp32 activations: what stands between the products of a decoder.
//
// Ladder: plain loops that the compiler vectorizes with each translation unit's flags. Sums go
// through sixteen partial sums in a fixed order; the exponential is a polynomial without a branch.
// A row is one token's, so nothing here depends on the rest of the batch.
#pragma once

#include "activations.h"

namespace quantkit {
namespace {

// exp(x) to about 2 ulp, for x clamped to where the result is a normal number (Cephes expf: x =
// n ln 2 + r, a polynomial of degree 5 in r, times 2^n). A NaN passes the comparisons and stays one.
// T is float, or a vector of them with Bits its lanes' bits.
template <class T, class Bits>
[[gnu::always_inline]] inline T exp_of(T x) {
  const T low = T{} - 87.0f, high = T{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const T shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const T n = shifted - 12582912.0f;
  T r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  T p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const T y = p * (r * r) + r + 1.0f;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  T power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}
inline float exp_approx(float x) { return exp_of<float, uint32_t>(x); }

inline void add_row(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

// out = x / sqrt(mean(x^2) + epsilon) * weight. out may be x.
inline void rms_norm_row(const float* x, const float* weight, int64_t n, float epsilon,
                         float* out) {
  float part[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) part[j] += x[i + j] * x[i + j];
  }
  for (int j = 0; i + j < n; ++j) part[j] += x[i + j] * x[i + j];
  const float total = sum_row(part, 16);
  const float factor = 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + epsilon);
  for (i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

// out = act(gate) * up. out may be gate.
inline void gate_row(const float* gate, const float* up, int64_t n, int32_t kind, float* out) {
  if (kind == QK_GATE_SILU) {
    for (int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + exp_approx(-gate[i])) * up[i];
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float g = gate[i];
    const float z = 0.7978845608028654f * (g + 0.044715f * g * g * g);
    const float tanh = 1.0f - 2.0f / (exp_approx(2.0f * z) + 1.0f);
    out[i] = 0.5f * g * (1.0f + tanh) * up[i];
  }
}

// Each run of `base` values times the factor, sixteen columns in a register at a time.
inline void base_product(float* x, const qk_hadamard& h) {
  const int64_t width = ceil_div(h.base, 16) * 16;
  float in[QK_LARGEST_BASE], out[16];
  for (int64_t run = 0; run < h.order; run += h.base) {
    std::memcpy(in, x + run, static_cast<size_t>(h.base) * 4);
    for (int64_t j = 0; j < h.base; j += 16) {
      F32Math::Acc sum = F32Math::zero();
      for (int64_t i = 0; i < h.base; ++i) {
        sum = F32Math::fma(F32Math::splat(in[i]), F32Math::load(h.factor + i * width + j), sum);
      }
      F32Math::store(out, sum);
      std::memcpy(x + run + j, out, static_cast<size_t>(min_of(16, h.base - j)) * 4);
    }
  }
}

// The product with S: stages of sums and differences, `half` values apart, two stages a pass.
inline void butterflies(float* x, int64_t order, int64_t half) {
  for (; 4 * half <= order; half *= 4) {
    for (int64_t first = 0; first < order; first += 4 * half) {
      float* __restrict a = x + first;
      float* __restrict b = a + half;
      float* __restrict c = b + half;
      float* __restrict d = c + half;
      for (int64_t i = 0; i < half; ++i) {
        const float more = a[i] + b[i], less = a[i] - b[i];
        const float more_behind = c[i] + d[i], less_behind = c[i] - d[i];
        a[i] = more + more_behind;
        b[i] = less + less_behind;
        c[i] = more - more_behind;
        d[i] = less - less_behind;
      }
    }
  }
  if (2 * half > order) return;
  float* __restrict a = x;  // of an odd number of stages one is left, across the whole run
  float* __restrict b = x + half;
  for (int64_t i = 0; i < half; ++i) {
    const float more = a[i] + b[i], less = a[i] - b[i];
    a[i] = more;
    b[i] = less;
  }
}

// In place, n a multiple of the order. The row stays in L1 from the gate to the rounding.
inline void hadamard_row(float* x, int64_t n, const qk_hadamard& h) {
  for (int64_t first = 0; first < n; first += h.order) {
    base_product(x + first, h);
    butterflies(x + first, h.order, h.base);
  }
}

// Pairs (i, i + dim/2) of the first `dim` values are turned by the angle of i.
inline void rope_row(float* x, const float* cos, const float* sin, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

inline void bf16_words_row(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_to_bf16(x[i]);
}

inline void round_bf16_row(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_f32(f32_to_bf16(x[i]));
}

// x * inverse as int8, rounded half to even. A NaN becomes -128: the scale holds it already.
inline void int8_codes(const float* x, int64_t n, float inverse, int8_t* q) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512 most = _mm512_set1_ps(127.0f);
  for (; i + 16 <= n; i += 16) {
    // Of a minimum with a NaN the second operand is left, of its conversion the least integer.
    const __m512 f = _mm512_min_ps(most, _mm512_mul_ps(_mm512_loadu_ps(x + i),
                                                       _mm512_set1_ps(inverse)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i),
                     _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(f)));
  }
#endif
  for (; i < n; ++i) {
    float f = x[i] * inverse;
    f = f > -128.0f ? f : -128.0f;
    f = f < 127.0f ? f : 127.0f;
    q[i] = static_cast<int8_t>(bits_of(f + 12582912.0f));
  }
}

// Symmetric int8 with a scale for each `group` columns: absmax / 127.5, as compressed-tensors has
// it. `given` replaces it when it is not 0. scale[g] is written for each group.
//
// Below the normal numbers a scale's reciprocal may be infinite, and 0 times that no number: such a
// group counts as zeros.
inline void int8_row(const float* x, int64_t n, int64_t group, float given, int8_t* q,
                     float* scale) {
  for (int64_t first = 0, g = 0; first < n; first += group, ++g) {
    const int64_t count = group < n - first ? group : n - first;
    float s = given;
    if (given == 0.0f) {
      s = absmax(x + first, count) / 127.5f;
      if (s < 1.17549435e-38f) s = 1.0f;
    }
    scale[g] = s;
    int8_codes(x + first, count, 1.0f / s, q + first);
  }
}

// Rounded to the grid of float8 e4m3 and multiplied back. out may be x.
inline void fp8_row(const float* x, int64_t n, int64_t group, float given, float* out) {
  uint8_t codes[512];
  for (int64_t first = 0; first < n; first += group) {
    const int64_t count = group < n - first ? group : n - first;
    float s = given;
    if (given == 0.0f) {
      s = absmax(x + first, count) / 448.0f;
      if (s == 0.0f) s = 1.0f;
    }
    for (int64_t i = first; i < first + count; i += 512) {
      const int64_t piece = 512 < first + count - i ? 512 : first + count - i;
      float scaled[512];
      for (int64_t j = 0; j < piece; ++j) scaled[j] = x[i + j] / s;
      to_fp8(scaled, piece, codes);
      for (int64_t j = 0; j < piece; ++j) out[i + j] = f8_to_f32(codes[j]) * s;
    }
  }
}

// sums[s] = sum of q over the s-th `step` columns.
inline void int8_sums_row(const int8_t* q, int64_t n, int64_t step, int32_t* sums) {
  for (int64_t first = 0, s = 0; first < n; first += step, ++s) {
    const int64_t end = step < n - first ? first + step : n;
    int32_t total = 0;
    int64_t i = first;
#if defined(__AVX512VNNI__)
    __m512i part = _mm512_setzero_si512();
    for (; i + 64 <= end; i += 64) {
      part = _mm512_dpbusd_epi32(part, _mm512_set1_epi8(1), _mm512_loadu_si512(q + i));
    }
    total = _mm512_reduce_add_epi32(part);
#endif
    for (; i < end; ++i) total += q[i];
    sums[s] = total;
  }
}

inline void float_sums_row(const float* x, int64_t n, int64_t step, float* sums) {
  for (int64_t first = 0, s = 0; first < n; first += step, ++s) {
    sums[s] = sum_row(x + first, step < n - first ? step : n - first);
  }
}

// Where the first largest of n > 0 values is, or the first NaN. Pieces are searched for their largest
// value, a few registers at a time; only the winner's piece is searched again for the place.
inline int64_t argmax_row(const float* x, int64_t n) {
  constexpr int64_t kPiece = 1024, kLanes = 64;
  int64_t best_piece = 0;
  float best = -__builtin_inff();
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t count = min_of(kPiece, n - first);
    const float* v = x + first;
    float most[kLanes];
    int32_t nan[kLanes] = {};
    for (float& m : most) m = v[0];
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) {
        most[j] = v[i + j] > most[j] ? v[i + j] : most[j];
        nan[j] |= v[i + j] != v[i + j];
      }
    }
    for (; i < count; ++i) {
      most[0] = v[i] > most[0] ? v[i] : most[0];
      nan[0] |= v[i] != v[i];
    }
    int32_t any = 0;
    for (int64_t j = 0; j < kLanes; ++j) {
      any |= nan[j];
      most[0] = most[j] > most[0] ? most[j] : most[0];
    }
    if (any != 0) {
      for (i = 0; v[i] == v[i]; ++i) {
      }
      return first + i;
    }
    if (most[0] > best) {
      best_piece = first;
      best = most[0];
    }
  }
  int64_t place = best_piece;
  while (x[place] != best) ++place;
  return place;
}

inline RowKernels row_kernels() {
  return {add_row,        rms_norm_row,   gate_row, hadamard_row, rope_row,
          bf16_words_row, round_bf16_row, int8_row, fp8_row,      int8_sums_row,
          float_sums_row, load_row,       argmax_row};
}

}  // namespace
}  // namespace quantkit
