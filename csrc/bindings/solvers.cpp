// The calibration operators of the CPU, through LibTorch's stable ABI. Schemas live in
// quantkit/ops/schema.py.
#include "cpu.h"
#include "quantkit/solvers.h"

namespace quantkit::binding {
namespace {

int32_t code_kind(const char* op, int64_t kind, double qmin, double qmax) {
  require(kind >= QK_CODE_INT && kind <= QK_CODE_E2M1, op, "kind ", kind,
          " is unknown; use 0 for integers, 1 for float8 e4m3 or 2 for float4 e2m1");
  const double limit = kind == QK_CODE_INT ? 2097152.0 : (kind == QK_CODE_E4M3 ? 448.0 : 6.0);
  require(qmin <= qmax && qmin >= -limit && qmax <= limit, op, "codes of ", qmin, "..", qmax,
          " are not an ascending range within +-", limit);
  return static_cast<int32_t>(kind);
}

Tensor gptq_round(Tensor weight, Tensor upper, Tensor scale, std::optional<Tensor> zero,
                  Tensor group, int64_t kind, double qmin, double qmax) {
  const char* op = "gptq_round";
  require(weight.dim() == 2, op, "weight has shape ", shape_of(weight), ", must be [N, K]");
  require(scale.dim() == 2 && scale.size(1) > 0, op, "scale has shape ", shape_of(scale),
          ", must be [N, groups]");
  qk_gptq_round_args args{};
  args.n = weight.size(0);
  args.k = weight.size(1);
  args.groups = scale.size(1);
  args.kind = code_kind(op, kind, qmin, qmax);
  args.qmin = static_cast<float>(qmin);
  args.qmax = static_cast<float>(qmax);
  const Tensor w = table(op, "weight", weight, {args.n, args.k});
  const Tensor u = table(op, "upper", upper, {args.k, args.k});
  const Tensor s = table(op, "scale", scale, {args.n, args.groups});
  std::optional<Tensor> z;
  if (zero.has_value()) {
    z = table(op, "zero", *zero, {args.n, args.groups});
    args.zero = floats(*z);
  }
  const ScalarType index = group.scalar_type();
  require(index == ScalarType::Int || index == ScalarType::Long, op, "group has dtype ",
          name_of(index), ", must be int32 or int64");
  require(group.dim() == 1 && group.size(0) == args.k, op, "group has shape ", shape_of(group),
          ", must be [K] = [", args.k, "]");
  const Tensor groups = dense(group);
  std::vector<int32_t> of_column(static_cast<size_t>(args.k));
  for (int64_t j = 0; j < args.k; ++j) {
    const int64_t g = index == ScalarType::Int
                          ? static_cast<const int32_t*>(groups.const_data_ptr())[j]
                          : static_cast<const int64_t*>(groups.const_data_ptr())[j];
    require(g >= 0 && g < args.groups, op, "group[", j, "] is ", g, ", must be in 0..",
            args.groups - 1, ", the columns of scale");
    of_column[static_cast<size_t>(j)] = static_cast<int32_t>(g);
  }
  Tensor codes = empty({args.n, args.k}, ScalarType::Float, weight);
  args.weight = floats(w);
  args.upper = floats(u);
  args.scale = floats(s);
  args.group = of_column.data();
  args.codes = static_cast<float*>(codes.mutable_data_ptr());
  follow_torch_threads();
  finish(op, qk_gptq_round(&args));
  return codes;
}

Tensor rounding_errors(Tensor weight, Tensor scales, std::optional<Tensor> zeros,
                       std::optional<Tensor> importance, int64_t group_size, int64_t kind,
                       double qmin, double qmax) {
  const char* op = "rounding_errors";
  require(weight.dim() == 2 && weight.size(1) > 0, op, "weight has shape ", shape_of(weight),
          ", must be [N, K] with K positive");
  require(group_size > 0, op, "group_size ", group_size, " must be positive");
  require(scales.dim() == 3, op, "scales have shape ", shape_of(scales),
          ", must be [candidates, N, ceil(K / group_size)]");
  qk_rounding_errors_args args{};
  args.candidates = scales.size(0);
  args.n = weight.size(0);
  args.k = weight.size(1);
  args.group_size = group_size < args.k ? group_size : args.k;
  const int64_t groups = (args.k + args.group_size - 1) / args.group_size;
  const std::vector<int64_t> sizes{args.candidates, args.n, groups};
  args.weight_dtype = float_dtype(op, "weight", weight);
  args.kind = code_kind(op, kind, qmin, qmax);
  args.qmin = static_cast<float>(qmin);
  args.qmax = static_cast<float>(qmax);
  const Tensor w = dense(weight), s = table(op, "scales", scales, sizes);
  std::optional<Tensor> z, weights;
  if (zeros.has_value()) {
    z = table(op, "zeros", *zeros, sizes);
    args.zero = floats(*z);
  }
  if (importance.has_value()) {
    weights = table(op, "importance", *importance, {args.k});
    args.importance = floats(*weights);
  }
  Tensor errors = empty(sizes, ScalarType::Float, weight);
  args.weight = w.const_data_ptr();
  args.scale = floats(s);
  args.errors = static_cast<float*>(errors.mutable_data_ptr());
  follow_torch_threads();
  finish(op, qk_rounding_errors(&args));
  return errors;
}

void syrk_accumulate(Tensor acc, Tensor x) {
  const char* op = "syrk_accumulate";
  require(x.dim() == 2, op, "x has shape ", shape_of(x), ", must be [T, K]");
  require(acc.dim() == 2 && acc.size(0) == x.size(1) && acc.size(1) == x.size(1), op,
          "acc has shape ", shape_of(acc), ", must be [K, K] for x ", shape_of(x));
  require(acc.scalar_type() == ScalarType::Float, op, "acc has dtype ",
          name_of(acc.scalar_type()), ", must be float32");
  require(acc.size(1) <= 1 || (acc.stride(1) == 1 && acc.stride(0) >= acc.size(1)), op,
          "acc must have neighbouring columns: it is written in place");
  const Rows rows = rows_of(op, "x", x);
  qk_syrk_args args{};
  args.tokens = rows.m;
  args.k = rows.k;
  args.x = rows.data;
  args.ldx = rows.stride;
  args.x_dtype = float_dtype(op, "x", x);
  args.acc = static_cast<float*>(acc.mutable_data_ptr());
  args.ld_acc = rows.k <= 1 ? 1 : acc.stride(0);
  follow_torch_threads();
  finish(op, qk_syrk_accumulate(&args));
}

}  // namespace
}  // namespace quantkit::binding

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  using namespace quantkit::binding;
  m.impl("gptq_round", TORCH_BOX(&gptq_round));
  m.impl("rounding_errors", TORCH_BOX(&rounding_errors));
  m.impl("syrk_accumulate", TORCH_BOX(&syrk_accumulate));
}
