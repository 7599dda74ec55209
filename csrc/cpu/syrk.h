// The lower triangle of acc += transposed(x) * x, for a Math with fp32 sums.
//
// Ladder:
//   1. The whole square as a matrix product over x widened to fp32: twice the products needed.
//   2. Column blocks of the lower half, each a matrix product: 9/16 of the square at K = 1536.
//   3. Register tiles of 8 x 48 sums (this file), none above the diagonal but for the part of a
//      tile that crosses it. x is repacked once into panels of 48 columns; the same panel serves
//      as the vectors of one tile and as the broadcasts of another.
//   4. bf16 stays bf16: a 32-bit word is a pair of neighbouring tokens and vdpbf16ps adds both
//      products, twice the rate of an fp32 product. Products of bf16 values are exact in fp32.
// A unit of work is 96 x 96 of acc over all the packed tokens, so that its part of acc stays in L2
// from one token block to the next. Where acc is double, a block's fp32 sums are widened on the way
// there: sums of many blocks then agree in whatever order they are added up.
#pragma once

#include "elementwise.h"
#include "native_vector.h"
#include "solver_table.h"

namespace quantkit {
namespace {

constexpr int kSyrkVectors = 3;
constexpr int kSyrkPanel = kSyrkVectors * kVecLanes;
#if defined(__AVX512F__)
constexpr int kSyrkRows = 8;  // 8 x 3 sums, 3 vectors and a broadcast in 32 registers
#else
constexpr int kSyrkRows = 4;  // 4 x 3, 3 and 1 in 16
#endif
static_assert(kSyrkUnit % kSyrkPanel == 0 && kSyrkPanel % kSyrkRows == 0);

struct F32Products {
  static constexpr int kTokens = 1;
  using Word = Vec;
  static Word load(const uint32_t* p) { return load_vec(reinterpret_cast<const float*>(p)); }
  static Word splat(const uint32_t* p) {
    float f;
    std::memcpy(&f, p, 4);
    return splat_vec(f);
  }
  static Vec mac(Vec sum, Word a, Word b) { return fma_vec(a, b, sum); }

  static void pack_row(const qk_syrk_args& a, int64_t token, int64_t, int64_t column,
                       int64_t columns, uint32_t* out) {
    float* values = reinterpret_cast<float*>(out);
    load_row(values, a.x, a.x_dtype, token * a.ldx + column, columns);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Products {
  static constexpr int kTokens = 2;
  using Word = __m512i;
  static Word load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Word splat(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int32_t>(*p)); }
  static Vec mac(Vec sum, Word a, Word b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  static __m512i widen(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  // Two tokens, or the last one and zeros, interleaved.
  static void pack_row(const qk_syrk_args& a, int64_t token, int64_t tokens, int64_t column,
                       int64_t columns, uint32_t* out) {
    const uint16_t* even = static_cast<const uint16_t*>(a.x) + token * a.ldx + column;
    const uint16_t* odd = tokens > 1 ? even + a.ldx : nullptr;
    int64_t c = 0;
    if (odd != nullptr) {
      for (; c + 16 <= columns; c += 16) {
        const __m512i high = _mm512_slli_epi32(widen(odd + c), 16);
        _mm512_storeu_si512(out + c, _mm512_or_si512(widen(even + c), high));
      }
    }
    for (; c < columns; ++c) {
      out[c] = even[c] | (odd == nullptr ? 0u : static_cast<uint32_t>(odd[c]) << 16);
    }
  }
};
#endif

template <class Math>
void syrk_pack(const qk_syrk_args& a, int64_t token, int64_t count, int64_t first, int64_t panels,
               uint32_t* words) {
  const int64_t steps = (count + Math::kTokens - 1) / Math::kTokens;
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = s * Math::kTokens;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t column = (first + p) * kSyrkPanel;
      const int64_t columns = kSyrkPanel < a.k - column ? kSyrkPanel : a.k - column;
      uint32_t* out = words + (p * kSyrkSteps + s) * kSyrkPanel;
      Math::pack_row(a, token + t, count - t, column, columns, out);
      for (int64_t c = columns; c < kSyrkPanel; ++c) out[c] = 0;
    }
  }
}

// One tile: rows of acc from `row`, columns from `column`.
template <class Math, class Sum>
void syrk_tile(const qk_syrk_args& a, const uint32_t* row_words, const uint32_t* column_words,
               int64_t steps, int64_t row, int64_t column) {
  using Word = typename Math::Word;
  Sum* out = static_cast<Sum*>(a.acc) + row * a.ld_acc + column;
  const bool inside = column + kSyrkPanel <= row + 1 && row + kSyrkRows <= a.k;
  if (inside) {
    for (int m = 0; m < kSyrkRows; ++m) {
      const char* sums = reinterpret_cast<const char*>(out + m * a.ld_acc);
      for (size_t b = 0; b < kSyrkPanel * sizeof(Sum); b += 64) __builtin_prefetch(sums + b, 1);
    }
  }
  Vec sum[kSyrkRows][kSyrkVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kSyrkRows; ++m) {
#pragma GCC unroll 3
    for (int v = 0; v < kSyrkVectors; ++v) sum[m][v] = Vec{};
  }
  for (int64_t s = 0; s < steps; ++s, row_words += kSyrkPanel, column_words += kSyrkPanel) {
    Word columns[kSyrkVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kSyrkVectors; ++v) columns[v] = Math::load(column_words + v * kVecLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kSyrkRows; ++m) {
      const Word value = Math::splat(row_words + m);
#pragma GCC unroll 3
      for (int v = 0; v < kSyrkVectors; ++v) sum[m][v] = Math::mac(sum[m][v], value, columns[v]);
    }
  }
  if constexpr (sizeof(Sum) == sizeof(float)) {
    if (inside) {
#pragma GCC unroll 8
      for (int m = 0; m < kSyrkRows; ++m) {
#pragma GCC unroll 3
        for (int v = 0; v < kSyrkVectors; ++v) {
          float* p = out + m * a.ld_acc + v * kVecLanes;
          store_vec(p, load_vec(p) + sum[m][v]);
        }
      }
      return;
    }
  }
  float sums[kSyrkRows * kSyrkPanel];
#pragma GCC unroll 8
  for (int m = 0; m < kSyrkRows; ++m) {
#pragma GCC unroll 3
    for (int v = 0; v < kSyrkVectors; ++v) {
      store_vec(sums + m * kSyrkPanel + v * kVecLanes, sum[m][v]);
    }
  }
  if (inside) {
    for (int64_t m = 0; m < kSyrkRows; ++m) {
      for (int64_t c = 0; c < kSyrkPanel; ++c) out[m * a.ld_acc + c] += sums[m * kSyrkPanel + c];
    }
    return;
  }
  for (int64_t m = 0; m < kSyrkRows && row + m < a.k; ++m) {
    for (int64_t c = 0; c < kSyrkPanel && column + c <= row + m; ++c) {
      out[m * a.ld_acc + c] += sums[m * kSyrkPanel + c];
    }
  }
}

template <class Math>
void syrk_run(const qk_syrk_args& a, const uint32_t* row_words, const uint32_t* column_words,
              int64_t steps, int64_t row, int64_t column) {
  for (int64_t c = 0; c < kSyrkUnit && column + c < a.k; c += kSyrkPanel) {
    const uint32_t* columns = column_words + c * kSyrkSteps;
    for (int64_t r = 0; r < kSyrkUnit && row + r < a.k; r += kSyrkRows) {
      if (row + r + kSyrkRows <= column + c) continue;  // wholly above the diagonal
      const int64_t panel = r / kSyrkPanel * kSyrkPanel;
      const auto tile = a.acc_is_double ? syrk_tile<Math, double> : syrk_tile<Math, float>;
      tile(a, row_words + panel * kSyrkSteps + (r - panel), columns, steps, row + r, column + c);
    }
  }
}

template <class Math>
SyrkKernel syrk_kernel() {
  return {kSyrkPanel, Math::kTokens, syrk_pack<Math>, syrk_run<Math>};
}

}  // namespace
}  // namespace quantkit
