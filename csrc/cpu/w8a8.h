// INT8 activations times INT8 weights, exact in int32.
//
// Ladder:
//   1. Widen both to int32 and multiply: one product a lane.
//   2. AVX2: widen to int16 and use vpmaddwd, two products a lane, exact. (vpmaddubsw would give
//      four, but it saturates at 16 bits.)
//   3. AVX512-VNNI: vpdpbusd, four products a lane. It wants one unsigned operand, so activations
//      travel as x + 128 and 128 * (sum of the row's weights) is taken off at the end: no sign
//      trick in the loop.
// Integer sums are the same in any order, so tiling is free to differ between batch sizes.
#pragma once

#include "elementwise.h"

namespace quantkit {
namespace {

#if defined(__AVX512VNNI__)

struct I8Dot {
  using Acc = __m512i;
  using Weight = __m512i;
  using Value = __m512i;
  static constexpr int kRows = 6, kBlocks = 4;
  static constexpr int kFewRows = 8, kFewBlocks = 2;  // 5..8 rows: one pass over the weight
  static constexpr int kBytesPerChunk = 4;
  static constexpr bool kBiased = true;
  static Acc zero() { return _mm512_setzero_si512(); }
  static Weight load(const uint8_t* chunk) { return _mm512_loadu_si512(chunk); }
  static Value splat(const uint8_t* x) {
    int32_t word;
    std::memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
  }
  static Value bias() { return _mm512_set1_epi8(-128); }  // 128 as an unsigned byte
  static Acc mac(Acc acc, Weight w, Value x) { return _mm512_dpbusd_epi32(acc, x, w); }
  static void store(int32_t* p, Acc a) { _mm512_storeu_si512(p, a); }
  static void prepare(const int8_t (&x)[4], uint8_t* out) {
    for (int j = 0; j < 4; ++j) out[j] = static_cast<uint8_t>(x[j]) ^ 0x80u;
  }
};

#elif defined(__AVX2__)

struct I8Dot {
  struct Acc {
    __m256i part[2];
  };
  using Weight = Acc;
  struct Value {
    __m256i even, odd;
  };
  static constexpr int kRows = 2, kBlocks = 2;
  static constexpr int kFewRows = 2, kFewBlocks = 2;
  static constexpr int kBytesPerChunk = 8;
  static constexpr bool kBiased = false;
  static Acc zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  static Weight load(const uint8_t* chunk) {
    const __m256i* p = reinterpret_cast<const __m256i*>(chunk);
    return {{_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)}};
  }
  static Value splat(const uint8_t* x) {
    int32_t even, odd;
    std::memcpy(&even, x, 4);
    std::memcpy(&odd, x + 4, 4);
    return {_mm256_set1_epi32(even), _mm256_set1_epi32(odd)};
  }
  static Value bias() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Acc mac(Acc acc, Weight w, Value x) {
    for (int i = 0; i < 2; ++i) {
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w.part[i], 8), 8);
      const __m256i odd = _mm256_srai_epi16(w.part[i], 8);
      acc.part[i] = _mm256_add_epi32(acc.part[i], _mm256_madd_epi16(even, x.even));
      acc.part[i] = _mm256_add_epi32(acc.part[i], _mm256_madd_epi16(odd, x.odd));
    }
    return acc;
  }
  static void store(int32_t* p, Acc a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.part[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, a.part[1]);
  }
  static void prepare(const int8_t (&x)[4], uint8_t* out) {  // (k0, k2), (k1, k3) as int16
    const int16_t words[4] = {x[0], x[2], x[1], x[3]};
    std::memcpy(out, words, 8);
  }
};

#else

struct I8Dot {
  struct Acc {
    NativeI32 part[kParts];
  };
  using Weight = Acc;
  struct Value {
    int32_t x[4];
  };
  static constexpr int kRows = 2, kBlocks = 1;
  static constexpr int kFewRows = 2, kFewBlocks = 1;
  static constexpr int kBytesPerChunk = 16;
  static constexpr bool kBiased = false;
  static Acc zero() { return {}; }
  static Weight load(const uint8_t* chunk) {
    Weight w;
    std::memcpy(&w, chunk, sizeof w);
    return w;
  }
  static Value splat(const uint8_t* x) {
    Value v;
    std::memcpy(&v, x, sizeof v);
    return v;
  }
  static Value bias() { return {}; }
  static Acc mac(Acc acc, Weight w, Value x) {
    for (int i = 0; i < kParts; ++i) {
      for (int j = 0; j < 4; ++j) {
        const NativeU32 top = reinterpret_cast<NativeU32>(w.part[i]) << (24 - 8 * j);
        acc.part[i] += (reinterpret_cast<NativeI32>(top) >> 24) * x.x[j];
      }
    }
    return acc;
  }
  static void store(int32_t* p, Acc a) { std::memcpy(p, &a, sizeof a); }
  static void prepare(const int8_t (&x)[4], uint8_t* out) {
    const int32_t words[4] = {x[0], x[1], x[2], x[3]};
    std::memcpy(out, words, 16);
  }
};

#endif

struct W8A8 {
  // kBiasInLoop: also sum the tile's weights times 128, into `bias`; else read it from there.
  template <int MR, int NB, bool kBiasInLoop>
  static void strip(const W8A8Job& job, int64_t block, int64_t row, int32_t* bias) {
    constexpr int kWidth = NB * static_cast<int>(kBlockRows);
    const qk_w8a8_args& a = *job.args;
    const PackedBlock at = packed_block(block, job.blocks, job.chunks);
    const uint8_t* packed = static_cast<const uint8_t*>(a.packed) + at.base;
    const uint8_t* x = job.words + row * job.row_bytes;
    I8Dot::Acc acc[MR][NB], row_sum[NB];
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) {
      row_sum[b] = I8Dot::zero();
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[m][b] = I8Dot::zero();
    }
    for (int64_t c = 0; c < job.chunks; ++c) {
      I8Dot::Weight weight[NB];
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) {
        weight[b] = I8Dot::load(packed + c * at.step + b * kChunkBytes);
        if constexpr (kBiasInLoop) row_sum[b] = I8Dot::mac(row_sum[b], weight[b], I8Dot::bias());
      }
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const I8Dot::Value value = I8Dot::splat(x + m * job.row_bytes + c * I8Dot::kBytesPerChunk);
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b) acc[m][b] = I8Dot::mac(acc[m][b], weight[b], value);
      }
    }
    if constexpr (kBiasInLoop) {
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) I8Dot::store(bias + b * kBlockRows, row_sum[b]);
    }
    // Every index of acc is a constant, here too: one that is not would keep it out of registers.
    int32_t sums[MR][kWidth];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) I8Dot::store(sums[m] + b * kBlockRows, acc[m][b]);
    }
    for (int m = 0; m < MR; ++m) {
      finish(a, block * kBlockRows, kWidth, row + m, sums[m], bias);
    }
  }

  template <int NB>
  static void weight_sums(const W8A8Job& job, int64_t block, int32_t* bias) {
    const PackedBlock at = packed_block(block, job.blocks, job.chunks);
    const uint8_t* packed = static_cast<const uint8_t*>(job.args->packed) + at.base;
    for (int b = 0; b < NB; ++b) {
      I8Dot::Acc sum = I8Dot::zero();
      for (int64_t c = 0; c < job.chunks; ++c) {
        sum = I8Dot::mac(sum, I8Dot::load(packed + c * at.step + b * kChunkBytes), I8Dot::bias());
      }
      I8Dot::store(bias + b * kBlockRows, sum);
    }
  }

  static void finish(const qk_w8a8_args& a, int64_t first, int64_t width, int64_t row,
                     const int32_t* sums, const int32_t* bias) {
    const int64_t valid = a.n - first < width ? a.n - first : width;
    const float x_scale = load_one(a.x_scale, a.x_scale_dtype, row * a.x_scale_stride);
    float y[4 * kBlockRows], add[4 * kBlockRows];
    for (int64_t i = 0; i < valid; ++i) {
      // Unsigned, so that taking the bias off wraps instead of overflowing.
      const uint32_t exact = I8Dot::kBiased
                                 ? static_cast<uint32_t>(sums[i]) - static_cast<uint32_t>(bias[i])
                                 : static_cast<uint32_t>(sums[i]);
      y[i] = static_cast<float>(static_cast<int32_t>(exact)) * (x_scale * a.w_scale[first + i]);
    }
    if (a.bias != nullptr) {
      load_row(add, a.bias, a.bias_dtype, first, valid);
      for (int64_t i = 0; i < valid; ++i) y[i] += add[i];
    }
    store_row(a.y, a.y_dtype, row * a.ldy + first, y, valid);
  }

  template <int NB, bool kBiasInLoop>
  static void rows(const W8A8Job& job, int64_t block, int64_t row, int64_t count, int32_t* bias) {
    const auto call = [&](auto height) {
      constexpr int kMost = NB <= I8Dot::kFewBlocks ? I8Dot::kFewRows : I8Dot::kRows;
      // Summing the weights needs registers that 5 x 4 accumulators do not leave.
      constexpr bool kFits = !kBiasInLoop || NB <= I8Dot::kFewBlocks || height.value <= 4;
      if constexpr (height.value <= kMost && kFits) {
        strip<height.value, NB, kBiasInLoop>(job, block, row, bias);
      }
    };
    switch (count) {
      case 1: return call(Height<1>{});
      case 2: return call(Height<2>{});
      case 3: return call(Height<3>{});
      case 4: return call(Height<4>{});
      case 5: return call(Height<5>{});
      case 6: return call(Height<6>{});
      case 7: return call(Height<7>{});
      case 8: return call(Height<8>{});
      default: break;
    }
  }

  static int64_t tile_blocks(int64_t rows) {
    return rows > 4 && rows <= I8Dot::kFewRows ? I8Dot::kFewBlocks : I8Dot::kBlocks;
  }

  template <int NB>
  static void tile(const W8A8Job& job, int64_t block, const Range& range) {
    int32_t bias[NB * kBlockRows];
    if (range.rows <= (NB <= I8Dot::kFewBlocks ? I8Dot::kFewRows : I8Dot::kRows) &&
        (!I8Dot::kBiased || range.rows <= 4 || NB <= I8Dot::kFewBlocks)) {
      return rows<NB, I8Dot::kBiased>(job, block, range.row, range.rows, bias);
    }
    if (I8Dot::kBiased) weight_sums<NB>(job, block, bias);
    const int64_t height = ceil_div(range.rows, ceil_div(range.rows, I8Dot::kRows));
    for (int64_t m = 0; m < range.rows; m += height) {
      const int64_t count = height < range.rows - m ? height : range.rows - m;
      rows<NB, false>(job, block, range.row + m, count, bias);
    }
  }

  static void run(const W8A8Job& job, const Range& range) {
    const int64_t widest = tile_blocks(range.rows);
    int64_t left = range.blocks;
    for (int64_t block = range.block; left > 0;) {
      const int64_t count = blocks_at_once(block, left, widest);
      if (count == 4) {
        if constexpr (I8Dot::kBlocks >= 4) tile<4>(job, block, range);
      } else if (count == 2) {
        if constexpr (I8Dot::kBlocks >= 2) tile<2>(job, block, range);
      } else {
        tile<1>(job, block, range);
      }
      block += count;
      left -= count;
    }
  }

  static void prepare_row(const W8A8Job& job, int64_t row, uint8_t* words) {
    const qk_w8a8_args& a = *job.args;
    const int8_t* x = a.xq + row * a.ldx;
    uint8_t* out = words + row * job.row_bytes;
    int64_t k = 0;
    for (; k + 4 <= a.k; k += 4, out += I8Dot::kBytesPerChunk) {
      const int8_t quad[4] = {x[k], x[k + 1], x[k + 2], x[k + 3]};
      I8Dot::prepare(quad, out);
    }
    if (k < a.k) {
      int8_t quad[4] = {};
      for (int j = 0; k + j < a.k; ++j) quad[j] = x[k + j];
      I8Dot::prepare(quad, out);
    }
  }
};

inline W8A8Kernel w8a8_kernel() {
  return {W8A8::tile_blocks, I8Dot::kBytesPerChunk, W8A8::prepare_row, W8A8::run};
}

}  // namespace
}  // namespace quantkit
