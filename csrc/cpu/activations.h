// Activations to 8-bit codes, and packed weights back to floats.
//
// The arithmetic is that of compressed-tensors, which computes in the dtype of the activation:
// each intermediate is rounded to `arith_dtype`. A scale from bf16 arithmetic differs from one
// computed in fp32 by up to 2^-9, which moves codes; a checkpoint scored with one and served with
// the other would be two systems.
//
// Ladder: plain loops over scratch rows of fp32, written so that the compiler vectorizes them with
// each translation unit's flags (integer maximum over magnitude bits, rounding by bit arithmetic).
#pragma once

#include "elementwise.h"

namespace quantkit {
namespace {

inline float round_to(float f, int32_t dtype) {
  if (dtype == QK_F32) return f;
  return dtype == QK_BF16 ? bf16_to_f32(f32_to_bf16(f)) : f16_to_f32(f32_to_f16(f));
}

inline void round_row(float* x, int64_t n, int32_t dtype) {
  if (dtype == QK_BF16) {
    for (int64_t i = 0; i < n; ++i) x[i] = bf16_to_f32(f32_to_bf16(x[i]));
  } else if (dtype == QK_F16) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      uint16_t half[16];
      store_f16(half, x + i);
      load_f16(x + i, half);
    }
    for (; i < n; ++i) x[i] = f16_to_f32(f32_to_f16(x[i]));
  }
}

// The largest magnitude. Bit patterns of magnitudes are ordered as integers, with NaN on top, so a
// NaN anywhere becomes the maximum and then the scale.
inline float absmax(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t mag = bits_of(x[i]) & 0x7fffffffu;
    most = mag > most ? mag : most;
  }
  return float_of(most);
}

inline float epsilon(int32_t dtype) {
  if (dtype == QK_F32) return 1.1920928955078125e-07f;
  return dtype == QK_BF16 ? 0.0078125f : 0.0009765625f;
}

// Clamped to [-128, 127] and rounded half to even by the 1.5 * 2^23 trick. A NaN becomes 0: its
// scale is NaN already.
inline void to_int8(const float* v, int64_t n, uint8_t* q) {
  for (int64_t i = 0; i < n; ++i) {
    float f = v[i] == v[i] ? v[i] : 0.0f;
    f = f < -128.0f ? -128.0f : f;
    f = f > 127.0f ? 127.0f : f;
    const uint32_t shifted = bits_of(f + 12582912.0f);
    q[i] = static_cast<uint8_t>(shifted);  // two's complement in the low mantissa bits
  }
}

// Clamped to +-448 and rounded half to even. Adding 0 first turns -0 into +0, as adding the
// (zero) zero point does in compressed-tensors.
inline void to_fp8(const float* v, int64_t n, uint8_t* q) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = bits_of(v[i] + 0.0f);
    const uint32_t sign = (u >> 24) & 0x80u;
    uint32_t mag = u & 0x7fffffffu;
    const bool nan = mag > 0x7f800000u;
    mag = mag > 0x43e00000u ? 0x43e00000u : mag;  // 448
    // Normals: drop 20 mantissa bits, rounding half to even, and rebias 127 -> 7.
    const uint32_t normal = (mag + 0x7ffffu + ((mag >> 20) & 1u) - (120u << 23)) >> 20;
    // Below 2^-6: steps of 2^-9, which is the ulp of 2^14.
    const uint32_t sub = bits_of(float_of(mag) + 16384.0f) - 0x46800000u;
    const uint32_t code = mag < 0x3c800000u ? sub : normal;
    q[i] = static_cast<uint8_t>(sign | (nan ? 0x7fu : code));
  }
}

inline void quantize_row(const qk_quantize_args& a, int64_t row) {
  constexpr int64_t kPiece = 512;
  const int64_t groups = ceil_div(a.k, a.group_size);
  const float half_range = a.format == QK_I8 ? 127.5f : 448.0f;
  float piece[kPiece];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * a.group_size;
    const int64_t end = first + (a.group_size < a.k - first ? a.group_size : a.k - first);
    float scale;
    if (a.scale_given) {
      scale = load_one(a.scale, a.arith_dtype, 0);
    } else {
      float most = 0.0f;
      for (int64_t k = first; k < end; k += kPiece) {
        const int64_t n = kPiece < end - k ? kPiece : end - k;
        load_row(piece, a.x, a.x_dtype, row * a.ldx + k, n);
        const uint32_t here = bits_of(absmax(piece, n));
        most = here > bits_of(most) ? float_of(here) : most;
      }
      scale = round_to(most / half_range, a.arith_dtype);
      if (scale == 0.0f) scale = epsilon(a.arith_dtype);
      store_one(a.scale, a.x_dtype, row * groups + g, scale);
    }
    for (int64_t k = first; k < end; k += kPiece) {
      const int64_t n = kPiece < end - k ? kPiece : end - k;
      load_row(piece, a.x, a.x_dtype, row * a.ldx + k, n);
      for (int64_t i = 0; i < n; ++i) piece[i] = piece[i] / scale;
      round_row(piece, n, a.arith_dtype);
      uint8_t* q = a.q + row * a.k + k;
      if (a.format == QK_I8) {
        to_int8(piece, n, q);
      } else {
        to_fp8(piece, n, q);
      }
    }
  }
}

// One row of w = (decode(code) - zero) * scale, in fp32 and rounded once.
inline void dequantize_row(const qk_weight_only_args& a, int64_t row) {
  const int64_t codes = chunk_codes(a.format);
  const PackedBlock at =
      packed_block(row / kBlockRows, ceil_div(a.n, kBlockRows), ceil_div(a.k, codes));
  const uint8_t* packed = static_cast<const uint8_t*>(a.packed) + at.base + row % kBlockRows * 4;
  for (int64_t k = 0; k < a.k; ++k) {
    const uint8_t* word = packed + k / codes * at.step;
    float value;
    if (a.format == QK_W4) {
      uint32_t bits;
      std::memcpy(&bits, word, 4);
      const int64_t j = k % 8;
      value = a.lut[(bits >> (4 * (j / 2) + 16 * (j & 1))) & 15u];
    } else if (a.format == QK_B16 || a.format == QK_F32W) {
      value = load_one(word, a.format == QK_B16 ? QK_BF16 : QK_F32, k % codes);
    } else {
      const uint8_t code = word[k % 4];
      value = a.format == QK_I8 ? static_cast<float>(static_cast<int8_t>(code)) : f8_to_f32(code);
    }
    const int64_t g = k / a.group_size;
    if (a.zero != nullptr) value -= a.zero[row * a.zero_stride_n + g * a.zero_stride_g];
    value *= load_one(a.scale, a.scale_dtype, row * a.scale_stride_n + g * a.scale_stride_g);
    store_one(a.y, a.x_dtype, row * a.ldy + k, value);
  }
}

}  // namespace
}  // namespace quantkit
