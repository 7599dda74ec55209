// The C ABI of quantkit's kernels: pointers, sizes and a stream in, a status out.
// No torch header, no C++ type: anything that can load a shared library can call these.
//
// Every weight-only format has one meaning, with fp32 accumulation:
//
//   y[m,n] = sum_g scale[n,g] * sum_{k in g} (decode(code[n,k]) - zero[n,g]) * x[m,k]  + bias[n]
//
// Every pointer may be unaligned to anything but its element; results do not depend on alignment,
// on the number of threads, or on how many other rows are computed in the same call.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QK_EXPORT __attribute__((visibility("default")))

// Raised whenever a layout or a signature below changes; the loader refuses another number.
#define QK_ABI_VERSION 5

enum qk_status {
  QK_OK = 0,
  QK_INVALID_ARGUMENT = 1,
  QK_UNSUPPORTED = 2,
  QK_OUT_OF_MEMORY = 3,
  QK_LAUNCH_FAILED = 4,
};

enum qk_dtype { QK_F32 = 0, QK_F16 = 1, QK_BF16 = 2 };

// What a weight code means.
//   QK_W4   4 bits, an index into a codebook of 16 fp32 values (int4, int3, int2, FP4, NF4 …)
//   QK_I8   8 bits, two's complement
//   QK_F8   8 bits, float8 e4m3fn (no infinities; 0x7f and 0xff are NaN)
//   QK_B16  a bf16 value
//   QK_F32W an fp32 value; multiplied in fp32 whatever the activations are
enum qk_format { QK_W4 = 0, QK_I8 = 1, QK_F8 = 2, QK_B16 = 3, QK_F32W = 4 };

// One weight-only linear layer applied to m rows.
//
// packed: the layout of qk_pack_w4 / qk_pack_w8 below.
// scale and zero are read as ptr[n * stride_n + g * stride_g]. stride_n == 1 is the fast order
// (16 neighbouring rows of one group are one vector load); any other is gathered once a tile.
// The last group may be short: groups = ceil(k / group_size).
typedef struct qk_weight_only_args {
  const void* x;         // [m, k], rows ldx elements apart
  int64_t ldx;
  int32_t x_dtype;       // qk_dtype; also the dtype of y
  int32_t format;        // qk_format
  int64_t m, n, k;
  int64_t group_size;    // a multiple of 16, or anything >= k for one group a row
  const void* packed;
  const float* lut;      // [16], QK_W4 only
  const void* scale;     // [n, groups]
  int32_t scale_dtype;   // QK_F32 or QK_BF16
  int64_t scale_stride_n, scale_stride_g;
  const float* zero;     // [n, groups] or NULL, in units of the decoded code
  int64_t zero_stride_n, zero_stride_g;
  const void* bias;      // [n] or NULL
  int32_t bias_dtype;
  void* y;               // [m, n], rows ldy elements apart
  int64_t ldy;
} qk_weight_only_args;

// INT8 activations times integer weights, accumulated exactly in int32 within a step: the columns
// that share the weight's scale and the activation's.
//
//   y[m,n] = sum_s (sum_{k in s} (decode(code[n,k]) - zero[n,g]) * xq[m,k]) * w_scale[n,g] * x_scale[m,s]
//            + bias[n]
//
// QK_W4 takes codebooks of integers or of halves of integers that span at most 127 (or 127 halves).
typedef struct qk_int8_linear_args {
  const int8_t* xq;      // [m, k], rows ldx bytes apart
  int64_t ldx;
  int32_t format;        // QK_W4 or QK_I8
  int64_t m, n, k;
  int64_t group_size;    // columns that share a weight scale: a multiple of 16, or >= k
  int64_t x_group_size;  // columns that share an activation scale: the same; one divides the other
  const void* packed;
  const float* lut;      // [16], QK_W4 only
  const float* x_scale;  // [m, ceil(k / x_group_size)], or one value with x_scale_stride == 0
  int64_t x_scale_stride;
  const void* scale;     // as in qk_weight_only_args
  int32_t scale_dtype;
  int64_t scale_stride_n, scale_stride_g;
  const float* zero;
  int64_t zero_stride_n, zero_stride_g;
  const void* bias;      // [n] or NULL
  int32_t bias_dtype;
  int32_t y_dtype;
  void* y;               // [m, n], rows ldy elements apart
  int64_t ldy;
} qk_int8_linear_args;

// Activations to 8-bit codes, in the arithmetic of compressed-tensors: every intermediate is
// rounded to `arith_dtype`, as a tensor library that works in that dtype would round it.
typedef struct qk_quantize_args {
  const void* x;         // [m, k], rows ldx elements apart
  int64_t ldx;
  int32_t x_dtype;
  int32_t format;        // QK_I8 or QK_F8
  int64_t m, k;
  int64_t group_size;    // columns that share a scale; >= k for one scale a row
  int32_t arith_dtype;   // dtype that division is rounded to
  int32_t scale_given;   // 1: `scale` is one value of arith_dtype, read; 0: [m, groups], written
  void* scale;           // elements of x_dtype when written, arith_dtype when read
  uint8_t* q;            // [m, k] contiguous
} qk_quantize_args;

// ---- CPU -------------------------------------------------------------------------------------

// codes [n, k], one a byte -> the packed layout. Rows go in blocks of 16, padded with code 0; a
// block goes along k in chunks of 64 bytes, 16 rows x 4 bytes. The chunks of four neighbouring
// blocks alternate, so that a tile of 64 rows is one run of memory:
//
//   [ceil(blocks / 4)][chunks][4 blocks, fewer in the last group][16 rows][4 bytes]
//
// QK_W4: chunk c holds k = 8c .. 8c+7. The four bytes of a row are one little-endian word, even k
//        in its low half and odd k in its high half:
//          code k = 8c + 2j     at bits 4j   .. 4j+3
//          code k = 8c + 2j + 1 at bits 16+4j .. 16+4j+3        (j = 0..3)
//        so one shift yields a bf16 pair's two indices in the two halves of a 32-bit lane.
// 8 bit: chunk c holds k = 4c .. 4c+3, byte j of a row k = 4c + j: the operand order of vpdpbusd.
// QK_B16: chunk c holds k = 2c, 2c+1; QK_F32W: k = c.
QK_EXPORT int qk_pack_w4(const uint8_t* codes, int64_t ldc, int64_t n, int64_t k, uint8_t* packed);
QK_EXPORT int qk_pack_w8(const uint8_t* codes, int64_t ldc, int64_t n, int64_t k, uint8_t* packed);
QK_EXPORT int qk_pack_float(const void* values, int32_t dtype, int64_t ldv, int64_t n, int64_t k,
                            void* packed);  // QK_BF16 -> QK_B16, QK_F32 -> QK_F32W
QK_EXPORT int64_t qk_packed_bytes(int32_t format, int64_t n, int64_t k);

QK_EXPORT int qk_weight_only_linear(const qk_weight_only_args* args);
QK_EXPORT int qk_int8_linear(const qk_int8_linear_args* args);
QK_EXPORT int qk_quantize(const qk_quantize_args* args);
// w[n,k] = (decode(code) - zero) * scale in fp32, rounded once to x_dtype; writes y as [n, k].
QK_EXPORT int qk_dequantize(const qk_weight_only_args* args);

// Threads used by one call, the calling thread included. 0 restores the default.
QK_EXPORT int qk_set_num_threads(int32_t threads);
QK_EXPORT int32_t qk_get_num_threads(void);
// The default while qk_set_num_threads is at 0; the binding keeps it equal to torch's.
QK_EXPORT void qk_set_default_threads(int32_t threads);

// Threads to run on instead of the library's own: `executor` must call body(ctx, i) once for each i
// in [0, threads) and return when all calls have; it may run them on fewer threads. NULL restores
// the library's pool. One pool in a process is faster than two that spin against each other.
typedef void (*qk_executor)(int32_t threads, void (*body)(void* ctx, int32_t index), void* ctx);
QK_EXPORT void qk_set_executor(qk_executor executor);

// Instruction sets, slowest first: "generic", "avx2", "avx512", "avx512bf16"; "auto" is the best
// that this CPU runs. Forcing one is for tests and benchmarks.
QK_EXPORT int qk_set_isa(const char* name);
QK_EXPORT const char* qk_get_isa(void);
QK_EXPORT int32_t qk_isa_supported(const char* name);

QK_EXPORT int32_t qk_abi_version(void);
QK_EXPORT const char* qk_status_message(int status);

// ---- CUDA: the same arguments and the same packed layout, on a stream ------------------------

QK_EXPORT int qk_cuda_weight_only_linear(const qk_weight_only_args* args, void* stream);
QK_EXPORT int qk_cuda_dequantize(const qk_weight_only_args* args, void* stream);
QK_EXPORT int32_t qk_cuda_abi_version(void);

// Integer 4-bit weights on the tensor cores, in a layout and tables of their own:
//
//   y[m,n] = sum_g scale[n,g] * sum_{k in g} (code[n,k] - zero[n,g]) * x[m,k]  + bias[n]
//
// Rows of the weight go in blocks of 64, padded, and columns in slabs of 64, padded with any code.
// packed: [ceil(n / 64)][ceil(k / 64)][4 tiles of 16 rows][32 lanes][4 words]. With g = lane / 4 and
//         t = lane % 4, word s holds eight codes: for j = 0..3, at bits 4j and 16 + 4j,
//           row 16 tile + g + 8 (j % 2),  columns 32 (s / 2) + 8t + 4 (s % 2) + 2 (j / 2) and + 1.
// scale and zero: [ceil(n / 64)][groups][8 g][4 tiles][2], for row 16 tile + g + 8 i.
typedef struct qk_w4a16_args {
  const void* x;         // [m, k], rows ldx elements apart
  int64_t ldx;
  int32_t dtype;         // QK_F16 or QK_BF16, of x, scale, bias and y
  int64_t m, n, k;
  int64_t group_size;    // a multiple of 32, or >= k
  int64_t groups;        // ceil(k / group_size)
  const uint8_t* packed; // 16-byte aligned, as scale and zero
  const void* scale;
  const uint8_t* zero;   // 0..15, or NULL for 8
  const void* bias;      // [n] or NULL
  void* y;               // [m, n], rows ldy elements apart
  int64_t ldy;
  float* partials;       // qk_cuda_w4a16_partials values; uninitialized
  uint32_t* counters;    // qk_cuda_w4a16_counters values; zero before and after every call
  int32_t multiprocessors;  // of the GPU
  int32_t overlap;       // 1: launch under the end of the kernel before (sm_90 and newer)
} qk_w4a16_args;

QK_EXPORT int qk_cuda_w4a16_linear(const qk_w4a16_args* args, void* stream);
QK_EXPORT int64_t qk_cuda_w4a16_partials(int64_t m, int64_t n, int64_t k, int32_t multiprocessors);
QK_EXPORT int64_t qk_cuda_w4a16_counters(int64_t m, int64_t n);

#ifdef __cplusplus
}
#endif
