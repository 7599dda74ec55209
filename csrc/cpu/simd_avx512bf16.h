// bf16 pairs: vdpbf16ps multiplies two products a lane and adds them to fp32.
//
// What is rounded: nothing for 8-bit codes and for codebooks of small integers or FP4 values, all
// of which bf16 holds exactly (scale and zero are applied to the fp32 sum of a group). A codebook
// with other values, such as NF4, is rounded to bf16: 2^-9 relative, as a bf16 weight would be.
#pragma once

#include "simd_avx512.h"

namespace quantkit {
namespace {

struct Bf16Math : F32Math {
  using Word = __m512i;
  static constexpr int kCodesPerWord = 2;

  // Rounded to nearest even.
  static void store_bf16(uint16_t* p, Acc a) {
    const __m256bh half = _mm512_cvtneps_pbh(a);
    std::memcpy(p, &half, sizeof half);
  }
  static Word load_word(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_word(uint8_t* p, Word w) { _mm512_storeu_si512(p, w); }
  static Word splat_word(const uint8_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  static Acc mac(Acc acc, Word w, Word x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
};

// The codebook twice in 32 half-words: a permute reads 5 bits of an index, and the fifth, which
// belongs to the neighbouring code, then does not matter.
struct W4ToBf16 {
  static constexpr int kSteps = 4;
  __m512i lut;
  explicit W4ToBf16(const float* table) {
    uint16_t half[32];
    for (int i = 0; i < 32; ++i) half[i] = f32_to_bf16(table[i & 15]);
    lut = _mm512_loadu_si512(half);
  }
  void operator()(const uint8_t* chunk, __m512i (&w)[kSteps]) const {
    const __m512i raw = _mm512_loadu_si512(chunk);
    w[0] = _mm512_permutexvar_epi16(raw, lut);
    w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(raw, 4), lut);
    w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(raw, 8), lut);
    w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(raw, 12), lut);
  }
};

struct B16ToBf16 {
  static constexpr int kSteps = 1;
  explicit B16ToBf16(const float*) {}
  void operator()(const uint8_t* chunk, __m512i (&w)[kSteps]) const {
    w[0] = _mm512_loadu_si512(chunk);
  }
};

// Within each 128 bits, four rows of k0..k3 become the four rows' (k0,k1) and then (k2,k3).
inline __m512i pairs_first(__m512i raw) {
  const __m512i order = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  return _mm512_shuffle_epi8(raw, order);
}

// The high and the low byte of every magnitude's bf16 come from two 128-entry byte tables.
struct F8ToBf16 {
  static constexpr int kSteps = 2;
  __m512i high[2], low[2];
  explicit F8ToBf16(const float*) {
    alignas(64) uint8_t h[128], l[128];
    for (int i = 0; i < 128; ++i) {
      const uint16_t value = f32_to_bf16(f8_to_f32(static_cast<uint8_t>(i)));
      h[i] = static_cast<uint8_t>(value >> 8);
      l[i] = static_cast<uint8_t>(value);
    }
    for (int i = 0; i < 2; ++i) {
      high[i] = _mm512_load_si512(h + 64 * i);
      low[i] = _mm512_load_si512(l + 64 * i);
    }
  }
  void operator()(const uint8_t* chunk, __m512i (&w)[kSteps]) const {
    const __m512i raw = pairs_first(_mm512_loadu_si512(chunk));
    const __m512i magnitude = _mm512_permutex2var_epi8(high[0], raw, high[1]);
    // magnitude | (raw & 0x80)
    const __m512i h = _mm512_ternarylogic_epi32(magnitude, raw, _mm512_set1_epi8(-128), 0xf8);
    const __m512i l = _mm512_permutex2var_epi8(low[0], raw, low[1]);
    w[0] = _mm512_unpacklo_epi8(l, h);
    w[1] = _mm512_unpackhi_epi8(l, h);
  }
};

// INT8 needs 256 entries: the table of the negative codes replaces the other under the sign mask.
struct I8ToBf16 {
  static constexpr int kSteps = 2;
  __m512i high[4], low[4];
  explicit I8ToBf16(const float*) {
    alignas(64) uint8_t h[256], l[256];
    for (int i = 0; i < 256; ++i) {
      const uint16_t value = f32_to_bf16(static_cast<float>(static_cast<int8_t>(i)));
      h[i] = static_cast<uint8_t>(value >> 8);
      l[i] = static_cast<uint8_t>(value);
    }
    for (int i = 0; i < 4; ++i) {
      high[i] = _mm512_load_si512(h + 64 * i);
      low[i] = _mm512_load_si512(l + 64 * i);
    }
  }
  void operator()(const uint8_t* chunk, __m512i (&w)[kSteps]) const {
    const __m512i raw = pairs_first(_mm512_loadu_si512(chunk));
    const __mmask64 negative = _mm512_movepi8_mask(raw);
    const __m512i h = _mm512_mask_blend_epi8(negative,
                                             _mm512_permutex2var_epi8(high[0], raw, high[1]),
                                             _mm512_permutex2var_epi8(high[2], raw, high[3]));
    const __m512i l = _mm512_mask_blend_epi8(negative,
                                             _mm512_permutex2var_epi8(low[0], raw, low[1]),
                                             _mm512_permutex2var_epi8(low[2], raw, low[3]));
    w[0] = _mm512_unpacklo_epi8(l, h);
    w[1] = _mm512_unpackhi_epi8(l, h);
  }
};

}  // namespace
}  // namespace quantkit
