// The C ABI of hadamard.cuh.
#include "hadamard.cuh"

#include <cmath>

namespace quantkit::cuda::hadamard {
namespace {

// Whether rows of x can be read by eight bytes.
bool reads_vectors(const qk_cuda_hadamard_args& a) {
  return a.base % 4 == 0 && a.ldx % 4 == 0 && aligned(a.x, 8);
}

template <class T>
int run(const qk_cuda_hadamard_args& a, const Sink& sink, cudaStream_t stream) {
  const int base = static_cast<int>(a.base), columns = static_cast<int>(a.n);
  const Matrix h{a.signs, base, static_cast<int>(a.order / a.base),
                 static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.order)))};
  const auto* x = static_cast<const T*>(a.x);
  const bool vector = reads_vectors(a);
  if (a.gated) {
    return launch_rows(Gated<T>{{x, a.ldx, a.gate}}, sink, h, a.m, columns, vector, stream);
  }
  return launch_rows(Plain<T>{x, a.ldx}, sink, h, a.m, columns, vector, stream);
}

}  // namespace
}  // namespace quantkit::cuda::hadamard

using namespace quantkit::cuda;

int64_t qk_cuda_hadamard_bytes(int64_t n, int64_t base) {
  return hadamard::shared_bytes(n, base, base % 4 == 0);
}

int qk_cuda_hadamard(const qk_cuda_hadamard_args* args, const qk_quantize_args* codes,
                     void* stream) {
  const qk_cuda_hadamard_args& a = *args;
  if (a.m < 0 || a.n <= 0 || a.signs == nullptr) return QK_INVALID_ARGUMENT;
  if (a.base < 1 || a.base > QK_LARGEST_BASE || a.order <= 0) return QK_INVALID_ARGUMENT;
  const int64_t runs = a.order / a.base;
  if (a.order % a.base != 0 || (runs & (runs - 1)) != 0 || a.n % a.order != 0) {
    return QK_INVALID_ARGUMENT;
  }
  if (a.gated && a.gate != QK_GATE_SILU && a.gate != QK_GATE_GELU_TANH) return QK_UNSUPPORTED;
  if (!rows::known(a.dtype)) return QK_UNSUPPORTED;
  if (qk_cuda_hadamard_bytes(a.n, a.base) > hadamard::kMostBytes) return QK_UNSUPPORTED;
  rows::Sink sink{rows::kValues, 0, 0, nullptr, nullptr, a.y, a.ldy};
  if (codes != nullptr) {
    if (const int status = rows::codes_sink(*codes, a.dtype, a.n, sink)) return status;
  }
  if (a.m == 0) return QK_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return a.dtype == QK_F16 ? hadamard::run<f16>(a, sink, on) : hadamard::run<bf16>(a, sink, on);
}
