// Argument checks shared by the CPU and the CUDA binding. Every message gives the value, the rule
// it broke and what to do about it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "quantkit/quantkit.h"

namespace quantkit::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] inline void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "quantkit::" << op << ": ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

template <class... Parts>
inline void require(bool holds, const char* op, const Parts&... parts) {
  if (!holds) fail(op, parts...);
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << ']';
  return out.str();
}

inline const char* name_of(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline int32_t float_dtype(const char* op, const char* what, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return QK_F32;
    case ScalarType::Half: return QK_F16;
    case ScalarType::BFloat16: return QK_BF16;
    default:
      fail(op, what, " has dtype ", name_of(t.scalar_type()),
           ", must be float32, float16 or bfloat16; convert it with .to(torch.bfloat16)");
  }
}

inline ScalarType scalar_type_of(int32_t dtype) {
  return dtype == QK_F32 ? ScalarType::Float
                         : (dtype == QK_F16 ? ScalarType::Half : ScalarType::BFloat16);
}

// dtype codes of operators that choose their output: 0 float32, 1 float16, 2 bfloat16.
inline int32_t out_dtype(const char* op, int64_t code) {
  require(code >= 0 && code <= 2, op, "out_dtype ", code,
          " is not a dtype code; use 0 (float32), 1 (float16) or 2 (bfloat16)");
  return static_cast<int32_t>(code);
}

inline Tensor empty(std::vector<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t device_type = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  const int32_t shim_dtype =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               shim_dtype, device_type, like.get_device_index(), &handle) != 0) {
    throw std::runtime_error("quantkit: no memory for an output tensor");
  }
  return Tensor(handle);
}

// A tensor of rows: [..., k] seen as [m, k] with a constant stride between rows.
struct Rows {
  Tensor tensor;  // keeps a copy alive when the strides did not allow a view
  const void* data;
  int64_t m, k, stride;
};

inline Rows rows_of(const char* op, const char* what, const Tensor& t) {
  require(t.dim() >= 1, op, what, " is a scalar, must be [..., K]; add a dimension");
  const int64_t last = t.dim() - 1;
  Rows rows{t, nullptr, 1, t.size(last), t.size(last)};
  for (int64_t i = 0; i < last; ++i) rows.m *= t.size(i);
  bool view = rows.k == 1 || t.stride(last) == 1;
  // Leading dimensions must collapse into one stride; those of size 1 do not matter.
  int64_t expected = -1;
  for (int64_t i = last - 1; view && i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (expected < 0) {
      rows.stride = t.stride(i);
      expected = rows.stride;
    }
    view = t.stride(i) == expected;
    expected *= t.size(i);
  }
  if (!view || rows.stride < rows.k) {
    rows.tensor = torch::stable::contiguous(t);
    rows.stride = rows.k;
  }
  rows.data = rows.tensor.const_data_ptr();
  return rows;
}

inline std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t i = 0; i + 1 < t.dim(); ++i) sizes[i] = t.size(i);
  sizes.back() = last;
  return sizes;
}

inline void require_same_device(const char* op, const char* what, const Tensor& t,
                                const Tensor& x) {
  require(t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(), op, what,
          " is on another device than x; move the layer's buffers to the device of x");
}

inline int64_t check_group_size(const char* op, int64_t group_size, int64_t k) {
  if (group_size == -1) return k;
  require(group_size > 0, op, "group_size ", group_size,
          " must be positive, or -1 for one group a row");
  require(group_size >= k || group_size % 16 == 0, op, "group_size ", group_size,
          " is not a multiple of 16; use 32, 64 or 128, or K = ", k, " for one group a row");
  return group_size < k ? group_size : k;
}

inline void check_group_table(const char* op, const char* what, const Tensor& t, const Tensor& x,
                              int64_t n, int64_t groups, bool bf16_too = false) {
  const bool bf16 = bf16_too && t.scalar_type() == ScalarType::BFloat16;
  require(bf16 || t.scalar_type() == ScalarType::Float, op, what, " has dtype ",
          name_of(t.scalar_type()), ", must be float32", bf16_too ? " or bfloat16" : "",
          "; convert it once when the layer is loaded");
  require(t.dim() == 2 && t.size(0) == n && t.size(1) == groups, op, what, " has shape ",
          shape_of(t), ", must be [N, ceil(K / group_size)] = [", n, ", ", groups, "]");
  require_same_device(op, what, t, x);
}

// A packed weight: 64 bytes a chunk of 16 rows, in elements of the format's dtype.
struct PackedFormat {
  int64_t codes;  // columns of a chunk
  ScalarType dtype;
  int64_t width;  // elements of a chunk
  const char* packer;
};

inline PackedFormat packed_format(int32_t format) {
  switch (format) {
    case QK_W4: return {8, ScalarType::Byte, 64, "pack_w4"};
    case QK_B16: return {2, ScalarType::BFloat16, 32, "pack_float"};
    case QK_F32W: return {1, ScalarType::Float, 16, "pack_float"};
    default: return {4, ScalarType::Byte, 64, "pack_w8"};
  }
}

inline const void* check_packed(const char* op, const Tensor& packed, const Tensor& like,
                                int32_t format, int64_t n, int64_t k) {
  const PackedFormat f = packed_format(format);
  const int64_t blocks = (n + 15) / 16, chunks = (k + f.codes - 1) / f.codes;
  require(packed.dim() == 3 && packed.size(0) == blocks && packed.size(1) == chunks &&
              packed.size(2) == f.width && packed.is_contiguous(),
          op, "packed weight has shape ", shape_of(packed), ", must be contiguous [", blocks, ", ",
          chunks, ", ", f.width, "] for N = ", n, " and K = ", k, "; make it with quantkit.ops.",
          f.packer);
  require(packed.scalar_type() == f.dtype, op, "packed weight has dtype ",
          name_of(packed.scalar_type()), ", must be ",
          f.dtype == ScalarType::Byte ? "uint8" : name_of(f.dtype));
  require_same_device(op, "packed weight", packed, like);
  return packed.const_data_ptr();
}

inline Tensor check_bias(const char* op, const Tensor& bias, const Tensor& like, int64_t n,
                         int32_t* dtype) {
  *dtype = float_dtype(op, "bias", bias);
  require(bias.dim() == 1 && bias.size(0) == n, op, "bias has shape ", shape_of(bias),
          ", must be [N] = [", n, "]");
  require_same_device(op, "bias", bias, like);
  return bias.is_contiguous() ? bias : torch::stable::contiguous(bias);
}

inline const float* check_lut(const char* op, const Tensor& lut, const Tensor& like) {
  require(lut.dim() == 1 && lut.size(0) == 16 && lut.scalar_type() == ScalarType::Float &&
              lut.is_contiguous(),
          op, "lut has shape ", shape_of(lut), " and dtype ", name_of(lut.scalar_type()),
          ", must be 16 contiguous float32 values");
  require_same_device(op, "lut", lut, like);
  return static_cast<const float*>(lut.const_data_ptr());
}

// The tensors behind a qk_weight_only_args: checks everything that the kernel relies on.
struct WeightOnlyCall {
  qk_weight_only_args args{};
  Rows x;
  std::optional<Tensor> bias;

  WeightOnlyCall(const char* op, const Tensor& x_, const std::optional<Tensor>& bias_, int64_t n,
                 int32_t format)
      : x(rows_of(op, "x", x_)) {
    require(x.k > 0 && n > 0, op, "K = ", x.k, " and N = ", n, " must be positive");
    args.x = x.data;
    args.ldx = x.stride;
    args.x_dtype = float_dtype(op, "x", x_);
    args.format = format;
    args.m = x.m;
    args.n = n;
    args.k = x.k;
    if (bias_.has_value()) {
      bias = check_bias(op, *bias_, x_, n, &args.bias_dtype);
      args.bias = bias->const_data_ptr();
    }
  }

  WeightOnlyCall(const char* op, const Tensor& x_, const Tensor& packed, const Tensor& scale,
                 const std::optional<Tensor>& zero, const std::optional<Tensor>& bias_, int64_t n,
                 int32_t format, int64_t group_size)
      : WeightOnlyCall(op, x_, bias_, n, format) {
    args.packed = check_packed(op, packed, x_, format, n, args.k);
    args.group_size = check_group_size(op, group_size, args.k);
    const int64_t groups = (args.k + args.group_size - 1) / args.group_size;
    check_group_table(op, "scale", scale, x_, n, groups);
    args.scale = scale.const_data_ptr();
    args.scale_dtype = QK_F32;
    args.scale_stride_n = scale.stride(0);
    args.scale_stride_g = scale.stride(1);
    if (zero.has_value()) {
      check_group_table(op, "zero", *zero, x_, n, groups);
      args.zero = static_cast<const float*>(zero->const_data_ptr());
      args.zero_stride_n = zero->stride(0);
      args.zero_stride_g = zero->stride(1);
    }
  }

  void set_lut(const char* op, const Tensor& lut, const Tensor& like) {
    args.lut = check_lut(op, lut, like);
  }
};

inline int32_t byte_format(const char* op, int64_t kind) {
  require(kind == QK_I8 || kind == QK_F8, op, "kind ", kind, " is unknown; use ", int(QK_I8),
          " for int8 or ", int(QK_F8), " for float8_e4m3fn codes");
  return static_cast<int32_t>(kind);
}

inline void check_status(const char* op, int status, const char* message) {
  if (status != QK_OK) fail(op, message, " (status ", status, ")");
}

}  // namespace quantkit::binding
