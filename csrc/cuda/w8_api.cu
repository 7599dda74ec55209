// The C ABI of the tensor-core layers with 8-bit weights, and the W8A8 kernels.
#include "w8a8.cuh"

namespace {

template <class Args>
int check_shape(const Args& a) {
  if (a.m < 0 || a.n < 0 || a.k <= 0 || a.group_size <= 0) return QK_INVALID_ARGUMENT;
  if (a.groups != (a.k + a.group_size - 1) / a.group_size) return QK_INVALID_ARGUMENT;
  if (a.multiprocessors <= 0) return QK_INVALID_ARGUMENT;
  return a.format == QK_I8 || a.format == QK_F8 ? QK_OK : QK_UNSUPPORTED;
}

}  // namespace

int qk_cuda_w8a16_linear(const qk_w8a16_args* args, void* stream) {
  using namespace quantkit::cuda;
  if (const int status = check_shape(*args)) return status;
  if (args->group_size < args->k && args->group_size % 32 != 0) return QK_UNSUPPORTED;
  if (args->dtype != QK_F16 && args->dtype != QK_BF16) return QK_UNSUPPORTED;
  if (args->m == 0 || args->n == 0) return QK_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return args->dtype == QK_F16 ? w8::w8a16_f16(*args, on) : w8::w8a16_bf16(*args, on);
}

int qk_cuda_w8a8_linear(const qk_w8a8_args* args, void* stream) {
  using namespace quantkit::cuda;
  if (const int status = check_shape(*args)) return status;
  if (args->y_dtype < QK_F32 || args->y_dtype > QK_BF16) return QK_UNSUPPORTED;
  const bool grouped = args->groups > 1;
  if (args->format == QK_I8 && (grouped || args->k > 131071)) return QK_UNSUPPORTED;
  if (grouped && args->group_size % 64 != 0) return QK_UNSUPPORTED;
  if (args->m == 0 || args->n == 0) return QK_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  if (args->format == QK_I8) return w8::linear<w8::Int8Channels>(*args, on);
  return grouped ? w8::linear<w8::Fp8Groups>(*args, on) : w8::linear<w8::Fp8Channels>(*args, on);
}
