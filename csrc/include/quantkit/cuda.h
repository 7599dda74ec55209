// The C ABI of the CUDA kernels around and below the linear layers of quantkit.h. Same conventions;
// stream is a cudaStream_t.
#pragma once

#include "quantkit/decoder.h"
#include "quantkit/quantkit.h"

#ifdef __cplusplus
extern "C" {
#endif

// As qk_quantize, for float16 and bfloat16 rows of at most 49,152 columns; group_size is at least k,
// or 128 with QK_F8.
QK_EXPORT int qk_cuda_quantize(const qk_quantize_args* args, void* stream);

// As qk_add_rms_norm and qk_gated_activation, for a float16 or bfloat16 y; norms of at most 24,576
// columns, gates of at most 49,152. With codes, y is not written but quantized: its values, rounded
// to y's dtype, are the x of qk_quantize (x, ldx, m and k of codes are not read, x_dtype is that of
// y), without a round trip through memory.
QK_EXPORT int qk_cuda_add_rms_norm(const qk_add_rms_norm_args* args, const qk_quantize_args* codes,
                                   void* stream);
QK_EXPORT int qk_cuda_gated_activation(const qk_gate_args* args, const qk_quantize_args* codes,
                                       void* stream);

// Each run of `order` columns of a row times S ⊗ B / sqrt(order): S Sylvester's Hadamard matrix of
// order `order` / `base`, B any matrix of order `base` of 1 and -1.
// signs: [ceil(base / 16) bands][ceil(base / 64)][32 lanes]. With g = lane / 4 and t = lane % 4, bit
//        16e + 15 - 4f - r of word w is set where B[b][c] is -1, for e = 0, 1 and f, r = 0 .. 3, at
//          b = 64w + 16f + 4t + 2 (r / 2) + e,  c = 16 band + g + 8 (r % 2);
//        bits past `base` mean nothing.
// A row is what x holds, or act(gate) * up of it, rounded to dtype before the product. Sums are fp32
// and y is rounded once; with codes, y is not written but quantized, as above.
typedef struct qk_cuda_hadamard_args {
  int64_t order;          // base * 2^k; divides n
  int64_t base;           // 1 .. QK_LARGEST_BASE
  const uint32_t* signs;
  int32_t gated;          // x is [m, 2 n], all of gate, then all of up; else [m, n]
  int32_t gate;           // qk_gate
  int64_t m, n;           // a block of a GPU must hold n fp32 values: qk_cuda_hadamard_bytes
  const void* x;          // rows ldx elements apart
  int64_t ldx;
  int32_t dtype;          // QK_F16 or QK_BF16, of x and y
  void* y;                // [m, n], rows ldy elements apart
  int64_t ldy;
} qk_cuda_hadamard_args;

QK_EXPORT int qk_cuda_hadamard(const qk_cuda_hadamard_args* args, const qk_quantize_args* codes,
                               void* stream);
// Shared memory that a block needs, at the most, for rows of n columns.
QK_EXPORT int64_t qk_cuda_hadamard_bytes(int64_t n, int64_t base);

// Eight-bit weights on the tensor cores, in one layout for 16-bit and for 8-bit activations. Rows of
// the weight go in blocks of 64, padded, and columns in slabs of 64, padded with code 0:
// packed: [ceil(n / 64)][ceil(k / 64)][4 tiles of 16 rows][2 halves][32 lanes][4 words]. With
//         g = lane / 4 and t = lane % 4, byte i of word r is
//           row 16 tile + g + 8 (r % 2),  column 32 half + 8t + 4 (r / 2) + i.
//
//   y[m,n] = sum_g scale[n,g] * sum_{k in g} decode(code[n,k]) * x[m,k]  + bias[n]
typedef struct qk_w8a16_args {
  const void* x;          // [m, k], rows ldx elements apart
  int64_t ldx;
  int32_t dtype;          // QK_F16 or QK_BF16, of x, scale, bias and y
  int32_t format;         // QK_I8 or QK_F8
  int64_t m, n, k;
  int64_t group_size;     // a multiple of 32, or >= k
  int64_t groups;         // ceil(k / group_size)
  const uint8_t* packed;  // 16-byte aligned, as scale
  const void* scale;      // as in qk_w4a16_args
  const void* bias;       // [n] or NULL
  void* y;                // [m, n], rows ldy elements apart
  int64_t ldy;
  float* partials;        // qk_cuda_w4a16_partials values; uninitialized
  uint32_t* counters;     // qk_cuda_w4a16_counters values; zero before and after every call
  int32_t multiprocessors;
  int32_t overlap;
} qk_w8a16_args;

// The same layout with activations of the weight's format:
//
//   y[m,n] = sum_g scale[n,g] * x_scale[m,g] * sum_{k in g} code[n,k] * x[m,k]  + bias[n]
//
// QK_I8: one group; k is at most 131071, and sums are exact. The result has the bits of
// qk_int8_linear: float(sum) * (x_scale * scale) + bias, each rounded to fp32.
typedef struct qk_w8a8_args {
  const void* x;          // [m, k] codes, rows ldx bytes apart
  int64_t ldx;
  int32_t format;         // QK_I8 or QK_F8, of x and of the weight
  int64_t m, n, k;
  int64_t group_size;     // >= k, or a multiple of 64 for QK_F8
  int64_t groups;         // ceil(k / group_size)
  const uint8_t* packed;  // 16-byte aligned
  const void* x_scale;    // [m, groups], rows x_scale_stride elements apart
  int32_t x_scale_dtype;
  int64_t x_scale_stride; // 0: one row for all
  const float* scale;     // [n], or [ceil(n / 64)][groups][8 g][4 tiles][2] for more than one group
  const void* bias;       // [n] or NULL
  int32_t bias_dtype;
  int32_t y_dtype;
  void* y;                // [m, n], rows ldy elements apart
  int64_t ldy;
  float* partials;        // as above; 32-bit words
  uint32_t* counters;
  int32_t multiprocessors;
  int32_t overlap;
} qk_w8a8_args;

// Four-bit floats and 16-bit activations on the tensor cores, in blocks and slabs as above:
// packed: [ceil(n / 64)][ceil(k / 64)][4 tiles of 16 rows][32 lanes][4 words]. With g = lane / 4 and
//         t = lane % 4, code i of word s belongs to
//           row 16 tile + g + 8 (i / 2 % 2),  column 32 (s / 2) + 8t + 4 (s % 2) + 2 (i / 4) + i % 2;
//         its low three bits lie at 4i, its highest bit at 8 (i % 4) + (i < 4 ? 7 : 3).
// scale:  QK_NVFP4  e4m3, one for 16 columns: [ceil(n / 64)][ceil(k / 64)][8 g][2 u][4 tiles][2 h][2 i],
//                   of row 16 tile + g + 8i and the columns from 32h + 16u of the slab on
//         QK_MXFP4  e8m0, one for 32 columns: [ceil(n / 64)][ceil(k / 64)][8 g][4 tiles][2 h][2 i],
//                   of the same row and the columns from 32h on; 255 is NaN
//         QK_NF4    of x's dtype, one for group_size columns, as in qk_w4a16_args
//         Bytes past n and k are 0.
//
//   y[m,n] = sum_g scale[n,g] * sum_{k in g} decode(code[n,k]) * x[m,k] / global_scale  + bias[n]
//
// decode: e2m1 (OCP MX v1.0, section 5.3.3), or NF4's values (Dettmers et al., "QLoRA", arXiv
// 2305.14314, appendix E) rounded to x's dtype. A product code * scale of NVFP4 is exact there.
enum qk_fp4_format { QK_NVFP4 = 0, QK_MXFP4 = 1, QK_NF4 = 2 };
typedef struct qk_fp4a16_args {
  const void* x;          // [m, k], rows ldx elements apart
  int64_t ldx;
  int32_t dtype;          // QK_F16 or QK_BF16, of x, bias, y and NF4's scales
  int32_t format;         // qk_fp4_format
  int64_t m, n, k;
  int64_t group_size;     // 16, 32, or for QK_NF4 a multiple of 64 or >= k
  int64_t groups;         // ceil(k / group_size)
  const uint8_t* packed;  // 16-byte aligned, as scale
  const void* scale;
  const float* global_scale;  // [1], QK_NVFP4 only
  const void* bias;       // [n] or NULL
  void* y;                // [m, n], rows ldy elements apart
  int64_t ldy;
  float* partials;        // as above
  uint32_t* counters;
  int32_t multiprocessors;
  int32_t overlap;
} qk_fp4a16_args;

QK_EXPORT int qk_cuda_fp4a16_linear(const qk_fp4a16_args* args, void* stream);
QK_EXPORT int qk_cuda_w8a16_linear(const qk_w8a16_args* args, void* stream);
QK_EXPORT int qk_cuda_w8a8_linear(const qk_w8a8_args* args, void* stream);

#ifdef __cplusplus
}
#endif
