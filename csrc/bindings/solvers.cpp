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

// The group of each column: int32 or int64 [K], each in 0 .. groups-1.
std::vector<int32_t> group_of_columns(const char* op, const Tensor& group, int64_t k,
                                      int64_t groups) {
  const ScalarType index = group.scalar_type();
  require(index == ScalarType::Int || index == ScalarType::Long, op, "group has dtype ",
          name_of(index), ", must be int32 or int64");
  require(group.dim() == 1 && group.size(0) == k, op, "group has shape ", shape_of(group),
          ", must be [K] = [", k, "]");
  const Tensor of = dense(group);
  std::vector<int32_t> of_column(static_cast<size_t>(k));
  for (int64_t j = 0; j < k; ++j) {
    const int64_t g = index == ScalarType::Int
                          ? static_cast<const int32_t*>(of.const_data_ptr())[j]
                          : static_cast<const int64_t*>(of.const_data_ptr())[j];
    require(g >= 0 && g < groups, op, "group[", j, "] is ", g, ", must be in 0..", groups - 1,
            ", the columns of scale");
    of_column[static_cast<size_t>(j)] = static_cast<int32_t>(g);
  }
  return of_column;
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
  const std::vector<int32_t> of_column = group_of_columns(op, group, args.k, args.groups);
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

float* in_place(const char* op, const char* what, const Tensor& t, int64_t rows, int64_t columns) {
  require(t.scalar_type() == ScalarType::Float && t.is_contiguous(), op, what,
          " must be contiguous float32: it is written in place");
  require(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, op, what, " has shape ",
          shape_of(t), ", must be [", rows, ", ", columns, "]");
  return static_cast<float*>(t.mutable_data_ptr());
}

void descend_codes(Tensor codes, Tensor moment, Tensor hessian, std::optional<Tensor> output,
                   Tensor scale, std::optional<Tensor> zero, Tensor group, int64_t kind,
                   double qmin, double qmax, int64_t sweeps) {
  const char* op = "descend_codes";
  require(codes.dim() == 2, op, "codes have shape ", shape_of(codes), ", must be [N, K]");
  require(scale.dim() == 2 && scale.size(1) > 0, op, "scale has shape ", shape_of(scale),
          ", must be [N, groups]");
  require(sweeps >= 0, op, "sweeps ", sweeps, " must not be negative");
  qk_descend_args args{};
  args.n = codes.size(0);
  args.k = codes.size(1);
  args.groups = scale.size(1);
  args.sweeps = sweeps;
  args.kind = code_kind(op, kind, qmin, qmax);
  args.qmin = static_cast<float>(qmin);
  args.qmax = static_cast<float>(qmax);
  const Tensor h = table(op, "hessian", hessian, {args.k, args.k});
  const Tensor s = table(op, "scale", scale, {args.n, args.groups});
  std::optional<Tensor> z, g;
  if (zero.has_value()) {
    z = table(op, "zero", *zero, {args.n, args.groups});
    args.zero = floats(*z);
  }
  if (output.has_value()) {
    g = table(op, "output", *output, {args.n, args.n});
    args.output = floats(*g);
  }
  const std::vector<int32_t> of_column = group_of_columns(op, group, args.k, args.groups);
  args.hessian = floats(h);
  args.scale = floats(s);
  args.group = of_column.data();
  args.codes = in_place(op, "codes", codes, args.n, args.k);
  args.moment = in_place(op, "moment", moment, args.n, args.k);
  follow_torch_threads();
  finish(op, qk_descend_codes(&args));
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
  const bool is_double = acc.scalar_type() == ScalarType::Double;
  require(is_double || acc.scalar_type() == ScalarType::Float, op, "acc has dtype ",
          name_of(acc.scalar_type()), ", must be float32 or float64");
  require(acc.size(1) <= 1 || (acc.stride(1) == 1 && acc.stride(0) >= acc.size(1)), op,
          "acc must have neighbouring columns: it is written in place");
  const Rows rows = rows_of(op, "x", x);
  qk_syrk_args args{};
  args.tokens = rows.m;
  args.k = rows.k;
  args.x = rows.data;
  args.ldx = rows.stride;
  args.x_dtype = float_dtype(op, "x", x);
  args.acc = acc.mutable_data_ptr();
  args.ld_acc = rows.k <= 1 ? 1 : acc.stride(0);
  args.acc_is_double = is_double;
  follow_torch_threads();
  finish(op, qk_syrk_accumulate(&args));
}

}  // namespace
}  // namespace quantkit::binding

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  using namespace quantkit::binding;
  m.impl("gptq_round", TORCH_BOX(&gptq_round));
  m.impl("descend_codes", TORCH_BOX(&descend_codes));
  m.impl("rounding_errors", TORCH_BOX(&rounding_errors));
  m.impl("syrk_accumulate", TORCH_BOX(&syrk_accumulate));
}
