// INT8 activations times 8-bit or 4-bit integer weights, exact in int32 inside a group.
//
//   y[m,n] = sum_s (float(sum_{k in s} code(w) * xq) - zero[n,s] * float(sum xq)) * (w_scale * x_scale)
//
// where s runs over the steps of k that share both scales; one scale a row and a token make one
// step, and then the integer sum is the whole product.
//
// Ladder:
//   1. Widen both to int32 and multiply: one product a lane.
//   2. AVX2: widen to int16 and use vpmaddwd, two products a lane, exact; 4-bit codes are small
//      enough for vpmaddubsw, four products a lane, without saturating.
//   3. AVX512-VNNI: vpdpbusd, four products a lane. Its unsigned operand is the weight: a 4-bit
//      code as it is, an 8-bit code plus 128. What that adds is an offset times the sum of the
//      step's activations, known beforehand: it is where the accumulator starts, and costs nothing.
//   4. The running y stays in registers: with one scale for 32 or 64 columns, loading and storing
//      it would cost as much as the products. With one scale for all columns there is none, and
//      its registers hold two rows more.
//   5. The first strip of a tile waits for its weights, later ones have them in the cache. So strips
//      ask for what the thread reads next: memory and products then take the time of the longer of
//      both, not their sum.
#pragma once

#include "elementwise.h"

namespace quantkit {
namespace {

#if defined(__AVX512VNNI__)

struct IntMath {
  using Acc = __m512i;
  using Word = __m512i;
  // Twelve sums, and as many running y: few rows take a weight's run of memory whole, many rows
  // share the work of decoding it.
  static constexpr int kBlocks = 4, kTallBlocks = 2;
  static constexpr int rows(int blocks, bool one_step) {
    return blocks == 4 ? 3 : (one_step ? 8 : 6);
  }
  static constexpr int32_t kByteOffset = 128;  // what load8 adds to a code
  static Acc splat(int32_t v) { return _mm512_set1_epi32(v); }
  static Word load8(const uint8_t* chunk) {
    return _mm512_xor_si512(_mm512_loadu_si512(chunk), _mm512_set1_epi8(-128));
  }
  static void load4(const uint8_t* chunk, Word& low, Word& high) {
    const __m512i raw = _mm512_loadu_si512(chunk), mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(raw, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask);
  }
  static Word load_table(const uint8_t* table) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  }
  static Word look_up(Word table, Word index) { return _mm512_shuffle_epi8(table, index); }
  static Acc mac8(Acc acc, Word w, const uint8_t* x) { return mac4(acc, w, x); }
  static Acc mac4(Acc acc, Word w, const uint8_t* x) {
    int32_t word;
    std::memcpy(&word, x, 4);
    // Spelled out: of the intrinsic GCC 12 makes a copy of the sum for each product.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(_mm512_set1_epi32(word)));
    return acc;
  }
  static F32Math::Acc to_float(Acc a) { return _mm512_cvtepi32_ps(a); }
};

#elif defined(__AVX2__)

struct IntMath {
  struct Acc {
    __m256i part[2];
  };
  using Word = Acc;
  static constexpr int kBlocks = 1, kTallBlocks = 1;
  static constexpr int rows(int, bool) { return 2; }
  static constexpr int32_t kByteOffset = 0;
  static Acc splat(int32_t v) { return {{_mm256_set1_epi32(v), _mm256_set1_epi32(v)}}; }
  static Word load8(const uint8_t* chunk) {
    const __m256i* p = reinterpret_cast<const __m256i*>(chunk);
    return {{_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)}};
  }
  static void load4(const uint8_t* chunk, Word& low, Word& high) {
    const Word raw = load8(chunk);
    const __m256i mask = _mm256_set1_epi8(15);
    for (int i = 0; i < 2; ++i) {
      low.part[i] = _mm256_and_si256(raw.part[i], mask);
      high.part[i] = _mm256_and_si256(_mm256_srli_epi16(raw.part[i], 4), mask);
    }
  }
  static Word load_table(const uint8_t* table) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    const __m256i both = _mm256_broadcastsi128_si256(half);
    return {{both, both}};
  }
  static Word look_up(Word table, Word index) {
    return {{_mm256_shuffle_epi8(table.part[0], index.part[0]),
             _mm256_shuffle_epi8(table.part[1], index.part[1])}};
  }
  static __m256i splat_word(const uint8_t* x) {
    int32_t word;
    std::memcpy(&word, x, 4);
    return _mm256_set1_epi32(word);
  }
  // Even and odd bytes as int16: four products of 8 bits are exact only that way.
  static Acc mac8(Acc acc, Word w, const uint8_t* x) {
    const __m256i value = splat_word(x);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(value, 8), 8);
    const __m256i odd = _mm256_srai_epi16(value, 8);
    for (int i = 0; i < 2; ++i) {
      const __m256i w_even = _mm256_srai_epi16(_mm256_slli_epi16(w.part[i], 8), 8);
      const __m256i w_odd = _mm256_srai_epi16(w.part[i], 8);
      acc.part[i] = _mm256_add_epi32(acc.part[i], _mm256_madd_epi16(w_even, even));
      acc.part[i] = _mm256_add_epi32(acc.part[i], _mm256_madd_epi16(w_odd, odd));
    }
    return acc;
  }
  // A pair is at most 2 * 127 * 128 in magnitude: no saturation for tables up to 127.
  static Acc mac4(Acc acc, Word w, const uint8_t* x) {
    const __m256i value = splat_word(x), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; ++i) {
      const __m256i pairs = _mm256_maddubs_epi16(w.part[i], value);
      acc.part[i] = _mm256_add_epi32(acc.part[i], _mm256_madd_epi16(pairs, ones));
    }
    return acc;
  }
  static F32Math::Acc to_float(Acc a) {
    F32Math::Acc out;
    for (int i = 0; i < 2; ++i) {
      out.part[i] = reinterpret_cast<NativeF32>(_mm256_cvtepi32_ps(a.part[i]));
    }
    return out;
  }
};

#else

struct IntMath {
  struct Acc {
    int32_t lane[16];
  };
  struct Word {
    int8_t byte[64];
  };
  static constexpr int kBlocks = 1, kTallBlocks = 1;
  static constexpr int rows(int, bool) { return 2; }
  static constexpr int32_t kByteOffset = 0;
  static Acc splat(int32_t v) {
    Acc a;
    for (int i = 0; i < 16; ++i) a.lane[i] = v;
    return a;
  }
  static Word load8(const uint8_t* chunk) {
    Word w;
    std::memcpy(w.byte, chunk, 64);
    return w;
  }
  static void load4(const uint8_t* chunk, Word& low, Word& high) {
    for (int i = 0; i < 64; ++i) low.byte[i] = static_cast<int8_t>(chunk[i] & 15u);
    for (int i = 0; i < 64; ++i) high.byte[i] = static_cast<int8_t>(chunk[i] >> 4);
  }
  static Word load_table(const uint8_t* table) {
    Word w;
    for (int i = 0; i < 64; ++i) w.byte[i] = static_cast<int8_t>(table[i % 16]);
    return w;
  }
  static Word look_up(Word table, Word index) {
    for (int i = 0; i < 64; ++i) index.byte[i] = table.byte[index.byte[i]];
    return index;
  }
  static Acc mac8(Acc acc, const Word& w, const uint8_t* x) {
    int8_t value[4];
    std::memcpy(value, x, 4);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 4; ++j) acc.lane[i] += w.byte[4 * i + j] * value[j];
    }
    return acc;
  }
  static Acc mac4(Acc acc, const Word& w, const uint8_t* x) { return mac8(acc, w, x); }
  static F32Math::Acc to_float(const Acc& a) {
    float out[16];
    for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(a.lane[i]);
    return F32Math::load(out);
  }
};

#endif

// What the 16 * NB rows of one weight tile need.
struct Int8Tile {
  int64_t block;
  const void* scale;  // + group * scale_step elements
  int64_t scale_step;
  bool scale_bf16;
  const float* zero;
  int64_t zero_step;
};

// What is fetched while strips compute: at the pace that memory keeps, from the first strip on.
struct Ahead {
  const uint8_t* line;
  const uint8_t* end;
  int64_t turns;  // of inner loops that are still to come

  static constexpr int64_t kLine = 64;
  static constexpr int kMost = 2;  // lines a turn
  int lines_a_turn() const {
    if (line >= end) return 0;
    return (end - line) / kLine > turns ? kMost : 1;
  }
};

template <int N>
struct Lines {
  static constexpr int value = N;
};

// How a format's codes become words: plain 4-bit codes, 4-bit codes through a table, bytes.
enum class Int8Decode { kPlain4, kTable4, kBytes };

struct Int8Linear {
  using F = F32Math;

  template <int MR, int NB, Int8Decode kDecode, bool kZero, bool kOneStep>
  static void strip(const Int8Job& job, const Int8Tile& tile, int64_t row, Ahead& ahead) {
    constexpr int kWidth = NB * static_cast<int>(kBlockRows);
    constexpr int64_t kCodes = kDecode == Int8Decode::kBytes ? 4 : 8;
    const PackedBlock at = packed_block(tile.block, job.blocks, job.chunks);
    const uint8_t* chunk = static_cast<const uint8_t*>(job.packed) + at.base;
    const int64_t row_bytes = job.row_bytes;
    const uint8_t* x = job.codes + row * row_bytes;
    const float* x_scale = job.x_scale + row * job.steps;
    const int32_t* x_sum = job.x_sum + row * job.steps;
    const IntMath::Word table = IntMath::load_table(job.table);

    F::Acc y[MR][NB];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) y[m][b] = F::zero();
    }
    int64_t k = 0;
    const int64_t steps = kOneStep ? 1 : job.steps;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t end = k + job.step < job.padded_k ? k + job.step : job.padded_k;
      IntMath::Acc acc[MR][NB];
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        // Unsigned: the offset may wrap where the exact sum, in the end, does not.
        const uint32_t start = 0u - static_cast<uint32_t>(job.offset) *
                                        static_cast<uint32_t>(x_sum[m * job.steps + s]);
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b) acc[m][b] = IntMath::splat(static_cast<int32_t>(start));
      }
      const auto multiply = [&](auto lines) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b) {
          if constexpr (kDecode == Int8Decode::kBytes) {
            const IntMath::Word w = IntMath::load8(chunk + b * kChunkBytes);
#pragma GCC unroll 8
            for (int m = 0; m < MR; ++m) {
              acc[m][b] = IntMath::mac8(acc[m][b], w, x + m * row_bytes);
            }
          } else {
            IntMath::Word low, high;
            IntMath::load4(chunk + b * kChunkBytes, low, high);
            if constexpr (kDecode == Int8Decode::kTable4) {
              low = IntMath::look_up(table, low);
              high = IntMath::look_up(table, high);
            }
#pragma GCC unroll 8
            for (int m = 0; m < MR; ++m) {
              acc[m][b] = IntMath::mac4(acc[m][b], low, x + m * row_bytes);
            }
#pragma GCC unroll 8
            for (int m = 0; m < MR; ++m) {
              acc[m][b] = IntMath::mac4(acc[m][b], high, x + m * row_bytes + 4);
            }
          }
        }
        x += kCodes;
        chunk += at.step;
#pragma GCC unroll 2
        for (int i = 0; i < lines.value; ++i, ahead.line += Ahead::kLine) {
          __builtin_prefetch(ahead.line, 0, 3);
        }
      };
      const auto run = [&](auto lines) __attribute__((always_inline)) {
        const uint8_t* const last = x + (end - k);
        if constexpr (kDecode == Int8Decode::kBytes) {
          // The compiler copies every sum once a turn: fewer turns.
#pragma GCC unroll 4
          while (x < last) multiply(lines);
        } else {
          while (x < last) multiply(lines);
        }
      };
      switch (ahead.lines_a_turn()) {
        case 0: run(Lines<0>{}); break;
        case 1: run(Lines<1>{}); break;
        default: run(Lines<Ahead::kMost>{}); break;
      }
      ahead.turns -= (end - k) / kCodes;
      k = end;
      const int64_t group = job.steps_a_group == 1 ? s : s / job.steps_a_group;
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) {
        const int64_t place = group * tile.scale_step + b * kBlockRows;
        const F::Acc scale =
            tile.scale_bf16 ? F::load_bf16(static_cast<const uint16_t*>(tile.scale) + place)
                            : F::load(static_cast<const float*>(tile.scale) + place);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          F::Acc sum = IntMath::to_float(acc[m][b]);
          if constexpr (kZero) {
            const float total = static_cast<float>(x_sum[m * job.steps + s]) * job.unit;
            sum = F::minus_product(sum, F::load(tile.zero + group * tile.zero_step + b * kBlockRows),
                                   F::splat(total));
          }
          const F::Acc both = F::mul(F::splat(x_scale[m * job.steps + s]), scale);
          y[m][b] = kOneStep ? F::mul(sum, both) : F::fma(sum, both, y[m][b]);
        }
      }
    }
    const int64_t first = tile.block * kBlockRows;
    if (job.bias == nullptr && job.y_dtype == QK_F32 && first + kWidth <= job.n) {
      float* out = static_cast<float*>(job.y) + row * job.ldy + first;
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b) F::store(out + m * job.ldy + b * kBlockRows, y[m][b]);
      }
      return;
    }
    float out[MR][kWidth];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) F::store(out[m] + b * kBlockRows, y[m][b]);
    }
    for (int m = 0; m < MR; ++m) finish(job, first, kWidth, row + m, out[m]);
  }

  static void finish(const Int8Job& job, int64_t first, int64_t width, int64_t row, float* y) {
    const int64_t valid = job.n - first < width ? job.n - first : width;
    if (job.bias != nullptr) {
      float bias[4 * kBlockRows];
      load_row(bias, job.bias, job.bias_dtype, first, valid);
      for (int64_t i = 0; i < valid; ++i) y[i] += bias[i];
    }
    store_row(job.y, job.y_dtype, row * job.ldy + first, y, valid);
  }

  template <int NB, Int8Decode kDecode, bool kZero, bool kOneStep, int MR = 1>
  static void rows(const Int8Job& job, const Int8Tile& tile, int64_t row, int64_t count,
                   Ahead& ahead) {
    if constexpr (MR < IntMath::rows(NB, kOneStep)) {
      if (count > MR) {
        return rows<NB, kDecode, kZero, kOneStep, MR + 1>(job, tile, row, count, ahead);
      }
    }
    strip<MR, NB, kDecode, kZero, kOneStep>(job, tile, row, ahead);
  }

  template <int NB, Int8Decode kDecode, bool kZero, bool kOneStep>
  static void tile(const Int8Job& job, int64_t block, const Range& range, uint8_t* scratch,
                   Ahead& ahead) {
    constexpr int64_t kWidth = NB * kBlockRows;
    const int64_t first = block * kBlockRows;
    float* memory = reinterpret_cast<float*>(scratch);
    Int8Tile t{};
    t.block = block;
    const GroupTable scales{job.scale, job.scale_dtype, job.scale_stride_n, job.scale_stride_g};
    t.scale = scales.tile(job.n, first, kWidth, job.groups, memory, &t.scale_step);
    t.scale_bf16 = job.scale_dtype == QK_BF16 && t.scale != memory;
    if (t.scale != memory) {  // they are read behind a step's products: time enough to come
      const int64_t bytes = t.scale_bf16 ? 2 : 4;
      for (int64_t g = 0; g < job.groups; ++g) {
        const char* line = static_cast<const char*>(t.scale) + g * t.scale_step * bytes;
        for (int64_t i = 0; i < kWidth * bytes; i += Ahead::kLine) __builtin_prefetch(line + i);
      }
    }
    if constexpr (kZero) {
      const GroupTable zeros{job.zero, QK_F32, job.zero_stride_n, job.zero_stride_g};
      t.zero = static_cast<const float*>(zeros.tile(
          job.n, first, kWidth, job.groups, memory + job.groups * kWidth, &t.zero_step));
    }
    const int64_t strips = ceil_div(range.rows, IntMath::rows(NB, kOneStep));
    constexpr int64_t kCodes = kDecode == Int8Decode::kBytes ? 4 : 8;
    ahead.turns = strips * ceil_div(range.block + range.blocks - block, NB) *
                  (job.padded_k / kCodes);
    const int64_t height = ceil_div(range.rows, strips);
    for (int64_t m = 0; m < range.rows; m += height) {
      const int64_t count = height < range.rows - m ? height : range.rows - m;
      rows<NB, kDecode, kZero, kOneStep>(job, t, range.row + m, count, ahead);
    }
  }

  template <Int8Decode kDecode, bool kZero, bool kOneStep>
  static void blocks(const Int8Job& job, const Range& range, uint8_t* scratch) {
    const int64_t short_rows = IntMath::rows(IntMath::kBlocks, kOneStep);
    const bool tall = kDecode == Int8Decode::kBytes && range.rows > short_rows;
    const int64_t widest = tall ? IntMath::kTallBlocks : IntMath::kBlocks;
    Ahead ahead{range.ahead, range.ahead + range.ahead_bytes, 0};
    // Few rows are one strip, which reads from memory all the time: nothing is left to hide.
    if (range.ahead == nullptr || range.rows <= short_rows) {
      ahead.line = ahead.end = static_cast<const uint8_t*>(job.packed);
    }
    int64_t left = range.blocks;
    for (int64_t block = range.block; left > 0;) {
      const int64_t count = blocks_at_once(block, left, widest);
      if (count == 4) {
        if constexpr (IntMath::kBlocks >= 4) {
          tile<4, kDecode, kZero, kOneStep>(job, block, range, scratch, ahead);
        }
      } else if (count == 2) {
        if constexpr (IntMath::kBlocks >= 2) {
          tile<2, kDecode, kZero, kOneStep>(job, block, range, scratch, ahead);
        }
      } else {
        tile<1, kDecode, kZero, kOneStep>(job, block, range, scratch, ahead);
      }
      block += count;
      left -= count;
    }
  }

  template <Int8Decode kDecode, bool kZero>
  static void stepped(const Int8Job& job, const Range& range, uint8_t* scratch) {
    // Only bytes are multiplied in tall tiles, whose height the running y would limit.
    if constexpr (kDecode == Int8Decode::kBytes) {
      if (job.steps == 1) return blocks<kDecode, kZero, true>(job, range, scratch);
    }
    blocks<kDecode, kZero, false>(job, range, scratch);
  }

  template <Int8Decode kDecode>
  static void decoded(const Int8Job& job, const Range& range, uint8_t* scratch) {
    if (job.zero != nullptr) return stepped<kDecode, true>(job, range, scratch);
    stepped<kDecode, false>(job, range, scratch);
  }

  static void run(const Int8Job& job, const Range& range, uint8_t* scratch) {
    if (job.format == QK_I8) return decoded<Int8Decode::kBytes>(job, range, scratch);
    if (job.plain) return decoded<Int8Decode::kPlain4>(job, range, scratch);
    decoded<Int8Decode::kTable4>(job, range, scratch);
  }

  static int64_t scratch_bytes(const Int8Job& job) {
    return 2 * job.groups * IntMath::kBlocks * kBlockRows * 4;
  }

  // Codes in the order that the packed layout holds them; see pack_w4's picture in quantkit.h.
  static void order_row(const int8_t* x, int64_t k, int64_t padded_k, int32_t format,
                        uint8_t* out) {
    std::memcpy(out, x, static_cast<size_t>(k));
    std::memset(out + k, 0, static_cast<size_t>(padded_k - k));
    if (format == QK_I8) return;
    static constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    for (int64_t i = 0; i < padded_k; i += 8) {
      uint8_t eight[8];
      for (int j = 0; j < 8; ++j) eight[j] = out[i + kOrder[j]];
      std::memcpy(out + i, eight, 8);
    }
  }
};

inline Int8Kernel int8_kernel() {
  return {IntMath::kBlocks, IntMath::kByteOffset, Int8Linear::scratch_bytes, Int8Linear::order_row,
          Int8Linear::run};
}

}  // namespace
}  // namespace quantkit
