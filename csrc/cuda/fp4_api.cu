// The C ABI of the linear layers with 4-bit float weights.
#include "fp4a16.cuh"

namespace {

// Columns that share a scale.
bool group_fits(const qk_fp4a16_args& a) {
  if (a.format == QK_NVFP4) return a.group_size == 16;
  if (a.format == QK_MXFP4) return a.group_size == 32;
  return a.group_size >= a.k || a.group_size % 64 == 0;
}

}  // namespace

int qk_cuda_fp4a16_linear(const qk_fp4a16_args* args, void* stream) {
  using namespace quantkit::cuda;
  const qk_fp4a16_args& a = *args;
  if (a.m < 0 || a.n < 0 || a.k <= 0 || a.group_size <= 0) return QK_INVALID_ARGUMENT;
  if (a.format < QK_NVFP4 || a.format > QK_NF4) return QK_UNSUPPORTED;
  if (!group_fits(a)) return QK_UNSUPPORTED;
  if (a.groups != (a.k + a.group_size - 1) / a.group_size) return QK_INVALID_ARGUMENT;
  if (a.format == QK_NVFP4 && a.global_scale == nullptr) return QK_INVALID_ARGUMENT;
  if (a.multiprocessors <= 0) return QK_INVALID_ARGUMENT;
  if (a.dtype != QK_F16 && a.dtype != QK_BF16) return QK_UNSUPPORTED;
  if (a.m == 0 || a.n == 0) return QK_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return a.dtype == QK_F16 ? fp4::linear_f16(a, on) : fp4::linear_bf16(a, on);
}
