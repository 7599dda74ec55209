// Every CPU entry point over random shapes with tails, against naive loops in double; on each
// instruction set that this CPU runs. Meant for -fsanitize=address,undefined: all memory has exactly
// the size that the C ABI asks for.
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "../cpu/numeric.h"
#include "quantkit/decoder.h"
#include "quantkit/quantkit.h"
#include "quantkit/solvers.h"

namespace {

// ---- randomness, and what is wrong ------------------------------------------------------------

std::mt19937 generator(1);
std::string scene;  // the instruction set and the test that run
int failures = 0;

__attribute__((format(printf, 2, 3))) void expect(bool holds, const char* format, ...) {
  if (holds) return;
  if (++failures > 50) return;
  std::printf("FAILED %s: ", scene.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
bool coin() { return pick(0, 1) == 1; }
double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}
template <class T>
T one_of(std::initializer_list<T> values) {
  return values.begin()[pick(0, static_cast<int64_t>(values.size()) - 1)];
}
int64_t some_rows() {
  return pick(0, 9) > 0 ? pick(1, 9) : one_of<int64_t>({17, 33, 70, 130, 260});
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
std::vector<T> sized(int64_t count) {
  return std::vector<T>(static_cast<size_t>(count));
}
std::vector<float> floats(int64_t count, double low, double high) {
  std::vector<float> out = sized<float>(count);
  for (float& f : out) f = static_cast<float>(uniform(low, high));
  return out;
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Values of one of the three float types.
struct Array {
  int32_t dtype;
  std::vector<uint8_t> bytes;

  Array(int32_t dtype_, int64_t count)
      : dtype(dtype_), bytes(static_cast<size_t>(count * (dtype_ == QK_F32 ? 4 : 2))) {}
  int64_t count() const {
    return static_cast<int64_t>(bytes.size()) / (dtype == QK_F32 ? 4 : 2);
  }
  void set(int64_t i, double value) {
    const float f = static_cast<float>(value);
    if (dtype == QK_F32) {
      std::memcpy(&bytes[static_cast<size_t>(4 * i)], &f, 4);
    } else {
      const uint16_t h = dtype == QK_BF16 ? f32_to_bf16(f) : f32_to_f16(f);
      std::memcpy(&bytes[static_cast<size_t>(2 * i)], &h, 2);
    }
  }
  double get(int64_t i) const {
    if (dtype == QK_F32) {
      float f;
      std::memcpy(&f, &bytes[static_cast<size_t>(4 * i)], 4);
      return f;
    }
    uint16_t h;
    std::memcpy(&h, &bytes[static_cast<size_t>(2 * i)], 2);
    return dtype == QK_BF16 ? bf16_to_f32(h) : f16_to_f32(h);
  }
  void* data() { return bytes.data(); }
  const void* data() const { return bytes.data(); }
  double step() const {  // of rounding, relative
    return dtype == QK_F32 ? 6e-8 : (dtype == QK_BF16 ? 0x1p-8 : 0x1p-11);
  }
};

Array random_array(int32_t dtype, int64_t count, double low, double high) {
  Array out(dtype, count);
  for (int64_t i = 0; i < count; ++i) out.set(i, uniform(low, high));
  return out;
}
int32_t some_dtype() { return one_of<int32_t>({QK_F32, QK_F16, QK_BF16}); }

// A result [m, n] with gaps of poison between its rows.
struct Result {
  Array values;
  int64_t m, n, ld;

  Result(int32_t dtype, int64_t m_, int64_t n_)
      : values(dtype, 0), m(m_), n(n_), ld(n_ + (coin() ? 0 : pick(1, 3))) {
    values = Array(dtype, (m - 1) * ld + n);
    std::memset(values.data(), 0xa5, values.bytes.size());
  }
  double at(int64_t row, int64_t column) const { return values.get(row * ld + column); }
  void check_gaps() const {
    const size_t size = values.dtype == QK_F32 ? 4 : 2;
    for (int64_t i = 0; i < values.count(); ++i) {
      if (i % ld < n) continue;
      for (size_t b = 0; b < size; ++b) {
        expect(values.bytes[static_cast<size_t>(i) * size + b] == 0xa5, "wrote between rows");
      }
    }
  }
  void compare(int64_t row, int64_t column, double exact, double slack) const {
    const double error = std::fabs(at(row, column) - exact);
    // A half below 2^-14 is spaced evenly.
    expect(error <= values.step() * std::fabs(exact) + slack + 1e-7, "[%ld, %ld] is %g, not %g",
           static_cast<long>(row), static_cast<long>(column), at(row, column), exact);
  }
};

// ---- weights -----------------------------------------------------------------------------------

struct Weight {
  int32_t format = 0;
  int64_t n = 0, k = 0, group = 0, groups = 0;
  std::vector<double> values;  // decoded
  std::vector<uint8_t> packed;
  std::vector<float> lut;
  Array scale{QK_F32, 0};
  int64_t stride_n = 1, stride_g = 0;
  bool has_zero = false;
  std::vector<float> zero;  // strides of scale
  std::vector<float> bias;

  double value(int64_t row, int64_t column) const {
    return values[static_cast<size_t>(row * k + column)];
  }
  int64_t place(int64_t row, int64_t column) const {
    return row * stride_n + column / group * stride_g;
  }
  double zero_at(int64_t row, int64_t column) const {
    return has_zero ? zero[static_cast<size_t>(place(row, column))] : 0.0;
  }
  double scale_at(int64_t row, int64_t column) const { return scale.get(place(row, column)); }
  double at(int64_t row, int64_t column) const {
    return (value(row, column) - zero_at(row, column)) * scale_at(row, column);
  }
  // What rounding errors of a product are measured by.
  double size_at(int64_t row, int64_t column) const {
    return (std::fabs(value(row, column)) + std::fabs(zero_at(row, column))) *
           std::fabs(scale_at(row, column));
  }
};

std::vector<float> some_lut(bool integral) {
  std::vector<float> lut(16);
  static const float e2m1[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  const int64_t kind = pick(0, 4), low = pick(-60, -1);
  for (int i = 0; i < 16; ++i) {
    switch (kind) {
      case 0: lut[i] = static_cast<float>(i - 8); break;
      case 1: lut[i] = static_cast<float>(i); break;
      case 2: lut[i] = i < 8 ? e2m1[i] : -e2m1[i - 8]; break;
      case 3: lut[i] = i < 8 ? static_cast<float>(i - 4) : 0.0f; break;
      // Eighths are what bf16 holds exactly.
      default: lut[i] = integral ? static_cast<float>(pick(low, low + 127))
                                 : static_cast<float>(pick(-64, 64)) / 8.0f;
    }
  }
  return lut;
}

Weight random_weight(int32_t format, int64_t n, int64_t k, int64_t group, bool integral = false,
                     bool dense_rows = false) {
  Weight w;
  w.format = format;
  w.n = n;
  w.k = k;
  w.group = group;
  w.groups = ceil_div(k, group);
  w.values.resize(static_cast<size_t>(n * k));
  w.packed = sized<uint8_t>(qk_packed_bytes(format, n, k));
  const int64_t ld = k + (coin() ? 0 : pick(1, 3));
  if (format == QK_B16 || format == QK_F32W) {
    Array source = random_array(format == QK_B16 ? QK_BF16 : QK_F32, (n - 1) * ld + k, -1, 1);
    for (int64_t i = 0; i < n * k; ++i) w.values[i] = source.get(i / k * ld + i % k);
    expect(qk_pack_float(source.data(), source.dtype, ld, n, k, w.packed.data()) == QK_OK, "pack");
  } else {
    if (format == QK_W4) w.lut = some_lut(integral);
    std::vector<uint8_t> codes = sized<uint8_t>((n - 1) * ld + k);
    for (uint8_t& code : codes) {
      code = static_cast<uint8_t>(pick(0, 255));
      if (format == QK_F8 && (code & 0x7f) == 0x7f) code = 0;
    }
    for (int64_t i = 0; i < n * k; ++i) {
      const uint8_t code = codes[static_cast<size_t>(i / k * ld + i % k)];
      w.values[i] = format == QK_W4   ? w.lut[code & 15u]
                    : format == QK_I8 ? static_cast<int8_t>(code)
                                      : static_cast<double>(f8_to_f32(code));
    }
    const auto packer = format == QK_W4 ? qk_pack_w4 : qk_pack_w8;
    expect(packer(codes.data(), ld, n, k, w.packed.data()) == QK_OK, "pack");
  }
  const int64_t gap = coin() ? 0 : pick(1, 2);
  if (dense_rows || coin()) {
    w.stride_n = 1;
    w.stride_g = n + gap;
  } else {
    w.stride_n = w.groups + gap;
    w.stride_g = 1;
  }
  const int64_t table = (n - 1) * w.stride_n + (w.groups - 1) * w.stride_g + 1;
  w.scale = random_array(coin() ? QK_F32 : QK_BF16, table, 0.01, 0.1);
  w.has_zero = coin();
  if (w.has_zero) w.zero = floats(table, -8, 8);
  if (coin()) w.bias = floats(n, -1, 1);
  return w;
}

int64_t some_group(int64_t k) {
  const int64_t group = one_of<int64_t>({16, 32, 48, 64, 128, k});
  return group < k ? group : k;
}

qk_weight_only_args weight_args(const Weight& w) {
  qk_weight_only_args args{};
  args.format = w.format;
  args.n = w.n;
  args.k = w.k;
  args.group_size = w.group;
  args.packed = w.packed.data();
  args.lut = w.lut.empty() ? nullptr : w.lut.data();
  args.scale = w.scale.data();
  args.scale_dtype = w.scale.dtype;
  args.scale_stride_n = args.zero_stride_n = w.stride_n;
  args.scale_stride_g = args.zero_stride_g = w.stride_g;
  args.zero = w.has_zero ? w.zero.data() : nullptr;
  args.bias = w.bias.empty() ? nullptr : w.bias.data();
  args.bias_dtype = QK_F32;
  return args;
}

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
  qk_syrk_args args{tokens, k, x.data(), ldx, x.dtype, acc.data(), ld};
  expect(qk_syrk_accumulate(&args) == QK_OK, "status");
  for (int64_t i = 0; i < (k - 1) * ld + k; ++i) {
    const int64_t row = i / ld, column = i % ld;
    double exact = 1;
    if (column <= row) {
      for (int64_t t = 0; t < tokens; ++t) exact += x.get(t * ldx + row) * x.get(t * ldx + column);
    }
    expect(std::fabs(acc[i] - exact) <= 1e-4, "[%ld, %ld] is %g, not %g", static_cast<long>(row),
           static_cast<long>(column), acc[i], exact);
  }
}

// ---- parts -------------------------------------------------------------------------------------

double gate_of(double g, int32_t kind) {
  if (kind == QK_GATE_SILU) return g / (1 + std::exp(-g));
  return 0.5 * g * (1 + std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)));
}

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

// ---- ragged batches ----------------------------------------------------------------------------

// The sequences of one call: `fresh` new tokens each behind `past`.
struct Ragged {
  std::vector<int32_t> starts{0}, past, pages;
  int64_t stride = 0;

  void add(int64_t old, int64_t fresh) {
    past.push_back(static_cast<int32_t>(old));
    starts.push_back(starts.back() + static_cast<int32_t>(fresh));
  }
  int64_t count() const { return static_cast<int64_t>(past.size()); }
  int64_t rows() const { return starts.back(); }
  qk_sequences view() const {
    return {count(), starts.data(), past.data(), pages.data(), stride};
  }
};

// Sequences of some lengths, their pages dealt from a shuffled pool; cut into calls that each take
// some tokens of some sequences.
struct Schedule {
  std::vector<int64_t> lengths, offsets;  // a sequence's first token among all
  std::vector<std::vector<int32_t>> pages;
  int64_t pool = 0;
  std::vector<Ragged> calls;
  std::vector<std::vector<int64_t>> tokens;  // of each call: places among all tokens

  Schedule(std::vector<int64_t> lengths_, bool whole) : lengths(std::move(lengths_)) {
    int64_t all = 0;
    for (const int64_t length : lengths) {
      offsets.push_back(all);
      all += length;
      pool += ceil_div(length, QK_PAGE_TOKENS);
    }
    pool += 1;
    std::vector<int32_t> order;
    for (int32_t p = 0; p < pool; ++p) order.push_back(p);
    std::shuffle(order.begin(), order.end(), generator);
    for (const int64_t length : lengths) {
      const int64_t need = ceil_div(length, QK_PAGE_TOKENS);
      pages.emplace_back(order.end() - need, order.end());
      order.resize(order.size() - static_cast<size_t>(need));
    }
    std::vector<int64_t> done(lengths.size(), 0);
    for (bool more = true; more;) {
      more = false;
      Ragged call;
      std::vector<int64_t> places;
      std::vector<size_t> chosen;
      for (size_t s = 0; s < lengths.size(); ++s) {
        const int64_t left = lengths[s] - done[s];
        if (left == 0) continue;
        more = true;
        if (!whole && lengths.size() > 1 && coin()) continue;
        const int64_t size = whole ? left : std::min(left, one_of<int64_t>({1, 1, 3, 7, 64, 90}));
        call.add(done[s], size);
        for (int64_t i = 0; i < size; ++i) places.push_back(offsets[s] + done[s] + i);
        chosen.push_back(s);
        done[s] += size;
        call.stride = std::max(call.stride, ceil_div(done[s], QK_PAGE_TOKENS));
      }
      if (call.count() == 0) continue;
      for (const size_t s : chosen) {
        for (int64_t p = 0; p < call.stride; ++p) {
          const bool known = p < static_cast<int64_t>(pages[s].size());
          call.pages.push_back(known ? pages[s][static_cast<size_t>(p)] : -1);
        }
      }
      calls.push_back(std::move(call));
      tokens.push_back(std::move(places));
    }
  }
  int64_t total() const { return offsets.back() + lengths.back(); }
};

struct Pages {
  std::vector<uint8_t> data;
  std::vector<float> scale;
  qk_kv_cache cache{};

  // `left`: what an earlier owner left, NaN in every type that has one.
  Pages(int32_t dtype, int64_t layers, int64_t pool, int64_t kv_heads, int64_t head_dim, bool left) {
    data.assign(static_cast<size_t>(layers * pool * kv_heads * 2 * qk_kv_page_bytes(dtype, head_dim)),
                left ? 0xff : 0);
    if (dtype >= QK_KV_INT8) {
      scale.assign(static_cast<size_t>(layers * pool * kv_heads * 2 * QK_PAGE_TOKENS),
                   left ? NAN : 0.0f);
    } else if (coin()) {
      scale.assign(1, NAN);  // not to be read
    }
    cache = {dtype, pool, data.data(), scale.empty() ? nullptr : scale.data()};
  }
};

std::vector<int64_t> some_lengths() {
  std::vector<int64_t> lengths;
  for (int64_t i = pick(1, 3); i > 0; --i) {
    lengths.push_back(pick(0, 3) > 0 ? pick(1, 40) : one_of<int64_t>({63, 64, 65, 128, 129, 200}));
  }
  return lengths;
}

// How far a result may be from fp64 over unrounded keys and values, by what pages hold.
double kv_slack(int32_t dtype) {
  static const double slack[4] = {2e-5, 0.03, 0.05, 0.3};
  return slack[dtype];
}

struct AttentionShape {
  int64_t heads, kv_heads, head_dim, rotary_dim, window;
  double softcap;
};

// out[h] of one query over keys and values [tokens][kv_heads][head_dim] of its sequence.
void naive_attention(const AttentionShape& a, const double* q, const std::vector<double>& keys,
                     const std::vector<double>& values, int64_t position, double scale,
                     double* out) {
  const int64_t hd = a.head_dim, first = a.window > 0 ? std::max<int64_t>(0, position + 1 - a.window)
                                                      : 0;
  for (int64_t h = 0; h < a.heads; ++h) {
    const int64_t kv = h / (a.heads / a.kv_heads);
    std::vector<double> p;
    double top = -INFINITY, total = 0;
    for (int64_t t = first; t <= position; ++t) {
      double score = 0;
      for (int64_t d = 0; d < hd; ++d) score += q[h * hd + d] * keys[(t * a.kv_heads + kv) * hd + d];
      score *= scale;
      if (a.softcap > 0) score = a.softcap * std::tanh(score / a.softcap);
      p.push_back(score);
      top = std::fmax(top, score);
    }
    for (double& v : p) total += v = std::exp(v - top);
    for (int64_t d = 0; d < hd; ++d) {
      double sum = 0;
      for (size_t t = 0; t < p.size(); ++t) {
        sum += p[t] * values[((first + static_cast<int64_t>(t)) * a.kv_heads + kv) * hd + d];
      }
      out[h * hd + d] = sum / total;
    }
  }
}

void naive_rope(double* x, int64_t rotary_dim, const float* cos, const float* sin) {
  for (int64_t i = 0; i < rotary_dim / 2; ++i) {
    const double a = x[i], b = x[i + rotary_dim / 2];
    x[i] = a * cos[i] - b * sin[i];
    x[i + rotary_dim / 2] = b * cos[i] + a * sin[i];
  }
}

void naive_norm(double* x, const float* weight, int64_t n, double epsilon) {
  double square = 0;
  for (int64_t i = 0; i < n; ++i) square += x[i] * x[i];
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= weight[i] / std::sqrt(square / static_cast<double>(n) + epsilon);
  }
}

std::vector<float> angles(int64_t positions, int64_t rotary_dim, bool cosine) {
  std::vector<float> out = sized<float>(positions * rotary_dim / 2);
  for (size_t i = 0; i < out.size(); ++i) {
    const double turn = 0.37 * static_cast<double>(i);
    out[i] = static_cast<float>(cosine ? std::cos(turn) : std::sin(turn));
  }
  return out;
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
  const std::vector<float> q_norm = floats(a.head_dim, 0.5, 1.5), k_norm = floats(a.head_dim, 0.5, 1.5);
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

// ---- the decoder -------------------------------------------------------------------------------

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

  // Whether a NaN shows in every token behind it: no window hides it, and no int8 code with a static
  // scale, which has no way to say it.
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
      add(normed(naive_linear(block.down, gated), block.post_mlp_norm));
    }
    for (double v : naive_linear(model.head, normed(x, model.final_norm))) {
      if (c.logit_softcap > 0) v = c.logit_softcap * std::tanh(v / c.logit_softcap);
      logits.push_back(v);
    }
  }
  return logits;
}

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
  expect(attend(16, cache) == QK_INVALID_ARGUMENT, "no scales");
  ragged.pages[0] = 2;
  expect(attend(16, pages.cache) == QK_INVALID_ARGUMENT, "page");
  ragged.pages[0] = 0;
  ragged.past[0] = 64;
  expect(attend(16, pages.cache) == QK_INVALID_ARGUMENT, "pages too few");
}

void serial_executor(int32_t threads, void (*body)(void*, int32_t), void* ctx) {
  for (int32_t i = 0; i < threads; ++i) body(ctx, i);
}

void repeat(const char* isa, const char* name, int64_t rounds, const std::function<void()>& test) {
  for (int64_t round = 0; round < rounds; ++round) {
    scene = std::string(isa) + " " + name + " round " + std::to_string(round);
    qk_set_num_threads(static_cast<int32_t>(pick(1, 3)));
    qk_set_executor(pick(0, 7) == 0 ? serial_executor : nullptr);
    test();
    qk_set_executor(nullptr);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t rounds = argc > 1 ? std::atoll(argv[1]) : 40;
  expect(qk_abi_version() == QK_ABI_VERSION, "ABI version");
  for (const char* isa : {"generic", "avx2", "avx512", "avx512bf16"}) {
    if (!qk_isa_supported(isa)) continue;
    expect(qk_set_isa(isa) == QK_OK && std::strcmp(qk_get_isa(), isa) == 0, "isa %s", isa);
    generator.seed(1);
    repeat(isa, "weight_only", 3 * rounds, test_weight_only);
    repeat(isa, "int8_linear", 3 * rounds, test_int8_linear);
    repeat(isa, "int8_extremes", 1, test_int8_extremes);
    repeat(isa, "quantize", rounds, test_quantize);
    repeat(isa, "gptq", rounds, test_gptq);
    repeat(isa, "rounding_errors", rounds, test_rounding_errors);
    repeat(isa, "syrk", rounds, test_syrk);
    repeat(isa, "rows", rounds, test_rows);
    repeat(isa, "attention", rounds, test_attention);
    repeat(isa, "decoder", rounds, test_decoder);
    repeat(isa, "decoder_nan", rounds, test_decoder_nan);
    repeat(isa, "refusals", 1, test_refusals);
    std::printf("%s: %d failures\n", isa, failures);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
