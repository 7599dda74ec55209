// The parts of a forward pass, and arguments that must be refused.
#include "kernels.h"

namespace quantkit::test {

void test_rows() {
  const int64_t m = some_rows(), n = pick(1, 300);
  {
    const int64_t ldr = n + pick(0, 2), ldb = n + pick(0, 2);
    std::vector<float> residual = floats((m - 1) * ldr + n, -2, 2);
    const std::vector<float> before = residual, weight = floats(n, -1, 1);
    const Array branch = random_array(some_dtype(), (m - 1) * ldb + n, -2, 2);
    Result y(some_dtype(), m, n);
    qk_add_rms_norm_args args{};
    args.m = m;
    args.n = n;
    args.residual = residual.data();
    args.ld_residual = ldr;
    args.branch = coin() ? branch.data() : nullptr;
    args.ld_branch = ldb;
    args.branch_dtype = branch.dtype;
    args.weight = weight.data();
    args.epsilon = 1e-5f;
    args.y_dtype = y.values.dtype;
    args.y = y.values.data();
    args.ldy = y.ld;
    expect(qk_add_rms_norm(&args) == QK_OK, "norm status");
    y.check_gaps();
    for (int64_t row = 0; row < m; ++row) {
      double square = 0;
      for (int64_t i = 0; i < n; ++i) {
        float sum = before[row * ldr + i];
        if (args.branch != nullptr) sum += static_cast<float>(branch.get(row * ldb + i));
        expect(residual[row * ldr + i] == sum, "residual");
        square += double(sum) * sum;
      }
      const double factor = 1 / std::sqrt(square / double(n) + 1e-5);
      for (int64_t i = 0; i < n; ++i) {
        y.compare(row, i, residual[row * ldr + i] * factor * weight[i], 3e-6);
      }
    }
  }
  {
    const int64_t ldx = 2 * n + pick(0, 2);
    const Array x = random_array(some_dtype(), (m - 1) * ldx + 2 * n, -9, 9);
    Result y(x.dtype, m, n);
    qk_gate_args args{};
    args.kind = static_cast<int32_t>(pick(QK_GATE_SILU, QK_GATE_GELU_TANH));
    args.m = m;
    args.n = n;
    args.x = x.data();
    args.ldx = ldx;
    args.dtype = x.dtype;
    args.y = y.values.data();
    args.ldy = y.ld;
    expect(qk_gated_activation(&args) == QK_OK, "gate status");
    y.check_gaps();
    for (int64_t i = 0; i < m * n; ++i) {
      const double gate = x.get(i / n * ldx + i % n), up = x.get(i / n * ldx + n + i % n);
      y.compare(i / n, i % n, gate_of(gate, args.kind) * up, 1e-6 * std::fabs(gate * up));
    }
  }
  {
    const Rotation rotation(one_of<int64_t>({1, 3, 12, 16, 17, 36}), one_of<int64_t>({1, 2, 4, 8}));
    const int64_t rows = pick(1, 9), order = rotation.order, k = order * pick(1, 3);
    const int64_t ldx = k + pick(0, 2);
    const Array x = random_array(some_dtype(), (rows - 1) * ldx + k, -2, 2);
    Result y(x.dtype, rows, k);
    qk_hadamard_args args{};
    args.hadamard = rotation.view();
    args.m = rows;
    args.n = k;
    args.x = x.data();
    args.ldx = ldx;
    args.dtype = x.dtype;
    args.y = y.values.data();
    args.ldy = y.ld;
    expect(qk_hadamard_rows(&args) == QK_OK, "hadamard status");
    y.check_gaps();
    for (int64_t i = 0; i < rows * k; ++i) {
      const int64_t j = i % k % order, first = i / k * ldx + i % k - j;
      double sum = 0, size = 0;
      for (int64_t r = 0; r < order; ++r) {
        const double term = x.get(first + r) * rotation.at(r, j);
        sum += term;
        size += std::fabs(term);
      }
      y.compare(i / k, i % k, sum, 2e-6 * size);
    }
  }
  {
    const int64_t vocab = pick(1, 50), ld = n + pick(0, 2);
    const Array table = random_array(some_dtype(), (vocab - 1) * ld + n, -2, 2);
    std::vector<int32_t> tokens = sized<int32_t>(m);
    for (int32_t& token : tokens) token = static_cast<int32_t>(pick(0, vocab - 1));
    Result y(QK_F32, m, n);
    qk_embed_args args{};
    args.count = m;
    args.vocab = vocab;
    args.n = n;
    args.tokens = tokens.data();
    args.table = table.data();
    args.ld_table = ld;
    args.table_dtype = table.dtype;
    args.scale = coin() ? 1.0f : 2.5f;
    args.y = static_cast<float*>(y.values.data());
    args.ldy = y.ld;
    expect(qk_embed(&args) == QK_OK, "embed status");
    y.check_gaps();
    for (int64_t i = 0; i < m * n; ++i) {
      y.compare(i / n, i % n, table.get(tokens[i / n] * ld + i % n) * args.scale, 0);
    }
  }
  {
    const int64_t ldx = n + pick(0, 2), ldq = n + pick(0, 2);
    const int64_t group = one_of<int64_t>({1, 16, 32, 100, n, 1000});
    const int64_t groups = ceil_div(n, group);
    const Array x = random_array(some_dtype(), (m - 1) * ldx + n, -2, 2);
    std::vector<int8_t> q = sized<int8_t>((m - 1) * ldq + n);
    std::vector<float> scale = sized<float>(m * groups);
    qk_quantize_int8_args args{};
    args.m = m;
    args.k = n;
    args.group = group;
    args.x = x.data();
    args.ldx = ldx;
    args.x_dtype = x.dtype;
    args.q = q.data();
    args.ldq = ldq;
    args.scale = scale.data();
    expect(qk_quantize_int8(&args) == QK_OK, "int8 status");
    for (int64_t i = 0; i < m * n; ++i) {
      const double s = scale[i / n * groups + i % n / group];
      const double error = q[i / n * ldq + i % n] * s - x.get(i / n * ldx + i % n);
      expect(std::fabs(error) <= 0.501 * s, "an int8 code is off by %g of %g", error, s);
    }
  }
}

void test_attention() {
  AttentionShape a{};
  a.kv_heads = pick(1, 3);
  a.heads = a.kv_heads * pick(1, 5);
  a.head_dim = one_of<int64_t>({16, 32, 48, 64, 96});
  a.rotary_dim = one_of<int64_t>({0, 2, a.head_dim / 2, a.head_dim});
  a.window = one_of<int64_t>({0, 0, 1, 50, 130});
  a.softcap = one_of<double>({0.0, 0.0, 3.0});
  const Schedule whole(some_lengths(), true), chunks(whole.lengths, false);
  const int32_t kv_dtype = static_cast<int32_t>(pick(QK_KV_F32, QK_KV_FP8));
  const int32_t dtype = some_dtype();
  const bool bf16 = coin();
  const int64_t q_width = a.heads * a.head_dim, kv_width = a.kv_heads * a.head_dim;
  const int64_t width = q_width + 2 * kv_width, positions = 201;
  const Array qkv = random_array(dtype, whole.total() * width, -1, 1);
  const std::vector<float> cos = angles(positions, a.rotary_dim, true);
  const std::vector<float> sin = angles(positions, a.rotary_dim, false);
  const std::vector<float> q_norm = floats(a.head_dim, 0.5, 1.5);
  const std::vector<float> k_norm = floats(a.head_dim, 0.5, 1.5);
  const bool normed = coin();
  const double scale = 1 / std::sqrt(double(a.head_dim));

  const auto run = [&](const Schedule& schedule) {
    Pages pages(kv_dtype, 1, schedule.pool, a.kv_heads, a.head_dim, true);
    Array out(dtype, schedule.total() * q_width);
    const size_t row_bytes = out.bytes.size() / static_cast<size_t>(schedule.total());
    for (size_t c = 0; c < schedule.calls.size(); ++c) {
      const std::vector<int64_t>& tokens = schedule.tokens[c];
      const int64_t rows = static_cast<int64_t>(tokens.size());
      const int64_t ld = width + pick(0, 2), ldq = q_width + pick(0, 2);
      Array in(dtype, (rows - 1) * ld + width);
      for (int64_t i = 0; i < rows * width; ++i) {
        in.set(i / width * ld + i % width, qkv.get(tokens[i / width] * width + i % width));
      }
      const qk_sequences sequences = schedule.calls[c].view();
      Array q(dtype, (rows - 1) * ldq + q_width);
      qk_rope_store_args store{};
      store.sequences = &sequences;
      store.kv = &pages.cache;
      store.heads = a.heads;
      store.kv_heads = a.kv_heads;
      store.head_dim = a.head_dim;
      store.rotary_dim = a.rotary_dim;
      store.max_positions = positions;
      store.qkv = in.data();
      store.ld_qkv = ld;
      store.dtype = dtype;
      store.q_norm = normed ? q_norm.data() : nullptr;
      store.k_norm = normed ? k_norm.data() : nullptr;
      store.norm_epsilon = 1e-5f;
      store.cos = cos.data();
      store.sin = sin.data();
      store.q = q.data();
      store.ldq = ldq;
      expect(qk_rope_store(&store) == QK_OK, "store status");
      Result y(dtype, rows, q_width);
      qk_attention_args attend{};
      attend.sequences = &sequences;
      attend.kv = &pages.cache;
      attend.precision = bf16 ? QK_PRECISION_BF16 : QK_PRECISION_F32;
      attend.heads = a.heads;
      attend.kv_heads = a.kv_heads;
      attend.head_dim = a.head_dim;
      attend.scale = static_cast<float>(scale);
      attend.softcap = static_cast<float>(a.softcap);
      attend.window = a.window;
      attend.dtype = dtype;
      attend.q = q.data();
      attend.ldq = ldq;
      attend.y = y.values.data();
      attend.ldy = y.ld;
      expect(qk_paged_attention(&attend) == QK_OK, "attention status");
      y.check_gaps();
      const size_t size = row_bytes / static_cast<size_t>(q_width);
      for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(&out.bytes[static_cast<size_t>(tokens[i]) * row_bytes],
                    &y.values.bytes[static_cast<size_t>(i * y.ld) * size], row_bytes);
      }
    }
    return out;
  };
  const Array y = run(whole);
  expect(same_bits(y.bytes, run(chunks).bytes), "chunks or threads change bits");

  const double slack = kv_slack(kv_dtype) + (bf16 || dtype != QK_F32 ? 0.03 : 0.0);
  for (size_t s = 0; s < whole.lengths.size(); ++s) {
    std::vector<double> keys, values;
    for (int64_t t = 0; t < whole.lengths[s]; ++t) {
      const int64_t row = whole.offsets[s] + t;
      std::vector<double> x(static_cast<size_t>(width)), out(static_cast<size_t>(q_width));
      for (int64_t i = 0; i < width; ++i) x[i] = qkv.get(row * width + i);
      for (int64_t h = 0; h < a.heads + a.kv_heads; ++h) {
        double* head = &x[h * a.head_dim];
        if (normed) naive_norm(head, (h < a.heads ? q_norm : k_norm).data(), a.head_dim, 1e-5);
        naive_rope(head, a.rotary_dim, cos.data() + t * a.rotary_dim / 2,
                   sin.data() + t * a.rotary_dim / 2);
      }
      keys.insert(keys.end(), x.begin() + q_width, x.begin() + q_width + kv_width);
      values.insert(values.end(), x.begin() + q_width + kv_width, x.end());
      naive_attention(a, x.data(), keys, values, t, scale, out.data());
      for (int64_t i = 0; i < q_width; ++i) {
        const double got = y.get(row * q_width + i);
        expect(std::fabs(got - out[i]) <= slack, "token %ld of %ld: %g, not %g (kv %d)",
               static_cast<long>(t), static_cast<long>(whole.lengths[s]), got, out[i], kv_dtype);
      }
    }
  }
}

// ---- what must be refused ----------------------------------------------------------------------

void test_refusals() {
  float one = 1.0f;
  qk_weight_only_args w{};
  w.m = w.n = w.k = w.group_size = w.ldx = w.ldy = 1;
  expect(qk_weight_only_linear(&w) == QK_INVALID_ARGUMENT, "no pointers");
  w.x = w.y = &one;
  w.scale = w.packed = &one;
  w.format = QK_W4;
  expect(qk_weight_only_linear(&w) == QK_INVALID_ARGUMENT, "no codebook");
  w.format = 9;
  expect(qk_weight_only_linear(&w) == QK_UNSUPPORTED, "format");
  w.format = QK_F32W;
  w.k = 40;
  w.group_size = 24;
  expect(qk_weight_only_linear(&w) == QK_INVALID_ARGUMENT, "group");
  qk_quantize_int8_args q{};
  q.m = q.k = q.group = 1;
  expect(qk_quantize_int8(&q) == QK_INVALID_ARGUMENT, "no pointers");
  q.m = 0;
  expect(qk_quantize_int8(&q) == QK_OK, "no rows");
  qk_gate_args g{};
  g.n = 1;
  g.kind = 7;
  expect(qk_gated_activation(&g) == QK_UNSUPPORTED, "gate");
  qk_hadamard_args h{};
  h.hadamard = {6, 3, &one};
  h.n = 9;
  expect(qk_hadamard_rows(&h) == QK_INVALID_ARGUMENT, "order");
  h.n = 12;
  expect(qk_hadamard_rows(&h) == QK_OK, "no rows");
  h.hadamard.base = 0;
  expect(qk_hadamard_rows(&h) == QK_INVALID_ARGUMENT, "base");
  h.hadamard = {9, 3, &one};
  h.n = 9;
  expect(qk_hadamard_rows(&h) == QK_INVALID_ARGUMENT, "no power of two");
  const Rotation rotation(3, 4);
  const qk_hadamard whole = rotation.view();
  expect(qk_decoder_rotate_down(nullptr, 0, &whole) == QK_INVALID_ARGUMENT, "no decoder");
  const int32_t token = 3;
  qk_embed_args e{1, 3, 1, &token, &one, 1, QK_F32, 1.0f, &one, 1};
  expect(qk_embed(&e) == QK_INVALID_ARGUMENT, "token");

  std::vector<float> rows(64, 0.0f);
  Pages pages(QK_KV_F32, 1, 2, 1, 16, false);
  Ragged ragged;
  ragged.add(0, 1);
  ragged.pages = {1};
  ragged.stride = 1;
  const auto attend = [&](int64_t head_dim, const qk_kv_cache& cache) {
    const qk_sequences sequences = ragged.view();
    qk_attention_args a{};
    a.sequences = &sequences;
    a.kv = &cache;
    a.heads = a.kv_heads = 1;
    a.head_dim = head_dim;
    a.q = a.y = rows.data();
    a.ldq = a.ldy = head_dim;
    return qk_paged_attention(&a);
  };
  expect(attend(16, pages.cache) == QK_OK, "attention");
  expect(attend(24, pages.cache) == QK_UNSUPPORTED, "head_dim");
  qk_kv_cache cache = pages.cache;
  cache.dtype = QK_KV_INT8;
  cache.scale = nullptr;
  expect(attend(16, cache) == QK_INVALID_ARGUMENT, "no scales");
  ragged.pages[0] = 2;
  expect(attend(16, pages.cache) == QK_INVALID_ARGUMENT, "page");
  ragged.pages[0] = 0;
  ragged.past[0] = 64;
  expect(attend(16, pages.cache) == QK_INVALID_ARGUMENT, "pages too few");
}

}  // namespace quantkit::test
