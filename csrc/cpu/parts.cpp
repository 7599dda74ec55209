// The parts of a decoder's forward pass as calls of their own.
//
// Ladder:
//   1. A chain of tensor operations: each reads and writes its rows once more, and rounds them.
//   2. One pass over a row for what belongs together (this file): a residual addition with the norm
//      behind it; norms, rotary embedding and the page's layout with the write. Rows go to threads
//      in runs of at most kTokensAUnit; attention as ragged.h cuts it.
// The arithmetic is the kernel tables', so a forward pass and a chain of these calls agree to the
// bit. Rows that are not fp32 are converted here, by plain loops.
#include "quantkit/decoder.h"

#include <cstring>
#include <new>

#include "kv_pages.h"
#include "ragged.h"
#include "simd_portable.h"

#include "elementwise.h"

using namespace quantkit;

namespace {

bool known_dtype(int32_t dtype) { return dtype >= QK_F32 && dtype <= QK_BF16; }

// body(m, memory) for each row m with `floats` floats of the thread's own.
template <class F>
int for_rows_with_memory(int64_t rows, int64_t floats, F&& body) {
  int status = QK_OK;
  for_rows(rows, [&](int64_t m) {
    float* memory = static_cast<float*>(scratch(kRowSlot, floats * 4));
    if (memory == nullptr) {
      __atomic_store_n(&status, QK_OUT_OF_MEMORY, __ATOMIC_RELAXED);
    } else {
      body(m, memory);
    }
  });
  return status;
}

// n values from element `first` on: where they lie if they are fp32, else widened into `memory`.
const float* row_of(const void* x, int32_t dtype, int64_t first, int64_t n, float* memory) {
  if (dtype == QK_F32) return static_cast<const float*>(x) + first;
  kernels().rows.load(memory, x, dtype, first, n);
  return memory;
}

// Where a row of results is computed: in place if it is fp32.
float* result_of(void* y, int32_t dtype, int64_t first, float* memory) {
  return dtype == QK_F32 ? static_cast<float*>(y) + first : memory;
}
void store_result(void* y, int32_t dtype, int64_t first, int64_t n, const float* memory) {
  if (dtype != QK_F32) store_row(y, dtype, first, memory, n);
}

int check_heads(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  if (heads <= 0 || kv_heads <= 0 || heads % kv_heads != 0) return QK_INVALID_ARGUMENT;
  return head_dim <= 0 || head_dim % 16 != 0 || head_dim > 512 ? QK_UNSUPPORTED : QK_OK;
}

// A call that may run out of memory for the lists it makes.
template <class F>
int guarded(F&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return QK_OUT_OF_MEMORY;
  }
}

}  // namespace

int qk_add_rms_norm(const qk_add_rms_norm_args* args) {
  const qk_add_rms_norm_args& a = *args;
  if (a.m < 0 || a.n <= 0) return QK_INVALID_ARGUMENT;
  if (!known_dtype(a.y_dtype) || (a.branch != nullptr && !known_dtype(a.branch_dtype))) {
    return QK_UNSUPPORTED;
  }
  if (a.m == 0) return QK_OK;
  if (a.residual == nullptr || a.weight == nullptr || a.y == nullptr) return QK_INVALID_ARGUMENT;
  const RowKernels& r = kernels().rows;
  return for_rows_with_memory(a.m, a.n, [&](int64_t m, float* memory) {
    float* x = a.residual + m * a.ld_residual;
    if (a.branch != nullptr) {
      r.add(x, row_of(a.branch, a.branch_dtype, m * a.ld_branch, a.n, memory), a.n);
    }
    r.rms_norm(x, a.weight, a.n, a.epsilon, result_of(a.y, a.y_dtype, m * a.ldy, memory));
    store_result(a.y, a.y_dtype, m * a.ldy, a.n, memory);
  });
}

int qk_gated_activation(const qk_gate_args* args) {
  const qk_gate_args& a = *args;
  if (a.m < 0 || a.n <= 0) return QK_INVALID_ARGUMENT;
  if (!known_dtype(a.dtype) || (a.kind != QK_GATE_SILU && a.kind != QK_GATE_GELU_TANH)) {
    return QK_UNSUPPORTED;
  }
  if (a.m == 0) return QK_OK;
  if (a.x == nullptr || a.y == nullptr) return QK_INVALID_ARGUMENT;
  const RowKernels& r = kernels().rows;
  return for_rows_with_memory(a.m, 2 * a.n, [&](int64_t m, float* memory) {
    const float* gate = row_of(a.x, a.dtype, m * a.ldx, 2 * a.n, memory);
    r.gate(gate, gate + a.n, a.n, a.kind, result_of(a.y, a.dtype, m * a.ldy, memory));
    store_result(a.y, a.dtype, m * a.ldy, a.n, memory);
  });
}

int qk_hadamard_rows(const qk_hadamard_args* args) {
  const qk_hadamard_args& a = *args;
  if (a.m < 0 || a.n <= 0 || !fits(a.hadamard, a.n)) return QK_INVALID_ARGUMENT;
  if (!known_dtype(a.dtype)) return QK_UNSUPPORTED;
  if (a.m == 0) return QK_OK;
  if (a.x == nullptr || a.y == nullptr) return QK_INVALID_ARGUMENT;
  const RowKernels& r = kernels().rows;
  return for_rows_with_memory(a.m, a.n, [&](int64_t m, float* memory) {
    float* row = result_of(a.y, a.dtype, m * a.ldy, memory);
    r.load(row, a.x, a.dtype, m * a.ldx, a.n);
    r.hadamard(row, a.n, a.hadamard);
    store_result(a.y, a.dtype, m * a.ldy, a.n, memory);
  });
}

int qk_embed(const qk_embed_args* args) {
  const qk_embed_args& a = *args;
  if (a.count < 0 || a.vocab < 0 || a.n <= 0) return QK_INVALID_ARGUMENT;
  if (!known_dtype(a.table_dtype)) return QK_UNSUPPORTED;
  if (a.count == 0) return QK_OK;
  if (a.tokens == nullptr || a.table == nullptr || a.y == nullptr) return QK_INVALID_ARGUMENT;
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.tokens[i] < 0 || a.tokens[i] >= a.vocab) return QK_INVALID_ARGUMENT;
  }
  const RowKernels& r = kernels().rows;
  for_rows(a.count, [&](int64_t i) {
    float* y = a.y + i * a.ldy;
    r.load(y, a.table, a.table_dtype, a.tokens[i] * a.ld_table, a.n);
    if (a.scale == 1.0f) return;
    for (int64_t j = 0; j < a.n; ++j) y[j] *= a.scale;
  });
  return QK_OK;
}

int qk_quantize_int8(const qk_quantize_int8_args* args) {
  const qk_quantize_int8_args& a = *args;
  if (a.m < 0 || a.k <= 0 || a.group <= 0) return QK_INVALID_ARGUMENT;
  if (!known_dtype(a.x_dtype)) return QK_UNSUPPORTED;
  if (a.m == 0) return QK_OK;
  if (a.x == nullptr || a.q == nullptr || a.scale == nullptr) return QK_INVALID_ARGUMENT;
  const RowKernels& r = kernels().rows;
  const int64_t group = a.group < a.k ? a.group : a.k;
  const int64_t groups = ceil_div(a.k, group);
  return for_rows_with_memory(a.m, a.k, [&](int64_t m, float* memory) {
    r.int8(row_of(a.x, a.x_dtype, m * a.ldx, a.k, memory), a.k, group, 0.0f, a.q + m * a.ldq,
           a.scale + m * groups);
  });
}

int qk_rope_store(const qk_rope_store_args* args) {
  const qk_rope_store_args& a = *args;
  if (a.sequences == nullptr || a.kv == nullptr || a.rotary_dim < 0 || a.rotary_dim % 2 != 0 ||
      a.rotary_dim > a.head_dim || a.max_positions < 0) {
    return QK_INVALID_ARGUMENT;
  }
  if (const int status = check_heads(a.heads, a.kv_heads, a.head_dim)) return status;
  if (!known_dtype(a.dtype)) return QK_UNSUPPORTED;
  if (const int status = check_sequences(*a.sequences, a.kv->pages, a.max_positions)) return status;
  if (a.sequences->count == 0) return QK_OK;
  if (const int status = check_cache(*a.kv)) return status;
  if (a.qkv == nullptr || a.q == nullptr ||
      (a.rotary_dim > 0 && (a.cos == nullptr || a.sin == nullptr))) {
    return QK_INVALID_ARGUMENT;
  }
  return guarded([&] {
    const RaggedRows rows(*a.sequences);
    const KvPages kv(*a.kv, 0, a.kv_heads, a.head_dim);
    const KernelTable& table = kernels();
    const RowKernels& r = table.rows;
    const int64_t q_width = a.heads * a.head_dim, kv_width = a.kv_heads * a.head_dim;
    const int64_t width = q_width + 2 * kv_width;
    clear_entered_values(*a.sequences, kv);
    return for_rows_with_memory(rows.count(), width, [&](int64_t m, float* memory) {
      r.load(memory, a.qkv, a.dtype, m * a.ld_qkv, width);
      const int64_t position = rows.position[static_cast<size_t>(m)];
      for (int64_t h = 0; h < a.heads + a.kv_heads; ++h) {
        float* x = memory + h * a.head_dim;
        const float* norm = h < a.heads ? a.q_norm : a.k_norm;
        if (norm != nullptr) r.rms_norm(x, norm, a.head_dim, a.norm_epsilon, x);
        if (a.rotary_dim == 0) continue;
        const int64_t angles = position * (a.rotary_dim / 2);
        r.rope(x, a.cos + angles, a.sin + angles, a.rotary_dim);
      }
      store_row(a.q, a.dtype, m * a.ldq, memory, q_width);
      const int64_t sequence = rows.sequence[static_cast<size_t>(m)];
      const int32_t* pages = a.sequences->pages + sequence * a.sequences->page_stride;
      store_token(table.attention_f32, kv, pages[position / QK_PAGE_TOKENS],
                  position % QK_PAGE_TOKENS, memory + q_width, memory + q_width + kv_width);
    });
  });
}

int qk_paged_attention(const qk_attention_args* args) {
  const qk_attention_args& a = *args;
  if (a.sequences == nullptr || a.kv == nullptr || a.window < 0 || !(a.softcap >= 0.0f)) {
    return QK_INVALID_ARGUMENT;
  }
  if (const int status = check_heads(a.heads, a.kv_heads, a.head_dim)) return status;
  if (!known_dtype(a.dtype) ||
      (a.precision != QK_PRECISION_F32 && a.precision != QK_PRECISION_BF16)) {
    return QK_UNSUPPORTED;
  }
  if (const int status = check_sequences(*a.sequences, a.kv->pages, -1)) return status;
  if (a.sequences->count == 0) return QK_OK;
  if (const int status = check_cache(*a.kv)) return status;
  if (a.q == nullptr || a.y == nullptr) return QK_INVALID_ARGUMENT;
  return guarded([&] {
    const KernelTable& table = kernels();
    const bool bf16 = a.precision == QK_PRECISION_BF16;
    const bool pairs = bf16 && table.attention_bf16.run != nullptr && a.kv->dtype != QK_KV_F32;
    const AttentionKernel& kernel = pairs ? table.attention_bf16 : table.attention_f32;
    const RaggedRows rows(*a.sequences);
    const KvPages kv(*a.kv, 0, a.kv_heads, a.head_dim);
    const int64_t width = a.heads * a.head_dim;

    AttentionJob job{};
    job.head_dim = a.head_dim;
    job.heads = a.heads;
    job.kv_heads = a.kv_heads;
    job.group = a.heads / a.kv_heads;
    job.scale = a.scale;
    job.softcap = a.softcap;
    job.window = a.window;
    job.round_bf16 = bf16;
    job.query_bytes = a.head_dim * (pairs ? 2 : 4);
    job.kv_dtype = kv.dtype;
    job.data = kv.data;
    job.scale_data = kv.scales;
    job.page_bytes = kv.page_bytes;

    // Queries that are words already are read where they are.
    const bool in_place = a.ldq == width && (pairs ? a.dtype == QK_BF16
                                                   : a.dtype == QK_F32 && !bf16);
    if (in_place) {
      job.queries = static_cast<const uint8_t*>(a.q);
    } else {
      auto* words =
          static_cast<uint8_t*>(scratch(kWordsSlot, rows.count() * a.heads * job.query_bytes));
      if (words == nullptr) return int{QK_OUT_OF_MEMORY};
      const int status = for_rows_with_memory(rows.count(), width, [&](int64_t m, float* memory) {
        const float* q = row_of(a.q, a.dtype, m * a.ldq, width, memory);
        uint8_t* out = words + m * a.heads * job.query_bytes;
        if (pairs) {
          table.rows.bf16_words(q, width, reinterpret_cast<uint16_t*>(out));
        } else if (bf16) {
          table.rows.round_bf16(q, width, reinterpret_cast<float*>(out));
        } else {
          std::memcpy(out, q, static_cast<size_t>(width) * 4);
        }
      });
      if (status != QK_OK) return status;
      job.queries = words;
    }

    AttentionPlan plan(a.heads, a.kv_heads, a.head_dim);
    const int64_t partials = plan.measure(*a.sequences, a.window);
    job.state_floats = plan.state_floats();
    const int64_t states = rows.count() * a.heads * job.state_floats;
    job.states = static_cast<float*>(scratch(kSumsSlot, (states + partials) * 4));
    if (job.states == nullptr) return int{QK_OUT_OF_MEMORY};
    plan.cut(*a.sequences, a.window, job.states + states);
    if (const int status = plan.run(kernel, job)) return status;
    return for_rows_with_memory(rows.count(), width, [&](int64_t m, float* memory) {
      plan.finish_row(kernel, job.states, m, rows.sequence[static_cast<size_t>(m)],
                      result_of(a.y, a.dtype, m * a.ldy, memory));
      store_result(a.y, a.dtype, m * a.ldy, width, memory);
    });
  });
}
