// How the blocks of a weight and the rows of a batch are cut into units of work.
#pragma once

#include "layout.h"
#include "thread_pool.h"

namespace quantkit {

// Scratch slots: what the caller shares with its workers, and what each unit uses alone.
constexpr int kWordsSlot = 0, kSumsSlot = 1, kUnitSlot = 2, kRowSlot = 3;

// Rows of x that one unit takes. Enough to amortize decoding a weight panel, few enough that a
// prompt is shared between threads even when the weight is narrow.
constexpr int64_t kUnitRows = 240;

// So few rows of x take several tiles at once: each is over soon. With one more, units fetch what
// the next one reads (Ahead in int8_linear.h), and of a long unit that is evicted before its turn.
constexpr int64_t kFewRows = 3;

// Blocks of 16 weight rows cut into units: an equal run for each thread, cut where the blocks that
// lie together in memory are, into `units_a_thread` units of which the last may be empty.
struct BlockPlan {
  int64_t blocks, threads, step, units_a_thread;

  BlockPlan(int64_t total, int64_t tile_blocks, bool few_rows) {
    blocks = total;
    threads = num_threads() < total ? num_threads() : total;
    const int64_t share = ceil_div(total, threads);
    // Several at once while that leaves eight a thread.
    const int64_t tiles = few_rows ? share / (tile_blocks * 8) : 1;
    step = tile_blocks * (tiles < 1 ? 1 : tiles);
    units_a_thread = ceil_div(share + kBlocksTogether, step);
  }
  int64_t units() const { return threads * units_a_thread; }
  void unit(int64_t index, int64_t* first_block, int64_t* count) const {
    const int64_t thread = index / units_a_thread;
    const int64_t first = blocks * thread / threads, last = blocks * (thread + 1) / threads;
    const int64_t from = first / kBlocksTogether * kBlocksTogether + index % units_a_thread * step;
    *first_block = from > first ? from : first;
    const int64_t end = from + step < last ? from + step : last;
    *count = end - *first_block;
  }
};

// Rows cut into units of at most kUnitRows.
struct RowPlan {
  int64_t rows, units, unit_rows;

  explicit RowPlan(int64_t total) {
    rows = total;
    units = ceil_div(total, kUnitRows);
    unit_rows = ceil_div(total, units);
  }
  void unit(int64_t index, int64_t* first, int64_t* count) const {
    *first = index * unit_rows;
    *count = unit_rows < rows - *first ? unit_rows : rows - *first;
  }
};

}  // namespace quantkit
