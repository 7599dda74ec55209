// The roof of a matrix product on one core: multiply-adds on registers alone, no memory.
// Compiled and loaded by solvers_cpu.py with -march=native; each function returns the
// multiply-adds of one call.
#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 Vec;
static inline Vec mac(Vec sum, Vec a, Vec b) { return _mm512_fmadd_ps(a, b, sum); }
#elif defined(__AVX2__)
#include <immintrin.h>
typedef __m256 Vec;
static inline Vec mac(Vec sum, Vec a, Vec b) { return _mm256_fmadd_ps(a, b, sum); }
#else
typedef float Vec __attribute__((vector_size(16)));
static inline Vec mac(Vec sum, Vec a, Vec b) { return sum + a * b; }
#endif

constexpr int kSums = 12;  // enough to hide the latency, and they fit 16 registers

extern "C" int64_t peak_f32(int64_t steps, float* out) {
  Vec sum[kSums] = {}, a = {}, b = {};
  __asm__ volatile("" : "+x"(a), "+x"(b));  // values that the compiler does not know
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) {
      sum[i] = mac(sum[i], a, b);
      __asm__ volatile("" : "+x"(sum[i]));
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) out[i] = sum[i][0];
  return steps * kSums * static_cast<int64_t>(sizeof(Vec) / 4);
}

extern "C" int64_t peak_bf16(int64_t steps, float* out) {
#if defined(__AVX512BF16__)
  __m512 sum[kSums] = {};
  __m512i a = {}, b = {};
  __asm__ volatile("" : "+v"(a), "+v"(b));
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) {
      sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)a, (__m512bh)b);
      __asm__ volatile("" : "+v"(sum[i]));
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) out[i] = sum[i][0];
  return steps * kSums * 32;
#else
  return peak_f32(steps, out);
#endif
}
