// An INT8 linear layer's job, from either of the C ABI's descriptions of a layer.
#pragma once

#include "kernel_table.h"

namespace quantkit {

// The weight's half of a job: formats, tables, steps. false if no integer kernel multiplies it.
struct Int8Weight {
  int32_t format;
  int64_t n, k, group_size, x_group_size;
  const void* packed;
  const float* lut;
  const void* scale;
  int32_t scale_dtype;
  int64_t scale_stride_n, scale_stride_g;
  const float* zero;
  int64_t zero_stride_n, zero_stride_g;
};
bool make_int8_job(const Int8Weight& weight, const Int8Kernel& kernel, Int8Job* job);

}  // namespace quantkit
