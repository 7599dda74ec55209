// Attention of a few tokens of one sequence, for the query heads of one key-value head, over pages.
//
// Ladder:
//   1. One query after another, dot products along head_dim: a horizontal sum a key, and every
//      query head of the group decodes the same keys again.
//   2. Pages hold keys in the packed layout of a weight, so that scores are the linear layer's
//      tile: sixteen keys in the lanes, query rows (tokens x heads of the group) in registers,
//      codes decoded once for all of them. Values the same, sixteen dimensions in the lanes.
//   3. Keys are taken in spans of kSpanPages pages at fixed places. A span has its own softmax; spans
//      are merged in ascending order. So a long context can be divided among threads, and the sums
//      are the same whether it was or not, whatever the chunk of the prompt and the batch.
#pragma once

#include "rows.h"
#include "weight_only.h"

namespace quantkit {
namespace {

template <class Math, class Decoder>
struct Attention {
  using Acc = typename Math::Acc;
  using Product = WeightOnly<Math, Decoder>;
  static constexpr int64_t kSpanTokens = kSpanPages * QK_PAGE_TOKENS;
  static constexpr int64_t kWordCodes = Math::kCodesPerWord;

  // out[m, 16 b + lane] (+)= page * x: every block of one page for MR rows. `ahead` is the page to
  // fetch meanwhile: pages are short streams in far places, and a hardware prefetcher has learnt one
  // when it ends.
  template <int MR, int NB>
  static void block_product(const Decoder& decode, const uint8_t* page, int64_t step,
                            const uint8_t* const (&x)[MR], int64_t words, float* out,
                            int64_t stride, bool add, const uint8_t* ahead) {
    Acc acc[MR][NB];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) {
        acc[m][b] = add ? Math::load(out + m * stride + b * kBlockRows) : Math::zero();
      }
    }
    Product::template from_packed<MR, NB, true>(decode, page, step, x, 0, words, acc, ahead);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) Math::store(out + m * stride + b * kBlockRows, acc[m][b]);
    }
  }

  template <int MR>
  static void product(const Decoder& decode, const uint8_t* page, int64_t page_blocks,
                      int64_t blocks, const uint8_t* const (&x)[MR], int64_t words, float* out,
                      int64_t stride, bool add, const uint8_t* ahead) {
    constexpr int kWidest = static_cast<int>(Math::attention_blocks(MR));
    const int64_t step = page_blocks * kChunkBytes;
    int64_t b = 0;
    if constexpr (kWidest >= 4) {
      for (; b + 4 <= blocks; b += 4) {
        block_product<MR, 4>(decode, page + b * kChunkBytes, step, x, words, out + b * kBlockRows,
                             stride, add, ahead + b * kChunkBytes);
      }
    }
    if constexpr (kWidest >= 2) {
      for (; b + 2 <= blocks; b += 2) {
        block_product<MR, 2>(decode, page + b * kChunkBytes, step, x, words, out + b * kBlockRows,
                             stride, add, ahead + b * kChunkBytes);
      }
    }
    for (; b < blocks; ++b) {
      block_product<MR, 1>(decode, page + b * kChunkBytes, step, x, words, out + b * kBlockRows,
                           stride, add, ahead + b * kChunkBytes);
    }
  }

  // Calls f(first row, rows as a type) over strips of at most Math::kAttentionRows rows.
  template <class F>
  static void strips(int64_t rows, F&& f) {
    const int64_t most = Math::kAttentionRows;
    const int64_t height = ceil_div(rows, ceil_div(rows, most));
    for (int64_t r = 0; r < rows; r += height) {
      const auto call = [&](auto size) {
        if constexpr (size.value <= Math::kAttentionRows) f(r, size);
      };
      switch (min_of(height, rows - r)) {
        case 1: call(Height<1>{}); break;
        case 2: call(Height<2>{}); break;
        case 3: call(Height<3>{}); break;
        case 4: call(Height<4>{}); break;
        case 5: call(Height<5>{}); break;
        default: call(Height<6>{}); break;
      }
    }
  }

  struct Memory {
    float* scores;   // [rows][kSpanTokens]
    uint8_t* words;  // [rows][kSpanTokens] probabilities as words
    float* sum;      // [rows][head_dim] of this span
    float* top;      // [rows] largest score of this span
    float* total;    // [rows] sum of probabilities of this span
  };

  static const uint8_t* page_at(const AttentionJob& job, const AttentionUnit& unit, int64_t page,
                                int value) {
    const int64_t number = unit.pages[page];
    return job.data + ((number * job.kv_heads + unit.kv_head) * 2 + value) * job.page_bytes;
  }
  static const float* scale_at(const AttentionJob& job, const AttentionUnit& unit, int64_t page,
                               int value) {
    const int64_t number = unit.pages[page];
    return job.scale_data +
           ((number * job.kv_heads + unit.kv_head) * 2 + value) * int64_t{QK_PAGE_TOKENS};
  }
  static const uint8_t* query(const AttentionJob& job, const AttentionUnit& unit, int64_t row) {
    const int64_t token = unit.token + row / job.group;
    const int64_t head = unit.kv_head * job.group + row % job.group;
    return job.queries + (token * job.heads + head) * job.query_bytes;
  }

  // The keys of span `span` that row `row` may see: [low, high) within the span.
  static void visible(const AttentionJob& job, const AttentionUnit& unit, int64_t span, int64_t row,
                      int64_t* low, int64_t* high) {
    const int64_t position = unit.position + row / job.group;
    const int64_t first = span * kSpanTokens;
    const int64_t oldest = job.window > 0 ? position - job.window + 1 : 0;
    *low = oldest > first ? min_of(oldest - first, kSpanTokens) : 0;
    *high = position + 1 - first;
    *high = *high < 0 ? 0 : min_of(*high, kSpanTokens);
    if (*low > *high) *low = *high;
  }

  static void softmax_row(const AttentionJob& job, const AttentionUnit& unit, int64_t span,
                          int64_t row, int64_t width, const Memory& m) {
    float* s = m.scores + row * kSpanTokens;
    int64_t low, high;
    visible(job, unit, span, row, &low, &high);
    if (job.scale_data != nullptr) {
      for (int64_t p = 0; p * QK_PAGE_TOKENS < high; ++p) {
        const float* scale = scale_at(job, unit, span * kSpanPages + p, 0);
        float* out = s + p * QK_PAGE_TOKENS;
        for (int64_t j = 0; j < QK_PAGE_TOKENS; ++j) out[j] *= scale[j];
      }
    }
    for (int64_t j = 0; j < width; ++j) s[j] *= job.scale;
    if (job.softcap > 0.0f) {
      for (int64_t j = 0; j < width; ++j) {
        const float e = exp_approx(2.0f * s[j] / job.softcap);
        s[j] = job.softcap * (1.0f - 2.0f / (e + 1.0f));
      }
    }
    for (int64_t j = 0; j < low; ++j) s[j] = -__builtin_inff();
    for (int64_t j = high; j < width; ++j) s[j] = -__builtin_inff();
    float lane[16];
    for (int j = 0; j < 16; ++j) lane[j] = s[j];
    for (int64_t i = 16; i < width; i += 16) {
      for (int j = 0; j < 16; ++j) lane[j] = s[i + j] > lane[j] ? s[i + j] : lane[j];
    }
    float top = lane[0];
    for (int j = 1; j < 16; ++j) top = lane[j] > top ? lane[j] : top;
    m.top[row] = top;
    if (low == high) {
      m.total[row] = 0.0f;
      std::memset(s, 0, static_cast<size_t>(width) * sizeof(float));
    } else {
      for (int64_t j = 0; j < width; ++j) s[j] = exp_approx(s[j] - top);
      for (int64_t j = 0; j < low; ++j) s[j] = 0.0f;
      for (int64_t j = high; j < width; ++j) s[j] = 0.0f;
      m.total[row] = sum_row(s, width);
    }
    if (job.scale_data != nullptr) {
      for (int64_t p = 0; p * QK_PAGE_TOKENS < high; ++p) {
        const float* scale = scale_at(job, unit, span * kSpanPages + p, 1);
        float* out = s + p * QK_PAGE_TOKENS;
        const int64_t count = min_of(high - p * QK_PAGE_TOKENS, QK_PAGE_TOKENS);
        for (int64_t j = 0; j < count; ++j) out[j] *= scale[j];
      }
    }
    if constexpr (kWordCodes == 2) {
      bf16_words_row(s, width, reinterpret_cast<uint16_t*>(m.words) + row * kSpanTokens);
    } else {
      float* words = reinterpret_cast<float*>(m.words) + row * kSpanTokens;
      if (job.round_bf16) {
        round_bf16_row(s, width, words);
      } else {
        std::memcpy(words, s, static_cast<size_t>(width) * sizeof(float));
      }
    }
  }

  // Scores, softmax and weighted values of the unit's rows over one span.
  static void attend(const AttentionJob& job, const Decoder& decode, const AttentionUnit& unit,
                     int64_t rows, int64_t span, const Memory& m) {
    const int64_t last = unit.position + (rows - 1) / job.group;  // the newest key any row sees
    const int64_t keys = min_of(last + 1 - span * kSpanTokens, kSpanTokens);
    const int64_t pages = ceil_div(keys, QK_PAGE_TOKENS);
    const int64_t word_bytes = 4 / kWordCodes;  // of one code
    const int64_t first = span * kSpanPages;
    const int64_t all = (last + QK_PAGE_TOKENS) / QK_PAGE_TOKENS;  // pages of the context
    strips(rows, [&](int64_t r, auto size) {
      constexpr int MR = decltype(size)::value;
      const uint8_t* x[MR];
      for (int i = 0; i < MR; ++i) x[i] = query(job, unit, r + i);
      for (int64_t p = 0; p < pages; ++p) {
        const int64_t here = min_of(keys - p * QK_PAGE_TOKENS, QK_PAGE_TOKENS);
        const uint8_t* page = page_at(job, unit, first + p, 0);
        product<MR>(decode, page,
                    QK_PAGE_TOKENS / kBlockRows, ceil_div(here, kBlockRows), x,
                    job.head_dim / kWordCodes, m.scores + r * kSpanTokens + p * QK_PAGE_TOKENS,
                    kSpanTokens, false, r == 0 ? page_at(job, unit, first + p, 1) : page);
      }
    });
    const int64_t width = ceil_div(keys, kBlockRows) * kBlockRows;
    for (int64_t r = 0; r < rows; ++r) softmax_row(job, unit, span, r, width, m);
    strips(rows, [&](int64_t r, auto size) {
      constexpr int MR = decltype(size)::value;
      for (int64_t p = 0; p < pages; ++p) {
        const int64_t here = min_of(keys - p * QK_PAGE_TOKENS, QK_PAGE_TOKENS);
        const uint8_t* x[MR];
        for (int i = 0; i < MR; ++i) {
          x[i] = m.words + ((r + i) * kSpanTokens + p * QK_PAGE_TOKENS) * word_bytes;
        }
        const uint8_t* page = page_at(job, unit, first + p, 1);
        const int64_t next = first + kSpanPages + p;
        product<MR>(decode, page,
                    job.head_dim / kBlockRows, job.head_dim / kBlockRows, x,
                    ceil_div(here, 4) * 4 / kWordCodes, m.sum + r * job.head_dim, job.head_dim,
                    p > 0, r == 0 && next < all ? page_at(job, unit, next, 0) : page);
      }
    });
  }

  static void run(const AttentionJob& job, const AttentionUnit& unit, uint8_t* scratch) {
    const Decoder decode(nullptr);
    const int64_t rows = unit.tokens * job.group;
    float* memory = reinterpret_cast<float*>(scratch);
    Memory m;
    m.scores = memory;
    m.words = reinterpret_cast<uint8_t*>(m.scores + rows * kSpanTokens);
    m.sum = m.scores + 2 * rows * kSpanTokens;
    m.top = m.sum + rows * job.head_dim;
    m.total = m.top + rows;
    for (int64_t span = unit.first_span; span < unit.end_span; ++span) {
      attend(job, decode, unit, rows, span, m);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t place = (unit.token + r / job.group) * job.heads +
                              unit.kv_head * job.group + r % job.group;
        float* state = unit.partials == nullptr
                           ? job.states + place * job.state_floats
                           : unit.partials + ((span - unit.span_base) * job.heads +
                                              unit.kv_head * job.group + r % job.group) *
                                                 job.state_floats;
        if (unit.partials == nullptr) {
          if (span == unit.first_span) clear_state(state, job.head_dim);
          merge_state(state, m.top[r], m.total[r], m.sum + r * job.head_dim, job.head_dim);
        } else {
          state[0] = m.top[r];
          state[1] = m.total[r];
          std::memcpy(state + kStateHeader, m.sum + r * job.head_dim,
                      static_cast<size_t>(job.head_dim) * sizeof(float));
        }
      }
    }
  }

  // A running softmax: largest score, sum of probabilities, then the weighted values.
  static void clear_state(float* state, int64_t head_dim) {
    state[0] = -__builtin_inff();
    state[1] = 0.0f;
    std::memset(state + kStateHeader, 0, static_cast<size_t>(head_dim) * sizeof(float));
  }
  static void merge_state(float* state, float top, float total, const float* sum,
                          int64_t head_dim) {
    if (total == 0.0f) return;  // no key of the span was visible
    const float most = top > state[0] ? top : state[0];
    const float old_weight = exp_approx(state[0] - most), new_weight = exp_approx(top - most);
    state[0] = most;
    state[1] = state[1] * old_weight + total * new_weight;
    float* out = state + kStateHeader;
    for (int64_t i = 0; i < head_dim; ++i) out[i] = out[i] * old_weight + sum[i] * new_weight;
  }
  static void finish_state(const float* state, int64_t head_dim, float* out) {
    const float inverse = 1.0f / state[1];
    for (int64_t i = 0; i < head_dim; ++i) out[i] = state[kStateHeader + i] * inverse;
  }

  static int64_t scratch_bytes(const AttentionJob& job, int64_t tokens) {
    const int64_t rows = tokens * job.group;
    return rows * (2 * kSpanTokens + job.head_dim + 2) * 4 + 64;
  }
};

template <class Math, class F32, class B16, class I8, class F8>
void run_attention(const AttentionJob& job, const AttentionUnit& unit, uint8_t* scratch) {
  switch (job.kv_dtype) {
    case QK_KV_F32:
      if constexpr (Math::kCodesPerWord == 1) Attention<Math, F32>::run(job, unit, scratch);
      return;
    case QK_KV_BF16: return Attention<Math, B16>::run(job, unit, scratch);
    case QK_KV_INT8: return Attention<Math, I8>::run(job, unit, scratch);
    default: return Attention<Math, F8>::run(job, unit, scratch);
  }
}

// The place of element [row, column] in a page seen as a packed weight of `rows` rows.
inline int64_t page_offset(int64_t row, int64_t column, int64_t rows, int64_t bytes) {
  const int64_t codes = 4 / bytes;
  return ((column / codes * (rows / kBlockRows) + row / kBlockRows) * kBlockRows +
          row % kBlockRows) * 4 + column % codes * bytes;
}

template <class T>
inline void scatter(const T* from, uint8_t* key_page, uint8_t* value_page, int64_t slot,
                    int64_t head_dim, bool value) {
  constexpr int64_t kBytes = sizeof(T);
  for (int64_t d = 0; d < head_dim; ++d) {
    uint8_t* to = value ? value_page + page_offset(d, slot, head_dim, kBytes)
                        : key_page + page_offset(slot, d, QK_PAGE_TOKENS, kBytes);
    std::memcpy(to, from + d, kBytes);
  }
}

// Writes one token's key or value of one head. `scale` is where its scale goes (8-bit types); it is
// `given` unless that is 0. A key that is not finite keeps a scale that is not: saturated to a
// calibrated range it would pass for a number.
inline void write_page(const float* x, int64_t head_dim, int32_t dtype, int64_t slot, bool value,
                       float given, uint8_t* page, float* scale) {
  uint8_t bytes[512];
  uint16_t half[512];
  switch (dtype) {
    case QK_KV_F32: return scatter(x, page, page, slot, head_dim, value);
    case QK_KV_BF16:
      bf16_words_row(x, head_dim, half);
      return scatter(half, page, page, slot, head_dim, value);
    case QK_KV_INT8: {
      const bool ours = given != 0.0f && __builtin_isfinite(absmax(x, head_dim));
      int8_row(x, head_dim, head_dim, ours ? given : 0.0f,
               reinterpret_cast<int8_t*>(bytes), scale);
      break;
    }
    default: {
      const float most = absmax(x, head_dim);
      *scale = given != 0.0f && __builtin_isfinite(most) ? given : most / 448.0f;
      if (*scale == 0.0f) *scale = 1.0f;  // the division may have underflowed
      float scaled[512];
      for (int64_t i = 0; i < head_dim; ++i) scaled[i] = x[i] / *scale;
      to_fp8(scaled, head_dim, bytes);
    }
  }
  scatter(bytes, page, page, slot, head_dim, value);
}

template <class Math, class F32, class B16, class I8, class F8>
AttentionKernel attention_kernel() {
  using Any = Attention<Math, B16>;
  return {Math::kCodesPerWord, Any::scratch_bytes, run_attention<Math, F32, B16, I8, F8>,
          Any::clear_state,    Any::merge_state,   Any::finish_state, write_page};
}

}  // namespace
}  // namespace quantkit
