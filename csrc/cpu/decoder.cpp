// The decoder: which rows go through which kernel, in which order.
//
// Ladder:
//   1. One operator call a step from Python: about 3 us each, and ten steps a layer are a
//      millisecond a token.
//   2. One native call a forward pass (this file). A pass is a list of parallel regions with a
//      barrier behind each; the little that stands between two products (a residual addition, a
//      norm, rounding to what the next product takes) is done by the caller alone when there are
//      one or two tokens, and in parallel when there are more.
#include "quantkit/decoder.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "kernel_table.h"
#include "kv_pages.h"
#include "numeric.h"
#include "projection.h"
#include "ragged.h"

using namespace quantkit;

namespace {

struct Layer {
  qk_decoder_layer spec;
  Projection qkv, attention_out, gate_up, down;
  qk_hadamard down_rotation{};  // order 0: none
};

class Clock {
 public:
  explicit Clock(int64_t* times) : times_(times), last_(now()) {}
  void lap(int part) {
    const int64_t time = now();
    times_[part] += time - last_;
    last_ = time;
  }
  static int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }

 private:
  int64_t* times_;
  int64_t last_;
};

}  // namespace

struct qk_decoder {
  qk_decoder_config config;
  std::vector<std::unique_ptr<qk_linear[]>> owned;  // copies of the callers' arrays
  std::vector<Layer> layers;
  Projection head;
  const KernelTable* table;
  std::optional<Projector> projector;
  const AttentionKernel* attention;

  // Of the pass that runs.
  const qk_batch* batch = nullptr;
  qk_sequences sequences{};
  std::optional<RaggedRows> places;  // of the rows
  int64_t rows = 0;
  Buffer residual, y, queries, states, partials, normed;
  std::optional<AttentionPlan> plan;
  int64_t times[QK_PARTS] = {};

  bool bf16() const { return config.precision == QK_PRECISION_BF16; }

  // ---- construction ------------------------------------------------------------------------

  int build(const qk_decoder_layer* from) {
    const qk_decoder_config& c = config;
    if (c.layers < 0 || c.hidden <= 0 || c.ffn <= 0 || c.vocab <= 0 || c.heads <= 0 ||
        c.kv_heads <= 0 || c.heads % c.kv_heads != 0 || c.head_dim <= 0 ||
        c.rotary_dim > c.head_dim || c.rotary_dim % 2 != 0 || c.max_positions <= 0 ||
        c.embedding == nullptr || c.final_norm == nullptr) {
      return QK_INVALID_ARGUMENT;
    }
    if (c.head_dim % 16 != 0 || c.head_dim > 512) return QK_UNSUPPORTED;
    if (c.precision != QK_PRECISION_F32 && c.precision != QK_PRECISION_BF16) return QK_UNSUPPORTED;
    table = &kernels();
    attention = bf16() && table->attention_bf16.run != nullptr ? &table->attention_bf16
                                                               : &table->attention_f32;
    plan.emplace(c.heads, c.kv_heads, c.head_dim);
    projector.emplace(*table, bf16());
    layers.resize(static_cast<size_t>(c.layers));
    const int64_t q_width = c.heads * c.head_dim;
    for (int64_t i = 0; i < c.layers; ++i) {
      Layer& layer = layers[static_cast<size_t>(i)];
      layer.spec = from[i];
      if (from[i].attention_norm == nullptr || from[i].mlp_norm == nullptr ||
          from[i].rope_cos == nullptr || from[i].rope_sin == nullptr) {
        return QK_INVALID_ARGUMENT;
      }
      int status = projector->add(from[i].qkv, q_width + 2 * c.kv_heads * c.head_dim, c.hidden,
                                  &layer.qkv);
      if (status == QK_OK) {
        status = projector->add(from[i].attention_out, c.hidden, q_width, &layer.attention_out);
      }
      if (status == QK_OK) {
        status = projector->add(from[i].gate_up, 2 * c.ffn, c.hidden, &layer.gate_up);
      }
      if (status == QK_OK) status = projector->add(from[i].down, c.hidden, c.ffn, &layer.down);
      if (status != QK_OK) return status;
    }
    const qk_projection only{&c.head, 1};
    return projector->add(only, c.vocab, c.hidden, &head);
  }

  // ---- a pass ------------------------------------------------------------------------------

  int check(const qk_batch& b) {
    if (b.sequences < 0 || (b.logit_count > 0 && (b.logits == nullptr || b.logit_rows == nullptr))) {
      return QK_INVALID_ARGUMENT;
    }
    if (b.sequences == 0) return QK_OK;
    if (b.tokens == nullptr || b.kv == nullptr) return QK_INVALID_ARGUMENT;
    if (const int status = check_cache(*b.kv)) return status;
    if (b.kv->dtype == QK_KV_F32 && attention->codes_per_word != 1) return QK_UNSUPPORTED;
    sequences = {b.sequences, b.starts, b.past, b.pages, b.page_stride};
    if (const int status = check_sequences(sequences, b.kv->pages, config.max_positions)) {
      return status;
    }
    const int64_t all = b.starts[b.sequences];
    for (int64_t i = 0; i < all; ++i) {
      if (b.tokens[i] < 0 || b.tokens[i] >= config.vocab) return QK_INVALID_ARGUMENT;
    }
    for (int64_t i = 0; i < b.logit_count; ++i) {
      if (b.logit_rows[i] < (i > 0 ? b.logit_rows[i - 1] + 1 : 0) || b.logit_rows[i] >= all) {
        return QK_INVALID_ARGUMENT;
      }
    }
    return QK_OK;
  }

  KvPages pages_of(int64_t layer) const {
    return KvPages(*batch->kv, layer, config.kv_heads, config.head_dim);
  }

  void rope_and_store(const Layer& layer, int64_t index, const float* qkv, int64_t width) {
    const qk_decoder_config& c = config;
    const KvPages pages = pages_of(index);
    const RowKernels& r = table->rows;
    const int64_t hd = c.head_dim;
    const bool words_bf16 = attention->codes_per_word == 2;
    const int64_t word_bytes = words_bf16 ? 2 : 4;
    uint8_t* q_words = queries.get<uint8_t>(0);
    clear_entered_values(sequences, pages);
    for_rows(rows, [&](int64_t m) {
      float* row = const_cast<float*>(qkv) + m * width;
      const int64_t position = places->position[static_cast<size_t>(m)];
      const float* cos = layer.spec.rope_cos + position * (c.rotary_dim / 2);
      const float* sin = layer.spec.rope_sin + position * (c.rotary_dim / 2);
      for (int64_t h = 0; h < c.heads + c.kv_heads; ++h) {
        float* x = row + h * hd;
        const float* norm = h < c.heads ? layer.spec.q_norm : layer.spec.k_norm;
        if (norm != nullptr) r.rms_norm(x, norm, hd, c.norm_epsilon, x);
        r.rope(x, cos, sin, c.rotary_dim);
        if (h >= c.heads) continue;
        uint8_t* out = q_words + (m * c.heads + h) * hd * word_bytes;
        if (words_bf16) {
          r.bf16_words(x, hd, reinterpret_cast<uint16_t*>(out));
        } else if (bf16()) {
          r.round_bf16(x, hd, reinterpret_cast<float*>(out));
        } else {
          std::memcpy(out, x, static_cast<size_t>(hd) * 4);
        }
      }
      const int64_t s = places->sequence[static_cast<size_t>(m)];
      const int64_t page = sequences.pages[s * sequences.page_stride + position / QK_PAGE_TOKENS];
      const int64_t slot = position % QK_PAGE_TOKENS;
      float* keys = row + c.heads * hd;
      store_token(*attention, pages, page, slot, keys, keys + c.kv_heads * hd);
    });
  }

  void cut_attention(int64_t window) {
    const int64_t count = plan->measure(sequences, window);
    plan->cut(sequences, window, partials.get<float>(count));
  }

  int attend(const Layer& layer, int64_t index) {
    const qk_decoder_config& c = config;
    const KvPages pages = pages_of(index);
    AttentionJob job{};
    job.head_dim = c.head_dim;
    job.heads = c.heads;
    job.kv_heads = c.kv_heads;
    job.group = c.heads / c.kv_heads;
    job.scale = c.attention_scale;
    job.softcap = c.attention_softcap;
    job.window = layer.spec.window;
    job.round_bf16 = bf16();
    job.queries = queries.get<uint8_t>(0);
    job.query_bytes = c.head_dim * (attention->codes_per_word == 2 ? 2 : 4);
    job.kv_dtype = pages.dtype;
    job.page_bytes = pages.page_bytes;
    job.data = pages.data;
    job.scale_data = pages.scales;
    job.states = states.get<float>(0);
    job.state_floats = plan->state_floats();
    return plan->run(*attention, job);
  }

  // The attention of row m: [heads * head_dim].
  void attention_row(int64_t m, float* out) {
    plan->finish_row(*attention, states.get<float>(0), m, places->sequence[static_cast<size_t>(m)],
                     out);
  }

  // x += a branch's output, through its own norm where the model has one.
  void add_branch(float* x, float* branch, const float* norm) {
    const RowKernels& r = table->rows;
    if (norm != nullptr) {
      r.rms_norm(branch, norm, config.hidden, config.norm_epsilon, branch);
    }
    r.add(x, branch, config.hidden);
  }

  int forward(const qk_batch& b) {
    if (const int status = check(b)) return status;
    batch = &b;
    const int64_t lifetime = times[QK_PART_LIFETIME];
    std::memset(times, 0, sizeof times);
    times[QK_PART_LIFETIME] = lifetime;
    if (b.sequences == 0) return QK_OK;
    const int64_t began = Clock::now();
    Clock clock(times);
    const qk_decoder_config& c = config;
    const RowKernels& r = table->rows;
    rows = b.starts[b.sequences];
    const int64_t q_width = c.heads * c.head_dim, qkv_width = q_width + 2 * c.kv_heads * c.head_dim;
    const int64_t y_width = qkv_width > 2 * c.ffn ? qkv_width : 2 * c.ffn;
    const int64_t y_stride = y_width > c.hidden ? y_width : c.hidden;

    places.emplace(sequences);
    float* x = residual.get<float>(rows * c.hidden);
    float* out = y.get<float>(rows * y_stride);
    const int64_t work_width = projector->widest() > c.hidden ? projector->widest() : c.hidden;
    float* work = normed.get<float>(rows * work_width);
    queries.get<uint8_t>(rows * q_width * 4);
    states.get<float>(rows * c.heads * plan->state_floats());
    for (Layer& layer : layers) {
      projector->reserve(layer.qkv, rows);
      projector->reserve(layer.attention_out, rows);
      projector->reserve(layer.gate_up, rows);
      projector->reserve(layer.down, rows);
    }

    for_rows(rows, [&](int64_t m) {
      r.load(x + m * c.hidden, c.embedding, c.embedding_dtype,
             static_cast<int64_t>(b.tokens[m]) * c.hidden, c.hidden);
      if (c.embedding_scale != 1.0f) {
        for (int64_t i = 0; i < c.hidden; ++i) x[m * c.hidden + i] *= c.embedding_scale;
      }
    });

    // Rows that somebody reads, and how many are still computed with: at last only these.
    const int64_t wanted = b.states != nullptr ? rows : b.logit_count;
    int64_t left = rows;
    const auto row_of = [&](int64_t i, int64_t count) {
      return count == rows ? i : b.logit_rows[i];
    };
    int64_t window = -1;
    const float* pending_norm = nullptr;
    for (int64_t index = 0; index < c.layers; ++index) {
      Layer& layer = layers[static_cast<size_t>(index)];
      if (layer.spec.window != window) cut_attention(window = layer.spec.window);
      for_rows(rows, [&](int64_t m) {
        if (index > 0) add_branch(x + m * c.hidden, out + m * y_stride, pending_norm);
        float* normal = work + m * work_width;
        r.rms_norm(x + m * c.hidden, layer.spec.attention_norm, c.hidden, c.norm_epsilon, normal);
        projector->fill(layer.qkv, normal, m);
      });
      clock.lap(QK_PART_NORM);
      projector->project(layer.qkv, rows, out, y_stride, &layer.attention_out);
      clock.lap(QK_PART_LINEAR);
      rope_and_store(layer, index, out, y_stride);
      clock.lap(QK_PART_ROPE);
      if (const int status = attend(layer, index)) return status;
      clock.lap(QK_PART_ATTENTION);
      // Behind the last layer's keys and values only the rows that somebody reads go on.
      if (index + 1 == c.layers) left = wanted;
      for_rows(left, [&](int64_t i) {
        float* row = work + i * work_width;
        attention_row(row_of(i, left), row);
        projector->fill(layer.attention_out, row, i);
      });
      clock.lap(QK_PART_ATTENTION);
      projector->project(layer.attention_out, left, out, y_stride, &layer.gate_up);
      clock.lap(QK_PART_LINEAR);
      for_rows(left, [&](int64_t i) {
        float* kept = x + row_of(i, left) * c.hidden;
        add_branch(kept, out + i * y_stride, layer.spec.post_attention_norm);
        float* normal = work + i * work_width;
        r.rms_norm(kept, layer.spec.mlp_norm, c.hidden, c.norm_epsilon, normal);
        projector->fill(layer.gate_up, normal, i);
      });
      clock.lap(QK_PART_NORM);
      projector->project(layer.gate_up, left, out, y_stride, &layer.down);
      clock.lap(QK_PART_LINEAR);
      for_rows(left, [&](int64_t i) {
        float* gate = out + i * y_stride;
        r.gate(gate, gate + c.ffn, c.ffn, c.gate, gate);
        if (layer.down_rotation.order > 0) r.hadamard(gate, c.ffn, layer.down_rotation);
        projector->fill(layer.down, gate, i);
      });
      clock.lap(QK_PART_GATE);
      projector->project(layer.down, left, out, y_stride,
              index + 1 < c.layers ? &layers[static_cast<size_t>(index) + 1].qkv : &head);
      clock.lap(QK_PART_LINEAR);
      pending_norm = layer.spec.post_mlp_norm;
    }

    for_rows(wanted, [&](int64_t i) {
      const int64_t m = row_of(i, wanted);
      if (c.layers > 0) add_branch(x + m * c.hidden, out + i * y_stride, pending_norm);
      float* normal = b.states != nullptr ? b.states + m * c.hidden : work + m * work_width;
      r.rms_norm(x + m * c.hidden, c.final_norm, c.hidden, c.norm_epsilon, normal);
    });
    clock.lap(QK_PART_NORM);
    if (b.logit_count > 0) {
      const bool kept = b.states != nullptr;
      run_head(b.logit_count, b.logits, [&](int64_t i) {
        const int64_t m = b.logit_rows[i];
        return kept ? b.states + m * c.hidden : work + m * work_width;
      });
    }
    clock.lap(QK_PART_HEAD);
    times[QK_PART_TOTAL] = Clock::now() - began;
    times[QK_PART_LIFETIME] += times[QK_PART_TOTAL];
    return QK_OK;
  }

  // Logits of `count` rows; state(i) is the i-th row's normalized state.
  template <class F>
  void run_head(int64_t count, float* logits, F&& state) {
    projector->reserve(head, count);
    for_rows(count, [&](int64_t i) { projector->fill(head, state(i), i); });
    projector->project(head, count, logits, config.vocab, nullptr);
    if (config.logit_softcap > 0.0f) {
      const float cap = config.logit_softcap;
      for_rows(count, [&](int64_t i) {
        float* row = logits + i * config.vocab;
        for (int64_t j = 0; j < config.vocab; ++j) row[j] = cap * __builtin_tanhf(row[j] / cap);
      });
    }
  }
};

int64_t qk_kv_page_bytes(int32_t dtype, int64_t head_dim) {
  const int64_t bytes = dtype == QK_KV_F32 ? 4 : (dtype == QK_KV_BF16 ? 2 : 1);
  return head_dim * QK_PAGE_TOKENS * bytes;
}

void qk_argmax_rows(const float* const* rows, int64_t count, int64_t n, int64_t* places,
                    float* values) {
  const auto argmax = kernels().rows.argmax;
  parallel_for(count, [&](int64_t i) {
    places[i] = argmax(rows[i], n);
    values[i] = rows[i][places[i]];
  });
}

int qk_decoder_create(const qk_decoder_config* config, const qk_decoder_layer* layers,
                      qk_decoder** decoder) {
  if (config == nullptr || (layers == nullptr && config->layers > 0) || decoder == nullptr) {
    return QK_INVALID_ARGUMENT;
  }
  try {
    auto made = std::make_unique<qk_decoder>();
    made->config = *config;
    if (const int status = made->build(layers)) return status;
    *decoder = made.release();
  } catch (const std::bad_alloc&) {
    return QK_OUT_OF_MEMORY;
  }
  return QK_OK;
}

void qk_decoder_destroy(qk_decoder* decoder) { delete decoder; }

int qk_decoder_rotate_down(qk_decoder* decoder, int64_t layer, const qk_hadamard* hadamard) {
  if (decoder == nullptr || hadamard == nullptr || layer < 0 || layer >= decoder->config.layers ||
      !fits(*hadamard, decoder->config.ffn)) {
    return QK_INVALID_ARGUMENT;
  }
  decoder->layers[static_cast<size_t>(layer)].down_rotation = *hadamard;
  return QK_OK;
}

int qk_decoder_forward(qk_decoder* decoder, const qk_batch* batch) {
  if (decoder == nullptr || batch == nullptr) return QK_INVALID_ARGUMENT;
  try {
    return decoder->forward(*batch);
  } catch (const std::bad_alloc&) {
    return QK_OUT_OF_MEMORY;
  }
}

int qk_decoder_head(qk_decoder* decoder, const float* states, int64_t rows, float* logits) {
  if (decoder == nullptr || rows < 0 || (rows > 0 && (states == nullptr || logits == nullptr))) {
    return QK_INVALID_ARGUMENT;
  }
  if (rows == 0) return QK_OK;
  try {
    const int64_t hidden = decoder->config.hidden;
    decoder->run_head(rows, logits, [&](int64_t i) { return states + i * hidden; });
  } catch (const std::bad_alloc&) {
    return QK_OUT_OF_MEMORY;
  }
  return QK_OK;
}

int qk_decoder_times(const qk_decoder* decoder, int64_t* nanoseconds) {
  if (decoder == nullptr || nanoseconds == nullptr) return QK_INVALID_ARGUMENT;
  std::memcpy(nanoseconds, decoder->times, sizeof decoder->times);
  return QK_OK;
}
