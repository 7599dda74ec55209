// One layer's pages, and how a token enters them; see decoder.h for the layout.
#pragma once

#include "kernel_table.h"

namespace quantkit {

struct KvPages {
  int32_t dtype;  // qk_kv_dtype
  int64_t kv_heads, head_dim;
  int64_t page_bytes;
  uint8_t* data;
  float* scales;       // NULL unless the cache holds 8-bit codes
  const float* fixed;  // [2: key, value] calibrated scales, or NULL: each token has its own

  KvPages(const qk_kv_cache& cache, int64_t layer, int64_t kv_heads, int64_t head_dim);

  // The key or value half of a page of one head.
  uint8_t* half(int64_t page, int64_t head, bool value) const {
    return data + place(page, head, value) * page_bytes;
  }
  // The scale of one of its tokens.
  float* scale(int64_t page, int64_t head, bool value, int64_t slot) const {
    return scales == nullptr ? nullptr
                             : scales + place(page, head, value) * QK_PAGE_TOKENS + slot;
  }
  // The scale that every token gets; 0: its own.
  float given(bool value) const { return fixed == nullptr ? 0.0f : fixed[value ? 1 : 0]; }

 private:
  int64_t place(int64_t page, int64_t head, bool value) const {
    return (page * kv_heads + head) * 2 + (value ? 1 : 0);
  }
};

int check_cache(const qk_kv_cache& cache);

// Pages that new tokens enter hold what their last owner left. Keys beyond a query's own position
// are never looked at, but values are multiplied by a probability of 0, and 0 * NaN is NaN.
void clear_entered_values(const qk_sequences& sequences, const KvPages& kv);

// Writes one token's keys and values, [kv_heads * head_dim] each.
//
// A value that is not finite becomes zeros, and its key NaNs, which `keys` then holds too: scores
// that a query must not see are thrown away, values are multiplied by 0. So what is in a page is
// always finite where a query does not look.
void store_token(const AttentionKernel& kernel, const KvPages& kv, int64_t page, int64_t slot,
                 float* keys, const float* values);

}  // namespace quantkit
