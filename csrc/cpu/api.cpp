// The CPU half of the C ABI: check the arguments, prepare the activations, cut the work into units.
#include <cstring>

#include "int8_job.h"
#include "kernel_table.h"
#include "units.h"

using namespace quantkit;

namespace {

bool known_dtype(int32_t dtype) { return dtype >= QK_F32 && dtype <= QK_BF16; }
bool scale_dtype(int32_t dtype) { return dtype == QK_F32 || dtype == QK_BF16; }

int check(const qk_weight_only_args& a) {
  if (a.m < 0 || a.n < 0 || a.k <= 0) return QK_INVALID_ARGUMENT;
  if (!known_dtype(a.x_dtype) || (a.bias != nullptr && !known_dtype(a.bias_dtype))) {
    return QK_UNSUPPORTED;
  }
  if (a.format < QK_W4 || a.format > QK_F32W || !scale_dtype(a.scale_dtype)) return QK_UNSUPPORTED;
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
  const bool as_bf16 =
      a.x_dtype == QK_BF16 && table.bf16.run != nullptr && a.format != QK_F32W;
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
  const RowPlan rows(a.m);
  int status = QK_OK;
  parallel_for(plan.units() * rows.units, [&](int64_t unit) {
    Range range;
    plan.unit(unit / rows.units, &range.block, &range.blocks);
    rows.unit(unit % rows.units, &range.row, &range.rows);
    if (range.rows <= 0 || range.blocks <= 0) return;
    void* memory = scratch(kUnitSlot, kernel.scratch_bytes(job, range.rows));
    if (memory == nullptr) {
      __atomic_store_n(&status, QK_OUT_OF_MEMORY, __ATOMIC_RELAXED);
    } else {
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

int qk_int8_linear(const qk_int8_linear_args* args) {
  const qk_int8_linear_args& a = *args;
  if (a.m < 0 || a.n < 0 || a.k <= 0 || a.group_size <= 0 || a.x_group_size <= 0) {
    return QK_INVALID_ARGUMENT;
  }
  if (!known_dtype(a.y_dtype) || !scale_dtype(a.scale_dtype) ||
      (a.bias != nullptr && !known_dtype(a.bias_dtype))) {
    return QK_UNSUPPORTED;
  }
  if (a.m == 0 || a.n == 0) return QK_OK;
  if (a.y == nullptr || a.x_scale == nullptr || a.scale == nullptr || a.xq == nullptr ||
      a.packed == nullptr) {
    return QK_INVALID_ARGUMENT;
  }
  const Int8Kernel& kernel = kernels().int8;
  const RowKernels& row_kernels = kernels().rows;
  Int8Job job;
  if (!make_int8_job({a.format, a.n, a.k, a.group_size, a.x_group_size, a.packed, a.lut, a.scale,
                      a.scale_dtype, a.scale_stride_n, a.scale_stride_g, a.zero, a.zero_stride_n,
                      a.zero_stride_g},
                     kernel, &job)) {
    return QK_UNSUPPORTED;
  }
  // More could overflow an int32 sum. What pads a row to whole chunks are zeros and do not count.
  if ((job.step < a.k ? job.step : a.k) > 131071) return QK_INVALID_ARGUMENT;
  job.bias = a.bias;
  job.bias_dtype = a.bias_dtype;
  job.y = a.y;
  job.y_dtype = a.y_dtype;
  job.ldy = a.ldy;
  job.row_bytes = ceil_div(job.padded_k, 64) * 64;
  uint8_t* codes = static_cast<uint8_t*>(scratch(kWordsSlot, a.m * job.row_bytes));
  float* scales = static_cast<float*>(scratch(kSumsSlot, a.m * job.steps * 8));
  if (codes == nullptr || scales == nullptr) return QK_OUT_OF_MEMORY;
  int32_t* sums = reinterpret_cast<int32_t*>(scales + a.m * job.steps);
  job.codes = codes;
  job.x_scale = scales;
  job.x_sum = sums;
  const int64_t x_group = a.x_group_size < a.k ? a.x_group_size : job.padded_k;
  const int64_t rows_a_unit = a.m <= 8 ? a.m : 8;
  parallel_for(ceil_div(a.m, rows_a_unit), [&](int64_t unit) {
    const int64_t end = (unit + 1) * rows_a_unit < a.m ? (unit + 1) * rows_a_unit : a.m;
    for (int64_t row = unit * rows_a_unit; row < end; ++row) {
      const int8_t* x = a.xq + row * a.ldx;
      kernel.order_row(x, a.k, job.padded_k, a.format, codes + row * job.row_bytes);
      row_kernels.int8_sums(x, a.k, job.step, sums + row * job.steps);
      for (int64_t s = 0; s < job.steps; ++s) {
        scales[row * job.steps + s] =
            a.x_scale[row * a.x_scale_stride + s * job.step / x_group] / job.unit;
      }
    }
  });

  const BlockPlan plan(job.blocks, kernel.tile_blocks, a.m <= kFewRows);
  const RowPlan rows(a.m);
  int status = QK_OK;
  parallel_for(plan.units() * rows.units, [&](int64_t unit) {
    Range range;
    plan.unit(unit / rows.units, &range.block, &range.blocks);
    rows.unit(unit % rows.units, &range.row, &range.rows);
    if (range.rows <= 0 || range.blocks <= 0) return;
    void* memory = scratch(kUnitSlot, kernel.scratch_bytes(job));
    if (memory == nullptr) {
      __atomic_store_n(&status, QK_OUT_OF_MEMORY, __ATOMIC_RELAXED);
    } else {
      kernel.run(job, range, static_cast<uint8_t*>(memory));
    }
  });
  return status;
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
