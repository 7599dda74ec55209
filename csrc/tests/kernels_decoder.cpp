// The decoder against its own parts, bit for bit, and against a forward pass in double.
#include "kernels.h"

namespace quantkit::test {

namespace {

struct Linear {
  Weight weight;
  int32_t activation;
  int64_t act_group;

  qk_linear view() const {
    qk_linear out{};
    out.format = weight.format;
    out.activation = activation;
    out.n = weight.n;
    out.k = weight.k;
    out.group_size = weight.group;
    out.act_group = act_group;
    out.act_scale = 0.05f;
    out.scale_dtype = weight.scale.dtype;
    out.packed = weight.packed.data();
    out.lut = weight.lut.empty() ? nullptr : weight.lut.data();
    out.scale = weight.scale.data();
    out.scale_stride = weight.stride_g;
    out.zero = weight.has_zero ? weight.zero.data() : nullptr;
    out.bias = weight.bias.empty() ? nullptr : weight.bias.data();
    return out;
  }
};
using Parts = std::vector<Linear>;  // side by side

struct Block {
  Parts qkv, attention_out, gate_up, down;
  std::vector<float> attention_norm, q_norm, k_norm, post_attention_norm, mlp_norm, post_mlp_norm;
  int64_t window;
  Rotation down_rotation;  // order 0: none
};

// What activations and weights a model has: floats only, what the parts offer, or anything.
enum class Kind { kFloat, kChain, kAny };

struct Model {
  qk_decoder_config config{};
  std::vector<Block> blocks;
  Array embedding{QK_F32, 0};
  std::vector<float> final_norm, cos, sin;
  Parts head;
  Kind kind;

  std::vector<std::vector<qk_linear>> views;
  std::vector<qk_decoder_layer> layers;
  qk_decoder* decoder = nullptr;

  Model(const Model&) = delete;
  ~Model() { qk_decoder_destroy(decoder); }

  // Whether a NaN shows in every token behind it: no window hides it, and no int8 code with a
  // static scale, which has no way to say it.
  bool shows_nan() const {
    const auto hides = [](const Parts& parts) {
      for (const Linear& part : parts) {
        if (part.activation == QK_ACT_INT8_STATIC) return true;
      }
      return false;
    };
    for (const Block& b : blocks) {
      if (b.window > 0 || hides(b.qkv) || hides(b.attention_out) || hides(b.gate_up) ||
          hides(b.down)) {
        return false;
      }
    }
    return !hides(head);
  }

  Linear linear(int64_t n, int64_t k) const {
    Linear out;
    out.activation = QK_ACT_FLOAT;
    int32_t format = one_of<int32_t>({QK_W4, QK_I8, QK_F8, QK_B16, QK_F32W});
    if (kind != Kind::kFloat && coin()) {
      out.activation = kind == Kind::kChain
                           ? QK_ACT_INT8
                           : static_cast<int32_t>(pick(QK_ACT_INT8, QK_ACT_FP8_STATIC));
      if (out.activation <= QK_ACT_INT8_STATIC) format = coin() ? QK_W4 : QK_I8;
    }
    const int64_t group = some_group(k);
    out.act_group = coin() ? k : group;
    out.weight = random_weight(format, n, k, group, out.activation != QK_ACT_FLOAT, true);
    // Outputs of about the size of the input, so that nothing saturates or vanishes.
    double most = 0;
    for (const double value : out.weight.values) most = std::fmax(most, std::fabs(value));
    const double zero = out.weight.has_zero ? 0.1 * most : 0;
    for (float& z : out.weight.zero) z = static_cast<float>(uniform(-zero, zero));
    const double size = 1 / (most + 1e-9) / std::sqrt(double(k));
    for (int64_t i = 0; i < out.weight.scale.count(); ++i) {
      out.weight.scale.set(i, uniform(0.5, 1.5) * size);
    }
    for (float& b : out.weight.bias) b *= 0.1f;
    return out;
  }

  Parts parts(std::vector<int64_t> rows, int64_t k) const {
    Parts out;
    if (coin()) {  // as one linear layer
      int64_t n = 0;
      for (const int64_t r : rows) n += r;
      rows = {n};
    }
    for (const int64_t n : rows) out.push_back(linear(n, k));
    return out;
  }

  qk_projection view(const Parts& parts) {
    std::vector<qk_linear> list;
    for (const Linear& linear : parts) list.push_back(linear.view());
    views.push_back(std::move(list));
    return {views.back().data(), static_cast<int32_t>(views.back().size())};
  }

  explicit Model(Kind kind_) : kind(kind_) {
    qk_decoder_config& c = config;
    c.precision = kind == Kind::kAny && coin() ? QK_PRECISION_BF16 : QK_PRECISION_F32;
    c.gate = static_cast<int32_t>(pick(QK_GATE_SILU, QK_GATE_GELU_TANH));
    c.layers = pick(0, 3);
    c.kv_heads = pick(1, 2);
    c.heads = c.kv_heads * pick(1, 3);
    c.head_dim = one_of<int64_t>({16, 32, 64});
    c.rotary_dim = coin() ? c.head_dim : c.head_dim / 2;
    c.hidden = pick(3, 90);
    c.ffn = pick(3, 130);
    c.vocab = pick(10, 70);
    c.max_positions = 220;
    c.norm_epsilon = 1e-5f;
    c.attention_scale = static_cast<float>(1 / std::sqrt(double(c.head_dim)));
    c.attention_softcap = coin() ? 0.0f : 20.0f;
    c.logit_softcap = coin() ? 0.0f : 30.0f;
    c.embedding_scale = coin() ? 1.0f : 1.5f;
    const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
    embedding = random_array(some_dtype(), c.vocab * c.hidden, -1, 1);
    c.embedding = embedding.data();
    c.embedding_dtype = embedding.dtype;
    final_norm = floats(c.hidden, 0.5, 1.5);
    c.final_norm = final_norm.data();
    cos = angles(c.max_positions, c.rotary_dim, true);
    sin = angles(c.max_positions, c.rotary_dim, false);
    blocks.resize(static_cast<size_t>(c.layers));
    const bool head_norms = coin(), post_norms = coin();
    for (Block& block : blocks) {
      block.qkv = parts({q, kv, kv}, c.hidden);
      block.attention_out = {linear(c.hidden, q)};
      block.gate_up = parts({c.ffn, c.ffn}, c.hidden);
      block.down = {linear(c.hidden, c.ffn)};
      block.attention_norm = floats(c.hidden, 0.5, 1.5);
      block.mlp_norm = floats(c.hidden, 0.5, 1.5);
      if (head_norms) block.q_norm = floats(c.head_dim, 0.5, 1.5);
      if (head_norms) block.k_norm = floats(c.head_dim, 0.5, 1.5);
      if (post_norms) block.post_attention_norm = floats(c.hidden, 0.5, 1.5);
      if (post_norms) block.post_mlp_norm = floats(c.hidden, 0.5, 1.5);
      block.window = coin() ? 0 : pick(1, 90);
      const int64_t runs = c.ffn & -c.ffn;
      if (coin()) block.down_rotation = Rotation(c.ffn / runs, runs);
    }
    head = {linear(c.vocab, c.hidden)};
    const auto optional = [](const std::vector<float>& v) {
      return v.empty() ? nullptr : v.data();
    };
    for (const Block& block : blocks) {
      qk_decoder_layer layer{};
      layer.attention_norm = block.attention_norm.data();
      layer.qkv = view(block.qkv);
      layer.q_norm = optional(block.q_norm);
      layer.k_norm = optional(block.k_norm);
      layer.attention_out = view(block.attention_out);
      layer.post_attention_norm = optional(block.post_attention_norm);
      layer.mlp_norm = block.mlp_norm.data();
      layer.gate_up = view(block.gate_up);
      layer.down = view(block.down);
      layer.post_mlp_norm = optional(block.post_mlp_norm);
      layer.rope_cos = cos.data();
      layer.rope_sin = sin.data();
      layer.window = block.window;
      layers.push_back(layer);
    }
    c.head = head[0].view();
    const int status = qk_decoder_create(&c, layers.data(), &decoder);
    expect(status == QK_OK, "create status %d", status);
    for (size_t i = 0; i < blocks.size() && status == QK_OK; ++i) {
      if (blocks[i].down_rotation.order == 0) continue;
      const qk_hadamard rotation = blocks[i].down_rotation.view();
      const auto index = static_cast<int64_t>(i);
      expect(qk_decoder_rotate_down(decoder, index, &rotation) == QK_OK, "rotate status");
    }
    // The decoder keeps copies of the descriptions.
    views.clear();
    layers.clear();
  }
};

struct Outputs {
  std::vector<float> logits, states;  // of every token
};

Outputs run_decoder(const Model& model, const Schedule& schedule, const std::vector<int32_t>& ids,
                    int32_t kv_dtype) {
  const qk_decoder_config& c = model.config;
  Pages pages(kv_dtype, c.layers, schedule.pool, c.kv_heads, c.head_dim, true);
  if (c.layers == 0) pages.data.resize(1);
  pages.cache.data = pages.data.data();
  float none = 0;
  if (kv_dtype >= QK_KV_INT8 && c.layers == 0) pages.cache.scale = &none;
  Outputs out;
  out.logits = sized<float>(schedule.total() * c.vocab);
  out.states = sized<float>(schedule.total() * c.hidden);
  for (size_t call = 0; call < schedule.calls.size(); ++call) {
    const std::vector<int64_t>& places = schedule.tokens[call];
    const Ragged& ragged = schedule.calls[call];
    std::vector<int32_t> tokens, wanted;
    for (const int64_t place : places) tokens.push_back(ids[static_cast<size_t>(place)]);
    for (size_t i = 0; i < places.size(); ++i) wanted.push_back(static_cast<int32_t>(i));
    std::vector<float> logits = sized<float>(ragged.rows() * c.vocab);
    std::vector<float> states = sized<float>(ragged.rows() * c.hidden);
    qk_batch batch{};
    batch.sequences = ragged.count();
    batch.tokens = tokens.data();
    batch.starts = ragged.starts.data();
    batch.past = ragged.past.data();
    batch.pages = ragged.pages.data();
    batch.page_stride = ragged.stride;
    batch.kv = &pages.cache;
    batch.logit_rows = wanted.data();
    batch.logit_count = ragged.rows();
    batch.logits = logits.data();
    const bool states_wanted = coin();
    batch.states = states_wanted ? states.data() : nullptr;
    const int status = qk_decoder_forward(model.decoder, &batch);
    expect(status == QK_OK, "forward status %d", status);
    if (states_wanted) {
      std::vector<float> again = sized<float>(ragged.rows() * c.vocab);
      qk_decoder_head(model.decoder, states.data(), ragged.rows(), again.data());
      expect(same_bits(again, logits), "the head's logits differ from the pass's");
    }
    for (size_t i = 0; i < places.size(); ++i) {
      std::copy_n(&logits[i * c.vocab], c.vocab, &out.logits[places[i] * c.vocab]);
      std::copy_n(&states[i * c.hidden], c.hidden, &out.states[places[i] * c.hidden]);
    }
  }
  return out;
}

// y [rows, sum of n] of x [rows, k], by the linear layers' own entry points.
std::vector<float> chain_linear(const Parts& parts, const std::vector<float>& x, int64_t rows) {
  int64_t width = 0, offset = 0;
  for (const Linear& part : parts) width += part.weight.n;
  std::vector<float> y = sized<float>(rows * width);
  for (const Linear& part : parts) {
    const Weight& w = part.weight;
    qk_weight_only_args args = weight_args(w);
    args.x = x.data();
    args.ldx = w.k;
    args.m = rows;
    args.y = y.data() + offset;
    args.ldy = width;
    if (part.activation == QK_ACT_FLOAT) {
      expect(qk_weight_only_linear(&args) == QK_OK, "chain linear");
    } else {
      const int64_t group = part.act_group, groups = ceil_div(w.k, group);
      std::vector<int8_t> codes = sized<int8_t>(rows * w.k);
      std::vector<float> scale = sized<float>(rows * groups);
      const qk_quantize_int8_args quantize{rows, w.k, group,        x.data(),    w.k,
                                           QK_F32, codes.data(), w.k, scale.data()};
      expect(qk_quantize_int8(&quantize) == QK_OK, "chain quantize");
      qk_int8_linear_args int8{};
      int8.xq = codes.data();
      int8.ldx = w.k;
      int8.format = w.format;
      int8.m = rows;
      int8.n = w.n;
      int8.k = w.k;
      int8.group_size = w.group;
      int8.x_group_size = group;
      int8.packed = args.packed;
      int8.lut = args.lut;
      int8.x_scale = scale.data();
      int8.x_scale_stride = groups;
      int8.scale = args.scale;
      int8.scale_dtype = args.scale_dtype;
      int8.scale_stride_n = int8.zero_stride_n = w.stride_n;
      int8.scale_stride_g = int8.zero_stride_g = w.stride_g;
      int8.zero = args.zero;
      int8.bias = args.bias;
      int8.y = y.data() + offset;
      int8.ldy = width;
      expect(qk_int8_linear(&int8) == QK_OK, "chain int8");
    }
    offset += w.n;
  }
  return y;
}

// The decoder's forward pass over whole sequences as a chain of its parts.
std::vector<float> run_chain(const Model& model, const Schedule& schedule,
                             const std::vector<int32_t>& ids, int32_t kv_dtype) {
  const qk_decoder_config& c = model.config;
  const Ragged& ragged = schedule.calls[0];
  const int64_t rows = ragged.rows(), q_width = c.heads * c.head_dim;
  const qk_sequences sequences = ragged.view();
  std::vector<float> x = sized<float>(rows * c.hidden), branch;
  const qk_embed_args embed{rows,     c.vocab,           c.hidden,          ids.data(), c.embedding,
                            c.hidden, c.embedding_dtype, c.embedding_scale, x.data(),   c.hidden};
  expect(qk_embed(&embed) == QK_OK, "chain embed");
  const auto norm = [&](std::vector<float>& residual, const std::vector<float>* added,
                        const std::vector<float>& weight) {
    std::vector<float> y = sized<float>(rows * c.hidden);
    qk_add_rms_norm_args args{};
    args.m = rows;
    args.n = args.ld_residual = args.ld_branch = args.ldy = c.hidden;
    args.residual = residual.data();
    args.branch = added == nullptr ? nullptr : added->data();
    args.weight = weight.data();
    args.epsilon = c.norm_epsilon;
    args.y = y.data();
    expect(qk_add_rms_norm(&args) == QK_OK, "chain norm");
    return y;
  };
  const auto after = [&](std::vector<float> y, const std::vector<float>& weight) {
    return weight.empty() ? y : norm(y, nullptr, weight);
  };
  for (const Block& block : model.blocks) {
    std::vector<float> y = norm(x, branch.empty() ? nullptr : &branch, block.attention_norm);
    y = chain_linear(block.qkv, y, rows);
    Pages pages(kv_dtype, 1, schedule.pool, c.kv_heads, c.head_dim, true);
    std::vector<float> q = sized<float>(rows * q_width), mixed = sized<float>(rows * q_width);
    qk_rope_store_args store{};
    store.sequences = &sequences;
    store.kv = &pages.cache;
    store.heads = c.heads;
    store.kv_heads = c.kv_heads;
    store.head_dim = c.head_dim;
    store.rotary_dim = c.rotary_dim;
    store.max_positions = c.max_positions;
    store.qkv = y.data();
    store.ld_qkv = q_width + 2 * c.kv_heads * c.head_dim;
    store.q_norm = block.q_norm.empty() ? nullptr : block.q_norm.data();
    store.k_norm = block.k_norm.empty() ? nullptr : block.k_norm.data();
    store.norm_epsilon = c.norm_epsilon;
    store.cos = model.cos.data();
    store.sin = model.sin.data();
    store.q = q.data();
    store.ldq = q_width;
    expect(qk_rope_store(&store) == QK_OK, "chain store");
    qk_attention_args attend{};
    attend.sequences = &sequences;
    attend.kv = &pages.cache;
    attend.heads = c.heads;
    attend.kv_heads = c.kv_heads;
    attend.head_dim = c.head_dim;
    attend.scale = c.attention_scale;
    attend.softcap = c.attention_softcap;
    attend.window = block.window;
    attend.q = q.data();
    attend.y = mixed.data();
    attend.ldq = attend.ldy = q_width;
    expect(qk_paged_attention(&attend) == QK_OK, "chain attention");
    branch = after(chain_linear(block.attention_out, mixed, rows), block.post_attention_norm);
    y = norm(x, &branch, block.mlp_norm);
    y = chain_linear(block.gate_up, y, rows);
    std::vector<float> gated = sized<float>(rows * c.ffn);
    const qk_gate_args gate{c.gate, rows, c.ffn, y.data(), 2 * c.ffn, QK_F32, gated.data(), c.ffn};
    expect(qk_gated_activation(&gate) == QK_OK, "chain gate");
    if (block.down_rotation.order > 0) {
      const std::vector<float> straight = gated;
      const qk_hadamard_args turn{block.down_rotation.view(), rows, c.ffn, straight.data(), c.ffn,
                                  QK_F32, gated.data(), c.ffn};
      expect(qk_hadamard_rows(&turn) == QK_OK, "chain hadamard");
    }
    branch = after(chain_linear(block.down, gated, rows), block.post_mlp_norm);
  }
  std::vector<float> logits = chain_linear(
      model.head, norm(x, branch.empty() ? nullptr : &branch, model.final_norm), rows);
  if (c.logit_softcap > 0) {
    for (float& v : logits) v = c.logit_softcap * std::tanh(v / c.logit_softcap);
  }
  return logits;
}

std::vector<double> naive_linear(const Parts& parts, const std::vector<double>& x) {
  std::vector<double> y;
  for (const Linear& part : parts) {
    for (int64_t i = 0; i < part.weight.n; ++i) {
      double sum = part.weight.bias.empty() ? 0.0 : part.weight.bias[i];
      for (int64_t j = 0; j < part.weight.k; ++j) sum += x[j] * part.weight.at(i, j);
      y.push_back(sum);
    }
  }
  return y;
}

// One sequence in double, token by token.
std::vector<double> naive_forward(const Model& model, const int32_t* ids, int64_t tokens) {
  const qk_decoder_config& c = model.config;
  const int64_t q_width = c.heads * c.head_dim, kv_width = c.kv_heads * c.head_dim;
  std::vector<std::vector<double>> keys(model.blocks.size()), values(model.blocks.size());
  std::vector<double> logits;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> x(static_cast<size_t>(c.hidden));
    for (int64_t i = 0; i < c.hidden; ++i) {
      x[i] = model.embedding.get(ids[t] * c.hidden + i) * c.embedding_scale;
    }
    const auto normed = [&](std::vector<double> y, const std::vector<float>& weight) {
      if (!weight.empty()) naive_norm(y.data(), weight.data(), c.hidden, c.norm_epsilon);
      return y;
    };
    const auto add = [&](const std::vector<double>& y) {
      for (int64_t i = 0; i < c.hidden; ++i) x[i] += y[i];
    };
    for (size_t b = 0; b < model.blocks.size(); ++b) {
      const Block& block = model.blocks[b];
      std::vector<double> y = naive_linear(block.qkv, normed(x, block.attention_norm));
      for (int64_t h = 0; h < c.heads + c.kv_heads; ++h) {
        const std::vector<float>& norm = h < c.heads ? block.q_norm : block.k_norm;
        double* head = &y[h * c.head_dim];
        if (!norm.empty()) naive_norm(head, norm.data(), c.head_dim, c.norm_epsilon);
        naive_rope(head, c.rotary_dim, model.cos.data() + t * c.rotary_dim / 2,
                   model.sin.data() + t * c.rotary_dim / 2);
      }
      keys[b].insert(keys[b].end(), y.begin() + q_width, y.begin() + q_width + kv_width);
      values[b].insert(values[b].end(), y.begin() + q_width + kv_width, y.end());
      const AttentionShape shape{c.heads,      c.kv_heads,   c.head_dim,
                                 c.rotary_dim, block.window, c.attention_softcap};
      std::vector<double> mixed(static_cast<size_t>(q_width));
      naive_attention(shape, y.data(), keys[b], values[b], t, c.attention_scale, mixed.data());
      add(normed(naive_linear(block.attention_out, mixed), block.post_attention_norm));
      y = naive_linear(block.gate_up, normed(x, block.mlp_norm));
      std::vector<double> gated(static_cast<size_t>(c.ffn));
      for (int64_t i = 0; i < c.ffn; ++i) gated[i] = gate_of(y[i], c.gate) * y[c.ffn + i];
      if (block.down_rotation.order > 0) {
        const std::vector<double> straight = gated;
        const Rotation& rotation = block.down_rotation;
        for (int64_t j = 0; j < c.ffn; ++j) {
          gated[j] = 0;
          for (int64_t i = 0; i < c.ffn; ++i) gated[j] += straight[i] * rotation.at(i, j);
        }
      }
      add(normed(naive_linear(block.down, gated), block.post_mlp_norm));
    }
    for (double v : naive_linear(model.head, normed(x, model.final_norm))) {
      if (c.logit_softcap > 0) v = c.logit_softcap * std::tanh(v / c.logit_softcap);
      logits.push_back(v);
    }
  }
  return logits;
}

}  // namespace

void test_decoder() {
  const Model model(one_of<Kind>({Kind::kFloat, Kind::kChain, Kind::kAny}));
  if (model.decoder == nullptr) return;
  const qk_decoder_config& c = model.config;
  const Schedule whole(some_lengths(), true), chunks(whole.lengths, false);
  std::vector<int32_t> ids = sized<int32_t>(whole.total());
  for (int32_t& id : ids) id = static_cast<int32_t>(pick(0, c.vocab - 1));
  // bf16 products take no fp32 pages on an instruction set that has them.
  const int32_t kv_dtype = static_cast<int32_t>(
      pick(c.precision == QK_PRECISION_BF16 ? QK_KV_BF16 : QK_KV_F32, QK_KV_FP8));
  const Outputs out = run_decoder(model, whole, ids, kv_dtype);
  for (const float logit : out.logits) expect(std::isfinite(logit), "a logit is no number");
  expect(same_bits(run_decoder(model, chunks, ids, kv_dtype).logits, out.logits),
         "chunks change bits");
  if (c.precision == QK_PRECISION_F32 && model.kind != Kind::kAny) {
    expect(same_bits(run_chain(model, whole, ids, kv_dtype), out.logits),
           "a chain of parts differs from a pass");
  }
  int64_t nanoseconds[QK_PARTS];
  expect(qk_decoder_times(model.decoder, nanoseconds) == QK_OK, "times status");
  if (model.kind != Kind::kFloat || kv_dtype != QK_KV_F32) return;
  for (size_t s = 0; s < whole.lengths.size(); ++s) {
    const std::vector<double> exact =
        naive_forward(model, ids.data() + whole.offsets[s], whole.lengths[s]);
    for (size_t i = 0; i < exact.size(); ++i) {
      const double got = out.logits[static_cast<size_t>(whole.offsets[s] * c.vocab) + i];
      expect(std::fabs(got - exact[i]) <= 2e-3 * (1 + std::fabs(exact[i])), "logit %g, not %g", got,
             exact[i]);
    }
  }
}

// A token of NaNs reaches the tokens behind it in its own sequence, and no other.
void test_decoder_nan() {
  Model model(Kind::kAny);
  if (model.decoder == nullptr) return;
  const qk_decoder_config& c = model.config;
  const Schedule whole(some_lengths(), true), chunks(whole.lengths, false);
  std::vector<int32_t> ids = sized<int32_t>(whole.total());
  for (int32_t& id : ids) id = static_cast<int32_t>(pick(1, c.vocab - 1));
  const int32_t kv_dtype = static_cast<int32_t>(pick(QK_KV_BF16, QK_KV_FP8));
  const Outputs clean = run_decoder(model, whole, ids, kv_dtype);
  const size_t s = static_cast<size_t>(pick(0, static_cast<int64_t>(whole.lengths.size()) - 1));
  const int64_t bad = whole.offsets[s] + pick(0, whole.lengths[s] - 1);
  ids[bad] = 0;
  for (int64_t i = 0; i < c.hidden; ++i) model.embedding.set(i, NAN);
  const Outputs one = run_decoder(model, whole, ids, kv_dtype);
  const Outputs other = run_decoder(model, chunks, ids, kv_dtype);
  for (int64_t t = 0; t < whole.total(); ++t) {
    const bool behind = t >= bad && t < whole.offsets[s] + whole.lengths[s];
    const bool lost = model.shows_nan() && (t == bad || (behind && c.layers > 0));
    const size_t first = static_cast<size_t>(t * c.vocab), bytes = static_cast<size_t>(c.vocab) * 4;
    for (const Outputs* out : {&one, &other}) {
      if (!behind) {
        expect(std::memcmp(&out->logits[first], &clean.logits[first], bytes) == 0,
               "token %ld changed by the NaN of token %ld", static_cast<long>(t),
               static_cast<long>(bad));
      } else if (lost) {
        expect(std::isnan(out->logits[first]), "token %ld hides the NaN of token %ld",
               static_cast<long>(t), static_cast<long>(bad));
      }
    }
  }
}

}  // namespace quantkit::test
