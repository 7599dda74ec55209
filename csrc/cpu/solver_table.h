// What one instruction set offers to the calibration kernels. As in kernel_table.h, each
// solvers_<isa>.cpp is compiled with its own flags and fills one table.
#pragma once

#include <cstdint>

#include "quantkit/solvers.h"

namespace quantkit {

// The factor is repacked into panels of `columns` columns: panel p holds the rows 0 .. its last
// column, `columns` floats each, zero beyond k. What a panel needs is then one stream.
struct GptqKernel {
  int64_t lanes;    // rows of the weight in one vector
  int64_t vectors;  // most vectors of rows that run() takes
  int64_t columns;
  int64_t (*scratch_bytes)(const qk_gptq_round_args& args, int64_t vectors);
  // Rows [row, row + vectors * lanes), those beyond n left out.
  void (*run)(const qk_gptq_round_args& args, const float* packed_upper, int64_t row,
              int64_t vectors, uint8_t* scratch);
};

// Panels before panel p have 1 + 2 + .. + p blocks of columns x columns.
inline int64_t upper_panel_offset(int64_t panel, int64_t columns) {
  return columns * columns * (panel * (panel + 1) / 2);
}

// x is repacked into [token block][panel of kPanel columns][step][column] 32-bit words: a step is
// one token in fp32, or two tokens as a pair of bf16.
inline constexpr int64_t kSyrkSteps = 128;  // steps of a token block
inline constexpr int64_t kSyrkUnit = 96;    // columns of a unit of work, a multiple of every panel

struct SyrkKernel {
  int64_t panel;
  int64_t tokens_per_step;
  // Columns [panel * first, ..) of `panels` panels, tokens [token, token + count) of one block.
  void (*pack)(const qk_syrk_args& args, int64_t token, int64_t count, int64_t first,
               int64_t panels, uint32_t* words);
  // acc[row .. row + kSyrkUnit, column .. column + kSyrkUnit) += over one token block of `steps`
  // steps; row_words and column_words are the block's panels from those columns on.
  void (*run)(const qk_syrk_args& args, const uint32_t* row_words, const uint32_t* column_words,
              int64_t steps, int64_t row, int64_t column);
};

// Columns that descend together when outputs are coupled.
inline constexpr int64_t kDescendColumns = 8;

struct DescendKernel {
  int64_t lanes;  // rows are padded to a multiple of it where outputs are coupled
  // All sweeps of one row; tables: 3 * k floats.
  void (*row)(const qk_descend_args& args, int64_t row, float* tables);
  // out[c][..] = G M for `vectors` vectors of rows; G [n][ld] from its first of those columns on,
  // M [n][kDescendColumns].
  void (*product)(const float* g, int64_t ld, const float* m, int64_t n, int64_t vectors,
                  float* out, int64_t out_ld);
  // One column of all rows, once; returns how many codes changed. See descend.h.
  int64_t (*column)(const qk_descend_args& args, const float* g, int64_t ld, float curvature,
                    const float* scale, const float* zero, const float* moment,
                    const float* diagonal, float* codes, float* changes, float* pushed);
  // to[i] -= by * from[i]
  void (*subtract)(float* to, const float* from, float by, int64_t count);
};

struct SolverTable {
  const char* name;
  GptqKernel gptq;
  DescendKernel descend;
  void (*rounding_errors_row)(const qk_rounding_errors_args& args, int64_t row, float* scratch);
  SyrkKernel syrk;
  SyrkKernel syrk_bf16;  // run == nullptr: bf16 is widened to fp32
};

const SolverTable& generic_solvers();
const SolverTable& avx2_solvers();
const SolverTable& avx512_solvers();
const SolverTable& avx512bf16_solvers();

}  // namespace quantkit
