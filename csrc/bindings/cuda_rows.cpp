// The CUDA operators between the linear layers: activation quantizers and Hadamard products, alone
// and fused.
#include <tuple>

#include "cuda.h"

namespace quantkit::binding {
namespace {

constexpr int64_t kGroup = 128;

void check_width(const char* op, const char* what, const Tensor& t, int64_t columns, int64_t most) {
  require(columns > 0 && columns <= most, op, what, " has shape ", shape_of(t),
          ", a row must have 1 to ", most, " columns on a GPU");
}

int32_t row_dtype(const char* op, const char* what, const Tensor& t) {
  const int32_t dtype = float_dtype(op, what, t);
  require(dtype != QK_F32, op, what,
          " has dtype float32, which has no CUDA kernel; use float16 or bfloat16");
  return dtype;
}

ScalarType code_type(int32_t format) {
  return format == QK_I8 ? ScalarType::Char : ScalarType::Float8_e4m3fn;
}

// Codes of rows shaped as [..., k], and one scale for each group of them.
struct Codes {
  qk_quantize_args args{};
  Tensor q, scale;

  Codes(const char* op, const Tensor& like, int64_t k, int32_t dtype, int32_t format, int64_t group)
      : q(empty(with_last(like, k), code_type(format), like)),
        scale(empty(with_last(like, group < 0 ? 1 : (k + group - 1) / group), scalar_type_of(dtype),
                    like)) {
    require(group == -1 || (group == kGroup && format == QK_F8), op, "groups of ", group,
            " columns have no CUDA kernel here; use ", kGroup, " for fp8, or one scale a token");
    args.x_dtype = args.arith_dtype = dtype;
    args.format = format;
    args.k = k;
    args.group_size = group < 0 ? k : group;
    args.scale = scale.mutable_data_ptr();
    args.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  }
};

template <class Call>
void on_stream(const char* op, const Tensor& x, Call call) {
  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  check_launch(op, call(current_stream(device)));
}

// ---- quantizers ------------------------------------------------------------------------------

void set_rows(const char* op, const Tensor& x, const Rows& rows, qk_quantize_args& args) {
  check_width(op, "x", x, rows.k, 49152);
  args.x = rows.data;
  args.ldx = rows.stride;
  args.m = rows.m;
}

std::tuple<Tensor, Tensor> quantize_dynamic(const char* op, const Tensor& x, int32_t format,
                                            int64_t group) {
  const Rows rows = rows_of(op, "x", x);
  Codes codes(op, x, rows.k, row_dtype(op, "x", x), format, group);
  set_rows(op, x, rows, codes.args);
  on_stream(op, x, [&](void* stream) { return qk_cuda_quantize(&codes.args, stream); });
  return {codes.q, codes.scale};
}

Tensor quantize_static(const char* op, const Tensor& x, const Tensor& scale, int32_t format) {
  const Rows rows = rows_of(op, "x", x);
  require(scale.numel() == 1, op, "scale has shape ", shape_of(scale),
          ", a static activation scale must be one value");
  require_same_device(op, "scale", scale, x);
  Codes codes(op, x, rows.k, row_dtype(op, "x", x), format, -1);
  set_rows(op, x, rows, codes.args);
  codes.args.scale_given = 1;
  const int32_t scale_dtype = float_dtype(op, "scale", scale);
  codes.args.arith_dtype = scale_dtype == codes.args.x_dtype ? scale_dtype : int32_t(QK_F32);
  const Tensor given = codes.args.arith_dtype == scale_dtype
                           ? scale
                           : torch::stable::to(scale, ScalarType::Float);
  codes.args.scale = const_cast<void*>(given.const_data_ptr());
  on_stream(op, x, [&](void* stream) { return qk_cuda_quantize(&codes.args, stream); });
  return codes.q;
}

std::tuple<Tensor, Tensor> quantize_int8_per_token(Tensor x) {
  return quantize_dynamic("quantize_int8_per_token", x, QK_I8, -1);
}

std::tuple<Tensor, Tensor> quantize_fp8_per_token(Tensor x) {
  return quantize_dynamic("quantize_fp8_per_token", x, QK_F8, -1);
}

std::tuple<Tensor, Tensor> quantize_fp8_per_block(Tensor x, int64_t block) {
  return quantize_dynamic("quantize_fp8_per_block", x, QK_F8, block);
}

Tensor quantize_int8_static(Tensor x, Tensor scale) {
  return quantize_static("quantize_int8_static", x, scale, QK_I8);
}

Tensor quantize_fp8_static(Tensor x, Tensor scale) {
  return quantize_static("quantize_fp8_static", x, scale, QK_F8);
}

// ---- norms and gates -------------------------------------------------------------------------

struct Norm {
  qk_add_rms_norm_args args{};
  std::optional<Rows> branch;

  Norm(const char* op, Tensor& residual, const std::optional<Tensor>& added, const Tensor& weight,
       double epsilon, int64_t dtype) {
    require(residual.dim() >= 1 && residual.scalar_type() == ScalarType::Float &&
                residual.is_contiguous(),
            op, "residual has shape ", shape_of(residual), " and dtype ",
            name_of(residual.scalar_type()),
            ", must be contiguous float32 [..., N]: it is written in place");
    const Rows rows = rows_of(op, "residual", residual);
    check_width(op, "residual", residual, rows.k, 24576);
    require(weight.scalar_type() == ScalarType::Float && weight.dim() == 1 &&
                weight.size(0) == rows.k && weight.is_contiguous(),
            op, "weight has shape ", shape_of(weight), " and dtype ", name_of(weight.scalar_type()),
            ", must be contiguous float32 [", rows.k, "]");
    require_same_device(op, "weight", weight, residual);
    args.m = rows.m;
    args.n = args.ld_residual = args.ldy = rows.k;
    args.residual = static_cast<float*>(residual.mutable_data_ptr());
    args.weight = static_cast<const float*>(weight.const_data_ptr());
    args.epsilon = static_cast<float>(epsilon);
    args.y_dtype = out_dtype(op, dtype);
    require(args.y_dtype != QK_F32, op,
            "rows in float32 have no CUDA kernel; use float16 or bfloat16");
    if (added.has_value()) {
      branch = rows_of(op, "branch", *added);
      require(branch->m == args.m && branch->k == args.n, op, "branch has shape ", shape_of(*added),
              ", must be that of residual, ", shape_of(residual));
      require_same_device(op, "branch", *added, residual);
      args.branch = branch->data;
      args.ld_branch = branch->stride;
      args.branch_dtype = float_dtype(op, "branch", *added);
    }
  }
};

Tensor add_rms_norm(Tensor residual, std::optional<Tensor> branch, Tensor weight, double epsilon,
                    int64_t dtype) {
  const char* op = "add_rms_norm";
  Norm norm(op, residual, branch, weight, epsilon, dtype);
  Tensor y = empty(with_last(residual, norm.args.n), scalar_type_of(norm.args.y_dtype), residual);
  norm.args.y = y.mutable_data_ptr();
  on_stream(op, residual,
            [&](void* stream) { return qk_cuda_add_rms_norm(&norm.args, nullptr, stream); });
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm_quantize(Tensor residual, std::optional<Tensor> branch,
                                                 Tensor weight, double epsilon, int64_t dtype,
                                                 int64_t kind, int64_t group) {
  const char* op = "add_rms_norm_quantize";
  Norm norm(op, residual, branch, weight, epsilon, dtype);
  Codes codes(op, residual, norm.args.n, norm.args.y_dtype, byte_format(op, kind), group);
  on_stream(op, residual,
            [&](void* stream) { return qk_cuda_add_rms_norm(&norm.args, &codes.args, stream); });
  return {codes.q, codes.scale};
}

void check_gate(const char* op, const Tensor& gate_up, const Rows& rows, int64_t gate) {
  require(gate == QK_GATE_SILU || gate == QK_GATE_GELU_TANH, op, "gate ", gate,
          " is unknown; use 0 for silu or 1 for gelu_tanh");
  require(rows.k % 2 == 0, op, "gate_up has shape ", shape_of(gate_up),
          ", its last dimension must be even: all of gate, then all of up");
}

// The arguments of a gate, without its result.
qk_gate_args gate_args(const char* op, const Tensor& gate_up, const Rows& rows, int64_t gate) {
  check_gate(op, gate_up, rows, gate);
  check_width(op, "gate_up", gate_up, rows.k, 2 * 49152);
  qk_gate_args args{};
  args.kind = static_cast<int32_t>(gate);
  args.m = rows.m;
  args.n = args.ldy = rows.k / 2;
  args.x = rows.data;
  args.ldx = rows.stride;
  args.dtype = row_dtype(op, "gate_up", gate_up);
  return args;
}

Tensor gated_activation(Tensor gate_up, int64_t kind) {
  const char* op = "gated_activation";
  const Rows rows = rows_of(op, "gate_up", gate_up);
  qk_gate_args args = gate_args(op, gate_up, rows, kind);
  Tensor y = empty(with_last(gate_up, args.n), gate_up.scalar_type(), gate_up);
  args.y = y.mutable_data_ptr();
  on_stream(op, gate_up,
            [&](void* stream) { return qk_cuda_gated_activation(&args, nullptr, stream); });
  return y;
}

std::tuple<Tensor, Tensor> gated_activation_quantize(Tensor gate_up, int64_t gate, int64_t kind,
                                                     int64_t group) {
  const char* op = "gated_activation_quantize";
  const Rows rows = rows_of(op, "gate_up", gate_up);
  const qk_gate_args args = gate_args(op, gate_up, rows, gate);
  Codes codes(op, gate_up, args.n, args.dtype, byte_format(op, kind), group);
  on_stream(op, gate_up,
            [&](void* stream) { return qk_cuda_gated_activation(&args, &codes.args, stream); });
  return {codes.q, codes.scale};
}

// ---- Hadamard products -----------------------------------------------------------------------

// Shared memory that a block may ask for.
int64_t shared_bytes(int device) {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// The arguments of a product of rows of `columns`, without its result.
qk_cuda_hadamard_args hadamard_args(const char* op, const char* what, const Tensor& x,
                                    const Rows& rows, int64_t columns, const Tensor& signs,
                                    int64_t base, int64_t order) {
  require(base >= 1 && base <= QK_LARGEST_BASE, op, "base ", base, " must be 1 to ",
          int{QK_LARGEST_BASE}, ", the rows of quantkit.hadamard.factor");
  const int64_t runs = order / base;
  require(order > 0 && order % base == 0 && (runs & (runs - 1)) == 0, op, "order ", order,
          " must be a power of two times ", base, ", the base");
  require(columns > 0 && columns % order == 0, op, what, " has shape ", shape_of(x),
          ", rows of ", columns, " columns must be a multiple of the order ", order);
  const int64_t bands = (base + 15) / 16, words = (base + 63) / 64;
  require(signs.scalar_type() == ScalarType::Int && signs.dim() == 3 && signs.size(0) == bands &&
              signs.size(1) == words && signs.size(2) == 32 && signs.is_contiguous(),
          op, "signs have shape ", shape_of(signs), " and dtype ", name_of(signs.scalar_type()),
          ", must be contiguous int32 [", bands, ", ", words, ", 32] for base ", base,
          "; make them with quantkit.ops.pack_hadamard");
  require_same_device(op, "signs", signs, x);
  const int64_t needed = qk_cuda_hadamard_bytes(columns, base);
  const int64_t most = shared_bytes(x.get_device_index());
  require(needed <= most, op, "a row of ", columns, " columns takes ", needed,
          " bytes of a block's shared memory, and this GPU has ", most,
          "; use get_backend('reference') here");
  qk_cuda_hadamard_args args{};
  args.order = order;
  args.base = base;
  args.signs = static_cast<const uint32_t*>(signs.const_data_ptr());
  args.m = rows.m;
  args.n = args.ldy = columns;
  args.x = rows.data;
  args.ldx = rows.stride;
  args.dtype = row_dtype(op, what, x);
  return args;
}

Tensor hadamard_mma(Tensor x, Tensor signs, int64_t base, int64_t order) {
  const char* op = "hadamard_mma";
  const Rows rows = rows_of(op, "x", x);
  qk_cuda_hadamard_args args = hadamard_args(op, "x", x, rows, rows.k, signs, base, order);
  Tensor y = empty(with_last(x, args.n), x.scalar_type(), x);
  args.y = y.mutable_data_ptr();
  on_stream(op, x, [&](void* stream) { return qk_cuda_hadamard(&args, nullptr, stream); });
  return y;
}

std::tuple<Tensor, Tensor> hadamard_mma_quantize(Tensor x, Tensor signs, int64_t base,
                                                 int64_t order, int64_t kind, int64_t group) {
  const char* op = "hadamard_mma_quantize";
  const Rows rows = rows_of(op, "x", x);
  const auto args = hadamard_args(op, "x", x, rows, rows.k, signs, base, order);
  Codes codes(op, x, args.n, args.dtype, byte_format(op, kind), group);
  on_stream(op, x, [&](void* stream) { return qk_cuda_hadamard(&args, &codes.args, stream); });
  return {codes.q, codes.scale};
}

std::tuple<Tensor, Tensor> gated_hadamard_mma_quantize(Tensor gate_up, Tensor signs, int64_t base,
                                                       int64_t order, int64_t gate, int64_t kind,
                                                       int64_t group) {
  const char* op = "gated_hadamard_mma_quantize";
  const Rows rows = rows_of(op, "gate_up", gate_up);
  check_gate(op, gate_up, rows, gate);
  auto args = hadamard_args(op, "gate_up", gate_up, rows, rows.k / 2, signs, base, order);
  args.gated = 1;
  args.gate = static_cast<int32_t>(gate);
  Codes codes(op, gate_up, args.n, args.dtype, byte_format(op, kind), group);
  on_stream(op, gate_up,
            [&](void* stream) { return qk_cuda_hadamard(&args, &codes.args, stream); });
  return {codes.q, codes.scale};
}

}  // namespace
}  // namespace quantkit::binding

STABLE_TORCH_LIBRARY_IMPL(quantkit, CUDA, m) {
  using namespace quantkit::binding;
  m.impl("quantize_int8_per_token", TORCH_BOX(&quantize_int8_per_token));
  m.impl("quantize_int8_static", TORCH_BOX(&quantize_int8_static));
  m.impl("quantize_fp8_per_token", TORCH_BOX(&quantize_fp8_per_token));
  m.impl("quantize_fp8_per_block", TORCH_BOX(&quantize_fp8_per_block));
  m.impl("quantize_fp8_static", TORCH_BOX(&quantize_fp8_static));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_quantize", TORCH_BOX(&add_rms_norm_quantize));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
  m.impl("gated_activation_quantize", TORCH_BOX(&gated_activation_quantize));
  m.impl("hadamard_mma", TORCH_BOX(&hadamard_mma));
  m.impl("hadamard_mma_quantize", TORCH_BOX(&hadamard_mma_quantize));
  m.impl("gated_hadamard_mma_quantize", TORCH_BOX(&gated_hadamard_mma_quantize));
}
