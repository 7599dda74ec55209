// What the files of CUDA operators share.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "check.h"
#include "quantkit/cuda.h"

namespace quantkit::binding {

// torch exports the current stream only from its CUDA build, so the symbol is looked up at run
// time: this library then links, and its kernels compile, against any torch.
inline void* current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* symbol = dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    if (symbol == nullptr) {
      if (void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
        symbol = dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
      }
    }
    return reinterpret_cast<GetStream>(symbol);
  }();
  void* stream = nullptr;
  if (get == nullptr || get(device, &stream) != 0) {
    throw std::runtime_error(
        "quantkit: this torch has no CUDA stream to run on; install a CUDA build of torch");
  }
  return stream;
}

struct Gpu {
  int multiprocessors = 0, major = 0;  // compute capability
};

inline Gpu gpu(int device) {
  Gpu g;
  cudaDeviceGetAttribute(&g.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&g.major, cudaDevAttrComputeCapabilityMajor, device);
  return g;
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
    device_ = device;
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0, device_ = 0;
};

inline void check_launch(const char* op, int status) {
  if (status == QK_OK) return;
  if (status == QK_UNSUPPORTED) {
    fail(op, "this dtype has no CUDA kernel; use float16 or bfloat16 activations");
  }
  const cudaError_t error = cudaPeekAtLastError();
  fail(op, "the kernel was not launched (status ", status, ", ", cudaGetErrorString(error), ")");
}

// ---- linear layers on the tensor cores --------------------------------------------------------

// A table of scales or zeros in the order of fragments: [ceil(n / 64), groups, 64].
inline void check_w4a16_table(const char* op, const char* what, const Tensor& t, const Tensor& x,
                       ScalarType dtype, int64_t n, int64_t groups) {
  require(t.scalar_type() == dtype, op, what, " has dtype ", name_of(t.scalar_type()), ", must be ",
          name_of(dtype), "; convert it before pack_w4a16_table");
  require(t.dim() == 3 && t.size(0) == (n + 63) / 64 && t.size(1) == groups && t.size(2) == 64 &&
              t.is_contiguous(),
          op, what, " has shape ", shape_of(t), ", must be contiguous [", (n + 63) / 64, ", ",
          groups, ", 64] for N = ", n, "; make it with quantkit.ops.pack_w4a16_table");
  require_same_device(op, what, t, x);
}

// The kernels read tables and codes by 16 bytes; a view may start anywhere.
inline void require_aligned(const char* op, const char* what, const void* p) {
  require(reinterpret_cast<uintptr_t>(p) % 16 == 0, op, what,
          " does not start at a multiple of 16 bytes; pass a tensor of its own, not a view");
}

// A weight in the order of fragments: [ceil(n / 64), ceil(k / 64), width] bytes.
inline const uint8_t* check_fragments(const char* op, const Tensor& packed, const Tensor& x,
                                      int64_t n, int64_t k, int64_t width, const char* packer) {
  const int64_t blocks = (n + 63) / 64, slabs = (k + 63) / 64;
  require(packed.scalar_type() == ScalarType::Byte && packed.dim() == 3 &&
              packed.size(0) == blocks && packed.size(1) == slabs && packed.size(2) == width &&
              packed.is_contiguous(),
          op, "packed weight has shape ", shape_of(packed), ", must be contiguous uint8 [", blocks,
          ", ", slabs, ", ", width, "] for N = ", n, " and K = ", k,
          "; make it with quantkit.ops.", packer);
  require_same_device(op, "packed weight", packed, x);
  const auto* data = static_cast<const uint8_t*>(packed.const_data_ptr());
  require_aligned(op, "packed weight", data);
  return data;
}

inline uint32_t* check_counters(const char* op, Tensor& counters, const Tensor& x, int64_t m,
                                int64_t n) {
  const int64_t needed = qk_cuda_w4a16_counters(m, n);
  require(counters.scalar_type() == ScalarType::Int && counters.is_contiguous() &&
              counters.numel() >= needed,
          op, "counters have shape ", shape_of(counters), ", must be at least ", needed,
          " contiguous int32 zeros; make them with quantkit.ops.new_w4a16_counters");
  require_same_device(op, "counters", counters, x);
  return static_cast<uint32_t*>(counters.mutable_data_ptr());
}

// Launches on the device of x, with memory for the sums of splits.
template <class Args>
void launch_linear(const char* op, Args& a, const Tensor& x, int (*kernel)(const Args*, void*)) {
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const Gpu on = gpu(device);
  a.multiprocessors = on.multiprocessors;
  a.overlap = on.major >= 9;
  // Freed when this returns, in stream order: the caching allocator reuses it behind the kernel.
  std::optional<Tensor> partials;
  if (const int64_t count = qk_cuda_w4a16_partials(a.m, a.n, a.k, a.multiprocessors)) {
    partials = empty({count}, ScalarType::Float, x);
    a.partials = static_cast<float*>(partials->mutable_data_ptr());
  }
  check_launch(op, kernel(&a, current_stream(device)));
}

// What layers with 16-bit activations share: sizes and the rows of x,
template <class Args>
void set_activations16(const char* op, Args& a, const Tensor& x, int64_t n) {
  const Rows rows = rows_of(op, "x", x);
  require(rows.k > 0 && n > 0, op, "K = ", rows.k, " and N = ", n, " must be positive");
  a.x = rows.data;
  a.ldx = rows.stride;
  a.dtype = float_dtype(op, "x", x);
  require(a.dtype != QK_F32, op, "x has dtype float32, must be float16 or bfloat16");
  a.m = rows.m;
  a.n = n;
  a.k = rows.k;
}

// and, once a has its weight, the bias, y and the launch.
template <class Args>
Tensor launch_activations16(const char* op, Args& a, const Tensor& x,
                            const std::optional<Tensor>& bias, Tensor& counters,
                            int (*kernel)(const Args*, void*)) {
  std::optional<Tensor> dense_bias;
  if (bias.has_value()) {
    int32_t dtype = 0;
    dense_bias = check_bias(op, *bias, x, a.n, &dtype);
    require(dtype == a.dtype, op, "bias has dtype ", name_of(bias->scalar_type()),
            ", must be that of x, ", name_of(x.scalar_type()));
    a.bias = dense_bias->const_data_ptr();
  }
  a.counters = check_counters(op, counters, x, a.m, a.n);
  Tensor y = empty(with_last(x, a.n), x.scalar_type(), x);
  a.y = y.mutable_data_ptr();
  a.ldy = a.n;
  launch_linear(op, a, x, kernel);
  return y;
}

}  // namespace quantkit::binding
