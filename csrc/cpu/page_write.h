// Keys and values into the pages that attention.h reads.
#pragma once

#include "rows.h"

namespace quantkit {
namespace {

// One token's codes of one head into its page: a key is a row of a packed weight
// [QK_PAGE_TOKENS, head_dim], 4 bytes of it every so often; a value a column of one
// [head_dim, QK_PAGE_TOKENS], a code every 4 bytes, because all its blocks lie side by side.
template <class T>
inline void scatter(const T* from, uint8_t* page, int64_t slot, int64_t head_dim, bool value) {
  constexpr int64_t kBytes = sizeof(T), kCodes = 4 / kBytes;
  if (value) {
    uint8_t* to = page + slot / kCodes * head_dim * 4 + slot % kCodes * kBytes;
    for (int64_t d = 0; d < head_dim; ++d) std::memcpy(to + 4 * d, from + d, kBytes);
  } else {
    uint8_t* to = page + 4 * slot;
    for (int64_t d = 0; d < head_dim; d += kCodes, to += 4 * QK_PAGE_TOKENS) {
      std::memcpy(to, from + d, 4);
    }
  }
}

// Whether bf16, and so every type of a page, holds these values.
inline bool finite_as_bf16(const float* x, int64_t n) {
  return bits_of(absmax(x, n)) < 0x7f7f8000u;  // from here on bf16 rounds to an infinity
}

// Writes one token's key or value of one head. `scale` is where its scale goes (8-bit types); it is
// `given` unless that is 0. A key that is not finite keeps a scale that is not: saturated to a
// calibrated range it would pass for a number.
inline void write_page(const float* x, int64_t head_dim, int32_t dtype, int64_t slot, bool value,
                       float given, uint8_t* page, float* scale) {
  uint8_t bytes[512];
  uint16_t half[512];
  switch (dtype) {
    case QK_KV_F32: return scatter(x, page, slot, head_dim, value);
    case QK_KV_BF16:
      bf16_words_row(x, head_dim, half);
      return scatter(half, page, slot, head_dim, value);
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
  scatter(bytes, page, slot, head_dim, value);
}

}  // namespace
}  // namespace quantkit
