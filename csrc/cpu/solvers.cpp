// The calibration half of the CPU's C ABI: check the arguments, repack what every unit of work
// reads, and cut the work into units.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernel_table.h"
#include "solver_table.h"
#include "thread_pool.h"

using namespace quantkit;

namespace {

constexpr int kSharedSlot = 0, kUnitSlot = 2;  // as in api.cpp: the caller's, and a unit's own
// Packed tokens at a time: few enough that they and the part of acc in work stay in the caches.
constexpr int64_t kSyrkPackedBytes = 2 << 20;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The solvers of the instruction set in use, so that qk_set_isa is one setting for all kernels.
const SolverTable& solvers() {
  const char* name = kernels().name;
#if defined(QK_X86)
  if (std::strcmp(name, "avx512bf16") == 0) return avx512bf16_solvers();
  if (std::strcmp(name, "avx512") == 0) return avx512_solvers();
  if (std::strcmp(name, "avx2") == 0) return avx2_solvers();
#endif
  (void)name;
  return generic_solvers();
}

bool known_kind(int32_t kind) { return kind >= QK_CODE_INT && kind <= QK_CODE_E2M1; }
bool known_dtype(int32_t dtype) { return dtype >= QK_F32 && dtype <= QK_BF16; }

// Four panels at a time: whole cache lines of the factor's rows.
void pack_upper(const float* upper, int64_t k, int64_t columns, float* packed) {
  constexpr int64_t kTogether = 4;
  const int64_t panels = ceil_div(k, columns);
  parallel_for(ceil_div(panels, kTogether), [&](int64_t unit) {
    const int64_t last = least((unit + 1) * kTogether, panels);
    for (int64_t row = 0; row < least(last * columns, k); ++row) {
      for (int64_t panel = unit * kTogether; panel < last; ++panel) {
        const int64_t first = panel * columns;
        if (row >= first + columns) continue;
        float* out = packed + upper_panel_offset(panel, columns) + row * columns;
        for (int64_t c = 0; c < columns; ++c) {
          out[c] = first + c < k ? upper[row * k + first + c] : 0.0f;
        }
      }
    }
  });
}

int descend_rows(const qk_descend_args& a, const DescendKernel& kernel) {
  int status = QK_OK;
  const int64_t rows_a_unit = most(1, 32768 / a.k);
  parallel_for(ceil_div(a.n, rows_a_unit), [&](int64_t unit) {
    float* tables = static_cast<float*>(scratch(kUnitSlot, 3 * a.k * 4));
    if (tables == nullptr) {
      __atomic_store_n(&status, QK_OUT_OF_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t row = unit * rows_a_unit; row < least((unit + 1) * rows_a_unit, a.n); ++row) {
      kernel.row(a, row, tables);
    }
  });
  return status;
}

// What descent with coupled outputs works on; rows are padded to whole vectors of ld floats.
struct Coupled {
  int64_t ld;
  std::vector<float> g;         // [n][ld]
  std::vector<float> diagonal;  // of G
  std::vector<float> scale;     // [groups][ld]
  std::vector<float> zero;      // [groups][ld]
  std::vector<float> rows;      // [n][kDescendColumns]: E H of the panel
  std::vector<float> moment;    // [kDescendColumns][ld]: G E H of the panel
  std::vector<float> codes;     // [kDescendColumns][ld]
  std::vector<float> changes;   // [kDescendColumns][ld]
  std::vector<float> pushed;    // G times a column's changes

  Coupled(const qk_descend_args& a, int64_t lanes)
      : ld(ceil_div(a.n, lanes) * lanes),
        g(size(a.n * ld)),
        diagonal(size(ld), 1.0f),
        scale(size(a.groups * ld), 1.0f),
        zero(size(a.zero == nullptr ? 0 : a.groups * ld)),
        rows(size(a.n * kDescendColumns)),
        moment(size(kDescendColumns * ld)),
        codes(size(kDescendColumns * ld)),
        changes(size(kDescendColumns * ld)),
        pushed(size(ld)) {
    for (int64_t i = 0; i < a.n; ++i) {
      std::memcpy(g.data() + i * ld, a.output + i * a.n, size(a.n) * 4);
      diagonal[size(i)] = a.output[i * a.n + i];
      for (int64_t group = 0; group < a.groups; ++group) {
        scale[size(group * ld + i)] = a.scale[i * a.groups + group];
        if (a.zero != nullptr) zero[size(group * ld + i)] = a.zero[i * a.groups + group];
      }
    }
  }

  static size_t size(int64_t count) { return static_cast<size_t>(count); }
};

int64_t descend_panel(const qk_descend_args& a, const DescendKernel& kernel, Coupled& c,
                      int64_t first) {
  const int64_t columns = least(kDescendColumns, a.k - first), ld = c.ld;
  for (int64_t i = 0; i < a.n; ++i) {
    for (int64_t x = 0; x < columns; ++x) {
      c.rows.data()[i * kDescendColumns + x] = a.moment[i * a.k + first + x];
      c.codes.data()[x * ld + i] = a.codes[i * a.k + first + x];
    }
  }
  const int64_t vectors = ld / kernel.lanes, vectors_a_unit = 6;
  parallel_for(ceil_div(vectors, vectors_a_unit), [&](int64_t unit) {
    const int64_t from = unit * vectors_a_unit, row = from * kernel.lanes;
    kernel.product(c.g.data() + row, ld, c.rows.data(), a.n, least(vectors_a_unit, vectors - from),
                   c.moment.data() + row, ld);
  });
  int64_t changed = 0;
  for (int64_t x = 0; x < columns; ++x) {
    const float* hessian = a.hessian + (first + x) * a.k;
    const int64_t group = a.group[first + x] * ld;
    float* changes = c.changes.data() + x * ld;
    std::fill(changes, changes + ld, 0.0f);
    if (!(hessian[first + x] > 0.0f)) continue;
    const int64_t here = kernel.column(
        a, c.g.data(), ld, hessian[first + x], c.scale.data() + group,
        a.zero == nullptr ? nullptr : c.zero.data() + group, c.moment.data() + x * ld,
        c.diagonal.data(), c.codes.data() + x * ld, changes, c.pushed.data());
    if (here == 0) continue;
    changed += here;
    for (int64_t later = x + 1; later < columns; ++later) {
      kernel.subtract(c.moment.data() + later * ld, c.pushed.data(), hessian[first + later], ld);
    }
  }
  if (changed == 0) return 0;
  constexpr int64_t kRows = 16;
  parallel_for(ceil_div(a.n, kRows), [&](int64_t unit) {
    for (int64_t i = unit * kRows; i < least((unit + 1) * kRows, a.n); ++i) {
      for (int64_t x = 0; x < columns; ++x) {
        const float change = c.changes.data()[x * ld + i];
        if (change == 0.0f) continue;
        a.codes[i * a.k + first + x] = c.codes.data()[x * ld + i];
        kernel.subtract(a.moment + i * a.k, a.hessian + (first + x) * a.k, change, a.k);
      }
    }
  });
  return changed;
}

}  // namespace

int qk_descend_codes(const qk_descend_args* args) {
  const qk_descend_args& a = *args;
  if (a.n < 0 || a.k < 0 || a.groups <= 0 || a.sweeps < 0) return QK_INVALID_ARGUMENT;
  if (!known_kind(a.kind)) return QK_UNSUPPORTED;
  if (a.n == 0 || a.k == 0) return QK_OK;
  if (a.hessian == nullptr || a.scale == nullptr || a.group == nullptr || a.codes == nullptr ||
      a.moment == nullptr) {
    return QK_INVALID_ARGUMENT;
  }
  for (int64_t j = 0; j < a.k; ++j) {
    if (a.group[j] < 0 || a.group[j] >= a.groups) return QK_INVALID_ARGUMENT;
  }
  const DescendKernel& kernel = solvers().descend;
  if (a.output == nullptr) return descend_rows(a, kernel);
  try {
    Coupled coupled(a, kernel.lanes);
    for (int64_t sweep = 0; sweep < a.sweeps; ++sweep) {
      int64_t here = 0;
      for (int64_t first = 0; first < a.k; first += kDescendColumns) {
        here += descend_panel(a, kernel, coupled, first);
      }
      if (here == 0) break;
    }
  } catch (const std::bad_alloc&) {
    return QK_OUT_OF_MEMORY;
  }
  return QK_OK;
}

int qk_gptq_round(const qk_gptq_round_args* args) {
  const qk_gptq_round_args& a = *args;
  if (a.n < 0 || a.k < 0 || a.groups <= 0) return QK_INVALID_ARGUMENT;
  if (!known_kind(a.kind)) return QK_UNSUPPORTED;
  if (a.n == 0 || a.k == 0) return QK_OK;
  if (a.weight == nullptr || a.upper == nullptr || a.scale == nullptr || a.group == nullptr ||
      a.codes == nullptr) {
    return QK_INVALID_ARGUMENT;
  }
  for (int64_t j = 0; j < a.k; ++j) {
    if (a.group[j] < 0 || a.group[j] >= a.groups) return QK_INVALID_ARGUMENT;
  }
  const GptqKernel& kernel = solvers().gptq;
  const int64_t floats = upper_panel_offset(ceil_div(a.k, kernel.columns), kernel.columns);
  // Not scratch, which is kept: this grows with the square of k.
  const std::unique_ptr<float[]> packed(new (std::nothrow) float[static_cast<size_t>(floats)]);
  if (packed == nullptr) return QK_OUT_OF_MEMORY;
  pack_upper(a.upper, a.k, kernel.columns, packed.get());

  // Wide tiles read the factor less often, as long as every thread gets two.
  const int64_t vectors = ceil_div(a.n, kernel.lanes);
  const int64_t wide =
      most(1, least(kernel.vectors, vectors / (2 * static_cast<int64_t>(num_threads()))));
  int status = QK_OK;
  parallel_for(ceil_div(vectors, wide), [&](int64_t unit) {
    const int64_t first = unit * wide, count = least(wide, vectors - first);
    void* memory = scratch(kUnitSlot, kernel.scratch_bytes(a, count));
    if (memory == nullptr) {
      __atomic_store_n(&status, QK_OUT_OF_MEMORY, __ATOMIC_RELAXED);
    } else {
      kernel.run(a, packed.get(), first * kernel.lanes, count, static_cast<uint8_t*>(memory));
    }
  });
  return status;
}

int qk_rounding_errors(const qk_rounding_errors_args* args) {
  const qk_rounding_errors_args& a = *args;
  if (a.candidates < 0 || a.n < 0 || a.k <= 0 || a.group_size <= 0) return QK_INVALID_ARGUMENT;
  if (!known_kind(a.kind) || !known_dtype(a.weight_dtype)) return QK_UNSUPPORTED;
  if (a.candidates == 0 || a.n == 0) return QK_OK;
  if (a.weight == nullptr || a.scale == nullptr || a.errors == nullptr) return QK_INVALID_ARGUMENT;
  const SolverTable& table = solvers();
  const int64_t rows_a_unit = most(1, 16384 / (a.k * a.candidates));
  int status = QK_OK;
  parallel_for(ceil_div(a.n, rows_a_unit), [&](int64_t unit) {
    float* memory = static_cast<float*>(scratch(kUnitSlot, a.k * 4));
    if (memory == nullptr) {
      __atomic_store_n(&status, QK_OUT_OF_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t row = unit * rows_a_unit; row < least((unit + 1) * rows_a_unit, a.n); ++row) {
      table.rounding_errors_row(a, row, memory);
    }
  });
  return status;
}

int qk_syrk_accumulate(const qk_syrk_args* args) {
  const qk_syrk_args& a = *args;
  if (a.tokens < 0 || a.k < 0 || a.ld_acc < a.k) return QK_INVALID_ARGUMENT;
  if (!known_dtype(a.x_dtype)) return QK_UNSUPPORTED;
  if (a.tokens == 0 || a.k == 0) return QK_OK;
  if (a.x == nullptr || a.acc == nullptr) return QK_INVALID_ARGUMENT;
  const SolverTable& table = solvers();
  const SyrkKernel& kernel =
      a.x_dtype == QK_BF16 && table.syrk_bf16.run != nullptr ? table.syrk_bf16 : table.syrk;

  const int64_t panels = ceil_div(a.k, kernel.panel);
  const int64_t unit_panels = kSyrkUnit / kernel.panel;
  const int64_t panel_words = kSyrkSteps * kernel.panel;
  const int64_t block_tokens = kSyrkSteps * kernel.tokens_per_step;
  const int64_t block_words = panels * panel_words;
  const int64_t most_blocks = most(1, kSyrkPackedBytes / (block_words * 4));
  const int64_t all_blocks = ceil_div(a.tokens, block_tokens);
  uint32_t* words = static_cast<uint32_t*>(
      scratch(kSharedSlot, least(most_blocks, all_blocks) * block_words * 4));
  if (words == nullptr) return QK_OUT_OF_MEMORY;

  // Squares below the diagonal first, the cheaper ones on it last: threads end together.
  const int64_t side = ceil_div(a.k, kSyrkUnit), below = side * (side - 1) / 2;
  const int64_t pack_units = ceil_div(panels, unit_panels);
  for (int64_t first = 0; first < all_blocks; first += most_blocks) {
    const int64_t blocks = least(most_blocks, all_blocks - first);
    const auto tokens_of = [&](int64_t block) {
      return least(block_tokens, a.tokens - (first + block) * block_tokens);
    };
    parallel_for(blocks * pack_units, [&](int64_t unit) {
      const int64_t block = unit / pack_units, panel = unit % pack_units * unit_panels;
      kernel.pack(a, (first + block) * block_tokens, tokens_of(block), panel,
                  least(unit_panels, panels - panel),
                  words + block * block_words + panel * panel_words);
    });
    parallel_for(below + side, [&](int64_t unit) {
      int64_t row = unit - below, column = unit - below;
      if (unit < below) {
        row = 1;
        while (row * (row + 1) / 2 <= unit) ++row;
        column = unit - row * (row - 1) / 2;
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const uint32_t* base = words + block * block_words;
        kernel.run(a, base + row * unit_panels * panel_words,
                   base + column * unit_panels * panel_words,
                   ceil_div(tokens_of(block), kernel.tokens_per_step), row * kSyrkUnit,
                   column * kSyrkUnit);
      }
    });
  }
  return QK_OK;
}
