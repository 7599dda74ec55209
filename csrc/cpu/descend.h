// Coordinate descent on the codes of a weight that is rounded already.
//
// Without an output factor rows are independent, and what a row reads next to its own moments is
// the Hessian's row of each code that changes. With one, a column of all rows is a problem of its
// own: the moments that rows see of each other are a product with the output factor.
//
// Ladder (with an output factor G):
//   1. One code at a time, every moment of G E H kept: each change writes all n * k of them.
//   2. A column at a time: G (E H) of that column before it is gone through, one pass over G each.
//   3. A panel of columns at a time (this file): G is read once for the panel, as a product whose
//      sums stay in registers; inside the panel a change reaches later columns through one vector,
//      G times the column's changes, and the other moments take all of the panel's changes at once.
#pragma once

#include "native_vector.h"
#include "solver_table.h"

namespace quantkit {
namespace {

#if defined(__AVX512F__)
constexpr int kDescendVectors = 3;  // 8 x 3 sums, 3 of G and a broadcast in 32 registers
#else
constexpr int kDescendVectors = 1;  // 8 x 1
#endif

// Two codes this close in error are as good as each other: rounding errors decide between them, and
// nothing is gained by a change. A NaN compares as false, and changes nothing either.
constexpr float kGain = 0.9999f;

inline Vec magnitude_vec(Vec v) {
  return reinterpret_cast<Vec>(reinterpret_cast<VecU>(v) & 0x7fffffffu);
}

// The code that is best for one coordinate, everything else as it is; lanes are rows or columns.
template <int kKind, bool kZero>
inline Vec best_code(Vec code, Vec moment, Vec curvature, Vec scale, Vec zero, Vec low, Vec high) {
  const Vec value = kZero ? code - zero : code;
  const Vec target = value + moment / (curvature * scale);
  const Vec best = round_code<kKind>(kZero ? target + zero : target, low, high);
  const Vec reached = kZero ? best - zero : best;
  const Vec gain = splat_vec(kGain);
  return magnitude_vec(target - reached) < gain * magnitude_vec(target - value) ? best : code;
}

// One row, `sweeps` times over its columns. tables: k scales, k zeros, k curvatures.
template <int kKind, bool kZero>
void descend_one_row(const qk_descend_args& a, int64_t row, float* tables) {
  const int64_t k = a.k;
  float* codes = a.codes + row * k;
  float* moment = a.moment + row * k;
  float *scales = tables, *zeros = scales + k, *curvatures = zeros + k;
  for (int64_t j = 0; j < k; ++j) {
    scales[j] = a.scale[row * a.groups + a.group[j]];
    zeros[j] = kZero ? a.zero[row * a.groups + a.group[j]] : 0.0f;
    curvatures[j] = a.hessian[j * k + j];
  }
  const Vec low = splat_vec(a.qmin), high = splat_vec(a.qmax);
  for (int64_t sweep = 0; sweep < a.sweeps; ++sweep) {
    int64_t here = 0;
    for (int64_t first = 0; first < k; first += kVecLanes) {
      const int64_t lanes = kVecLanes < k - first ? kVecLanes : k - first;
      // A changed code moves every moment: lanes behind it are looked at again.
      for (int64_t lane = 0; lane < lanes;) {
        float c[kVecLanes] = {}, m[kVecLanes] = {}, h[kVecLanes], s[kVecLanes], z[kVecLanes] = {};
        for (int i = 0; i < kVecLanes; ++i) h[i] = s[i] = 1.0f;
        const size_t bytes = static_cast<size_t>(lanes) * 4;
        std::memcpy(c, codes + first, bytes);
        std::memcpy(m, moment + first, bytes);
        std::memcpy(h, curvatures + first, bytes);
        std::memcpy(s, scales + first, bytes);
        std::memcpy(z, zeros + first, bytes);
        float best[kVecLanes];
        store_vec(best, best_code<kKind, kZero>(load_vec(c), load_vec(m), load_vec(h), load_vec(s),
                                                load_vec(z), low, high));
        while (lane < lanes && !(best[lane] != c[lane] && h[lane] > 0.0f)) ++lane;
        if (lane == lanes) break;
        const float change = (best[lane] - c[lane]) * s[lane];
        codes[first + lane] = best[lane];
        const float* hessian = a.hessian + (first + lane) * k;
        const Vec by = splat_vec(change);
        int64_t i = 0;
        for (; i + kVecLanes <= k; i += kVecLanes) {
          store_vec(moment + i, minus_product_vec(load_vec(moment + i), by, load_vec(hessian + i)));
        }
        for (; i < k; ++i) moment[i] -= change * hessian[i];
        ++here;
        ++lane;
      }
    }
    if (here == 0) break;
  }
}

inline void descend_row(const qk_descend_args& a, int64_t row, float* tables) {
  for_kind(a.kind, a.zero != nullptr, [&](auto kind, auto zero) {
    descend_one_row<decltype(kind)::value, decltype(zero)::value != 0>(a, row, tables);
  });
}

// out[c][row ..] = (G M)[row .., c] for kDescendColumns columns and `rows` rows (a multiple of the
// lanes, at most kDescendVectors of them). G is [n][ld], M [n][kDescendColumns].
template <int kVectors>
inline void panel_product(const float* g, int64_t ld, const float* m, int64_t n, float* out,
                          int64_t out_ld) {
  Vec sum[kDescendColumns][kVectors] = {};
  for (int64_t i = 0; i < n; ++i) {
    Vec v[kVectors];
#pragma GCC unroll 3
    for (int x = 0; x < kVectors; ++x) v[x] = load_vec(g + i * ld + x * kVecLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kDescendColumns; ++c) {
      const Vec by = splat_vec(m[i * kDescendColumns + c]);
#pragma GCC unroll 3
      for (int x = 0; x < kVectors; ++x) sum[c][x] = fma_vec(v[x], by, sum[c][x]);
    }
  }
  for (int c = 0; c < kDescendColumns; ++c) {
    for (int x = 0; x < kVectors; ++x) store_vec(out + c * out_ld + x * kVecLanes, sum[c][x]);
  }
}

inline void descend_product(const float* g, int64_t ld, const float* m, int64_t n, int64_t vectors,
                            float* out, int64_t out_ld) {
  for (; vectors >= kDescendVectors; vectors -= kDescendVectors) {
    panel_product<kDescendVectors>(g, ld, m, n, out, out_ld);
    g += kDescendVectors * kVecLanes;
    out += kDescendVectors * kVecLanes;
  }
  for (; vectors > 0; --vectors, g += kVecLanes, out += kVecLanes) {
    panel_product<1>(g, ld, m, n, out, out_ld);
  }
}

// One column of all rows, once. Arrays are `ld` floats: whole vectors, padded with codes 0,
// moments 0, scales 1 and curvatures 1, so that a padded lane stays as it is.
//   moment     (G E H)[:, j], as before the column
//   pushed     G times the column's changes, out
//   changes    of the column's values, out
template <int kKind, bool kZero>
int64_t descend_one_column(const qk_descend_args& a, const float* g, int64_t ld, float curvature,
                           const float* scale, const float* zero, const float* moment,
                           const float* diagonal, float* codes, float* changes, float* pushed) {
  const Vec low = splat_vec(a.qmin), high = splat_vec(a.qmax), h = splat_vec(curvature);
  int64_t changed = 0;
  for (int64_t i = 0; i < ld; i += kVecLanes) {
    store_vec(pushed + i, Vec{});
    store_vec(changes + i, Vec{});
  }
  for (int64_t first = 0; first < ld; first += kVecLanes) {
    for (int64_t lane = 0; lane < kVecLanes;) {
      const Vec now = minus_product_vec(load_vec(moment + first), h, load_vec(pushed + first));
      const Vec s = load_vec(scale + first), c = load_vec(codes + first);
      const Vec z = kZero ? load_vec(zero + first) : Vec{};
      float best[kVecLanes];
      store_vec(best,
                best_code<kKind, kZero>(c, now, h * load_vec(diagonal + first), s, z, low, high));
      while (lane < kVecLanes &&
             !(best[lane] != codes[first + lane] && diagonal[first + lane] > 0.0f)) {
        ++lane;
      }
      if (lane == kVecLanes) break;
      const int64_t row = first + lane;
      const float change = (best[lane] - codes[row]) * scale[row];
      codes[row] = best[lane];
      changes[row] += change;
      const Vec by = splat_vec(change);
      for (int64_t i = 0; i < ld; i += kVecLanes) {
        store_vec(pushed + i, fma_vec(by, load_vec(g + row * ld + i), load_vec(pushed + i)));
      }
      ++changed;
      ++lane;
    }
  }
  return changed;
}

inline int64_t descend_column(const qk_descend_args& a, const float* g, int64_t ld,
                              float curvature, const float* scale, const float* zero,
                              const float* moment, const float* diagonal, float* codes,
                              float* changes, float* pushed) {
  int64_t changed = 0;
  for_kind(a.kind, a.zero != nullptr, [&](auto kind, auto has_zero) {
    changed = descend_one_column<decltype(kind)::value, decltype(has_zero)::value != 0>(
        a, g, ld, curvature, scale, zero, moment, diagonal, codes, changes, pushed);
  });
  return changed;
}

// to[i] -= by * from[i]
inline void subtract_product(float* to, const float* from, float by, int64_t count) {
  const Vec factor = splat_vec(by);
  int64_t i = 0;
  for (; i + kVecLanes <= count; i += kVecLanes) {
    store_vec(to + i, minus_product_vec(load_vec(to + i), factor, load_vec(from + i)));
  }
  for (; i < count; ++i) to[i] -= by * from[i];
}

inline DescendKernel descend_kernel() {
  return {kVecLanes, descend_row, descend_product, descend_column, subtract_product};
}

}  // namespace
}  // namespace quantkit
