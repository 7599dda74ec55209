// Sixteen lanes as a few native vectors, in the compiler's own vector extension: the same source
// is AVX2 with 32-byte vectors, SSE2 or NEON with 16-byte ones.
#pragma once

#include "numeric.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace quantkit {
namespace {

#ifdef __AVX2__
constexpr int kNativeBytes = 32;
#else
constexpr int kNativeBytes = 16;
#endif
constexpr int kNativeLanes = kNativeBytes / 4;
constexpr int kParts = 16 / kNativeLanes;

typedef float NativeF32 __attribute__((vector_size(kNativeBytes)));
typedef int32_t NativeI32 __attribute__((vector_size(kNativeBytes)));
typedef uint32_t NativeU32 __attribute__((vector_size(kNativeBytes)));

struct Vec16 {
  NativeF32 part[kParts];
};

#define QK_EACH_PART for (int i = 0; i < kParts; ++i)

struct F32Math {
  using Acc = Vec16;
  using Word = Vec16;
  static constexpr int kCodesPerWord = 1;
  // Sixteen registers. AVX2: 6 rows x 2 vectors leave two weights and one activation.
#ifdef __AVX2__
  static constexpr int kDirectRows = 4;
  static constexpr int64_t direct_blocks(int64_t rows) { return rows <= 2 ? 2 : 1; }
  static constexpr int kPanelRows = 6, kPanelBlocks = 1;
  static constexpr int kAttentionRows = 4;
#else
  static constexpr int kDirectRows = 2;
  static constexpr int64_t direct_blocks(int64_t) { return 1; }
  static constexpr int kPanelRows = 2, kPanelBlocks = 1;
  static constexpr int kAttentionRows = 2;
#endif
  static constexpr int64_t attention_blocks(int64_t rows) { return direct_blocks(rows); }

  static Acc splat(float f) {
    Acc a;
    QK_EACH_PART a.part[i] = NativeF32{} + f;
    return a;
  }
  static Acc zero() { return splat(0.0f); }
  static Acc mul(Acc a, Acc b) {
    QK_EACH_PART a.part[i] *= b.part[i];
    return a;
  }
  static Acc load_bf16(const uint16_t* p) {
    float wide[16];
    for (int i = 0; i < 16; ++i) wide[i] = bf16_to_f32(p[i]);
    return load(wide);
  }
  static Acc load(const float* p) { return load_word(reinterpret_cast<const uint8_t*>(p)); }
  static void store(float* p, Acc a) { store_word(reinterpret_cast<uint8_t*>(p), a); }
  static Acc fma(Acc a, Acc b, Acc c) {
    QK_EACH_PART c.part[i] = a.part[i] * b.part[i] + c.part[i];
    return c;
  }
  static Acc minus_product(Acc c, Acc a, Acc b) {
    QK_EACH_PART c.part[i] = c.part[i] - a.part[i] * b.part[i];
    return c;
  }
  static Word load_word(const uint8_t* p) {
    Word w;
    QK_EACH_PART std::memcpy(&w.part[i], p + i * kNativeBytes, kNativeBytes);
    return w;
  }
  static void store_word(uint8_t* p, Word w) {
    QK_EACH_PART std::memcpy(p + i * kNativeBytes, &w.part[i], kNativeBytes);
  }
  static Word splat_word(const uint8_t* p) {
    float f;
    std::memcpy(&f, p, 4);
    return splat(f);
  }
  static Acc mac(Acc acc, Word w, Word x) { return fma(w, x, acc); }
};

inline NativeU32 load_raw(const uint8_t* chunk, int part) {
  NativeU32 raw;
  std::memcpy(&raw, chunk + part * kNativeBytes, kNativeBytes);
  return raw;
}

struct W4ToF32 {
  static constexpr int kSteps = 8;
  static constexpr int shift_of(int step) { return 4 * (step / 2) + 16 * (step & 1); }
#ifdef __AVX2__
  // A permute of eight lanes reads 3 bits of the index; the fourth picks between two tables.
  __m256 low, high;
  explicit W4ToF32(const float* table)
      : low(_mm256_loadu_ps(table)), high(_mm256_loadu_ps(table + 8)) {}
  NativeF32 decode(NativeU32 raw, int step) const {
    const __m256i index = reinterpret_cast<__m256i>(raw >> shift_of(step));
    const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                            _mm256_permutevar8x32_ps(high, index), fourth);
  }
#else
  const float* lut;
  explicit W4ToF32(const float* table) : lut(table) {}
  NativeF32 decode(NativeU32 raw, int step) const {
    NativeF32 w;
    for (int lane = 0; lane < kNativeLanes; ++lane) {
      w[lane] = lut[(raw[lane] >> shift_of(step)) & 15u];
    }
    return w;
  }
#endif
  void operator()(const uint8_t* chunk, Vec16 (&w)[kSteps]) const {
    QK_EACH_PART {
      const NativeU32 raw = load_raw(chunk, i);
      for (int step = 0; step < kSteps; ++step) w[step].part[i] = decode(raw, step);
    }
  }
};

struct I8ToF32 {
  static constexpr int kSteps = 4;
  explicit I8ToF32(const float*) {}
  void operator()(const uint8_t* chunk, Vec16 (&w)[kSteps]) const {
    QK_EACH_PART {
      const NativeU32 raw = load_raw(chunk, i);
      for (int step = 0; step < kSteps; ++step) {
        const NativeI32 code = reinterpret_cast<NativeI32>(raw << (24 - 8 * step)) >> 24;
        w[step].part[i] = __builtin_convertvector(code, NativeF32);
      }
    }
  }
};

// As in simd_avx512.h: no fp32 subnormal appears on the way.
struct F8ToF32 {
  static constexpr int kSteps = 4;
  explicit F8ToF32(const float*) {}
  static NativeF32 decode(NativeU32 top) {
    const NativeU32 mag = (top << 1) >> 25;
    const NativeU32 sign = top & 0x80000000u;
    const NativeU32 normal = (mag << 20) + (120u << 23);
    const NativeF32 raised = reinterpret_cast<NativeF32>(normal + (1u << 23)) - 0.015625f;
    NativeU32 value = mag < 8u ? reinterpret_cast<NativeU32>(raised) : normal;
    value = mag == 0x7fu ? NativeU32{} + 0x7fc00000u : value;
    return reinterpret_cast<NativeF32>(value | sign);
  }
  void operator()(const uint8_t* chunk, Vec16 (&w)[kSteps]) const {
    QK_EACH_PART {
      const NativeU32 raw = load_raw(chunk, i);
      for (int step = 0; step < kSteps; ++step) {
        w[step].part[i] = decode(raw << (24 - 8 * step));
      }
    }
  }
};

// Weights that are floats already: a pair of bf16 values, or one fp32 value, a lane.
struct B16ToF32 {
  static constexpr int kSteps = 2;
  explicit B16ToF32(const float*) {}
  void operator()(const uint8_t* chunk, Vec16 (&w)[kSteps]) const {
    QK_EACH_PART {
      const NativeU32 raw = load_raw(chunk, i);
      w[0].part[i] = reinterpret_cast<NativeF32>(raw << 16);
      w[1].part[i] = reinterpret_cast<NativeF32>(raw & 0xffff0000u);
    }
  }
};
struct F32ToF32 {
  static constexpr int kSteps = 1;
  explicit F32ToF32(const float*) {}
  void operator()(const uint8_t* chunk, Vec16 (&w)[kSteps]) const {
    w[0] = F32Math::load_word(chunk);
  }
};

#ifdef __F16C__
inline void store_f16(uint16_t* out, const float* y) {
  for (int i = 0; i < 2; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out) + i,
                     _mm256_cvtps_ph(_mm256_loadu_ps(y + 8 * i), _MM_FROUND_TO_NEAREST_INT));
  }
}
inline void load_f16(float* out, const uint16_t* x) {
  for (int i = 0; i < 2; ++i) {
    _mm256_storeu_ps(out + 8 * i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x) + i)));
  }
}
#else
inline void store_f16(uint16_t* out, const float* y) {
  for (int i = 0; i < 16; ++i) out[i] = f32_to_f16(y[i]);
}
inline void load_f16(float* out, const uint16_t* x) {
  for (int i = 0; i < 16; ++i) out[i] = f16_to_f32(x[i]);
}
#endif

}  // namespace
}  // namespace quantkit
