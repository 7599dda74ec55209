// The CPU half of the C ABI: check the arguments, prepare the activations, cut the work into units.
#include <cstring>

#include "kernel_table.h"
#include "thread_pool.h"

using namespace quantkit;

namespace {

// Scratch slots: what the caller shares with its workers, and what each unit uses alone.
constexpr int kWordsSlot = 0, kSumsSlot = 1, kUnitSlot = 2;

bool known_dtype(int32_t dtype) { return dtype >= QK_F32 && dtype <= QK_BF16; }

// Rows of x that one unit takes. Enough to amortize decoding a weight panel, few enough that a
// prompt is shared between threads even when the weight is narrow.
constexpr int64_t kUnitRows = 240;

constexpr int64_t kFewRows = 8;

// Blocks of 16 weight rows cut into units: an equal run for each thread, cut where the blocks that
// lie together in memory are, into `units_a_thread` units of which the last may be empty.
struct BlockPlan {
  int64_t blocks, threads, step, units_a_thread;

  BlockPlan(int64_t total, int64_t tile_blocks, bool few_rows) {
    blocks = total;
    threads = num_threads() < total ? num_threads() : total;
    const int64_t share = ceil_div(total, threads);
    // Few rows of x make tiles short: claim several at once while that leaves eight a thread.
    const int64_t tiles = few_rows ? share / (tile_blocks * 8) : 1;
    step = tile_blocks * (tiles < 1 ? 1 : tiles);
    units_a_thread = ceil_div(share + kBlocksTogether, step);
  }
  int64_t units() const { return threads * units_a_thread; }
  void unit(int64_t index, Range* range) const {
    const int64_t thread = index / units_a_thread;
    const int64_t first = blocks * thread / threads, last = blocks * (thread + 1) / threads;
    const int64_t from = first / kBlocksTogether * kBlocksTogether + index % units_a_thread * step;
    range->block = from > first ? from : first;
    const int64_t end = from + step < last ? from + step : last;
    range->blocks = end - range->block;
  }
};

int check(const qk_weight_only_args& a) {
  if (a.m < 0 || a.n < 0 || a.k <= 0) return QK_INVALID_ARGUMENT;
  if (!known_dtype(a.x_dtype) || (a.bias != nullptr && !known_dtype(a.bias_dtype))) {
    return QK_UNSUPPORTED;
  }
  if (a.format < QK_W4 || a.format > QK_F8) return QK_UNSUPPORTED;
  if (a.group_size <= 0 || (a.group_size < a.k && a.group_size % 16 != 0)) {
    return QK_INVALID_ARGUMENT;
  }
  if (a.m == 0 || a.n == 0) return QK_OK;
  if (a.y == nullptr || a.packed == nullptr || a.scale == nullptr) return QK_INVALID_ARGUMENT;
  if (a.format == QK_W4 && a.lut == nullptr) return QK_INVALID_ARGUMENT;
  return QK_OK;
}

}  // namespace

int qk_weight_only_linear(const qk_weight_only_args* args) {
  const qk_weight_only_args& a = *args;
  if (const int status = check(a)) return status;
  if (a.m == 0 || a.n == 0) return QK_OK;
  if (a.x == nullptr) return QK_INVALID_ARGUMENT;

  const KernelTable& table = kernels();
  const bool as_bf16 = a.x_dtype == QK_BF16 && table.bf16.run != nullptr;
  const WeightOnlyKernel& kernel = as_bf16 ? table.bf16 : table.f32;

  WeightOnlyJob job;
  job.args = args;
  const int64_t codes = chunk_codes(a.format);
  job.padded_k = ceil_div(a.k, codes) * codes;
  job.groups = a.group_size >= a.k ? 1 : ceil_div(a.k, a.group_size);
  job.group_size = job.groups == 1 ? job.padded_k : a.group_size;
  job.blocks = ceil_div(a.n, kBlockRows);
  job.chunks = job.padded_k / codes;

  // Activations that already are whole words are read where they are.
  const int64_t element = a.x_dtype == QK_F32 ? 4 : 2;
  const bool in_place = job.padded_k == a.k && (as_bf16 || a.x_dtype == QK_F32);
  uint8_t* words = nullptr;
  if (in_place) {
    job.words = static_cast<const uint8_t*>(a.x);
    job.row_bytes = a.ldx * element;
  } else {
    job.row_bytes = ceil_div(job.padded_k / kernel.codes_per_word * 4, 64) * 64;
    words = static_cast<uint8_t*>(scratch(kWordsSlot, a.m * job.row_bytes));
    if (words == nullptr) return QK_OUT_OF_MEMORY;
    job.words = words;
  }
  float* sums = nullptr;
  if (a.zero != nullptr) {
    sums = static_cast<float*>(scratch(kSumsSlot, a.m * job.groups * 4));
    if (sums == nullptr) return QK_OUT_OF_MEMORY;
  }
  job.group_sums = sums;
  if (words != nullptr || sums != nullptr) {
    const int64_t rows_a_unit = a.m <= 4 ? a.m : 4;
    parallel_for(ceil_div(a.m, rows_a_unit), [&](int64_t unit) {
      const int64_t end = (unit + 1) * rows_a_unit < a.m ? (unit + 1) * rows_a_unit : a.m;
      for (int64_t row = unit * rows_a_unit; row < end; ++row) {
        kernel.prepare_row(job, row, words, sums);
      }
    });
  }

  const BlockPlan plan(job.blocks, kernel.tile_blocks(a.m), a.m <= kFewRows);
  const int64_t row_units = ceil_div(a.m, kUnitRows);
  const int64_t unit_rows = ceil_div(a.m, row_units);
  int status = QK_OK;
  parallel_for(plan.units() * row_units, [&](int64_t unit) {
    Range range;
    plan.unit(unit / row_units, &range);
    range.row = unit % row_units * unit_rows;
    range.rows = unit_rows < a.m - range.row ? unit_rows : a.m - range.row;
    void* memory = scratch(kUnitSlot, kernel.scratch_bytes(job, range.rows));
    if (memory == nullptr) {
      __atomic_store_n(&status, QK_OUT_OF_MEMORY, __ATOMIC_RELAXED);
    } else if (range.rows > 0 && range.blocks > 0) {
      kernel.run(job, range, static_cast<uint8_t*>(memory));
    }
  });
  return status;
}

int qk_dequantize(const qk_weight_only_args* args) {
  const qk_weight_only_args& a = *args;
  if (const int status = check(a)) return status;
  if (a.n == 0) return QK_OK;
  parallel_for(a.n, [&](int64_t row) { kernels().dequantize_row(a, row); });
  return QK_OK;
}

int qk_w8a8_linear(const qk_w8a8_args* args) {
  const qk_w8a8_args& a = *args;
  if (a.m < 0 || a.n < 0 || a.k <= 0 || a.k > 131071) return QK_INVALID_ARGUMENT;
  if (!known_dtype(a.y_dtype) || !known_dtype(a.x_scale_dtype) ||
      (a.bias != nullptr && !known_dtype(a.bias_dtype))) {
    return QK_UNSUPPORTED;
  }
  if (a.m == 0 || a.n == 0) return QK_OK;
  if (a.y == nullptr || a.x_scale == nullptr || a.w_scale == nullptr) return QK_INVALID_ARGUMENT;
  if (a.xq == nullptr || a.packed == nullptr) return QK_INVALID_ARGUMENT;

  const W8A8Kernel& kernel = kernels().w8a8;
  W8A8Job job;
  job.args = args;
  job.blocks = ceil_div(a.n, kBlockRows);
  job.chunks = ceil_div(a.k, 4);
  job.row_bytes = ceil_div(job.chunks * kernel.bytes_per_chunk, 64) * 64;
  uint8_t* words = static_cast<uint8_t*>(scratch(kWordsSlot, a.m * job.row_bytes));
  if (words == nullptr) return QK_OUT_OF_MEMORY;
  job.words = words;
  const int64_t rows_a_unit = a.m <= 8 ? a.m : 8;
  parallel_for(ceil_div(a.m, rows_a_unit), [&](int64_t unit) {
    const int64_t end = (unit + 1) * rows_a_unit < a.m ? (unit + 1) * rows_a_unit : a.m;
    for (int64_t row = unit * rows_a_unit; row < end; ++row) kernel.prepare_row(job, row, words);
  });

  const BlockPlan plan(job.blocks, kernel.tile_blocks(a.m), a.m <= kFewRows);
  const int64_t row_units = ceil_div(a.m, kUnitRows);
  const int64_t unit_rows = ceil_div(a.m, row_units);
  parallel_for(plan.units() * row_units, [&](int64_t unit) {
    Range range;
    plan.unit(unit / row_units, &range);
    range.row = unit % row_units * unit_rows;
    range.rows = unit_rows < a.m - range.row ? unit_rows : a.m - range.row;
    if (range.rows > 0 && range.blocks > 0) kernel.run(job, range);
  });
  return QK_OK;
}

int qk_quantize(const qk_quantize_args* args) {
  const qk_quantize_args& a = *args;
  if (a.m < 0 || a.k < 0 || a.group_size <= 0) return QK_INVALID_ARGUMENT;
  if (!known_dtype(a.x_dtype) || !known_dtype(a.arith_dtype)) return QK_UNSUPPORTED;
  if (a.format != QK_I8 && a.format != QK_F8) return QK_UNSUPPORTED;
  if (a.m == 0 || a.k == 0) return QK_OK;
  if (a.x == nullptr || a.q == nullptr || a.scale == nullptr) return QK_INVALID_ARGUMENT;
  // About 8k elements a unit: below that, handing work over costs more than doing it.
  const int64_t rows_a_unit = a.k >= 8192 ? 1 : ceil_div(8192, a.k);
  const KernelTable& table = kernels();
  parallel_for(ceil_div(a.m, rows_a_unit), [&](int64_t unit) {
    const int64_t end = (unit + 1) * rows_a_unit < a.m ? (unit + 1) * rows_a_unit : a.m;
    for (int64_t row = unit * rows_a_unit; row < end; ++row) table.quantize_row(a, row);
  });
  return QK_OK;
}

void qk_set_executor(qk_executor executor) { set_executor(executor); }

int qk_set_num_threads(int32_t threads) {
  if (threads < 0) return QK_INVALID_ARGUMENT;
  set_num_threads(threads);
  return QK_OK;
}
int32_t qk_get_num_threads(void) { return num_threads(); }
void qk_set_default_threads(int32_t threads) { set_default_threads(threads); }

int qk_set_isa(const char* name) { return set_isa(name) ? QK_OK : QK_UNSUPPORTED; }
const char* qk_get_isa(void) { return kernels().name; }
int32_t qk_isa_supported(const char* name) { return isa_supported(name) ? 1 : 0; }

int32_t qk_abi_version(void) { return QK_ABI_VERSION; }

const char* qk_status_message(int status) {
  switch (status) {
    case QK_OK: return "ok";
    case QK_INVALID_ARGUMENT: return "an argument is out of range or a required pointer is null";
    case QK_UNSUPPORTED: return "this dtype, format or instruction set is not supported here";
    case QK_OUT_OF_MEMORY: return "no memory for the kernel's scratch buffers";
    case QK_LAUNCH_FAILED: return "the GPU refused the kernel launch";
    default: return "unknown status";
  }
}
