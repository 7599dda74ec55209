// The C ABI of row_quantize.cuh.
#include "row_quantize.cuh"

namespace quantkit::cuda::rows {
namespace {

bool fits(int64_t k, int bytes_a_column) { return k > 0 && k <= kMostBytes / bytes_a_column; }

template <class T>
int quantize(const qk_quantize_args& a, const Sink& sink, cudaStream_t stream) {
  const bool vector = a.k % 8 == 0 && a.ldx % 8 == 0 && aligned(a.x, 16);
  return launch_rows(Plain<T>{static_cast<const T*>(a.x), a.ldx}, sink, a.m, a.k, vector, stream);
}

template <class T>
int norm(const qk_add_rms_norm_args& a, const Sink& sink, cudaStream_t stream) {
  const bool branch = a.branch == nullptr || (aligned(a.branch, 16) && a.ld_branch % 8 == 0);
  const bool vector = a.n % 8 == 0 && a.ld_residual % 4 == 0 && aligned(a.residual, 16) &&
                      aligned(a.weight, 16) && branch;
  return launch_rows(Norm<T>{a}, sink, a.m, a.n, vector, stream);
}

template <class T>
int gate(const qk_gate_args& a, const Sink& sink, cudaStream_t stream) {
  const bool vector = a.n % 8 == 0 && a.ldx % 8 == 0 && aligned(a.x, 16);
  return launch_rows(Gated<T>{static_cast<const T*>(a.x), a.ldx, a.kind}, sink, a.m, a.n, vector,
                     stream);
}

}  // namespace
}  // namespace quantkit::cuda::rows

using namespace quantkit::cuda;

int qk_cuda_quantize(const qk_quantize_args* args, void* stream) {
  if (args->m < 0 || args->k <= 0) return QK_INVALID_ARGUMENT;
  if (!rows::known(args->x_dtype) || !rows::fits(args->k, 2)) return QK_UNSUPPORTED;
  rows::Sink sink;
  if (const int status = rows::codes_sink(*args, args->x_dtype, args->k, sink)) return status;
  if (args->m == 0) return QK_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return args->x_dtype == QK_F16 ? rows::quantize<f16>(*args, sink, on)
                                 : rows::quantize<bf16>(*args, sink, on);
}

int qk_cuda_add_rms_norm(const qk_add_rms_norm_args* args, const qk_quantize_args* codes,
                         void* stream) {
  if (args->m < 0 || args->n <= 0) return QK_INVALID_ARGUMENT;
  if (!rows::known(args->y_dtype) || !rows::fits(args->n, 4)) return QK_UNSUPPORTED;
  rows::Sink sink{rows::kValues, 0, 0, nullptr, nullptr, args->y, args->ldy};
  if (codes != nullptr) {
    if (const int status = rows::codes_sink(*codes, args->y_dtype, args->n, sink)) return status;
  }
  if (args->m == 0) return QK_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return args->y_dtype == QK_F16 ? rows::norm<f16>(*args, sink, on)
                                 : rows::norm<bf16>(*args, sink, on);
}

int qk_cuda_gated_activation(const qk_gate_args* args, const qk_quantize_args* codes,
                             void* stream) {
  if (args->m < 0 || args->n <= 0) return QK_INVALID_ARGUMENT;
  if (args->kind != QK_GATE_SILU && args->kind != QK_GATE_GELU_TANH) return QK_UNSUPPORTED;
  if (!rows::known(args->dtype) || !rows::fits(args->n, 2)) return QK_UNSUPPORTED;
  rows::Sink sink{rows::kValues, 0, 0, nullptr, nullptr, args->y, args->ldy};
  if (codes != nullptr) {
    if (const int status = rows::codes_sink(*codes, args->dtype, args->n, sink)) return status;
  }
  if (args->m == 0) return QK_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return args->dtype == QK_F16 ? rows::gate<f16>(*args, sink, on)
                               : rows::gate<bf16>(*args, sink, on);
}
