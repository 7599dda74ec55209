#include "kv_pages.h"

#include <cmath>
#include <cstring>

#include "thread_pool.h"

namespace quantkit {
KvPages::KvPages(const qk_kv_cache& cache, int64_t layer, int64_t kv_heads, int64_t head_dim)
    : dtype(cache.dtype),
      kv_heads(kv_heads),
      head_dim(head_dim),
      page_bytes(qk_kv_page_bytes(cache.dtype, head_dim)) {
  const int64_t halves = layer * cache.pages * kv_heads * 2;
  data = static_cast<uint8_t*>(cache.data) + halves * page_bytes;
  scales = dtype < QK_KV_INT8 ? nullptr : cache.scale + halves * QK_PAGE_TOKENS;
  fixed = cache.fixed == nullptr ? nullptr : cache.fixed + layer * 2;
}

int check_cache(const qk_kv_cache& cache) {
  if (cache.dtype < QK_KV_F32 || cache.dtype > QK_KV_FP8) return QK_UNSUPPORTED;
  if (cache.data == nullptr) return QK_INVALID_ARGUMENT;
  if (cache.dtype >= QK_KV_INT8 && cache.scale == nullptr) return QK_INVALID_ARGUMENT;
  if (cache.dtype < QK_KV_INT8 && cache.fixed != nullptr) return QK_INVALID_ARGUMENT;
  return QK_OK;
}

void clear_entered_values(const qk_sequences& s, const KvPages& kv) {
  const auto first_entered = [&](int64_t i) { return ceil_div(s.past[i], QK_PAGE_TOKENS); };
  const auto end_of = [&](int64_t i) { return int64_t{s.past[i]} + s.starts[i + 1] - s.starts[i]; };
  bool any = false;  // most steps of decoding enter none: spare them the parallel region
  for (int64_t i = 0; i < s.count; ++i) any |= first_entered(i) * QK_PAGE_TOKENS < end_of(i);
  if (!any) return;
  parallel_for(s.count, [&](int64_t i) {
    for (int64_t p = first_entered(i); p * QK_PAGE_TOKENS < end_of(i); ++p) {
      const int64_t page = s.pages[i * s.page_stride + p];
      for (int64_t h = 0; h < kv.kv_heads; ++h) {
        std::memset(kv.half(page, h, true), 0, static_cast<size_t>(kv.page_bytes));
      }
    }
  });
}

void store_token(const AttentionKernel& kernel, const KvPages& kv, int64_t page, int64_t slot,
                 float* keys, const float* values) {
  static const float zeros[512] = {};  // the widest head
  for (int64_t h = 0; h < kv.kv_heads; ++h) {
    float* key = keys + h * kv.head_dim;
    const float* value = values + h * kv.head_dim;
    if (!kernel.finite_as_bf16(value, kv.head_dim)) {
      for (int64_t i = 0; i < kv.head_dim; ++i) key[i] = NAN;
      value = zeros;
    }
    kernel.write_page(key, kv.head_dim, kv.dtype, slot, false, kv.given(false),
                      kv.half(page, h, false), kv.scale(page, h, false, slot));
    kernel.write_page(value, kv.head_dim, kv.dtype, slot, true, kv.given(true),
                      kv.half(page, h, true), kv.scale(page, h, true, slot));
  }
}

}  // namespace quantkit
