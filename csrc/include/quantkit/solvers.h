// The C ABI of the calibration kernels: rounding with error feedback, the errors of candidate
// scales, and second moments of activations. CPU only. Same conventions as quantkit.h.
#pragma once

#include "quantkit/quantkit.h"

#ifdef __cplusplus
extern "C" {
#endif

// What a code is, before scaling. Values are clamped to [qmin, qmax], then rounded to the nearest
// code, ties to the even one. A NaN stays a NaN.
//   QK_CODE_INT   integers, |qmin| and |qmax| at most 2^21
//   QK_CODE_E4M3  float8 e4m3fn, subnormals included
//   QK_CODE_E2M1  0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
enum qk_code_kind { QK_CODE_INT = 0, QK_CODE_E4M3 = 1, QK_CODE_E2M1 = 2 };

// GPTQ's column loop (Frantar et al., arXiv 2210.17323, algorithm 1), for columns j = 0 .. k-1 of
// each row, with s and z those of group[j]:
//
//   code[j] = round(w[j] / s + z)       e = (w[j] - (code[j] - z) * s) / upper[j, j]
//   w[i]   -= e * upper[j, i]           for every i > j
//
// Updates reach a column in the order of j, in fp32: a row's codes depend neither on the number of
// threads nor on the other rows.
typedef struct qk_gptq_round_args {
  int64_t n, k, groups;
  const float* weight;   // [n, k]
  const float* upper;    // [k, k]; only the upper triangle is read
  const float* scale;    // [n, groups]
  const float* zero;     // [n, groups] or NULL
  const int32_t* group;  // [k], each in 0 .. groups-1
  int32_t kind;          // qk_code_kind
  float qmin, qmax;
  float* codes;          // [n, k], the values of the codes
} qk_gptq_round_args;

// Coordinate descent: in place, for codes in turn, the code that minimises
//
//   tr(G E H Eᵀ),   E = weight - (codes - zero) * scale
//
// while all others stay as they are, over all columns `sweeps` times or until nothing changes.
// moment holds E H [n, k] and is kept up to date. Rows are independent where G is NULL: then a row
// is finished before the next. Otherwise columns go in order, and the rows of each in order.
// Columns and rows whose entry on the diagonal of H or G is not positive stay as they are, and so does
// a code whose distance from the best value falls by less than 1 in 10,000. fp32; the result does not
// depend on the number of threads.
typedef struct qk_descend_args {
  int64_t n, k, groups, sweeps;
  const float* hessian;  // H [k, k], symmetric
  const float* output;   // G [n, n], symmetric, or NULL for the identity
  const float* scale;    // [n, groups]
  const float* zero;     // [n, groups] or NULL
  const int32_t* group;  // [k], each in 0 .. groups-1
  int32_t kind;          // qk_code_kind
  float qmin, qmax;
  float* codes;          // [n, k], the values of the codes, in and out
  float* moment;         // [n, k], in and out
} qk_descend_args;

// errors[s, n, g] = sum_{k in g} importance[k] * ((round(w / scale + zero) - zero) * scale - w)^2
// with the scale and zero of [s, n, g], in fp32.
typedef struct qk_rounding_errors_args {
  int64_t candidates, n, k;
  int64_t group_size;       // columns of a group; the last may be short
  const void* weight;       // [n, k]
  int32_t weight_dtype;     // qk_dtype
  const float* scale;       // [candidates, n, ceil(k / group_size)]
  const float* zero;        // like scale, or NULL
  const float* importance;  // [k] or NULL for ones
  int32_t kind;             // qk_code_kind
  float qmin, qmax;
  float* errors;            // like scale
} qk_rounding_errors_args;

// acc[i, j] += sum_t x[t, i] * x[t, j] for j <= i; what is above the diagonal is neither read nor
// written. Sums are fp32, in an order that the number of threads does not change.
//
// The avx512bf16 path multiplies bf16 pairs with vdpbf16ps, which takes subnormal inputs as zero:
// bf16 values below 1.2e-38 count as 0.
typedef struct qk_syrk_args {
  int64_t tokens, k;
  const void* x;    // [tokens, k], rows ldx elements apart
  int64_t ldx;
  int32_t x_dtype;  // qk_dtype
  void* acc;        // [k, k], rows ld_acc elements apart: float, or double
  int64_t ld_acc;
  int32_t acc_is_double;
} qk_syrk_args;

QK_EXPORT int qk_gptq_round(const qk_gptq_round_args* args);
QK_EXPORT int qk_descend_codes(const qk_descend_args* args);
QK_EXPORT int qk_rounding_errors(const qk_rounding_errors_args* args);
QK_EXPORT int qk_syrk_accumulate(const qk_syrk_args* args);

#ifdef __cplusplus
}
#endif
