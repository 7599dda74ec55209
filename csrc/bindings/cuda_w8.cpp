// The CUDA linear layers with 8-bit weights on the tensor cores.
#include "cuda.h"

namespace quantkit::binding {
namespace {

constexpr int64_t kWidth = 4096;  // bytes of a block of 64 rows and 64 columns

int64_t groups_of(const char* op, int64_t& group_size, int64_t k, int64_t multiple) {
  require(group_size == -1 || group_size >= k || (group_size > 0 && group_size % multiple == 0), op,
          "group_size ", group_size, " is not a multiple of ", multiple,
          "; use a multiple, or -1 for one group a row");
  if (group_size == -1 || group_size > k) group_size = k;
  return (k + group_size - 1) / group_size;
}

Tensor w8a16_linear(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> bias,
                    Tensor counters, int64_t n, int64_t kind, int64_t group_size) {
  const char* op = "w8a16_linear";
  qk_w8a16_args a{};
  set_activations16(op, a, x, n);
  a.format = byte_format(op, kind);
  a.groups = groups_of(op, group_size, a.k, 32);
  a.group_size = group_size;
  a.packed = check_fragments(op, packed, x, n, a.k, kWidth, "pack_w8_mma");
  check_w4a16_table(op, "scale", scale, x, x.scalar_type(), n, a.groups);
  a.scale = scale.const_data_ptr();
  require_aligned(op, "scale", a.scale);
  return launch_activations16(op, a, x, bias, counters, qk_cuda_w8a16_linear);
}

Tensor w8a8_mma_linear(Tensor xq, Tensor x_scale, Tensor packed, Tensor scale,
                       std::optional<Tensor> bias, Tensor counters, int64_t n, int64_t group_size,
                       int64_t dtype) {
  const char* op = "w8a8_mma_linear";
  const bool int8 = xq.scalar_type() == ScalarType::Char;
  require(int8 || xq.scalar_type() == ScalarType::Float8_e4m3fn, op, "xq has dtype ",
          name_of(xq.scalar_type()), ", must be int8 or float8_e4m3fn, as the weight's codes");
  const Rows rows = rows_of(op, "xq", xq);
  require(rows.k > 0 && n > 0, op, "K = ", rows.k, " and N = ", n, " must be positive");
  qk_w8a8_args a{};
  a.x = rows.data;
  a.ldx = rows.stride;
  a.format = int8 ? QK_I8 : QK_F8;
  a.m = rows.m;
  a.n = n;
  a.k = rows.k;
  a.groups = groups_of(op, group_size, a.k, 64);
  a.group_size = group_size;
  if (int8) {
    require(a.k <= 131071, op, "K = ", a.k, " must be at most 131071, where no int32 sum overflows");
    require(a.groups == 1, op, "int8 has one scale a channel here; use group_size -1");
  }
  a.packed = check_fragments(op, packed, xq, n, a.k, kWidth, "pack_w8_mma");
  const bool one = x_scale.numel() == 1 && a.groups == 1;
  require(x_scale.is_contiguous() && (one || x_scale.numel() == a.m * a.groups), op,
          "x_scale has shape ", shape_of(x_scale), ", must be contiguous with ", a.groups,
          " values for each of ", a.m, " rows of xq");
  require_same_device(op, "x_scale", x_scale, xq);
  a.x_scale = x_scale.const_data_ptr();
  a.x_scale_dtype = float_dtype(op, "x_scale", x_scale);
  a.x_scale_stride = one ? 0 : a.groups;
  if (a.groups > 1) {
    check_w4a16_table(op, "scale", scale, xq, ScalarType::Float, n, a.groups);
    require_aligned(op, "scale", scale.const_data_ptr());
  } else {
    require(scale.scalar_type() == ScalarType::Float && scale.numel() == n && scale.is_contiguous(),
            op, "scale has shape ", shape_of(scale), " and dtype ", name_of(scale.scalar_type()),
            ", must be contiguous float32 [", n, "]");
    require_same_device(op, "scale", scale, xq);
  }
  a.scale = static_cast<const float*>(scale.const_data_ptr());
  std::optional<Tensor> dense_bias;
  if (bias.has_value()) {
    dense_bias = check_bias(op, *bias, xq, n, &a.bias_dtype);
    a.bias = dense_bias->const_data_ptr();
  }
  a.counters = check_counters(op, counters, xq, a.m, n);
  a.y_dtype = out_dtype(op, dtype);
  Tensor y = empty(with_last(xq, n), scalar_type_of(a.y_dtype), xq);
  a.y = y.mutable_data_ptr();
  a.ldy = n;
  launch_linear(op, a, xq, qk_cuda_w8a8_linear);
  return y;
}

}  // namespace
}  // namespace quantkit::binding

STABLE_TORCH_LIBRARY_IMPL(quantkit, CUDA, m) {
  using namespace quantkit::binding;
  m.impl("w8a16_linear", TORCH_BOX(&w8a16_linear));
  m.impl("w8a8_mma_linear", TORCH_BOX(&w8a8_mma_linear));
}
