// The squared error of rounding each group of a weight, under many candidate scales.
//
// Ladder:
//   1. A tensor library: some ten passes over the whole weight for each candidate.
//   2. A row at a time (this file): the row and the importance stay in L1 while every candidate
//      goes over them, and a group's error is one register until it is stored. What remains is a
//      division and about ten instructions for each vector.
#pragma once

#include "elementwise.h"
#include "native_vector.h"

namespace quantkit {
namespace {

template <int kKind, bool kZero>
inline Vec squared_error(Vec w, Vec scale, Vec zero, Vec low, Vec high) {
  const Vec scaled = kZero ? w / scale + zero : w / scale;
  const Vec code = round_code<kKind>(scaled, low, high);
  const Vec error = (kZero ? code - zero : code) * scale - w;
  return error * error;
}

template <int kKind, bool kZero>
void rounding_errors_of_row(const qk_rounding_errors_args& a, int64_t row, const float* weight) {
  const int64_t groups = (a.k + a.group_size - 1) / a.group_size;
  const Vec low = splat_vec(a.qmin), high = splat_vec(a.qmax);
  VecI lane;
  for (int i = 0; i < kVecLanes; ++i) lane[i] = i;
  for (int64_t s = 0; s < a.candidates; ++s) {
    const int64_t table = (s * a.n + row) * groups;
    for (int64_t g = 0; g < groups; ++g) {
      const Vec scale = splat_vec(a.scale[table + g]);
      const Vec zero = kZero ? splat_vec(a.zero[table + g]) : Vec{};
      int64_t k = g * a.group_size;
      const int64_t end = a.group_size < a.k - k ? k + a.group_size : a.k;
      Vec sum{};
      for (; k + kVecLanes <= end; k += kVecLanes) {
        const Vec e = squared_error<kKind, kZero>(load_vec(weight + k), scale, zero, low, high);
        sum = a.importance == nullptr ? sum + e : fma_vec(e, load_vec(a.importance + k), sum);
      }
      if (k < end) {  // lanes beyond the group must not count whatever they compute
        float w[kVecLanes] = {}, weights[kVecLanes] = {};
        std::memcpy(w, weight + k, static_cast<size_t>(end - k) * 4);
        if (a.importance != nullptr) {
          std::memcpy(weights, a.importance + k, static_cast<size_t>(end - k) * 4);
        }
        Vec e = squared_error<kKind, kZero>(load_vec(w), scale, zero, low, high);
        if (a.importance != nullptr) e *= load_vec(weights);
        sum += lane < static_cast<int32_t>(end - k) ? e : Vec{};
      }
      a.errors[table + g] = sum_vec(sum);
    }
  }
}

// scratch: k floats.
inline void rounding_errors_row(const qk_rounding_errors_args& a, int64_t row, float* scratch) {
  const float* weight = static_cast<const float*>(a.weight) + row * a.k;
  if (a.weight_dtype != QK_F32) {
    load_row(scratch, a.weight, a.weight_dtype, row * a.k, a.k);
    weight = scratch;
  }
  for_kind(a.kind, a.zero != nullptr, [&](auto kind, auto zero) {
    rounding_errors_of_row<decltype(kind)::value, decltype(zero)::value != 0>(a, row, weight);
  });
}

}  // namespace
}  // namespace quantkit
