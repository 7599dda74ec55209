// Weight-only linear layers, for any activation math and any weight decoder.
//
// Ladder:
//   1. Dequantize the whole weight, call a matrix product: 8x the traffic of a 4-bit weight.
//   2. Dequantize a row in registers and take dot products along k: reads only codes, but ends
//      each row with a horizontal sum and reloads the scale of every group as a scalar.
//   3. Sixteen rows across the lanes (this file): no horizontal sum, scales are vectors, and the
//      activation is a broadcast. Scale and zero act on the fp32 sum of a group, so the inner loop
//      multiplies by small codes that bf16 holds exactly.
//   4. More rows of x than registers hold: decode a panel of the weight once into L2, then run a
//      register-tiled product over it.
// Steps 3 and 4 add in the same order, so a row of y has the same bits whatever M is.
#pragma once

#include "elementwise.h"

namespace quantkit {
namespace {

constexpr int64_t kPanelWords = 256;  // words of k in a panel: 64 KB with four blocks
constexpr int64_t kPanelRowsMax = 240;  // rows of x that share a panel; their sums stay in L2

// What the 16 * NB rows of one weight tile need, whatever the rows of x.
struct Tile {
  int64_t block;
  const void* scale;  // + g * scale_step elements: the 16 * NB values of group g
  int64_t scale_step;
  bool scale_bf16;
  const float* zero;
  int64_t zero_step;
  const uint8_t* panel;  // decoded words, when there are more rows than a direct strip takes
  float* sums;           // [rows][16 * NB] the running y
  float* carry;          // [rows][16 * NB] an unfinished group between two panels
};

// Blocks that one tile of `rows` rows of x should have.
template <class Math>
constexpr int64_t tile_blocks(int64_t rows) {
  return rows <= Math::kDirectRows ? Math::direct_blocks(rows) : Math::kPanelBlocks;
}

template <class Math, class Decoder>
struct WeightOnly {
  using Acc = typename Math::Acc;
  using Word = typename Math::Word;
  static constexpr int kSteps = Decoder::kSteps;
  static constexpr int kChunkCodes = kSteps * Math::kCodesPerWord;

  // acc += weight[block .. block+NB) * x over the words [w0, w1) of k.
  template <int MR, int NB, bool kAhead = false>
  [[gnu::always_inline]] static void from_packed(const Decoder& decode, const uint8_t* packed,
                                                 int64_t step, const uint8_t* const (&x)[MR],
                                                 int64_t w0, int64_t w1, Acc (&acc)[MR][NB],
                                                 const uint8_t* ahead = nullptr) {
    for (int64_t w = w0; w < w1; w += kSteps) {
      const uint8_t* chunk = packed + w / kSteps * step;
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) {
        if constexpr (kAhead) __builtin_prefetch(ahead + (chunk - packed) + b * kChunkBytes, 0, 3);
        Word weight[kSteps];
        decode(chunk + b * kChunkBytes, weight);
#pragma GCC unroll 8
        for (int s = 0; s < kSteps; ++s) {
#pragma GCC unroll 8
          for (int m = 0; m < MR; ++m) {
            acc[m][b] = Math::mac(acc[m][b], weight[s], Math::splat_word(x[m] + (w + s) * 4));
          }
        }
      }
    }
  }

  template <int MR, int NB>
  [[gnu::always_inline]] static void from_panel(const uint8_t* panel,
                                                const uint8_t* const (&x)[MR], int64_t w0,
                                                int64_t w1, Acc (&acc)[MR][NB]) {
    for (int64_t w = w0; w < w1; ++w, panel += NB * kChunkBytes) {
      Word weight[NB];
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) weight[b] = Math::load_word(panel + b * kChunkBytes);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Word value = Math::splat_word(x[m] + w * 4);
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b) acc[m][b] = Math::mac(acc[m][b], weight[b], value);
      }
    }
  }

  // MR rows of x times one tile, over k in [k0, k1): whole groups, or a part of one.
  // `slot` is the first row's place in the tile's sums.
  template <int MR, int NB, bool kPanel>
  static void strip(const WeightOnlyJob& job, const Decoder& decode, const Tile& tile, int64_t row,
                    int64_t slot, int64_t k0, int64_t k1) {
    constexpr int kWidth = NB * static_cast<int>(kBlockRows);
    const uint8_t* x[MR];
    for (int m = 0; m < MR; ++m) x[m] = job.words + (row + m) * job.row_bytes;
    const PackedBlock at = packed_block(tile.block, job.blocks, job.chunks);
    const uint8_t* packed = static_cast<const uint8_t*>(job.args->packed) + at.base;
    float* sums = tile.sums + slot * kWidth;
    float* carry = tile.carry + slot * kWidth;

    Acc acc[MR][NB];
    const bool resumed = k0 % job.group_size != 0;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) {
        acc[m][b] = resumed ? Math::load(carry + m * kWidth + b * kBlockRows) : Math::zero();
      }
    }
    for (int64_t k = k0; k < k1;) {
      const int64_t group = k / job.group_size;
      const int64_t group_end = min_of((group + 1) * job.group_size, job.padded_k);
      const int64_t end = min_of(group_end, k1);
      const int64_t w0 = k / Math::kCodesPerWord, w1 = end / Math::kCodesPerWord;
      if constexpr (kPanel) {
        const int64_t offset = (w0 - k0 / Math::kCodesPerWord) * NB * kChunkBytes;
        from_panel<MR, NB>(tile.panel + offset, x, w0, w1, acc);
      } else {
        from_packed<MR, NB>(decode, packed, at.step, x, w0, w1, acc);
      }
      k = end;
      if (end < group_end) break;
      const int64_t place = group * tile.scale_step;
      const float* zero = tile.zero == nullptr ? nullptr : tile.zero + group * tile.zero_step;
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        float* y = sums + m * kWidth;
        const Acc x_sum = zero == nullptr
                              ? Math::zero()
                              : Math::splat(job.group_sums[(row + m) * job.groups + group]);
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b) {
          Acc sum = acc[m][b];
          if (zero != nullptr) {
            sum = Math::minus_product(sum, Math::load(zero + b * kBlockRows), x_sum);
          }
          const Acc before = Math::load(y + b * kBlockRows);
          const Acc scale = load_scale(tile, place + b * kBlockRows);
          Math::store(y + b * kBlockRows, Math::fma(sum, scale, before));
          acc[m][b] = Math::zero();
        }
      }
    }
    if (k1 % job.group_size != 0 && k1 != job.padded_k) {
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b) Math::store(carry + m * kWidth + b * kBlockRows, acc[m][b]);
      }
    }
  }

  template <int NB, bool kPanel>
  static void rows(const WeightOnlyJob& job, const Decoder& decode, const Tile& tile, int64_t row,
                   int64_t slot, int64_t count, int64_t k0, int64_t k1) {
    constexpr int kMost = kPanel ? Math::kPanelRows : Math::kDirectRows;
    const auto call = [&](auto height) {
      // A direct strip is instantiated only for the widths that its height runs at.
      if constexpr (height.value <= kMost &&
                    (kPanel || NB <= Math::direct_blocks(height.value))) {
        strip<height.value, NB, kPanel>(job, decode, tile, row, slot, k0, k1);
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

  [[gnu::always_inline]] static Acc load_scale(const Tile& tile, int64_t place) {
    return tile.scale_bf16 ? Math::load_bf16(static_cast<const uint16_t*>(tile.scale) + place)
                           : Math::load(static_cast<const float*>(tile.scale) + place);
  }

  static void finish(const WeightOnlyJob& job, const float* sums, int64_t first, int64_t width,
                     int64_t row, int64_t count) {
    const qk_weight_only_args& a = *job.args;
    const int64_t valid = min_of(width, a.n - first);
    float out[4 * kBlockRows], bias[4 * kBlockRows];
    if (a.bias != nullptr) load_row(bias, a.bias, a.bias_dtype, first, valid);
    for (int64_t m = 0; m < count; ++m) {
      const float* y = sums + m * width;
      if (a.bias != nullptr) {
        for (int64_t i = 0; i < valid; ++i) out[i] = y[i] + bias[i];
        y = out;
      }
      store_row(a.y, a.x_dtype, (row + m) * a.ldy + first, y, valid);
    }
  }

  template <int NB>
  static void tile(const WeightOnlyJob& job, const Decoder& decode, int64_t block,
                   const Range& range, uint8_t* scratch) {
    constexpr int64_t kWidth = NB * kBlockRows;
    const qk_weight_only_args& a = *job.args;
    float* memory = reinterpret_cast<float*>(scratch);
    Tile t;
    t.block = block;
    const GroupTable scales{a.scale, a.scale_dtype, a.scale_stride_n, a.scale_stride_g};
    t.scale = scales.tile(a.n, block * kBlockRows, kWidth, job.groups, memory, &t.scale_step);
    t.scale_bf16 = a.scale_dtype == QK_BF16 && t.scale != memory;
    memory += job.groups * kWidth;
    t.zero = nullptr;
    if (a.zero != nullptr) {
      const GroupTable zeros{a.zero, QK_F32, a.zero_stride_n, a.zero_stride_g};
      t.zero = static_cast<const float*>(
          zeros.tile(a.n, block * kBlockRows, kWidth, job.groups, memory, &t.zero_step));
      memory += job.groups * kWidth;
    }
    const int64_t count = min_of(range.rows, kPanelRowsMax);
    t.sums = memory;
    t.carry = memory + count * kWidth;
    uint8_t* panel = reinterpret_cast<uint8_t*>(t.carry + count * kWidth);

    const bool direct = range.rows <= Math::kDirectRows;
    t.panel = panel;
    for (int64_t first = 0; first < range.rows; first += kPanelRowsMax) {
      const int64_t row = range.row + first;
      const int64_t rows_here = min_of(kPanelRowsMax, range.rows - first);
      std::memset(t.sums, 0, static_cast<size_t>(rows_here * kWidth) * sizeof(float));
      if (direct) {
        rows<NB, false>(job, decode, t, row, 0, rows_here, 0, job.padded_k);
      } else {
        panels<NB>(job, decode, t, panel, row, rows_here);
      }
      finish(job, t.sums, block * kBlockRows, kWidth, row, rows_here);
    }
  }

  template <int NB>
  static void panels(const WeightOnlyJob& job, const Decoder& decode, const Tile& t,
                     uint8_t* panel, int64_t row, int64_t count) {
    constexpr int64_t kPanelCodes = kPanelWords * Math::kCodesPerWord;
    const PackedBlock at = packed_block(t.block, job.blocks, job.chunks);
    const uint8_t* packed = static_cast<const uint8_t*>(job.args->packed) + at.base;
    // Strips of nearly equal height: 7 rows are 4 + 3, not 6 + 1.
    const int64_t strips = ceil_div(count, Math::kPanelRows);
    const int64_t height = ceil_div(count, strips);
    for (int64_t k0 = 0; k0 < job.padded_k;) {
      int64_t k1;
      if (job.group_size <= kPanelCodes) {
        k1 = min_of(job.padded_k, k0 + kPanelCodes / job.group_size * job.group_size);
      } else {
        const int64_t group_end = (k0 / job.group_size + 1) * job.group_size;
        k1 = min_of(min_of(group_end, job.padded_k), k0 + kPanelCodes);
      }
      uint8_t* out = panel;
      for (int64_t k = k0; k < k1; k += kChunkCodes) {
        const uint8_t* chunk = packed + k / kChunkCodes * at.step;
        for (int b = 0; b < NB; ++b) {
          Word weight[kSteps];
          decode(chunk + b * kChunkBytes, weight);
          for (int s = 0; s < kSteps; ++s) {
            Math::store_word(out + (s * NB + b) * kChunkBytes, weight[s]);
          }
        }
        out += kSteps * NB * kChunkBytes;
      }
      for (int64_t slot = 0; slot < count; slot += height) {
        rows<NB, true>(job, decode, t, row + slot, slot, min_of(height, count - slot), k0, k1);
      }
      k0 = k1;
    }
  }

  static void run(const WeightOnlyJob& job, const Range& range, uint8_t* scratch) {
    const Decoder decode(job.args->lut);
    const int64_t widest = tile_blocks<Math>(range.rows);
    int64_t left = range.blocks;
    for (int64_t block = range.block; left > 0;) {
      const int64_t count = blocks_at_once(block, left, widest);
      if (count == 4) {
        if constexpr (Math::direct_blocks(1) >= 4) tile<4>(job, decode, block, range, scratch);
      } else if (count == 2) {
        if constexpr (Math::direct_blocks(1) >= 2) tile<2>(job, decode, block, range, scratch);
      } else {
        tile<1>(job, decode, block, range, scratch);
      }
      block += count;
      left -= count;
    }
  }
};

template <class Math>
int64_t weight_only_scratch(const WeightOnlyJob& job, int64_t rows) {
  const int64_t width = 4 * kBlockRows;
  const int64_t tables = 2 * job.groups * width * 4;
  const int64_t sums = 2 * min_of(rows, kPanelRowsMax) * width * 4;
  return tables + sums + kPanelWords * 4 * kChunkBytes;
}

template <class Math>
void prepare_weight_only_row(const WeightOnlyJob& job, int64_t row, uint8_t* words, float* sums) {
  const qk_weight_only_args& a = *job.args;
  const int64_t first = row * a.ldx;
  if (words != nullptr) {
    if constexpr (Math::kCodesPerWord == 1) {
      float* out = reinterpret_cast<float*>(words + row * job.row_bytes);
      load_row(out, a.x, a.x_dtype, first, a.k);
      for (int64_t k = a.k; k < job.padded_k; ++k) out[k] = 0.0f;
    } else {
      uint8_t* out = words + row * job.row_bytes;
      const size_t used = static_cast<size_t>(a.k) * 2;
      std::memcpy(out, static_cast<const uint16_t*>(a.x) + first, used);
      std::memset(out + used, 0, static_cast<size_t>(job.padded_k) * 2 - used);
    }
  }
  if (sums == nullptr) return;
  for (int64_t g = 0; g < job.groups; ++g) {
    const int64_t end = min_of((g + 1) * job.group_size, a.k);
    // Pieces of 512 so that any group size fits the stack; the order depends on k alone.
    float total = 0.0f;
    for (int64_t k = g * job.group_size; k < end; k += 512) {
      float piece[512];
      const int64_t n = min_of(512, end - k);
      load_row(piece, a.x, a.x_dtype, first + k, n);
      total += sum_row(piece, n);
    }
    sums[row * job.groups + g] = total;
  }
}

template <class Math, class W4, class I8, class F8, class B16, class F32>
void run_weight_only(const WeightOnlyJob& job, const Range& range, uint8_t* scratch) {
  switch (job.args->format) {
    case QK_W4: return WeightOnly<Math, W4>::run(job, range, scratch);
    case QK_I8: return WeightOnly<Math, I8>::run(job, range, scratch);
    case QK_F8: return WeightOnly<Math, F8>::run(job, range, scratch);
    case QK_B16: return WeightOnly<Math, B16>::run(job, range, scratch);
    default:  // fp32 weights are multiplied as fp32 only
      if constexpr (Math::kCodesPerWord == 1) WeightOnly<Math, F32>::run(job, range, scratch);
  }
}

template <class Math, class W4, class I8, class F8, class B16, class F32>
WeightOnlyKernel weight_only_kernel() {
  return {Math::kCodesPerWord, tile_blocks<Math>, prepare_weight_only_row<Math>,
          weight_only_scratch<Math>, run_weight_only<Math, W4, I8, F8, B16, F32>};
}

}  // namespace
}  // namespace quantkit
