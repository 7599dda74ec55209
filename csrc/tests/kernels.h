// What the tests of the kernels share: randomness, arrays with gaps, weights, ragged batches, and
// naive loops in double. All memory has exactly the size that the C ABI asks for, so that a
// sanitizer sees one byte more.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "../cpu/numeric.h"
#include "quantkit/decoder.h"
#include "quantkit/quantkit.h"

namespace quantkit::test {

// ---- randomness, and what is wrong ------------------------------------------------------------

inline std::mt19937 generator(1);
inline std::string scene;  // the instruction set and the test that run
inline int failures = 0;

inline __attribute__((format(printf, 2, 3))) void expect(bool holds, const char* format, ...) {
  if (holds) return;
  if (++failures > 50) return;
  std::printf("FAILED %s: ", scene.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

inline int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
inline bool coin() { return pick(0, 1) == 1; }
inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}
template <class T>
T one_of(std::initializer_list<T> values) {
  return values.begin()[pick(0, static_cast<int64_t>(values.size()) - 1)];
}
inline int64_t some_rows() {
  return pick(0, 9) > 0 ? pick(1, 9) : one_of<int64_t>({17, 33, 70, 130, 260});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
std::vector<T> sized(int64_t count) {
  return std::vector<T>(static_cast<size_t>(count));
}
inline std::vector<float> floats(int64_t count, double low, double high) {
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

inline Array random_array(int32_t dtype, int64_t count, double low, double high) {
  Array out(dtype, count);
  for (int64_t i = 0; i < count; ++i) out.set(i, uniform(low, high));
  return out;
}
inline int32_t some_dtype() { return one_of<int32_t>({QK_F32, QK_F16, QK_BF16}); }

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

// ---- rotations ---------------------------------------------------------------------------------

// What qk_hadamard multiplies by, with a random factor: nothing depends on its being orthogonal.
struct Rotation {
  int64_t order = 0, base = 0;
  std::vector<float> factor;

  Rotation() = default;
  Rotation(int64_t base_, int64_t runs) : order(base_ * runs), base(base_) {
    factor.assign(static_cast<size_t>(base * width()), 0.0f);
    const double most = 1 / std::sqrt(double(order));
    for (int64_t i = 0; i < base * base; ++i) {
      factor[i / base * width() + i % base] = static_cast<float>(uniform(-most, most));
    }
  }
  int64_t width() const { return ceil_div(base, 16) * 16; }
  qk_hadamard view() const { return {order, base, factor.data()}; }
  // An element of the matrix: negative where both runs' numbers share an odd number of bits.
  double at(int64_t i, int64_t j) const {
    const auto shared = static_cast<unsigned long long>(i / base & j / base);
    const double value = factor[i % base * width() + j % base];
    return __builtin_parityll(shared) != 0 ? -value : value;
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

inline std::vector<float> some_lut(bool integral) {
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

inline Weight random_weight(int32_t format, int64_t n, int64_t k, int64_t group,
                            bool integral = false, bool dense_rows = false) {
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

inline int64_t some_group(int64_t k) {
  const int64_t group = one_of<int64_t>({16, 32, 48, 64, 128, k});
  return group < k ? group : k;
}

inline qk_weight_only_args weight_args(const Weight& w) {
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

// ---- a forward pass ---------------------------------------------------------------------------

inline double gate_of(double g, int32_t kind) {
  if (kind == QK_GATE_SILU) return g / (1 + std::exp(-g));
  return 0.5 * g * (1 + std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)));
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
  Pages(int32_t dtype, int64_t layers, int64_t pool, int64_t kv_heads, int64_t head_dim,
        bool left) {
    const int64_t halves = layers * pool * kv_heads * 2;
    data.assign(static_cast<size_t>(halves * qk_kv_page_bytes(dtype, head_dim)), left ? 0xff : 0);
    if (dtype >= QK_KV_INT8) {
      scale.assign(static_cast<size_t>(halves * QK_PAGE_TOKENS), left ? NAN : 0.0f);
    } else if (coin()) {
      scale.assign(1, NAN);  // not to be read
    }
    cache = {dtype, pool, data.data(), scale.empty() ? nullptr : scale.data(), nullptr};
  }
};

inline std::vector<int64_t> some_lengths() {
  std::vector<int64_t> lengths;
  for (int64_t i = pick(1, 3); i > 0; --i) {
    lengths.push_back(pick(0, 3) > 0 ? pick(1, 40) : one_of<int64_t>({63, 64, 65, 128, 129, 200}));
  }
  return lengths;
}

// How far a result may be from fp64 over unrounded keys and values, by what pages hold.
inline double kv_slack(int32_t dtype) {
  static const double slack[4] = {2e-5, 0.03, 0.05, 0.3};
  return slack[dtype];
}

struct AttentionShape {
  int64_t heads, kv_heads, head_dim, rotary_dim, window;
  double softcap;
};

// out[h] of one query over keys and values [tokens][kv_heads][head_dim] of its sequence.
inline void naive_attention(const AttentionShape& a, const double* q,
                            const std::vector<double>& keys, const std::vector<double>& values,
                            int64_t position, double scale, double* out) {
  const int64_t hd = a.head_dim;
  const int64_t first = a.window > 0 ? std::max<int64_t>(0, position + 1 - a.window) : 0;
  for (int64_t h = 0; h < a.heads; ++h) {
    const int64_t kv = h / (a.heads / a.kv_heads);
    std::vector<double> p;
    double top = -INFINITY, total = 0;
    for (int64_t t = first; t <= position; ++t) {
      double score = 0;
      const double* key = &keys[(t * a.kv_heads + kv) * hd];
      for (int64_t d = 0; d < hd; ++d) score += q[h * hd + d] * key[d];
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

inline void naive_rope(double* x, int64_t rotary_dim, const float* cos, const float* sin) {
  for (int64_t i = 0; i < rotary_dim / 2; ++i) {
    const double a = x[i], b = x[i + rotary_dim / 2];
    x[i] = a * cos[i] - b * sin[i];
    x[i + rotary_dim / 2] = b * cos[i] + a * sin[i];
  }
}

inline void naive_norm(double* x, const float* weight, int64_t n, double epsilon) {
  double square = 0;
  for (int64_t i = 0; i < n; ++i) square += x[i] * x[i];
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= weight[i] / std::sqrt(square / static_cast<double>(n) + epsilon);
  }
}

inline std::vector<float> angles(int64_t positions, int64_t rotary_dim, bool cosine) {
  std::vector<float> out = sized<float>(positions * rotary_dim / 2);
  for (size_t i = 0; i < out.size(); ++i) {
    const double turn = 0.37 * static_cast<double>(i);
    out[i] = static_cast<float>(cosine ? std::cos(turn) : std::sin(turn));
  }
  return out;
}

// ---- the tests, each a round -------------------------------------------------------------------

void test_weight_only();
void test_int8_linear();
void test_int8_extremes();
void test_quantize();
void test_descend();
void test_gptq();
void test_rounding_errors();
void test_syrk();
void test_rows();
void test_attention();
void test_decoder();
void test_decoder_nan();
void test_refusals();

}  // namespace quantkit::test
