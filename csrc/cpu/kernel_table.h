// What one instruction set offers. Each kernels_<isa>.cpp is compiled with its own flags and fills
// one table; isa.cpp picks among them at run time.
#pragma once

#include <cstdint>

#include "layout.h"
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
};

struct WeightOnlyKernel {
  int64_t codes_per_word;                // 1: fp32 words; 2: bf16 pairs
  int64_t (*tile_blocks)(int64_t rows);  // blocks that a range of so many rows should have
  void (*prepare_row)(const WeightOnlyJob& job, int64_t row, uint8_t* words, float* sums);
  int64_t (*scratch_bytes)(const WeightOnlyJob& job, int64_t rows);
  void (*run)(const WeightOnlyJob& job, const Range& range, uint8_t* scratch);
};

// An INT8 x INT8 call whose activations are in the kernel's own operand order.
struct W8A8Job {
  const qk_w8a8_args* args;
  int64_t blocks, chunks;
  const uint8_t* words;
  int64_t row_bytes;
};

struct W8A8Kernel {
  int64_t (*tile_blocks)(int64_t rows);
  int64_t bytes_per_chunk;  // prepared activation bytes for four codes
  void (*prepare_row)(const W8A8Job& job, int64_t row, uint8_t* words);
  void (*run)(const W8A8Job& job, const Range& range);
};

struct KernelTable {
  const char* name;
  WeightOnlyKernel f32;
  WeightOnlyKernel bf16;  // run == nullptr: bf16 activations are widened to fp32
  W8A8Kernel w8a8;
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
