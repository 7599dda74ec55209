// The CUDA half of the C ABI.
#include "w4a16.cuh"
#include "weight_only.cuh"

namespace {

int check(const qk_weight_only_args& a) {
  if (a.m < 0 || a.n < 0 || a.k <= 0 || a.group_size <= 0) return QK_INVALID_ARGUMENT;
  if (a.group_size < a.k && a.group_size % 16 != 0) return QK_INVALID_ARGUMENT;
  if (a.x_dtype != QK_F16 && a.x_dtype != QK_BF16) return QK_UNSUPPORTED;
  if (a.format < QK_W4 || a.format > QK_F8) return QK_UNSUPPORTED;
  if (a.scale_dtype != QK_F32) return QK_UNSUPPORTED;
  if (a.format == QK_W4 && a.lut == nullptr) return QK_INVALID_ARGUMENT;
  return QK_OK;
}

int check(const qk_w4a16_args& a) {
  if (a.m < 0 || a.n < 0 || a.k <= 0 || a.group_size <= 0) return QK_INVALID_ARGUMENT;
  if (a.groups != (a.k + a.group_size - 1) / a.group_size) return QK_INVALID_ARGUMENT;
  if (a.group_size < a.k && a.group_size % 32 != 0) return QK_UNSUPPORTED;
  if (a.dtype != QK_F16 && a.dtype != QK_BF16) return QK_UNSUPPORTED;
  if (a.multiprocessors <= 0) return QK_INVALID_ARGUMENT;
  return QK_OK;
}

}  // namespace

int qk_cuda_weight_only_linear(const qk_weight_only_args* args, void* stream) {
  if (const int status = check(*args)) return status;
  if (args->m == 0 || args->n == 0) return QK_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return args->format == QK_W4 ? quantkit::cuda::w4_linear(*args, on)
                               : quantkit::cuda::w8_linear(*args, on);
}

int qk_cuda_dequantize(const qk_weight_only_args* args, void* stream) {
  if (const int status = check(*args)) return status;
  if (args->n == 0) return QK_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return args->format == QK_W4 ? quantkit::cuda::w4_dequantize(*args, on)
                               : quantkit::cuda::w8_dequantize(*args, on);
}

int qk_cuda_w4a16_linear(const qk_w4a16_args* args, void* stream) {
  if (const int status = check(*args)) return status;
  if (args->m == 0 || args->n == 0) return QK_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return args->dtype == QK_F16 ? quantkit::cuda::w4a16::linear_f16(*args, on)
                               : quantkit::cuda::w4a16::linear_bf16(*args, on);
}

int64_t qk_cuda_w4a16_partials(int64_t m, int64_t n, int64_t k, int32_t multiprocessors) {
  return quantkit::cuda::frame::partials_needed(m, n, k, multiprocessors);
}

int64_t qk_cuda_w4a16_counters(int64_t m, int64_t n) {
  return quantkit::cuda::frame::counters_needed(m, n);
}

int32_t qk_cuda_abi_version(void) { return QK_ABI_VERSION; }
