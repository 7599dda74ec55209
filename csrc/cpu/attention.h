// Attention of a few tokens of one sequence, for the query heads of key-value heads, over pages.
//
// Ladder:
//   1. One query after another, dot products along head_dim: a horizontal sum a key, and every
//      query head of the group decodes the same keys again.
//   2. Pages hold keys in the packed layout of a weight, so that scores are the linear layer's
//      tile: sixteen keys in the lanes, query rows (tokens x heads of the group) in registers,
//      codes decoded once for all of them. Values the same, sixteen dimensions in the lanes.
//   3. Keys are taken in spans of kSpanPages pages at fixed places. A span has its own softmax;
//      spans are merged in ascending order. So a long context can be divided among threads, and the sums
//      are the same whether it was or not, whatever the chunk of the prompt and the batch.
//   4. Softmax in two passes over a row's scores, in registers: of 5.6 ms that 16 sequences take on
//      one thread 0.8 -> 0.6. Then in powers of two, with a choice only in vectors that are not seen
//      whole: attention of a prompt of 128 tokens 2.1 -> 1.5 ms, of the next 128 4.7 -> 3.4.
//   5. 8-bit keys and values of a prompt to words once a span, not once a strip: 5.0 -> 4.1.
//   6. A new token's heads in one unit, because those of a page lie side by side: pieces of 48 KB
//      instead of 16 stream at 46 instead of 40 GB/s.
#pragma once

#include "native_vector.h"
#include "page_write.h"
#include "rows.h"
#include "weight_only.h"

namespace quantkit {
namespace {

#if defined(__AVX512F__)
constexpr VecI kLanePlaces = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
constexpr VecI kLanePlaces = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr VecI kLanePlaces = {0, 1, 2, 3};
#endif

// Words that were decoded before.
template <class Math>
struct Decoded {
  static constexpr int kSteps = 1;
  explicit Decoded(const float*) {}
  void operator()(const uint8_t* chunk, typename Math::Word (&w)[kSteps]) const {
    w[0] = Math::load_word(chunk);
  }
};

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
    uint8_t* pages;  // [kSpanPages] keys or values of this span as words
  };

  static const uint8_t* page_at(const AttentionJob& job, const AttentionUnit& unit,
                                int64_t kv_head, int64_t page, int value) {
    const int64_t number = unit.pages[page];
    return job.data + ((number * job.kv_heads + kv_head) * 2 + value) * job.page_bytes;
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

  // One row's scores to probabilities, in two passes over them: what it may not see has none.
  static void softmax_row(const AttentionJob& job, const AttentionUnit& unit, int64_t span,
                          int64_t row, int64_t width, const Memory& m) {
    constexpr int kVecs = static_cast<int>(kBlockRows) / kVecLanes;  // of sixteen keys
    float* s = m.scores + row * kSpanTokens;
    int64_t low, high;
    visible(job, unit, span, row, &low, &high);
    // f(vector in its sixteen, place, seen(x, otherwise)): most vectors are seen whole, and for them
    // there is nothing to choose.
    const auto each = [&](int64_t key, auto&& f) {
      for (int i = 0; i < kVecs; ++i) {
        const int64_t at = key + i * kVecLanes;
        if (low <= at && at + kVecLanes <= high) {
          f(i, at, [](Vec x, Vec) { return x; });
        } else {
          const VecI place = kLanePlaces + static_cast<int32_t>(at);
          const auto seen =
              (place >= static_cast<int32_t>(low)) & (place < static_cast<int32_t>(high));
          f(i, at, [&](Vec x, Vec otherwise) { return seen ? x : otherwise; });
        }
      }
    };
    // Of 8-bit keys (0) or values (1), from the span's key `key` on.
    const auto scale_of = [&](int64_t key, int value) {
      return scale_at(job, unit, span * kSpanPages + key / QK_PAGE_TOKENS, value) +
             key % QK_PAGE_TOKENS;
    };
    const float factor = job.scale, softcap = job.softcap, log2e = 1.44269504f;
    const float binary = factor * log2e;  // to powers of two
    const Vec none = splat_vec(-__builtin_inff());
    Vec top[kVecs], total[kVecs] = {};
    for (Vec& t : top) t = none;
    for (int64_t key = 0; key < width; key += kBlockRows) {
      const float* scale = job.scale_data == nullptr ? nullptr : scale_of(key, 0);
      each(key, [&](int i, int64_t at, auto&& seen) {
        Vec x = load_vec(s + at);
        if (scale != nullptr) x *= load_vec(scale + i * kVecLanes);
        if (softcap > 0.0f) {
          const Vec e = exp_of<Vec, VecU>(2.0f * (x * factor) / softcap);
          x = softcap * log2e * (1.0f - 2.0f / (e + 1.0f));
        } else {
          x *= binary;
        }
        x = seen(x, none);
        top[i] = x > top[i] ? x : top[i];
        store_vec(s + at, x);
      });
    }
    const float most = across(top, [](auto a, auto b) { return a > b ? a : b; });
    for (int64_t key = 0; key < width; key += kBlockRows) {
      const float* scale = job.scale_data == nullptr ? nullptr : scale_of(key, 1);
      each(key, [&](int i, int64_t at, auto&& seen) {
        Vec x = seen(exp2_vec(load_vec(s + at) - most), Vec{});
        total[i] += x;
        if (scale != nullptr) x = seen(x * load_vec(scale + i * kVecLanes), Vec{});
        store_vec(s + at, x);
      });
      if constexpr (kWordCodes == 2) {
        Math::store_bf16(reinterpret_cast<uint16_t*>(m.words) + row * kSpanTokens + key,
                         Math::load(s + key));
      }
    }
    m.top[row] = most;
    m.total[row] = across(total, [](auto a, auto b) { return a + b; });
    if constexpr (kWordCodes == 1) {
      float* words = reinterpret_cast<float*>(m.words) + row * kSpanTokens;
      if (job.round_bf16) {
        round_bf16_row(s, width, words);
      } else {
        std::memcpy(words, s, static_cast<size_t>(width) * sizeof(float));
      }
    }
  }

  // Sixteen lanes to one value, halves onto each other: the order is that of every instruction set.
  template <int kVecs, class F>
  static float across(const Vec (&lanes)[kVecs], F&& f) {
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    float part[kBlockRows];
    for (int i = 0; i < kVecs; ++i) store_vec(part + i * kVecLanes, lanes[i]);
    Half half[2];
    std::memcpy(half, part, sizeof half);
    half[0] = f(half[0], half[1]);
    Quarter quarter[2];
    std::memcpy(quarter, half, sizeof quarter);
    const Quarter q = f(quarter[0], quarter[1]);
    return f(f(q[0], q[2]), f(q[1], q[3]));
  }

  // A head's keys in a span.
  struct Keys {
    int64_t kv_head, span;
  };
  // Those that follow a head's in a span. The heads of a page lie side by side.
  static Keys coming(const AttentionUnit& unit, int64_t kv_head, int64_t span) {
    if (kv_head + 1 < unit.end_head) return {kv_head + 1, span};
    return {unit.kv_head, span + 1};
  }
  // The page at place `p` of a span, or `otherwise` where the context ends before it.
  static const uint8_t* page_of(const AttentionJob& job, const AttentionUnit& unit,
                                const Keys& keys, int64_t p, const uint8_t* otherwise) {
    const int64_t page = keys.span * kSpanPages + p;
    if (keys.span >= unit.end_span || page * QK_PAGE_TOKENS >= unit.position + unit.tokens) {
      return otherwise;
    }
    return page_at(job, unit, keys.kv_head, page, 0);
  }

  // Asks for the scales of a span's 8-bit keys and values: the softmax wants them right behind the
  // scores, and they lie in far places, too.
  static void fetch_scales(const AttentionJob& job, const AttentionUnit& unit, int64_t span,
                           int64_t pages) {
    if (job.scale_data == nullptr) return;
    for (int64_t p = 0; p < pages; ++p) {
      const float* scale = scale_at(job, unit, span * kSpanPages + p, 0);
      for (int64_t i = 0; i < 2 * QK_PAGE_TOKENS; i += kBlockRows) {
        __builtin_prefetch(scale + i, 0, 3);
      }
    }
  }

  // A prompt's rows are many strips, and each would decode the same codes.
  static bool decodes_first(int64_t rows) {
    return Decoder::kSteps > 1 && rows > 2 * Math::kAttentionRows;
  }
  static int64_t decoded_bytes(const AttentionJob& job) {
    return QK_PAGE_TOKENS * job.head_dim * 4 / kWordCodes;  // of a page's keys or values
  }
  static void decode_page(const Decoder& decode, const uint8_t* page, int64_t blocks,
                          int64_t chunks, uint8_t* out) {
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t b = 0; b < blocks; ++b, page += kChunkBytes) {
        typename Math::Word words[Decoder::kSteps];
        decode(page, words);
        for (int s = 0; s < Decoder::kSteps; ++s) {
          Math::store_word(out + ((c * Decoder::kSteps + s) * blocks + b) * kChunkBytes, words[s]);
        }
      }
    }
  }

  // product() of a page, or of its words where `decoded` has them.
  template <int MR>
  static void page_product(const Decoder& decode, const uint8_t* page, const uint8_t* decoded,
                           int64_t page_blocks, int64_t blocks, const uint8_t* const (&x)[MR],
                           int64_t words, float* out, int64_t stride, bool add,
                           const uint8_t* ahead) {
    if constexpr (Decoder::kSteps > 1) {
      if (decoded != nullptr) {
        using Words = Attention<Math, Decoded<Math>>;
        return Words::template product<MR>(Decoded<Math>(nullptr), decoded, page_blocks, blocks, x,
                                           words, out, stride, add, decoded);
      }
    }
    product<MR>(decode, page, page_blocks, blocks, x, words, out, stride, add, ahead);
  }

  // Scores, softmax and weighted values of the unit's rows and its first head over one span. The
  // next keys are fetched meanwhile.
  static void attend(const AttentionJob& job, const Decoder& decode, const AttentionUnit& unit,
                     int64_t rows, int64_t span, const Keys& next, const Memory& m) {
    const int64_t last = unit.position + (rows - 1) / job.group;  // the newest key any row sees
    const int64_t keys = min_of(last + 1 - span * kSpanTokens, kSpanTokens);
    const int64_t pages = ceil_div(keys, QK_PAGE_TOKENS);
    const int64_t word_bytes = 4 / kWordCodes;  // of one code
    const int64_t first = span * kSpanPages;
    fetch_scales(job, unit, span, pages);
    const bool words_first = decodes_first(rows);
    const int64_t decoded_page = decoded_bytes(job);
    // Words of each page, `blocks` of sixteen wide, of its keys (0) or values (1).
    const auto decode_pages = [&](int64_t blocks, int value) {
      for (int64_t p = 0; words_first && p < pages; ++p) {
        decode_page(decode, page_at(job, unit, unit.kv_head, first + p, value), blocks,
                    job.page_bytes / (blocks * kChunkBytes), m.pages + p * decoded_page);
      }
    };
    const auto decoded = [&](int64_t p) {
      return words_first ? m.pages + p * decoded_page : nullptr;
    };
    decode_pages(QK_PAGE_TOKENS / kBlockRows, 0);
    strips(rows, [&](int64_t r, auto size) {
      constexpr int MR = decltype(size)::value;
      const uint8_t* x[MR];
      for (int i = 0; i < MR; ++i) x[i] = query(job, unit, r + i);
      for (int64_t p = 0; p < pages; ++p) {
        const int64_t here = min_of(keys - p * QK_PAGE_TOKENS, QK_PAGE_TOKENS);
        const uint8_t* page = page_at(job, unit, unit.kv_head, first + p, 0);
        page_product<MR>(decode, page, decoded(p), QK_PAGE_TOKENS / kBlockRows,
                         ceil_div(here, kBlockRows), x, job.head_dim / kWordCodes,
                         m.scores + r * kSpanTokens + p * QK_PAGE_TOKENS, kSpanTokens, false,
                         r == 0 ? page + job.page_bytes : page);  // its values
      }
    });
    const int64_t width = ceil_div(keys, kBlockRows) * kBlockRows;
    for (int64_t r = 0; r < rows; ++r) softmax_row(job, unit, span, r, width, m);
    decode_pages(job.head_dim / kBlockRows, 1);
    strips(rows, [&](int64_t r, auto size) {
      constexpr int MR = decltype(size)::value;
      for (int64_t p = 0; p < pages; ++p) {
        const int64_t here = min_of(keys - p * QK_PAGE_TOKENS, QK_PAGE_TOKENS);
        const uint8_t* x[MR];
        for (int i = 0; i < MR; ++i) {
          x[i] = m.words + ((r + i) * kSpanTokens + p * QK_PAGE_TOKENS) * word_bytes;
        }
        const uint8_t* page = page_at(job, unit, unit.kv_head, first + p, 1);
        page_product<MR>(decode, page, decoded(p), job.head_dim / kBlockRows,
                         job.head_dim / kBlockRows, x, ceil_div(here, 4) * 4 / kWordCodes,
                         m.sum + r * job.head_dim, job.head_dim, p > 0,
                         r == 0 ? page_of(job, unit, next, p, page) : page);
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
    const uint8_t* used = reinterpret_cast<uint8_t*>(m.total + rows);
    m.pages = scratch + ceil_div(used - scratch, kChunkBytes) * kChunkBytes;
    AttentionUnit head = unit;
    for (int64_t span = unit.first_span; span < unit.end_span; ++span) {
      for (head.kv_head = unit.kv_head; head.kv_head < unit.end_head; ++head.kv_head) {
        attend(job, decode, head, rows, span, coming(unit, head.kv_head, span), m);
        keep(job, head, rows, span, m);
      }
    }
  }

  // What a span says of each row: a state of its own, or merged into the row's.
  static void keep(const AttentionJob& job, const AttentionUnit& unit, int64_t rows, int64_t span,
                   const Memory& m) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = unit.kv_head * job.group + r % job.group;
      const int64_t place = (unit.token + r / job.group) * job.heads + head;
      const float* sum = m.sum + r * job.head_dim;
      float* state = job.states + place * job.state_floats;
      if (unit.partials != nullptr) {
        state = unit.partials + ((span - unit.span_base) * job.heads + head) * job.state_floats;
      } else if (span > unit.first_span) {
        merge_state(state, m.top[r], m.total[r], sum, job.head_dim);
        continue;
      }
      state[0] = m.top[r];
      state[1] = m.total[r];
      std::memcpy(state + kStateHeader, sum, static_cast<size_t>(job.head_dim) * sizeof(float));
    }
  }

  // A running softmax: largest score (as a power of two), sum of probabilities, weighted values.
  static void clear_state(float* state, int64_t head_dim) {
    state[0] = -__builtin_inff();
    state[1] = 0.0f;
    std::memset(state + kStateHeader, 0, static_cast<size_t>(head_dim) * sizeof(float));
  }
  static void merge_state(float* state, float top, float total, const float* sum,
                          int64_t head_dim) {
    if (total == 0.0f) return;  // no key of the span was visible
    const float most = top > state[0] ? top : state[0];
    const float old_weight = exp2_vec(splat_vec(state[0] - most))[0];
    const float new_weight = exp2_vec(splat_vec(top - most))[0];
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
    return rows * (2 * kSpanTokens + job.head_dim + 2) * 4 + 64 + kSpanPages * decoded_bytes(job);
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

template <class Math, class F32, class B16, class I8, class F8>
AttentionKernel attention_kernel() {
  using Any = Attention<Math, B16>;
  return {Math::kCodesPerWord, Any::scratch_bytes, run_attention<Math, F32, B16, I8, F8>,
          Any::clear_state,    Any::merge_state,   Any::finish_state,
          write_page,          finite_as_bf16};
}

}  // namespace
}  // namespace quantkit
