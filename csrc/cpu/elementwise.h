// Rows of activations in, rows of results out: conversions between the user's dtype and fp32.
// Needs store_f16 / load_f16 of a simd_*.h included before it.
#pragma once

#include "kernel_table.h"
#include "numeric.h"

namespace quantkit {
namespace {

// A strip's height as a type, for a switch that instantiates one kernel a height.
template <int kValue>
struct Height {
  static constexpr int value = kValue;
};

inline float load_one(const void* p, int32_t dtype, int64_t i) {
  if (dtype == QK_F32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return dtype == QK_BF16 ? bf16_to_f32(h) : f16_to_f32(h);
}

inline void store_one(void* p, int32_t dtype, int64_t i, float f) {
  if (dtype == QK_F32) {
    static_cast<float*>(p)[i] = f;
  } else {
    static_cast<uint16_t*>(p)[i] = dtype == QK_BF16 ? f32_to_bf16(f) : f32_to_f16(f);
  }
}

// out[0..n) = x[first .. first+n) as fp32.
inline void load_row(float* out, const void* x, int32_t dtype, int64_t first, int64_t n) {
  if (dtype == QK_F32) {
    std::memcpy(out, static_cast<const float*>(x) + first, static_cast<size_t>(n) * 4);
  } else if (dtype == QK_BF16) {
    const uint16_t* h = static_cast<const uint16_t*>(x) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_f32(h[i]);
  } else {
    const uint16_t* h = static_cast<const uint16_t*>(x) + first;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) load_f16(out + i, h + i);
    for (; i < n; ++i) out[i] = f16_to_f32(h[i]);
  }
}

// y[first .. first+n) = values[0..n), rounded once.
inline void store_row(void* y, int32_t dtype, int64_t first, const float* values, int64_t n) {
  if (dtype == QK_F32) {
    std::memcpy(static_cast<float*>(y) + first, values, static_cast<size_t>(n) * 4);
  } else if (dtype == QK_BF16) {
    uint16_t* h = static_cast<uint16_t*>(y) + first;
    for (int64_t i = 0; i < n; ++i) h[i] = f32_to_bf16(values[i]);
  } else {
    uint16_t* h = static_cast<uint16_t*>(y) + first;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store_f16(h + i, values + i);
    for (; i < n; ++i) h[i] = f32_to_f16(values[i]);
  }
}

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Scales or zeros, one for each group of each row of a weight.
struct GroupTable {
  const void* source;
  int32_t dtype;  // QK_F32 or QK_BF16
  int64_t stride_n, stride_g;

  // The values of rows [first, first + width): group g at the result + g * *step elements. Where
  // they lie, if there they are neighbours; else gathered into `out` as fp32, zeros past the end.
  const void* tile(int64_t n, int64_t first, int64_t width, int64_t groups, float* out,
                   int64_t* step) const {
    if (stride_n == 1 && first + width <= n) {
      *step = stride_g;
      return static_cast<const uint8_t*>(source) + first * (dtype == QK_BF16 ? 2 : 4);
    }
    *step = width;
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t g = 0; g < groups; ++g) {
        out[g * width + i] =
            first + i < n ? load_one(source, dtype, (first + i) * stride_n + g * stride_g) : 0.0f;
      }
    }
    return out;
  }
};

// Sixteen partial sums, then a tree: the order depends on neither M nor the thread.
inline float sum_row(const float* x, int64_t n) {
  float part[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) part[j] += x[i + j];
  }
  for (int j = 0; i + j < n; ++j) part[j] += x[i + j];
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) part[j] += part[j + width];
  }
  return part[0];
}

}  // namespace
}  // namespace quantkit
