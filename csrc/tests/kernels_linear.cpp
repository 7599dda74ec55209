// Linear layers, activation quantizers and the kernels of calibration.
#include "kernels.h"
#include "quantkit/solvers.h"

namespace quantkit::test {

void test_weight_only() {
  const int32_t format = one_of<int32_t>({QK_W4, QK_I8, QK_F8, QK_B16, QK_F32W});
  const int64_t m = some_rows(), n = pick(1, 90), k = pick(1, 300);
  const Weight w = random_weight(format, n, k, some_group(k));
  const int64_t ldx = k + (coin() ? 0 : pick(1, 3));
  const Array x = random_array(some_dtype(), (m - 1) * ldx + k, -1, 1);
  Result y(x.dtype, m, n);
  qk_weight_only_args args = weight_args(w);
  args.x = x.data();
  args.ldx = ldx;
  args.x_dtype = x.dtype;
  args.m = m;
  args.y = y.values.data();
  args.ldy = y.ld;
  expect(qk_weight_only_linear(&args) == QK_OK, "status");
  y.check_gaps();
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < n; ++i) {
      double exact = w.bias.empty() ? 0.0 : w.bias[i], size = std::fabs(exact);
      for (int64_t j = 0; j < k; ++j) {
        const double value = x.get(row * ldx + j);
        exact += value * w.at(i, j);
        size += std::fabs(value) * w.size_at(i, j);
      }
      y.compare(row, i, exact, 2e-6 * size);
    }
  }
  if (m > 1) return;
  Result dense(some_dtype(), n, k);
  args = weight_args(w);
  args.x_dtype = dense.values.dtype;
  args.y = dense.values.data();
  args.ldy = dense.ld;
  expect(qk_dequantize(&args) == QK_OK, "dequantize status");
  dense.check_gaps();
  for (int64_t i = 0; i < n * k; ++i) {
    dense.compare(i / k, i % k, w.at(i / k, i % k), 2e-7 * w.size_at(i / k, i % k));
  }
}

void test_int8_linear() {
  const int32_t format = coin() ? QK_W4 : QK_I8;
  const int64_t m = some_rows(), n = pick(1, 90), k = pick(1, 300);
  int64_t group = some_group(k), x_group = some_group(k);
  if (group < k && x_group < k && group % x_group != 0 && x_group % group != 0) x_group = group;
  const Weight w = random_weight(format, n, k, group, true);
  const int64_t ldx = k + (coin() ? 0 : pick(1, 3)), x_groups = ceil_div(k, x_group);
  std::vector<int8_t> x = sized<int8_t>((m - 1) * ldx + k);
  for (int8_t& code : x) code = static_cast<int8_t>(pick(-128, 127));
  const bool one = x_group == k && coin();
  const int64_t scale_stride = one ? 0 : x_groups + pick(0, 1);
  const std::vector<float> x_scale = floats((m - 1) * scale_stride + x_groups, 0.01, 0.1);
  Result y(some_dtype(), m, n);
  const qk_weight_only_args weight = weight_args(w);
  qk_int8_linear_args args{};
  args.xq = x.data();
  args.ldx = ldx;
  args.format = format;
  args.m = m;
  args.n = n;
  args.k = k;
  args.group_size = group;
  args.x_group_size = x_group;
  args.packed = weight.packed;
  args.lut = weight.lut;
  args.x_scale = x_scale.data();
  args.x_scale_stride = scale_stride;
  args.scale = weight.scale;
  args.scale_dtype = weight.scale_dtype;
  args.scale_stride_n = args.zero_stride_n = w.stride_n;
  args.scale_stride_g = args.zero_stride_g = w.stride_g;
  args.zero = weight.zero;
  args.bias = weight.bias;
  args.bias_dtype = QK_F32;
  args.y_dtype = y.values.dtype;
  args.y = y.values.data();
  args.ldy = y.ld;
  expect(qk_int8_linear(&args) == QK_OK, "status");
  y.check_gaps();
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < n; ++i) {
      double exact = w.bias.empty() ? 0.0 : w.bias[i], size = std::fabs(exact);
      for (int64_t j = 0; j < k; ++j) {
        const double value =
            x[row * ldx + j] *
            static_cast<double>(x_scale[row * scale_stride + j / x_group]);
        exact += value * w.at(i, j);
        size += std::fabs(value) * w.size_at(i, j);
      }
      y.compare(row, i, exact, 1e-6 * size);
    }
  }
}

// A sum whose intermediate values leave the range of int32 where the sum itself does not.
void test_int8_extremes() {
  for (const int64_t k : {70000, 131071}) {
    std::vector<int8_t> x = sized<int8_t>(k);
    std::vector<uint8_t> codes = sized<uint8_t>(k);
    for (const int code : {0, 15}) {
      for (const float low : {-128.0f, 0.0f, 112.0f}) {
        for (const int8_t value : {int8_t{-128}, int8_t{127}}) {
          for (int8_t& v : x) v = value;
          for (uint8_t& c : codes) c = static_cast<uint8_t>(code);
          std::vector<float> lut(16);
          for (int i = 0; i < 16; ++i) lut[i] = low + static_cast<float>(i);
          std::vector<uint8_t> packed = sized<uint8_t>(qk_packed_bytes(QK_W4, 1, k));
          qk_pack_w4(codes.data(), k, 1, k, packed.data());
          const float one = 1.0f;
          float y = 0;
          qk_int8_linear_args args{};
          args.xq = x.data();
          args.format = QK_W4;
          args.m = args.n = 1;
          args.ldx = args.k = args.group_size = args.x_group_size = k;
          args.packed = packed.data();
          args.lut = lut.data();
          args.x_scale = &one;
          args.scale = &one;
          args.y = &y;
          args.ldy = 1;
          expect(qk_int8_linear(&args) == QK_OK, "status");
          const float exact = static_cast<float>(double(value) * lut[code] * double(k));
          expect(y == exact, "%d codes %d from %g: %g, not %g", value, code, low, y, exact);
        }
      }
    }
  }
}

void test_quantize() {
  const int64_t m = some_rows(), k = pick(1, 700), ldx = k + pick(0, 2);
  Array x = random_array(some_dtype(), (m - 1) * ldx + k, -3, 3);
  if (coin()) x.set(0, NAN);
  qk_quantize_args args{};
  args.x = x.data();
  args.ldx = ldx;
  args.x_dtype = x.dtype;
  args.format = coin() ? QK_I8 : QK_F8;
  args.m = m;
  args.k = k;
  args.group_size = one_of<int64_t>({16, 100, 128, k});
  const int64_t groups = ceil_div(k, args.group_size);
  args.scale_given = coin();
  args.arith_dtype = args.scale_given && coin() ? QK_F32 : x.dtype;
  Array scale = args.scale_given ? random_array(args.arith_dtype, 1, 0.03, 0.04)
                                 : Array(x.dtype, m * groups);
  std::vector<uint8_t> q = sized<uint8_t>(m * k);
  args.scale = scale.data();
  args.q = q.data();
  expect(qk_quantize(&args) == QK_OK, "status");
  for (int64_t i = 0; i < m * k; ++i) {
    const double value = x.get(i / k * ldx + i % k);
    const double s = scale.get(args.scale_given ? 0 : i / k * groups + i % k / args.group_size);
    if (std::isnan(s) || std::isnan(value)) continue;
    const double code = args.format == QK_I8 ? static_cast<int8_t>(q[i]) : f8_to_f32(q[i]);
    const double limit = args.format == QK_I8 ? 127 : 448;
    const double clamped = std::fmin(std::fmax(value, -(limit + 1) * s), limit * s);
    const double step = args.format == QK_I8 ? 0.51 * s : 0.0626 * std::fabs(value) + 0.001 * s;
    expect(std::fabs(code * s - clamped) <= step + 0x1p-7 * std::fabs(value), "%g became %g * %g",
           value, code, s);
  }
}

// ---- calibration -------------------------------------------------------------------------------

void test_gptq() {
  const int64_t n = pick(1, 70), k = pick(1, 150), groups = pick(1, 4);
  std::vector<float> weight = floats(n * k, -1, 1), upper = floats(k * k, -0.2, 0.2);
  for (int64_t j = 0; j < k; ++j) upper[j * k + j] = 1.0f;
  const std::vector<float> scale = floats(n * groups, 0.1, 0.2), zero = floats(n * groups, -2, 2);
  std::vector<int32_t> group = sized<int32_t>(k);
  for (int32_t& g : group) g = static_cast<int32_t>(pick(0, groups - 1));
  std::vector<float> codes = sized<float>(n * k);
  qk_gptq_round_args args{};
  args.n = n;
  args.k = k;
  args.groups = groups;
  args.weight = weight.data();
  args.upper = upper.data();
  args.scale = scale.data();
  args.zero = coin() ? zero.data() : nullptr;
  args.group = group.data();
  args.kind = static_cast<int32_t>(pick(QK_CODE_INT, QK_CODE_E2M1));
  args.qmax = args.kind == QK_CODE_INT ? 7 : (args.kind == QK_CODE_E4M3 ? 448 : 6);
  args.qmin = -args.qmax;
  args.codes = codes.data();
  expect(qk_gptq_round(&args) == QK_OK, "status");
  if (args.kind != QK_CODE_INT) return;
  int64_t different = 0;  // a value within a rounding error of a tie may fall to either side
  for (int64_t row = 0; row < n; ++row) {
    std::vector<double> w(weight.begin() + row * k, weight.begin() + (row + 1) * k);
    for (int64_t j = 0; j < k; ++j) {
      const double s = scale[row * groups + group[j]];
      const double z = args.zero == nullptr ? 0.0 : zero[row * groups + group[j]];
      const double code = std::fmin(std::fmax(std::nearbyint(w[j] / s + z), args.qmin), args.qmax);
      if (codes[row * k + j] != static_cast<float>(code)) {
        ++different;
        break;  // errors follow from here on
      }
      const double e = w[j] - (code - z) * s;
      for (int64_t i = j + 1; i < k; ++i) w[i] -= e * upper[j * k + i];
    }
  }
  expect(different * 20 <= n + 20, "%ld of %ld rows differ", static_cast<long>(different),
         static_cast<long>(n));
}

void test_descend() {
  const int64_t n = pick(1, 50), k = pick(1, 60), groups = pick(1, 3);
  const auto symmetric = [](int64_t size) {
    std::vector<float> matrix = floats(size * size, -0.1, 0.1);
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < i; ++j) matrix[i * size + j] = matrix[j * size + i];
      matrix[i * size + i] = 1.0f + 0.1f * static_cast<float>(size);
    }
    return matrix;
  };
  const std::vector<float> weight = floats(n * k, -1, 1), hessian = symmetric(k);
  const std::vector<float> output = symmetric(n);
  const std::vector<float> scale = floats(n * groups, 0.1, 0.2), zero = floats(n * groups, -2, 2);
  std::vector<int32_t> group = sized<int32_t>(k);
  for (int32_t& g : group) g = static_cast<int32_t>(pick(0, groups - 1));
  std::vector<float> codes = sized<float>(n * k), moment = sized<float>(n * k);
  for (float& code : codes) code = static_cast<float>(pick(-7, 7));
  qk_descend_args args{};
  args.n = n;
  args.k = k;
  args.groups = groups;
  args.sweeps = pick(1, 3);
  args.hessian = hessian.data();
  args.output = coin() ? output.data() : nullptr;
  args.scale = scale.data();
  args.zero = coin() ? zero.data() : nullptr;
  args.group = group.data();
  args.kind = static_cast<int32_t>(pick(QK_CODE_INT, QK_CODE_E2M1));
  args.qmax = args.kind == QK_CODE_INT ? 7 : (args.kind == QK_CODE_E4M3 ? 448 : 6);
  args.qmin = -args.qmax;
  args.codes = codes.data();
  args.moment = moment.data();
  const auto errors = [&] {
    std::vector<double> e(static_cast<size_t>(n * k));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const int64_t at = i * groups + group[j];
        const double z = args.zero == nullptr ? 0.0 : zero[at];
        e[i * k + j] = weight[i * k + j] - (codes[i * k + j] - z) * scale[at];
      }
    }
    return e;
  };
  const auto moments = [&](const std::vector<double>& e) {
    std::vector<double> m(static_cast<size_t>(n * k));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        for (int64_t x = 0; x < k; ++x) m[i * k + j] += e[i * k + x] * hessian[x * k + j];
      }
    }
    return m;
  };
  const auto total = [&] {
    const std::vector<double> e = errors(), m = moments(e);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t x = 0; x < n; ++x) {
        const double g = args.output == nullptr ? (i == x ? 1.0 : 0.0) : output[i * n + x];
        for (int64_t j = 0; j < k; ++j) sum += g * m[x * k + j] * e[i * k + j];
      }
    }
    return sum;
  };
  const std::vector<double> start = moments(errors());
  for (size_t i = 0; i < start.size(); ++i) moment[i] = static_cast<float>(start[i]);
  const double before = total();
  expect(qk_descend_codes(&args) == QK_OK, "status");
  const double after = total();
  expect(after <= before * 1.00001 + 1e-6, "the error rose from %g to %g", before, after);
  const std::vector<double> end = moments(errors());
  for (size_t i = 0; i < end.size(); ++i) {
    expect(std::fabs(moment[i] - end[i]) <= 1e-3 * (1 + std::fabs(end[i])), "moment %g, is %g",
           static_cast<double>(moment[i]), end[i]);
  }
}

void test_rounding_errors() {
  const int64_t s = pick(1, 4), n = pick(1, 40), k = pick(1, 200);
  const int64_t group = one_of<int64_t>({7, 16, 32, k}), groups = ceil_div(k, group);
  const Array weight = random_array(some_dtype(), n * k, -1, 1);
  const std::vector<float> scale = floats(s * n * groups, 0.05, 0.2);
  const std::vector<float> zero = floats(s * n * groups, -2, 2), importance = floats(k, 0, 2);
  std::vector<float> errors = sized<float>(s * n * groups);
  qk_rounding_errors_args args{};
  args.candidates = s;
  args.n = n;
  args.k = k;
  args.group_size = group;
  args.weight = weight.data();
  args.weight_dtype = weight.dtype;
  args.scale = scale.data();
  args.zero = coin() ? zero.data() : nullptr;
  args.importance = coin() ? importance.data() : nullptr;
  args.kind = QK_CODE_INT;
  args.qmin = -8;
  args.qmax = 7;
  args.errors = errors.data();
  expect(qk_rounding_errors(&args) == QK_OK, "status");
  for (int64_t i = 0; i < s * n * groups; ++i) {
    const int64_t row = i / groups % n, g = i % groups;
    double exact = 0;
    for (int64_t j = g * group; j < std::min(k, (g + 1) * group); ++j) {
      const double w = weight.get(row * k + j), z = args.zero == nullptr ? 0.0 : zero[i];
      const double code = std::fmin(std::fmax(std::nearbyint(w / scale[i] + z), -8.0), 7.0);
      const double e = (code - z) * scale[i] - w;
      exact += (args.importance == nullptr ? 1.0 : importance[j]) * e * e;
    }
    expect(std::fabs(errors[i] - exact) <= 1e-3 * exact + 1e-6, "%g, not %g", errors[i], exact);
  }
  args.kind = QK_CODE_E2M1;
  args.qmin = -6;
  args.qmax = 6;
  expect(qk_rounding_errors(&args) == QK_OK, "status");
}

void test_syrk() {
  const int64_t tokens = pick(1, 90), k = pick(1, 100), ldx = k + pick(0, 2), ld = k + pick(0, 2);
  const Array x = random_array(some_dtype(), (tokens - 1) * ldx + k, -1, 1);
  std::vector<float> acc((k - 1) * ld + k, 1.0f);
  std::vector<double> wide(acc.begin(), acc.end());
  qk_syrk_args args{tokens, k, x.data(), ldx, x.dtype, acc.data(), ld, 0};
  expect(qk_syrk_accumulate(&args) == QK_OK, "status");
  args.acc = wide.data();
  args.acc_is_double = 1;
  expect(qk_syrk_accumulate(&args) == QK_OK, "status of doubles");
  for (int64_t i = 0; i < (k - 1) * ld + k; ++i) {
    const int64_t row = i / ld, column = i % ld;
    double exact = 1;
    if (column <= row) {
      for (int64_t t = 0; t < tokens; ++t) exact += x.get(t * ldx + row) * x.get(t * ldx + column);
    }
    for (const double found : {static_cast<double>(acc[i]), wide[i]}) {
      expect(std::fabs(found - exact) <= 1e-4, "[%ld, %ld] is %g, not %g", static_cast<long>(row),
             static_cast<long>(column), found, exact);
    }
  }
}

}  // namespace quantkit::test
