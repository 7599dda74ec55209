// The CPU operators, through LibTorch's stable ABI. Schemas live in quantkit/ops/schema.py.
#include "cpu.h"
#include "quantkit/decoder.h"

namespace quantkit::binding {
namespace {

Tensor pack(const char* op, const Tensor& codes, int32_t format) {
  require(codes.dim() == 2, op, "codes have shape ", shape_of(codes), ", must be [N, K]");
  const int64_t n = codes.size(0), k = codes.size(1);
  require(n > 0 && k > 0, op, "codes have shape ", shape_of(codes), ", N and K must be positive");
  const Rows rows = rows_of(op, "codes", codes);
  const int64_t per_chunk = format == QK_W4 ? 8 : 4;
  Tensor packed =
      empty({(n + 15) / 16, (k + per_chunk - 1) / per_chunk, 64}, ScalarType::Byte, codes);
  const auto* in = static_cast<const uint8_t*>(rows.data);
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  follow_torch_threads();
  finish(op, format == QK_W4 ? qk_pack_w4(in, rows.stride, n, k, out)
                             : qk_pack_w8(in, rows.stride, n, k, out));
  return packed;
}

Tensor pack_w4(Tensor codes) {
  require(codes.scalar_type() == ScalarType::Byte, "pack_w4", "codes have dtype ",
          name_of(codes.scalar_type()), ", must be uint8 with values 0..15");
  return pack("pack_w4", codes, QK_W4);
}

Tensor pack_w8(Tensor codes) {
  const ScalarType dtype = codes.scalar_type();
  require(dtype == ScalarType::Byte || dtype == ScalarType::Char ||
              dtype == ScalarType::Float8_e4m3fn,
          "pack_w8", "codes have dtype ", name_of(dtype),
          ", must be int8, float8_e4m3fn or uint8 bytes of one of them");
  return pack("pack_w8", codes, QK_I8);
}

Tensor pack_float(Tensor values) {
  const char* op = "pack_float";
  require(values.dim() == 2, op, "values have shape ", shape_of(values), ", must be [N, K]");
  const ScalarType dtype = values.scalar_type();
  require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, op, "values have dtype ",
          name_of(dtype), ", must be bfloat16 or float32");
  const int64_t n = values.size(0), k = values.size(1);
  require(n > 0 && k > 0, op, "values have shape ", shape_of(values),
          ", N and K must be positive");
  const Rows rows = rows_of(op, "values", values);
  const PackedFormat format = packed_format(dtype == ScalarType::Float ? QK_F32W : QK_B16);
  Tensor packed =
      empty({(n + 15) / 16, (k + format.codes - 1) / format.codes, format.width}, dtype, values);
  follow_torch_threads();
  finish(op, qk_pack_float(rows.data, float_dtype(op, "values", values), rows.stride, n, k,
                           packed.mutable_data_ptr()));
  return packed;
}

Tensor run_weight_only(const char* op, WeightOnlyCall& call, const Tensor& x) {
  Tensor y = empty(with_last(x, call.args.n), x.scalar_type(), x);
  call.args.y = y.mutable_data_ptr();
  call.args.ldy = call.args.n;
  follow_torch_threads();
  finish(op, qk_weight_only_linear(&call.args));
  return y;
}

Tensor w4_linear(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero, Tensor lut,
                 std::optional<Tensor> bias, int64_t n, int64_t group_size) {
  WeightOnlyCall call("w4_linear", x, packed, scale, zero, bias, n, QK_W4, group_size);
  call.set_lut("w4_linear", lut, x);
  return run_weight_only("w4_linear", call, x);
}

// Row-major [N, K] codes are packed here, on every call: correct, and as slow as it sounds.
Tensor packed_bytes(const char* op, const Tensor& codes, int64_t n, int64_t k) {
  if (codes.dim() != 2) return codes;
  require(codes.size(0) == n && codes.size(1) == k, op, "weight has shape ", shape_of(codes),
          ", must be [", n, ", ", k, "], or the result of quantkit.ops.pack_w8 on such a tensor");
  return pack_w8(codes);
}

Tensor w8_linear(Tensor x, Tensor codes, Tensor scale, std::optional<Tensor> zero,
                 std::optional<Tensor> bias, int64_t kind, int64_t group_size) {
  const char* op = "w8_linear";
  require(scale.dim() == 2, op, "scale has shape ", shape_of(scale),
          ", must be [N, ceil(K / group_size)]");
  require(x.dim() >= 1, op, "x is a scalar, must be [..., K]; add a dimension");
  const Tensor packed = packed_bytes(op, codes, scale.size(0), x.size(x.dim() - 1));
  WeightOnlyCall call(op, x, packed, scale, zero, bias, scale.size(0),
                      byte_format(op, kind), group_size);
  return run_weight_only(op, call, x);
}

Tensor float_linear(Tensor x, Tensor packed, std::optional<Tensor> bias, int64_t n) {
  const char* op = "float_linear";
  const ScalarType dtype = packed.scalar_type();
  require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, op,
          "packed weight has dtype ", name_of(dtype),
          ", must be bfloat16 or float32; make it with quantkit.ops.pack_float");
  WeightOnlyCall call(op, x, bias, n, dtype == ScalarType::Float ? QK_F32W : QK_B16);
  call.args.packed = check_packed(op, packed, x, call.args.format, n, call.args.k);
  // Every row's scale is this one: its strides stay 0.
  static const float one = 1.0f;
  call.args.scale = &one;
  call.args.scale_dtype = QK_F32;
  call.args.group_size = call.args.k;
  return run_weight_only(op, call, x);
}

Tensor dequantize(const char* op, const Tensor& packed, const Tensor& scale,
                  const std::optional<Tensor>& zero, const Tensor* lut, int64_t n, int64_t k,
                  int32_t format, int64_t group_size, int64_t dtype) {
  require(n > 0 && k > 0, op, "N = ", n, " and K = ", k, " must be positive");
  const int32_t out = out_dtype(op, dtype);
  Tensor y = empty({n, k}, scalar_type_of(out), packed);
  // The call has no activation: an empty one of the right width stands in for it.
  Tensor none = empty({0, k}, scalar_type_of(out), packed);
  WeightOnlyCall call(op, none, packed, scale, zero, std::nullopt, n, format, group_size);
  if (lut != nullptr) call.set_lut(op, *lut, packed);
  call.args.m = n;
  call.args.y = y.mutable_data_ptr();
  call.args.ldy = k;
  follow_torch_threads();
  finish(op, qk_dequantize(&call.args));
  return y;
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

Tensor as_f32(const char* op, const char* what, const Tensor& t) {
  float_dtype(op, what, t);
  return dense(t.scalar_type() == ScalarType::Float ? t
                                                    : torch::stable::to(t, ScalarType::Float));
}

Tensor w8a8_linear(Tensor xq, Tensor x_scale, Tensor wq, Tensor w_scale, std::optional<Tensor> bias,
                   int64_t dtype) {
  const char* op = "w8a8_linear";
  require(xq.scalar_type() == ScalarType::Char, op, "xq has dtype ", name_of(xq.scalar_type()),
          ", must be int8; make it with quantkit.ops.quantize_int8_per_token");
  const Rows x = rows_of(op, "xq", xq);
  const int64_t n = w_scale.numel(), k = x.k;
  require(n > 0, op, "w_scale is empty, must hold one scale a row of the weight");
  require(k > 0 && k <= 131071, op, "K = ", k,
          " must be in 1..131071, where no int32 sum can overflow");
  require(x_scale.numel() == 1 || x_scale.numel() == x.m, op, "x_scale has ", x_scale.numel(),
          " values, must have 1 or one a row of xq (", x.m, ")");
  const Tensor packed = packed_bytes(op, wq, n, k);
  require(packed.dim() == 3 && packed.size(0) == (n + 15) / 16 && packed.size(1) == (k + 3) / 4 &&
              packed.size(2) == 64 && packed.is_contiguous() &&
              packed.scalar_type() == ScalarType::Byte,
          op, "wq has shape ", shape_of(wq), ", must be int8 [", n, ", ", k,
          "] or the uint8 result of quantkit.ops.pack_w8 on it");
  const Tensor xs = as_f32(op, "x_scale", x_scale), ws = as_f32(op, "w_scale", w_scale);

  qk_int8_linear_args args{};
  args.format = QK_I8;
  args.y_dtype = out_dtype(op, dtype);
  std::optional<Tensor> bias_rows;
  if (bias.has_value()) {
    bias_rows = check_bias(op, *bias, xq, n, &args.bias_dtype);
    args.bias = bias_rows->const_data_ptr();
  }
  Tensor y = empty(with_last(xq, n), scalar_type_of(args.y_dtype), xq);
  args.xq = static_cast<const int8_t*>(x.data);
  args.ldx = x.stride;
  args.m = x.m;
  args.n = n;
  args.k = args.group_size = args.x_group_size = k;
  args.packed = packed.const_data_ptr();
  args.x_scale = static_cast<const float*>(xs.const_data_ptr());
  args.x_scale_stride = x_scale.numel() == 1 ? 0 : 1;
  args.scale = ws.const_data_ptr();
  args.scale_dtype = QK_F32;
  args.scale_stride_n = args.scale_stride_g = 1;
  args.y = y.mutable_data_ptr();
  args.ldy = n;
  follow_torch_threads();
  finish(op, qk_int8_linear(&args));
  return y;
}

Tensor int8_linear(Tensor xq, Tensor x_scale, Tensor packed, Tensor scale,
                   std::optional<Tensor> zero, std::optional<Tensor> lut,
                   std::optional<Tensor> bias, int64_t n, int64_t group_size, int64_t dtype,
                   int64_t x_group_size) {
  const char* op = "int8_linear";
  require(xq.scalar_type() == ScalarType::Char, op, "xq has dtype ", name_of(xq.scalar_type()),
          ", must be int8; make it with quantkit.ops.quantize_int8_per_group");
  const Rows x = rows_of(op, "xq", xq);
  const int64_t k = x.k;
  require(k > 0 && n > 0, op, "K = ", k, " and N = ", n, " must be positive");

  qk_int8_linear_args args{};
  args.xq = static_cast<const int8_t*>(x.data);
  args.ldx = x.stride;
  args.m = x.m;
  args.n = n;
  args.k = k;
  args.format = lut.has_value() ? QK_W4 : QK_I8;
  args.packed = check_packed(op, packed, xq, args.format, n, k);
  if (lut.has_value()) args.lut = check_lut(op, *lut, xq);
  args.group_size = check_group_size(op, group_size, k);
  args.x_group_size = check_group_size(op, x_group_size, k);
  const int64_t smaller = args.group_size < args.x_group_size ? args.group_size : args.x_group_size;
  const int64_t larger = args.group_size < args.x_group_size ? args.x_group_size : args.group_size;
  require(larger == k || larger % smaller == 0, op, "group_size ", args.group_size,
          " and x_group_size ", args.x_group_size, ": one must divide the other");
  require(smaller <= 131071, op, smaller,
          " columns share both scales, must be at most 131071, where no int32 sum can overflow");

  const int64_t groups = (k + args.group_size - 1) / args.group_size;
  check_group_table(op, "scale", scale, xq, n, groups, true);
  args.scale = scale.const_data_ptr();
  args.scale_dtype = scale.scalar_type() == ScalarType::Float ? QK_F32 : QK_BF16;
  args.scale_stride_n = scale.stride(0);
  args.scale_stride_g = scale.stride(1);
  if (zero.has_value()) {
    check_group_table(op, "zero", *zero, xq, n, groups);
    args.zero = floats(*zero);
    args.zero_stride_n = zero->stride(0);
    args.zero_stride_g = zero->stride(1);
  }

  const int64_t x_groups = (k + args.x_group_size - 1) / args.x_group_size;
  const bool one = x_scale.numel() == 1;
  require(one || (x_scale.dim() == xq.dim() && x_scale.size(x_scale.dim() - 1) == x_groups &&
                  x_scale.numel() == x.m * x_groups),
          op, "x_scale has shape ", shape_of(x_scale), ", must be ",
          shape(with_last(xq, x_groups)), " for x_group_size ", args.x_group_size,
          ", or one value for all");
  const Tensor scales = as_f32(op, "x_scale", x_scale);
  args.x_scale = floats(scales);
  if (one) {
    args.x_group_size = k;
  } else {
    args.x_scale_stride = x_groups;
  }

  args.y_dtype = out_dtype(op, dtype);
  std::optional<Tensor> bias_row;
  if (bias.has_value()) {
    bias_row = check_bias(op, *bias, xq, n, &args.bias_dtype);
    args.bias = bias_row->const_data_ptr();
  }
  Tensor y = empty(with_last(xq, n), scalar_type_of(args.y_dtype), xq);
  args.y = y.mutable_data_ptr();
  args.ldy = n;
  follow_torch_threads();
  const int status = qk_int8_linear(&args);
  require(status != QK_UNSUPPORTED || !lut.has_value(), op,
          "lut holds values that int8 products cannot take; they must be integers or halves, the"
          " largest at most 127 steps above the smallest; use w4_linear for other codebooks");
  finish(op, status);
  return y;
}

qk_quantize_args quantize_args(const char* op, const Rows& x, const Tensor& tensor,
                               int32_t format) {
  require(x.k > 0, op, "x has shape ", shape_of(tensor), ", its last dimension must not be empty");
  qk_quantize_args args{};
  args.x = x.data;
  args.ldx = x.stride;
  args.x_dtype = args.arith_dtype = float_dtype(op, "x", tensor);
  args.format = format;
  args.m = x.m;
  args.k = args.group_size = x.k;
  return args;
}

ScalarType code_type(int32_t format) {
  return format == QK_I8 ? ScalarType::Char : ScalarType::Float8_e4m3fn;
}

Tensor run_quantize(const char* op, qk_quantize_args& args, const Tensor& x) {
  Tensor q = empty(with_last(x, args.k), code_type(args.format), x);
  args.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  follow_torch_threads();
  finish(op, qk_quantize(&args));
  return q;
}

std::tuple<Tensor, Tensor> quantize_dynamic(const char* op, const Tensor& x, int32_t format,
                                            int64_t group_size) {
  const Rows rows = rows_of(op, "x", x);
  qk_quantize_args args = quantize_args(op, rows, x, format);
  if (group_size > 0) args.group_size = group_size;
  const int64_t groups = (args.k + args.group_size - 1) / args.group_size;
  Tensor scale = empty(with_last(x, groups), x.scalar_type(), x);
  args.scale = scale.mutable_data_ptr();
  return {run_quantize(op, args, x), scale};
}

Tensor quantize_static(const char* op, const Tensor& x, const Tensor& scale, int32_t format) {
  const Rows rows = rows_of(op, "x", x);
  qk_quantize_args args = quantize_args(op, rows, x, format);
  require(scale.numel() == 1, op, "scale has shape ", shape_of(scale),
          ", a static activation scale must be one value");
  // torch's promotion: the same dtype stays, two different ones meet in float32.
  if (float_dtype(op, "scale", scale) != args.x_dtype) args.arith_dtype = QK_F32;
  const Tensor one = torch::stable::to(scale, scalar_type_of(args.arith_dtype));
  args.scale_given = 1;
  args.scale = const_cast<void*>(one.const_data_ptr());
  return run_quantize(op, args, x);
}

std::tuple<Tensor, Tensor> quantize_int8_per_token(Tensor x) {
  return quantize_dynamic("quantize_int8_per_token", x, QK_I8, 0);
}
std::tuple<Tensor, Tensor> quantize_fp8_per_token(Tensor x) {
  return quantize_dynamic("quantize_fp8_per_token", x, QK_F8, 0);
}
std::tuple<Tensor, Tensor> quantize_fp8_per_block(Tensor x, int64_t block) {
  require(block > 0, "quantize_fp8_per_block", "block ", block, " must be positive; 128 is usual");
  return quantize_dynamic("quantize_fp8_per_block", x, QK_F8, block);
}
std::tuple<Tensor, Tensor> quantize_int8_per_group(Tensor x, int64_t group) {
  const char* op = "quantize_int8_per_group";
  require(group > 0, op, "group ", group, " must be positive; K gives one scale a row");
  const Rows rows = rows_of(op, "x", x);
  require(rows.k > 0, op, "x has shape ", shape_of(x), ", its last dimension must not be empty");
  qk_quantize_int8_args args{};
  args.m = rows.m;
  args.k = args.ldq = rows.k;
  args.group = group < rows.k ? group : rows.k;
  args.x = rows.data;
  args.ldx = rows.stride;
  args.x_dtype = float_dtype(op, "x", x);
  Tensor q = empty(with_last(x, rows.k), ScalarType::Char, x);
  Tensor scale =
      empty(with_last(x, (rows.k + args.group - 1) / args.group), ScalarType::Float, x);
  args.q = static_cast<int8_t*>(q.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  follow_torch_threads();
  finish(op, qk_quantize_int8(&args));
  return {q, scale};
}
Tensor quantize_int8_static(Tensor x, Tensor scale) {
  return quantize_static("quantize_int8_static", x, scale, QK_I8);
}
Tensor quantize_fp8_static(Tensor x, Tensor scale) {
  return quantize_static("quantize_fp8_static", x, scale, QK_F8);
}

// torch's own threads as an executor of the kernels.
void on_torch_threads(int32_t threads, void (*body)(void*, int32_t), void* ctx) {
  struct Call {
    void (*body)(void*, int32_t);
    void* ctx;
  } call{body, ctx};
  const auto range = [](int64_t begin, int64_t end, void* opaque) {
    const Call& made = *static_cast<Call*>(opaque);
    for (int64_t i = begin; i < end; ++i) made.body(made.ctx, static_cast<int32_t>(i));
  };
  torch_parallel_for(0, threads, 1, range, &call);
}

}  // namespace
}  // namespace quantkit::binding

// 1: run on torch's threads; 0: on the library's own.
extern "C" QK_EXPORT void qk_use_torch_threads(int32_t use) {
  qk_set_executor(use != 0 ? quantkit::binding::on_torch_threads : nullptr);
}

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  using namespace quantkit::binding;
  m.impl("pack_w4", TORCH_BOX(&pack_w4));
  m.impl("pack_w8", TORCH_BOX(&pack_w8));
  m.impl("pack_float", TORCH_BOX(&pack_float));
  m.impl("w4_linear", TORCH_BOX(&w4_linear));
  m.impl("w8_linear", TORCH_BOX(&w8_linear));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("float_linear", TORCH_BOX(&float_linear));
  m.impl("dequantize_w4", TORCH_BOX(&dequantize_w4));
  m.impl("dequantize_w8", TORCH_BOX(&dequantize_w8));
  m.impl("quantize_int8_per_token", TORCH_BOX(&quantize_int8_per_token));
  m.impl("quantize_int8_per_group", TORCH_BOX(&quantize_int8_per_group));
  m.impl("quantize_int8_static", TORCH_BOX(&quantize_int8_static));
  m.impl("quantize_fp8_per_token", TORCH_BOX(&quantize_fp8_per_token));
  m.impl("quantize_fp8_per_block", TORCH_BOX(&quantize_fp8_per_block));
  m.impl("quantize_fp8_static", TORCH_BOX(&quantize_fp8_static));
}
