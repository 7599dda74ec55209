// A ragged batch: which sequence and position a row has, how rows and attention are cut into units.
// Knows no model: for whoever runs one, whole or in parts.
//
// Units are cut by the numbers of rows, keys and threads. None of it changes a bit of a result: a
// row is one token's, and attention sums spans at fixed places in ascending order.
#pragma once

#include <vector>

#include "kernel_table.h"
#include "units.h"

namespace quantkit {

// Rows that the caller computes alone: below this a parallel region costs more than it saves.
constexpr int64_t kSerialRows = 2;
// Most tokens of a unit of rows, and tokens of a unit of attention over a prompt.
constexpr int64_t kTokensAUnit = 8;
constexpr int64_t kUnitsAThread = 4;

// body(m) for each row m.
template <class F>
void for_rows(int64_t rows, F&& body) {
  if (rows <= kSerialRows) {
    for (int64_t m = 0; m < rows; ++m) body(m);
    return;
  }
  const int64_t share = rows / (num_threads() * kUnitsAThread);
  const int64_t step = share < 1 ? 1 : (share > kTokensAUnit ? kTokensAUnit : share);
  parallel_for(ceil_div(rows, step), [&](int64_t unit) {
    const int64_t end = (unit + 1) * step < rows ? (unit + 1) * step : rows;
    for (int64_t m = unit * step; m < end; ++m) body(m);
  });
}

// QK_OK if every page number is in [0, pages), every sequence has a new token and its pages reach
// to the last. Positions are below max_positions unless that is negative.
int check_sequences(const qk_sequences& sequences, int64_t pages, int64_t max_positions);

// Sequence and position of every row.
struct RaggedRows {
  std::vector<int64_t> sequence, position;

  explicit RaggedRows(const qk_sequences& sequences);
  int64_t count() const { return static_cast<int64_t>(sequence.size()); }
};

// Attention cut into units.
//
// A single new token is a unit, because the heads of a page lie side by side; a unit a head where
// there are too few for the threads. One whose spans are more than a thread's share is several: then
// each of its spans leaves a state of its own, and finish_row merges them.
class AttentionPlan {
 public:
  AttentionPlan(int64_t heads, int64_t kv_heads, int64_t head_dim)
      : heads_(heads), kv_heads_(kv_heads), head_dim_(head_dim) {}

  int64_t state_floats() const { return kStateHeader + head_dim_; }

  // Floats that the spans' own states need.
  int64_t measure(const qk_sequences& sequences, int64_t window);
  void cut(const qk_sequences& sequences, int64_t window, float* partials);

  // QK_OUT_OF_MEMORY if a thread gets no scratch memory.
  int run(const AttentionKernel& kernel, const AttentionJob& job) const;

  // out [heads * head_dim]: the attention of one row. `states` is the job's.
  void finish_row(const AttentionKernel& kernel, float* states, int64_t row, int64_t sequence,
                  float* out) const;

 private:
  int64_t heads_, kv_heads_, head_dim_;
  int64_t spans_a_unit_ = 1, heads_a_unit_ = 1;
  std::vector<AttentionUnit> units_;
  std::vector<int64_t> own_spans_;   // of each sequence: states of its own, 0 for none
  std::vector<int64_t> own_offset_;  // and where they begin
  float* partials_ = nullptr;
};

}  // namespace quantkit
