// The C ABI of keys and values in pages on a GPU: rotary embedding with the write into pages, and
// attention of one new token a sequence. Same conventions as cuda.h.
//
// Pages of one layer, of QK_PAGE_TOKENS tokens each, token after token:
//   data   [pages][kv_heads][2: key, value][QK_PAGE_TOKENS][head_dim], 16-byte aligned
//   scale  [pages][kv_heads][2][QK_PAGE_TOKENS] fp32, 16-byte aligned (8-bit types only)
// This is not the CPU's order (decoder.h), where a page is a packed weight: here a writer stores a
// token as one run of bytes, cp.async moves 16 bytes of a token at a time and leaves out tokens past
// the end, and ldmatrix makes the fragments of keys and, transposed, of values. So nothing past a
// sequence's end is ever read, and pages need no clearing.
//
// A token has scales of its own even where they are calibrated for the layer: the reader then has
// one rule, for 8 bytes a token and head, and a key that is no number says so in its scale.
#pragma once

#include "quantkit/decoder.h"

#ifdef __cplusplus
extern "C" {
#endif

// As qk_rope_store for bfloat16 qkv and q, into pages on the GPU; QK_KV_F32 is not held there. All
// pointers but this struct's are to device memory. Tokens of qkv behind starts[sequences] are left.
typedef struct qk_cuda_rope_store_args {
  int64_t sequences, tokens;  // tokens: rows of qkv
  const int32_t* starts;      // [sequences + 1]
  const int32_t* past;        // [sequences]
  const int32_t* pages;       // [sequences][page_stride]
  int64_t page_stride;
  int32_t kv_dtype;           // qk_kv_dtype
  void* data;
  float* scale;
  const float* fixed;         // [2: key, value] calibrated scales > 0, or NULL (8-bit types only)
  int64_t heads, kv_heads, head_dim, rotary_dim;
  const void* qkv;            // [tokens, (heads + 2 kv_heads) * head_dim]: queries, keys, values
  int64_t ld_qkv;
  const float* q_norm;        // [head_dim] or NULL
  const float* k_norm;
  float norm_epsilon;
  const float* cos;           // [positions, rotary_dim / 2]
  const float* sin;
  void* q;                    // [tokens, heads * head_dim]
  int64_t ldq;
} qk_cuda_rope_store_args;

// y[s] = attention of one query a sequence over its first lengths[s] tokens; 0 where that is 0.
//
// bfloat16 queries, products of bf16 (codes of 8-bit pages are exact there) with fp32 sums, softmax
// in fp32; probabilities, times the scales of values, are rounded to bf16. Result and bits of a
// sequence depend on its own length, pages and query alone.
typedef struct qk_cuda_paged_decode_args {
  int64_t sequences;
  const int32_t* lengths;   // [sequences], the new token included; at most 64 page_stride
  const int32_t* pages;     // [sequences][page_stride]
  int64_t page_stride;
  int32_t kv_dtype;
  const void* data;
  const float* scale;
  int64_t heads, kv_heads;  // heads: a multiple of kv_heads
  int64_t head_dim;         // 64, 80, 96 or 128
  float score_scale;
  float softcap;            // scores become softcap * tanh(score / softcap); 0: none
  int64_t window;           // keys a query sees, its own included; 0: all
  const void* q;            // [sequences, heads * head_dim], rows ldq elements apart, 4-byte aligned
  int64_t ldq;
  void* y;                  // likewise
  int64_t ldy;
  float* partials;          // qk_cuda_paged_decode_partials values; uninitialized, 8-byte aligned
  int32_t overlap;          // 1: blocks may start before the previous kernel ends (sm_90 and newer)
} qk_cuda_paged_decode_args;

QK_EXPORT int qk_cuda_rope_store(const qk_cuda_rope_store_args* args, void* stream);
QK_EXPORT int qk_cuda_paged_decode(const qk_cuda_paged_decode_args* args, void* stream);
QK_EXPORT int64_t qk_cuda_paged_decode_partials(int64_t sequences, int64_t heads, int64_t head_dim,
                                                int64_t page_stride);

#ifdef __cplusplus
}
#endif
