// The CUDA operators, through LibTorch's stable ABI. Loaded only where torch sees a GPU.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "check.h"

namespace quantkit::binding {
namespace {

// Up to this many rows each weight is read once (or a few times, from L2) by our own kernel; above
// it the weight is dequantized once and torch's matrix product takes over. There the dequantized
// weight is rounded to the dtype of x, which the kernel's fp32 arithmetic does not do.
constexpr int64_t kKernelRows = 64;

// torch exports the current stream only from its CUDA build, so the symbol is looked up at run
// time: this library then links, and its kernels compile, against any torch.
void* current_stream(int32_t device) {
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

Gpu gpu(int device) {
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

void check_launch(const char* op, int status) {
  if (status == QK_OK) return;
  if (status == QK_UNSUPPORTED) {
    fail(op, "this dtype has no CUDA kernel; use float16 or bfloat16 activations");
  }
  const cudaError_t error = cudaPeekAtLastError();
  fail(op, "the kernel was not launched (status ", status, ", ", cudaGetErrorString(error), ")");
}

Tensor dequantized(const char* op, qk_weight_only_args args, const Tensor& like) {
  Tensor weight = empty({args.n, args.k}, scalar_type_of(args.x_dtype), like);
  args.y = weight.mutable_data_ptr();
  args.ldy = args.k;
  const int32_t device = like.get_device_index();
  const DeviceGuard guard(device);
  check_launch(op, qk_cuda_dequantize(&args, current_stream(device)));
  return weight;
}

Tensor run(const char* op, WeightOnlyCall& call, const Tensor& x) {
  if (call.args.m > kKernelRows) {
    Tensor weight = dequantized(op, call.args, x);
    Tensor rows = torch::stable::reshape(x, {call.args.m, call.args.k});
    Tensor y = torch::stable::matmul(rows, torch::stable::transpose(weight, 0, 1));
    if (call.bias.has_value()) {
      // y + bias = y - (-1) * bias: subtract is the stable ABI's only sum of two tensors.
      y = torch::stable::subtract(y, torch::stable::to(*call.bias, x.scalar_type()), -1.0);
    }
    return torch::stable::reshape(y, with_last(x, call.args.n));
  }
  Tensor y = empty(with_last(x, call.args.n), x.scalar_type(), x);
  call.args.y = y.mutable_data_ptr();
  call.args.ldy = call.args.n;
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  check_launch(op, qk_cuda_weight_only_linear(&call.args, current_stream(device)));
  return y;
}

Tensor w4_linear(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero, Tensor lut,
                 std::optional<Tensor> bias, int64_t n, int64_t group_size) {
  WeightOnlyCall call("w4_linear", x, packed, scale, zero, bias, n, QK_W4, group_size);
  call.set_lut("w4_linear", lut, x);
  return run("w4_linear", call, x);
}

Tensor w8_linear(Tensor x, Tensor codes, Tensor scale, std::optional<Tensor> zero,
                 std::optional<Tensor> bias, int64_t kind, int64_t group_size) {
  const char* op = "w8_linear";
  require(scale.dim() == 2, op, "scale has shape ", shape_of(scale),
          ", must be [N, ceil(K / group_size)]");
  WeightOnlyCall call(op, x, codes, scale, zero, bias, scale.size(0), byte_format(op, kind),
                      group_size);
  return run(op, call, x);
}

// A table of w4a16_linear: [ceil(n / 64), groups, 64].
void check_w4a16_table(const char* op, const char* what, const Tensor& t, const Tensor& x,
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
void require_aligned(const char* op, const char* what, const void* p) {
  require(reinterpret_cast<uintptr_t>(p) % 16 == 0, op, what,
          " does not start at a multiple of 16 bytes; pass a tensor of its own, not a view");
}

Tensor w4a16_linear(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero,
                    std::optional<Tensor> bias, Tensor counters, int64_t n, int64_t group_size) {
  const char* op = "w4a16_linear";
  const Rows rows = rows_of(op, "x", x);
  require(rows.k > 0 && n > 0, op, "K = ", rows.k, " and N = ", n, " must be positive");
  const int64_t blocks = (n + 63) / 64, slabs = (rows.k + 63) / 64;
  qk_w4a16_args a{};
  a.x = rows.data;
  a.ldx = rows.stride;
  a.dtype = float_dtype(op, "x", x);
  require(a.dtype != QK_F32, op, "x has dtype float32, must be float16 or bfloat16");
  a.m = rows.m;
  a.n = n;
  a.k = rows.k;
  require(group_size == -1 || group_size >= rows.k || (group_size > 0 && group_size % 32 == 0), op,
          "group_size ", group_size, " is not a multiple of 32; use w4_linear");
  a.group_size = group_size == -1 || group_size > rows.k ? rows.k : group_size;
  a.groups = (rows.k + a.group_size - 1) / a.group_size;
  require(packed.scalar_type() == ScalarType::Byte && packed.dim() == 3 &&
              packed.size(0) == blocks && packed.size(1) == slabs && packed.size(2) == 2048 &&
              packed.is_contiguous(),
          op, "packed weight has shape ", shape_of(packed), ", must be contiguous uint8 [", blocks,
          ", ", slabs, ", 2048] for N = ", n, " and K = ", rows.k,
          "; make it with quantkit.ops.pack_w4a16");
  require_same_device(op, "packed weight", packed, x);
  a.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  require_aligned(op, "packed weight", a.packed);
  check_w4a16_table(op, "scale", scale, x, x.scalar_type(), n, a.groups);
  a.scale = scale.const_data_ptr();
  require_aligned(op, "scale", a.scale);
  if (zero.has_value()) {
    check_w4a16_table(op, "zero", *zero, x, ScalarType::Byte, n, a.groups);
    a.zero = static_cast<const uint8_t*>(zero->const_data_ptr());
    require_aligned(op, "zero", a.zero);
  }
  std::optional<Tensor> dense_bias;
  if (bias.has_value()) {
    int32_t dtype = 0;
    dense_bias = check_bias(op, *bias, x, n, &dtype);
    require(dtype == a.dtype, op, "bias has dtype ", name_of(bias->scalar_type()),
            ", must be that of x, ", name_of(x.scalar_type()));
    a.bias = dense_bias->const_data_ptr();
  }
  const int64_t needed = qk_cuda_w4a16_counters(a.m, n);
  require(counters.scalar_type() == ScalarType::Int && counters.is_contiguous() &&
              counters.numel() >= needed,
          op, "counters have shape ", shape_of(counters), ", must be at least ", needed,
          " contiguous int32 zeros; make them with quantkit.ops.new_w4a16_counters");
  require_same_device(op, "counters", counters, x);
  a.counters = static_cast<uint32_t*>(counters.mutable_data_ptr());

  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  const Gpu on = gpu(device);
  a.multiprocessors = on.multiprocessors;
  a.overlap = on.major >= 9;
  Tensor y = empty(with_last(x, n), x.scalar_type(), x);
  a.y = y.mutable_data_ptr();
  a.ldy = n;
  // Freed when this returns, in stream order: the caching allocator reuses it behind the kernel.
  std::optional<Tensor> partials;
  if (const int64_t count = qk_cuda_w4a16_partials(a.m, n, a.k, a.multiprocessors)) {
    partials = empty({count}, ScalarType::Float, x);
    a.partials = static_cast<float*>(partials->mutable_data_ptr());
  }
  check_launch(op, qk_cuda_w4a16_linear(&a, current_stream(device)));
  return y;
}

Tensor dequantize(const char* op, const Tensor& packed, const Tensor& scale,
                  const std::optional<Tensor>& zero, const Tensor* lut, int64_t n, int64_t k,
                  int32_t format, int64_t group_size, int64_t dtype) {
  require(n > 0 && k > 0, op, "N = ", n, " and K = ", k, " must be positive");
  Tensor none = empty({0, k}, scalar_type_of(out_dtype(op, dtype)), packed);
  WeightOnlyCall call(op, none, packed, scale, zero, std::nullopt, n, format, group_size);
  if (lut != nullptr) call.set_lut(op, *lut, packed);
  return dequantized(op, call.args, packed);
}

Tensor dequantize_w4(Tensor packed, Tensor scale, std::optional<Tensor> zero, Tensor lut, int64_t n,
                     int64_t k, int64_t group_size, int64_t out_dtype) {
  return dequantize("dequantize_w4", packed, scale, zero, &lut, n, k, QK_W4, group_size, out_dtype);
}

Tensor dequantize_w8(Tensor packed, Tensor scale, std::optional<Tensor> zero, int64_t n, int64_t k,
                     int64_t kind, int64_t group_size, int64_t out_dtype) {
  return dequantize("dequantize_w8", packed, scale, zero, nullptr, n, k,
                    byte_format("dequantize_w8", kind), group_size, out_dtype);
}

}  // namespace
}  // namespace quantkit::binding

STABLE_TORCH_LIBRARY_IMPL(quantkit, CUDA, m) {
  using namespace quantkit::binding;
  m.impl("w4_linear", TORCH_BOX(&w4_linear));
  m.impl("w8_linear", TORCH_BOX(&w8_linear));
  m.impl("w4a16_linear", TORCH_BOX(&w4a16_linear));
  m.impl("dequantize_w4", TORCH_BOX(&dequantize_w4));
  m.impl("dequantize_w8", TORCH_BOX(&dequantize_w8));
}
