// What one instruction set offers. Each kernels_<isa>.cpp is compiled with its own flags and fills
// one table; isa.cpp picks among them at run time.
#pragma once

#include <cstdint>

#include "layout.h"
#include "quantkit/decoder.h"
#include "quantkit/quantkit.h"

namespace quantkit {

// A weight-only call with its activations prepared: each row is a run of 32-bit words, an fp32
// value or a pair of bf16 values, padded with zeros to whole chunks.
struct WeightOnlyJob {
  const qk_weight_only_args* args;
  int64_t groups;
  int64_t group_size;       // padded k when there is one group
  int64_t padded_k;
  int64_t blocks, chunks;   // of 16 rows, and of codes along k
  const uint8_t* words;     // [m] rows of words
  int64_t row_bytes;
  const float* group_sums;  // [m, groups]: sum of x over a group; NULL without zero points
};

// A block range [block, block + blocks) of the weight times rows [row, row + rows).
struct Range {
  int64_t block, blocks, row, rows;
  // What the thread reads next, to be fetched meanwhile; NULL for nothing.
  const uint8_t* ahead = nullptr;
  int64_t ahead_bytes = 0;
};

struct WeightOnlyKernel {
  int64_t codes_per_word;                // 1: fp32 words; 2: bf16 pairs
  int64_t (*tile_blocks)(int64_t rows);  // blocks that a range of so many rows should have
  void (*prepare_row)(const WeightOnlyJob& job, int64_t row, uint8_t* words, float* sums);
  int64_t (*scratch_bytes)(const WeightOnlyJob& job, int64_t rows);
  void (*run)(const WeightOnlyJob& job, const Range& range, uint8_t* scratch);
};

// An INT8 call whose activations are codes in the order of the packed layout (Int8Kernel's
// order_row), with the scale and the sum of the codes of every step. A step is the columns that
// share both scales.
struct Int8Job {
  int32_t format;           // QK_W4 or QK_I8
  int64_t n, padded_k;
  int64_t blocks, chunks;
  const void* packed;
  bool plain;               // 4-bit codes are what they say, less `offset`
  uint8_t table[16];        // else: value * unit + offset
  int32_t offset;           // what a weight word is above its value, times unit
  float unit;               // 1, or 2 for tables of halves; x_scale is divided by it already
  int64_t step, steps;
  int64_t steps_a_group;    // of the weight's scales
  int64_t groups;
  int32_t scale_dtype;
  const void* scale;
  int64_t scale_stride_n, scale_stride_g;
  const float* zero;
  int64_t zero_stride_n, zero_stride_g;
  const uint8_t* codes;     // [m] rows
  int64_t row_bytes;
  const float* x_scale;     // [m, steps]
  const int32_t* x_sum;     // [m, steps]
  const void* bias;
  int32_t bias_dtype;
  void* y;
  int32_t y_dtype;
  int64_t ldy;
};

struct Int8Kernel {
  int64_t tile_blocks;
  int32_t byte_offset;  // Int8Job::offset of 8-bit weights
  int64_t (*scratch_bytes)(const Int8Job& job);
  void (*order_row)(const int8_t* x, int64_t k, int64_t padded_k, int32_t format, uint8_t* out);
  void (*run)(const Int8Job& job, const Range& range, uint8_t* scratch);
};

// See rows.h.
struct RowKernels {
  void (*add)(float* x, const float* y, int64_t n);
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float epsilon, float* out);
  void (*gate)(const float* gate, const float* up, int64_t n, int32_t kind, float* out);
  void (*hadamard)(float* x, int64_t n, const qk_hadamard& hadamard);
  void (*rope)(float* x, const float* cos, const float* sin, int64_t dim);
  void (*bf16_words)(const float* x, int64_t n, uint16_t* out);
  void (*round_bf16)(const float* x, int64_t n, float* out);
  void (*int8)(const float* x, int64_t n, int64_t group, float given, int8_t* q, float* scale);
  void (*fp8)(const float* x, int64_t n, int64_t group, float given, float* out);
  void (*int8_sums)(const int8_t* q, int64_t n, int64_t step, int32_t* sums);
  void (*float_sums)(const float* x, int64_t n, int64_t step, float* sums);
  void (*load)(float* out, const void* x, int32_t dtype, int64_t first, int64_t n);
  int64_t (*argmax)(const float* x, int64_t n);
};

namespace {

// Whether rows of n values can be multiplied so.
inline bool fits(const qk_hadamard& h, int64_t n) {
  if (h.factor == nullptr || h.base < 1 || h.base > QK_LARGEST_BASE) return false;
  const int64_t runs = h.order / h.base;
  return runs > 0 && (runs & (runs - 1)) == 0 && h.order % h.base == 0 && n % h.order == 0;
}

}  // namespace

// Pages whose keys share one softmax before spans are merged: long enough to fill the registers
// of a tile, short enough that a context of a few hundred tokens is work for several threads.
constexpr int64_t kSpanPages = 2;
constexpr int64_t kStateHeader = 16;  // floats before the values of a softmax state

// Attention over one layer's pages.
struct AttentionJob {
  int64_t head_dim, heads, kv_heads;
  int64_t group;            // query heads of a key-value head
  float scale, softcap;
  int64_t window;           // 0: none
  bool round_bf16;          // fp32 words of bf16 values
  const uint8_t* queries;   // [tokens, heads] rows of words
  int64_t query_bytes;
  int32_t kv_dtype;
  const uint8_t* data;      // the layer's pages
  const float* scale_data;  // NULL unless the cache holds 8-bit codes
  int64_t page_bytes;
  float* states;            // [tokens, heads] softmax states of units without partials
  int64_t state_floats;
};

// Some tokens of one sequence times some key-value heads, over some spans.
struct AttentionUnit {
  const int32_t* pages;
  int64_t kv_head, end_head;
  int64_t token, tokens;    // rows of the batch
  int64_t position;         // of the first of them in its sequence
  int64_t first_span, end_span;
  float* partials;          // [spans from span_base on][heads] states, or NULL to merge at once
  int64_t span_base;
};

struct AttentionKernel {
  int64_t codes_per_word;
  int64_t (*scratch_bytes)(const AttentionJob& job, int64_t tokens);
  void (*run)(const AttentionJob& job, const AttentionUnit& unit, uint8_t* scratch);
  void (*clear_state)(float* state, int64_t head_dim);
  void (*merge_state)(float* state, float top, float total, const float* sum, int64_t head_dim);
  void (*finish_state)(const float* state, int64_t head_dim, float* out);
  void (*write_page)(const float* x, int64_t head_dim, int32_t dtype, int64_t slot, bool value,
                     float given, uint8_t* page, float* scale);
  bool (*finite_as_bf16)(const float* x, int64_t n);
};

struct KernelTable {
  const char* name;
  WeightOnlyKernel f32;
  WeightOnlyKernel bf16;  // run == nullptr: bf16 activations are widened to fp32
  Int8Kernel int8;
  RowKernels rows;
  AttentionKernel attention_f32;
  AttentionKernel attention_bf16;  // run == nullptr: values rounded to bf16 in fp32 words
  void (*quantize_row)(const qk_quantize_args& args, int64_t row);
  void (*dequantize_row)(const qk_weight_only_args& args, int64_t row);
};

const KernelTable& generic_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512bf16_kernels();

const KernelTable& kernels();  // the chosen one
bool set_isa(const char* name);
bool isa_supported(const char* name);

}  // namespace quantkit
