// GPTQ's column loop. The recurrence along a row is serial; rows are independent.
//
// Ladder:
//   1. A column of the whole weight at a time, in a tensor library: K calls of a rank-1 update,
//      each a pass over the rest of the weight.
//   2. Lazy blocks: a rank-1 update inside a block of columns, a matrix product for the rest. The
//      product still reads and writes the rest of the weight once a block.
//   3. Left-looking, rows across the lanes (this file): a panel of columns takes all the updates of
//      the columns before it while it sits in registers, is rounded there, and leaves only its
//      errors, which the panels after it read. Two loads feed three products of a step, and no
//      weight is ever written back. A column's updates still arrive in the order of algorithm 1.
#pragma once

#include "native_vector.h"
#include "solver_table.h"

namespace quantkit {
namespace {

#if defined(__AVX512F__)
constexpr int kGptqColumns = 8;  // 8 x 3 sums, 3 errors and a broadcast in 32 registers
#else
constexpr int kGptqColumns = 4;  // 4 x 3, 3 and 1 in 16
#endif
constexpr int kGptqVectors = 3;

// out[column][lane] = source[lane][column]; lanes beyond `valid` take `fill`.
inline void transpose(const float* source, int64_t stride, int64_t valid, int64_t columns,
                      int64_t width, float fill, float* out) {
  constexpr int64_t kStep = 8;  // columns that stay in L1 while the rows go by
  for (int64_t first = 0; first < columns; first += kStep) {
    const int64_t end = first + kStep < columns ? first + kStep : columns;
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t c = first; c < end; ++c) {
        out[c * width + i] = i < valid ? source[i * stride + c] : fill;
      }
    }
  }
}

template <int kKind, bool kZero, int kVectors>
void gptq_tile(const qk_gptq_round_args& a, const float* packed_upper, int64_t row,
               float* scratch) {
  constexpr int kColumns = kGptqColumns;
  constexpr int64_t kWidth = kVectors * kVecLanes;
  const int64_t valid = kWidth < a.n - row ? kWidth : a.n - row;
  float* errors = scratch;  // [k][kWidth]
  float* scales = errors + a.k * kWidth;
  float* zeros = scales + a.groups * kWidth;
  transpose(a.scale + row * a.groups, a.groups, valid, a.groups, kWidth, 1.0f, scales);
  if (kZero) transpose(a.zero + row * a.groups, a.groups, valid, a.groups, kWidth, 0.0f, zeros);
  const Vec low = splat_vec(a.qmin), high = splat_vec(a.qmax);

  for (int64_t first = 0; first < a.k; first += kColumns) {
    const int64_t columns = kColumns < a.k - first ? kColumns : a.k - first;
    const float* upper = packed_upper + upper_panel_offset(first / kColumns, kColumns);
    alignas(64) float panel[kColumns * kWidth] = {};
    transpose(a.weight + row * a.k + first, a.k, valid, columns, kWidth, 0.0f, panel);

    Vec w[kColumns][kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) w[c][v] = load_vec(panel + c * kWidth + v * kVecLanes);
    }
    const float* error = errors;
    for (int64_t j = 0; j < first; ++j, error += kWidth, upper += kColumns) {
      Vec e[kVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) e[v] = load_vec(error + v * kVecLanes);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const Vec u = splat_vec(upper[c]);
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) w[c][v] = minus_product_vec(w[c][v], e[v], u);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      if (c >= columns) break;
      const int64_t group = a.group[first + c];
      const float* pivots = upper + c * kColumns;
      const Vec pivot = splat_vec(pivots[c]);
      Vec e[kVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        const int64_t lane = v * kVecLanes;
        const Vec scale = load_vec(scales + group * kWidth + lane);
        const Vec zero = kZero ? load_vec(zeros + group * kWidth + lane) : Vec{};
        const Vec scaled = kZero ? w[c][v] / scale + zero : w[c][v] / scale;
        const Vec code = round_code<kKind>(scaled, low, high);
        const Vec value = (kZero ? code - zero : code) * scale;
        e[v] = (w[c][v] - value) / pivot;
        store_vec(panel + c * kWidth + lane, code);
        store_vec(errors + (first + c) * kWidth + lane, e[v]);
      }
#pragma GCC unroll 8
      for (int next = c + 1; next < kColumns; ++next) {
        const Vec u = splat_vec(pivots[next]);
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) w[next][v] = minus_product_vec(w[next][v], e[v], u);
      }
    }
    for (int64_t i = 0; i < valid; ++i) {
      float* codes = a.codes + (row + i) * a.k + first;
      for (int64_t c = 0; c < columns; ++c) codes[c] = panel[c * kWidth + i];
    }
  }
}

inline int64_t gptq_scratch_bytes(const qk_gptq_round_args& a, int64_t vectors) {
  const int64_t tables = a.zero == nullptr ? 1 : 2;
  return (a.k + tables * a.groups) * vectors * kVecBytes;
}

inline void gptq_run(const qk_gptq_round_args& a, const float* packed_upper, int64_t row,
                     int64_t vectors, uint8_t* scratch) {
  float* memory = reinterpret_cast<float*>(scratch);
  for_kind(a.kind, a.zero != nullptr, [&](auto kind, auto zero) {
    constexpr int k = decltype(kind)::value;
    constexpr bool z = decltype(zero)::value != 0;
    switch (vectors) {
      case 1: return gptq_tile<k, z, 1>(a, packed_upper, row, memory);
      case 2: return gptq_tile<k, z, 2>(a, packed_upper, row, memory);
      default: return gptq_tile<k, z, 3>(a, packed_upper, row, memory);
    }
  });
}

inline GptqKernel gptq_kernel() {
  return {kVecLanes, kGptqVectors, kGptqColumns, gptq_scratch_bytes, gptq_run};
}

}  // namespace
}  // namespace quantkit
