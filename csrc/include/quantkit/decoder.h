// A dense decoder of the Llama family as one native call, and the parts it is made of.
//
// A forward pass takes a ragged batch: any number of sequences, each with one or more new tokens
// behind those that are in its pages of the key-value cache. Nothing that is computed for a token
// depends on what else is in the batch, on how a prompt was cut into chunks, or on the number of
// threads: the order of every sum is fixed by the token's own position.
//
// The residual stream, rotary embeddings, softmax and all sums are fp32. What is rounded on the way
// into a product is said by qk_precision and, for each linear layer, by qk_activation.
#pragma once

#include "quantkit/quantkit.h"

#ifdef __cplusplus
extern "C" {
#endif

// QK_PRECISION_F32: nothing is rounded; for comparing with an fp32 model.
// QK_PRECISION_BF16: what enters a product of floats (activations, queries, probabilities) is
// rounded to bf16, as a bf16 model does, and multiplied with fp32 sums.
enum qk_precision { QK_PRECISION_F32 = 0, QK_PRECISION_BF16 = 1 };

// What becomes of the input of a linear layer.
//   QK_ACT_FLOAT        the precision's own rounding
//   QK_ACT_INT8         int8, one scale for `act_group` columns of a token (k: one a token)
//   QK_ACT_INT8_STATIC  int8 with the given scale
//   QK_ACT_FP8          rounded to the grid of float8 e4m3, one scale for `act_group` columns,
//                       multiplied as floats
//   QK_ACT_FP8_STATIC   the same with the given scale
enum qk_activation {
  QK_ACT_FLOAT = 0,
  QK_ACT_INT8 = 1,
  QK_ACT_INT8_STATIC = 2,
  QK_ACT_FP8 = 3,
  QK_ACT_FP8_STATIC = 4,
};

enum qk_gate { QK_GATE_SILU = 0, QK_GATE_GELU_TANH = 1 };

// One linear layer. Fields have the meaning of qk_weight_only_args and qk_int8_linear_args.
typedef struct qk_linear {
  int32_t format;      // qk_format
  int32_t activation;  // qk_activation
  int64_t n, k;
  int64_t group_size;  // columns that share a weight scale; >= k for one group a row
  int64_t act_group;   // columns that share an activation scale
  float act_scale;     // of the static activations
  int32_t scale_dtype; // QK_F32 or QK_BF16
  const void* packed;
  const float* lut;    // QK_W4
  const void* scale;   // [groups][n]: n is the dense dimension, groups are scale_stride apart
  int64_t scale_stride;
  const float* zero;   // the same order and stride, or NULL
  const float* bias;   // [n] or NULL
} qk_linear;

// Linear layers that read the same input and write side by side: query, key and value; gate and up.
typedef struct qk_projection {
  const qk_linear* parts;
  int32_t count;
} qk_projection;

typedef struct qk_decoder_layer {
  const float* attention_norm;       // [hidden]
  qk_projection qkv;                 // n = (heads + 2 kv_heads) * head_dim in this order
  const float* q_norm;               // [head_dim] or NULL
  const float* k_norm;
  qk_projection attention_out;
  const float* post_attention_norm;  // [hidden] or NULL: of the attention's output
  const float* mlp_norm;             // [hidden]
  qk_projection gate_up;             // n = 2 ffn: all of gate, then all of up
  qk_projection down;
  const float* post_mlp_norm;        // [hidden] or NULL
  const float* rope_cos;             // [max_positions, rotary_dim / 2]
  const float* rope_sin;
  int64_t window;                    // keys a query sees, itself included; 0: all
} qk_decoder_layer;

typedef struct qk_decoder_config {
  int32_t precision;  // qk_precision
  int32_t gate;       // qk_gate
  int64_t layers, hidden, ffn, vocab;
  int64_t heads, kv_heads, head_dim, rotary_dim;
  int64_t max_positions;
  float norm_epsilon;
  float attention_scale;
  float attention_softcap;     // 0: none
  float logit_softcap;         // 0: none
  float embedding_scale;
  const void* embedding;       // [vocab, hidden] row-major
  int32_t embedding_dtype;     // qk_dtype
  const float* final_norm;     // [hidden]
  qk_linear head;              // n = vocab
} qk_decoder_config;

// Keys and values: pages of QK_PAGE_TOKENS tokens, a page of one layer and one head together.
//
//   data   [layers][pages][kv_heads][2: key, value][page bytes]
//   scale  [layers][pages][kv_heads][2][QK_PAGE_TOKENS] fp32 (int8 and fp8 only): one scale a token
//   fixed  [layers][2: key, value] fp32 > 0, or NULL: calibrated scales that every token of a layer
//          gets, in place of its own (int8 and fp8 only). What lies beyond them saturates.
//
// A key page is the packed layout of a weight [QK_PAGE_TOKENS, head_dim]; a value page that of
// [head_dim, QK_PAGE_TOKENS], its blocks of 16 rows side by side: 16 rows x 4 bytes of codes along
// the second dimension make a chunk. So both products of attention are the linear layer's kernel.
// Pages need not be initialized: a forward pass clears what it would multiply with zero.
enum { QK_PAGE_TOKENS = 64 };
enum qk_kv_dtype { QK_KV_F32 = 0, QK_KV_BF16 = 1, QK_KV_INT8 = 2, QK_KV_FP8 = 3 };

typedef struct qk_kv_cache {
  int32_t dtype;  // qk_kv_dtype
  int64_t pages;
  void* data;
  float* scale;
  const float* fixed;
} qk_kv_cache;

typedef struct qk_batch {
  int64_t sequences;
  const int32_t* tokens;     // ids of all new tokens, sequence after sequence
  const int32_t* starts;     // [sequences + 1] where a sequence's new tokens begin
  const int32_t* past;       // [sequences] tokens that its pages hold already
  const int32_t* pages;      // [sequences][page_stride] page numbers
  int64_t page_stride;
  const qk_kv_cache* kv;
  const int32_t* logit_rows; // new tokens whose logits are wanted, ascending
  int64_t logit_count;
  float* logits;             // [logit_count, vocab]
  float* states;             // [all new tokens, hidden] after the final norm, or NULL
} qk_batch;

// An orthogonal product with each run of `order` values of a row: run · (S ⊗ factor), S Sylvester's
// Hadamard matrix of order `order` / `base`. With B / sqrt(order) for the factor, B a Hadamard
// matrix of order `base`, lengths stay as they are.
enum { QK_LARGEST_BASE = 512 };
typedef struct qk_hadamard {
  int64_t order;        // base * 2^k; divides the row
  int64_t base;         // 1 .. QK_LARGEST_BASE
  const float* factor;  // [base][ceil(base / 16) * 16], zeros from column `base` on
} qk_hadamard;

typedef struct qk_decoder qk_decoder;

// Copies the descriptions, not the weights, which must outlive the decoder.
QK_EXPORT int qk_decoder_create(const qk_decoder_config* config, const qk_decoder_layer* layers,
                                qk_decoder** decoder);
QK_EXPORT void qk_decoder_destroy(qk_decoder* decoder);
// From now on the input of a layer's `down` is multiplied by a Hadamard matrix, between the gate and
// the rounding. The factor must outlive the decoder.
QK_EXPORT int qk_decoder_rotate_down(qk_decoder* decoder, int64_t layer,
                                     const qk_hadamard* hadamard);
// One call at a time for one decoder.
QK_EXPORT int qk_decoder_forward(qk_decoder* decoder, const qk_batch* batch);
// logits [rows, vocab] of states [rows, hidden] that a forward pass returned.
QK_EXPORT int qk_decoder_head(qk_decoder* decoder, const float* states, int64_t rows,
                              float* logits);
// Of each of `count` rows of n > 0 values: where the first largest is, or the first NaN, and it.
QK_EXPORT void qk_argmax_rows(const float* const* rows, int64_t count, int64_t n, int64_t* places,
                              float* values);
QK_EXPORT int64_t qk_kv_page_bytes(int32_t dtype, int64_t head_dim);
// Nanoseconds of the last forward pass by part: see qk_part. For benchmarks.
enum qk_part {
  QK_PART_NORM = 0,   // residual additions, norms, rounding of inputs
  QK_PART_LINEAR = 1,
  QK_PART_ROPE = 2,   // rotary embedding and cache writes
  QK_PART_ATTENTION = 3,
  QK_PART_GATE = 4,
  QK_PART_HEAD = 5,
  QK_PART_TOTAL = 6,
  QK_PART_LIFETIME = 7,  // of all passes since the decoder was made
  QK_PARTS = 8,
};
QK_EXPORT int qk_decoder_times(const qk_decoder* decoder, int64_t* nanoseconds);

// ---- the parts of a forward pass, one call each ----------------------------------------------
//
// The kernels of qk_decoder_forward, cut into the same units: a token gets the same bits from a
// chain of these calls as from a pass. Rows are read in their dtype, computed in fp32 and rounded
// once when they are written.

// The sequences of a ragged batch: fields and rules of qk_batch.
typedef struct qk_sequences {
  int64_t count;
  const int32_t* starts;  // [count + 1]
  const int32_t* past;    // [count]
  const int32_t* pages;   // [count][page_stride]
  int64_t page_stride;
} qk_sequences;

// residual += branch, then y = residual / sqrt(mean(residual^2) + epsilon) * weight.
typedef struct qk_add_rms_norm_args {
  int64_t m, n;
  float* residual;      // [m, n], rows ld_residual elements apart; written unless branch is NULL
  int64_t ld_residual;
  const void* branch;   // [m, n] or NULL: only the norm
  int64_t ld_branch;
  int32_t branch_dtype;
  const float* weight;  // [n]
  float epsilon;
  int32_t y_dtype;
  void* y;              // [m, n]
  int64_t ldy;
} qk_add_rms_norm_args;

// y = act(x[:, :n]) * x[:, n:].
typedef struct qk_gate_args {
  int32_t kind;   // qk_gate
  int64_t m, n;
  const void* x;  // [m, 2 n]
  int64_t ldx;
  int32_t dtype;  // of x and y
  void* y;        // [m, n]
  int64_t ldy;
} qk_gate_args;

// y = x times a Hadamard matrix, each row.
typedef struct qk_hadamard_args {
  qk_hadamard hadamard;
  int64_t m, n;
  const void* x;  // [m, n]
  int64_t ldx;
  int32_t dtype;  // of x and y
  void* y;        // [m, n], elsewhere than x
  int64_t ldy;
} qk_hadamard_args;

// y[i] = table[tokens[i]] * scale.
typedef struct qk_embed_args {
  int64_t count, vocab, n;
  const int32_t* tokens;  // [count], each in 0 .. vocab-1
  const void* table;      // [vocab, n], rows ld_table elements apart
  int64_t ld_table;
  int32_t table_dtype;
  float scale;
  float* y;               // [count, n]
  int64_t ldy;
} qk_embed_args;

// Symmetric int8 codes with a scale for each `group` columns of a row: absmax / 127.5, 1 where that
// is no normal number; codes are clamp(x * (1 / scale), -128, 127), rounded half to even.
typedef struct qk_quantize_int8_args {
  int64_t m, k, group;  // group: any positive number; the last group of a row may be short
  const void* x;        // [m, k]
  int64_t ldx;
  int32_t x_dtype;
  int8_t* q;            // [m, k], rows ldq bytes apart
  int64_t ldq;
  float* scale;         // [m, ceil(k / group)]
} qk_quantize_int8_args;

// Norms of query and key heads, rotary embedding, and the write of keys and values into pages.
//
// The value half of a page is cleared when its first token is written: whoever owned the page
// before leaves nothing behind. A value that no bf16 can hold, an infinity or a NaN, is stored as
// zeros with a key of NaNs, so that it makes NaN of the queries that see it and of no other. No two
// sequences may write to one page.
typedef struct qk_rope_store_args {
  const qk_sequences* sequences;
  const qk_kv_cache* kv;      // of one layer
  int64_t heads, kv_heads, head_dim, rotary_dim, max_positions;
  const void* qkv;            // [tokens, (heads + 2 kv_heads) * head_dim]: queries, keys, values
  int64_t ld_qkv;
  int32_t dtype;              // of qkv and q
  const float* q_norm;        // [head_dim] or NULL
  const float* k_norm;
  float norm_epsilon;
  const float* cos;           // [max_positions, rotary_dim / 2]
  const float* sin;
  void* q;                    // [tokens, heads * head_dim]
  int64_t ldq;
} qk_rope_store_args;

// Attention of every new token over its sequence's pages, which hold the new tokens already.
//
// QK_PRECISION_BF16 rounds queries and probabilities to bf16; QK_KV_F32 pages are multiplied in
// fp32 even then. All of a sequence's pages must be valid, those before a window too.
typedef struct qk_attention_args {
  const qk_sequences* sequences;
  const qk_kv_cache* kv;  // of one layer
  int32_t precision;      // qk_precision
  int64_t heads, kv_heads, head_dim;
  float scale;            // of a score
  float softcap;          // 0: none
  int64_t window;         // keys a query sees, itself included; 0: all
  int32_t dtype;          // of q and y
  const void* q;          // [tokens, heads * head_dim]
  int64_t ldq;
  void* y;                // [tokens, heads * head_dim]
  int64_t ldy;
} qk_attention_args;

QK_EXPORT int qk_add_rms_norm(const qk_add_rms_norm_args* args);
QK_EXPORT int qk_gated_activation(const qk_gate_args* args);
QK_EXPORT int qk_hadamard_rows(const qk_hadamard_args* args);
QK_EXPORT int qk_embed(const qk_embed_args* args);
QK_EXPORT int qk_quantize_int8(const qk_quantize_int8_args* args);
QK_EXPORT int qk_rope_store(const qk_rope_store_args* args);
QK_EXPORT int qk_paged_attention(const qk_attention_args* args);

#ifdef __cplusplus
}
#endif
