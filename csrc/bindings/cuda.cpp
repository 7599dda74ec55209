// The CUDA operators, through LibTorch's stable ABI. Loaded only where torch sees a GPU.
#include "cuda.h"

namespace quantkit::binding {
namespace {

// Up to this many rows each weight is read once (or a few times, from L2) by our own kernel; above
// it the weight is dequantized once and torch's matrix product takes over. There the dequantized
// weight is rounded to the dtype of x, which the kernel's fp32 arithmetic does not do.
constexpr int64_t kKernelRows = 64;

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

Tensor w4a16_linear(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero,
                    std::optional<Tensor> bias, Tensor counters, int64_t n, int64_t group_size) {
  const char* op = "w4a16_linear";
  qk_w4a16_args a{};
  set_activations16(op, a, x, n);
  require(group_size == -1 || group_size >= a.k || (group_size > 0 && group_size % 32 == 0), op,
          "group_size ", group_size, " is not a multiple of 32; use w4_linear");
  a.group_size = group_size == -1 || group_size > a.k ? a.k : group_size;
  a.groups = (a.k + a.group_size - 1) / a.group_size;
  a.packed = check_fragments(op, packed, x, n, a.k, 2048, "pack_w4a16");
  check_w4a16_table(op, "scale", scale, x, x.scalar_type(), n, a.groups);
  a.scale = scale.const_data_ptr();
  require_aligned(op, "scale", a.scale);
  if (zero.has_value()) {
    check_w4a16_table(op, "zero", *zero, x, ScalarType::Byte, n, a.groups);
    a.zero = static_cast<const uint8_t*>(zero->const_data_ptr());
    require_aligned(op, "zero", a.zero);
  }
  return launch_activations16(op, a, x, bias, counters, qk_cuda_w4a16_linear);
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
