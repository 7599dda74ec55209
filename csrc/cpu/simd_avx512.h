// 512-bit vectors: one vector is the 16 rows of a packed block.
#pragma once

#include <immintrin.h>

#include "numeric.h"

namespace quantkit {
namespace {

struct F32Math {
  using Acc = __m512;
  using Word = __m512;
  static constexpr int kCodesPerWord = 1;
  // 32 registers: 4 x 4 or 8 x 2 accumulators leave room to decode; 6 x 4 fill a panel product.
  static constexpr int kDirectRows = 8;
  static constexpr int64_t direct_blocks(int64_t rows) { return rows <= 4 ? 4 : 2; }
  static constexpr int kPanelRows = 6, kPanelBlocks = 4;
  static constexpr int kAttentionRows = 6;
  static constexpr int64_t attention_blocks(int64_t) { return 4; }

  static Acc zero() { return _mm512_setzero_ps(); }
  static Acc load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Acc a) { _mm512_storeu_ps(p, a); }
  static Acc load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Acc splat(float f) { return _mm512_set1_ps(f); }
  static Acc mul(Acc a, Acc b) { return _mm512_mul_ps(a, b); }
  static Acc fma(Acc a, Acc b, Acc c) { return _mm512_fmadd_ps(a, b, c); }
  static Acc minus_product(Acc c, Acc a, Acc b) { return _mm512_fnmadd_ps(a, b, c); }

  static Word load_word(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static void store_word(uint8_t* p, Word w) { _mm512_storeu_ps(p, w); }
  static Word splat_word(const uint8_t* p) {
    float f;
    std::memcpy(&f, p, 4);
    return _mm512_set1_ps(f);
  }
  static Acc mac(Acc acc, Word w, Word x) { return _mm512_fmadd_ps(w, x, acc); }
};

// Sixteen codebook entries are one register, and a permute reads only the low 4 bits of an index:
// no mask is needed after the shift.
struct W4ToF32 {
  static constexpr int kSteps = 8;
  __m512 lut;
  explicit W4ToF32(const float* table) : lut(_mm512_loadu_ps(table)) {}
  void operator()(const uint8_t* chunk, __m512 (&w)[kSteps]) const {
    const __m512i raw = _mm512_loadu_si512(chunk);
    w[0] = _mm512_permutexvar_ps(raw, lut);
    w[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 16), lut);
    w[2] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 4), lut);
    w[3] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 20), lut);
    w[4] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 8), lut);
    w[5] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 24), lut);
    w[6] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 12), lut);
    w[7] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 28), lut);
  }
};

struct I8ToF32 {
  static constexpr int kSteps = 4;
  explicit I8ToF32(const float*) {}
  void operator()(const uint8_t* chunk, __m512 (&w)[kSteps]) const {
    const __m512i raw = _mm512_loadu_si512(chunk);
    w[0] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(raw, 24), 24));
    w[1] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(raw, 16), 24));
    w[2] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(raw, 8), 24));
    w[3] = _mm512_cvtepi32_ps(_mm512_srai_epi32(raw, 24));
  }
};

// e4m3 to fp32 by integer arithmetic. Subnormals take the exponent of the smallest normal and lose
// it again in one subtraction, so no fp32 subnormal appears and flush-to-zero modes do no harm.
struct F8ToF32 {
  static constexpr int kSteps = 4;
  explicit F8ToF32(const float*) {}
  static __m512 decode(__m512i top) {  // the code in bits 24..31
    const __m512i mag = _mm512_srli_epi32(_mm512_slli_epi32(top, 1), 25);
    const __m512i sign = _mm512_and_si512(top, _mm512_set1_epi32(INT32_MIN));
    const __m512i normal =
        _mm512_add_epi32(_mm512_slli_epi32(mag, 20), _mm512_set1_epi32(120 << 23));
    const __mmask16 sub = _mm512_cmplt_epi32_mask(mag, _mm512_set1_epi32(8));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(mag, _mm512_set1_epi32(0x7f));
    __m512 value = _mm512_castsi512_ps(normal);
    const __m512 raised =
        _mm512_castsi512_ps(_mm512_add_epi32(normal, _mm512_set1_epi32(1 << 23)));
    value = _mm512_mask_sub_ps(value, sub, raised, _mm512_set1_ps(0.015625f));
    value = _mm512_mask_mov_ps(value, nan, _mm512_set1_ps(__builtin_nanf("")));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
  }
  void operator()(const uint8_t* chunk, __m512 (&w)[kSteps]) const {
    const __m512i raw = _mm512_loadu_si512(chunk);
    w[0] = decode(_mm512_slli_epi32(raw, 24));
    w[1] = decode(_mm512_slli_epi32(raw, 16));
    w[2] = decode(_mm512_slli_epi32(raw, 8));
    w[3] = decode(raw);
  }
};

// Weights that are floats already: a pair of bf16 values, or one fp32 value, a lane.
struct B16ToF32 {
  static constexpr int kSteps = 2;
  explicit B16ToF32(const float*) {}
  void operator()(const uint8_t* chunk, __m512 (&w)[kSteps]) const {
    const __m512i raw = _mm512_loadu_si512(chunk);
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
    w[1] = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(-65536)));
  }
};
struct F32ToF32 {
  static constexpr int kSteps = 1;
  explicit F32ToF32(const float*) {}
  void operator()(const uint8_t* chunk, __m512 (&w)[kSteps]) const { w[0] = _mm512_loadu_ps(chunk); }
};

inline void store_f16(uint16_t* out, const float* y) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtps_ph(_mm512_loadu_ps(y), _MM_FROUND_TO_NEAREST_INT));
}
inline void load_f16(float* out, const uint16_t* x) {
  _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
}

}  // namespace
}  // namespace quantkit
