// The CUDA linear layer with 4-bit float weights on the tensor cores.
#include "cuda.h"

namespace quantkit::binding {
namespace {

struct Fp4 {
  const char* name;
  int64_t group_size, width;  // bytes of scales of a block of 64 rows and 64 columns
};
constexpr Fp4 kFp4[] = {{"nvfp4", 16, 256}, {"mxfp4", 32, 128}, {"nf4", 0, 0}};

void set_groups(const char* op, qk_fp4a16_args& a, int64_t group_size) {
  if (a.format == QK_NF4) {
    require(group_size == -1 || group_size >= a.k || (group_size > 0 && group_size % 64 == 0), op,
            "group_size ", group_size, " is not a multiple of 64; use a multiple, or -1 for one ",
            "group a row");
    a.group_size = group_size == -1 || group_size > a.k ? a.k : group_size;
  } else {
    const Fp4& format = kFp4[a.format];
    require(group_size == format.group_size, op, "group_size ", group_size, " with ", format.name,
            " scales: they belong to groups of ", format.group_size);
    a.group_size = group_size;
  }
  a.groups = (a.k + a.group_size - 1) / a.group_size;
}

void check_byte_scales(const char* op, const Tensor& scale, const Tensor& x,
                       const qk_fp4a16_args& a) {
  const int64_t blocks = (a.n + 63) / 64, slabs = (a.k + 63) / 64, width = kFp4[a.format].width;
  require(scale.scalar_type() == ScalarType::Byte && scale.dim() == 3 &&
              scale.size(0) == blocks && scale.size(1) == slabs && scale.size(2) == width &&
              scale.is_contiguous(),
          op, "scale has shape ", shape_of(scale), ", must be contiguous uint8 [", blocks, ", ",
          slabs, ", ", width, "] for N = ", a.n, " and K = ", a.k,
          "; make it with quantkit.ops.pack_fp4_scales");
  require_same_device(op, "scale", scale, x);
}

Tensor fp4a16_linear(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> global_scale,
                     std::optional<Tensor> bias, Tensor counters, int64_t n, int64_t kind,
                     int64_t group_size) {
  const char* op = "fp4a16_linear";
  qk_fp4a16_args a{};
  set_activations16(op, a, x, n);
  require(kind >= QK_NVFP4 && kind <= QK_NF4, op, "kind ", kind,
          " is unknown; 0 is nvfp4, 1 mxfp4, 2 nf4");
  a.format = static_cast<int32_t>(kind);
  set_groups(op, a, group_size);
  a.packed = check_fragments(op, packed, x, n, a.k, 2048, "pack_fp4_mma");
  if (a.format == QK_NF4) {
    check_w4a16_table(op, "scale", scale, x, x.scalar_type(), n, a.groups);
  } else {
    check_byte_scales(op, scale, x, a);
  }
  a.scale = scale.const_data_ptr();
  require_aligned(op, "scale", a.scale);
  require(global_scale.has_value() == (a.format == QK_NVFP4), op,
          "global_scale goes with nvfp4, and only with it");
  if (global_scale.has_value()) {
    require(global_scale->scalar_type() == ScalarType::Float && global_scale->numel() == 1, op,
            "global_scale has shape ", shape_of(*global_scale), " and dtype ",
            name_of(global_scale->scalar_type()), ", must be float32 [1]");
    require_same_device(op, "global_scale", *global_scale, x);
    a.global_scale = static_cast<const float*>(global_scale->const_data_ptr());
  }
  return launch_activations16(op, a, x, bias, counters, qk_cuda_fp4a16_linear);
}

}  // namespace
}  // namespace quantkit::binding

STABLE_TORCH_LIBRARY_IMPL(quantkit, CUDA, m) {
  using namespace quantkit::binding;
  m.impl("fp4a16_linear", TORCH_BOX(&fp4a16_linear));
}
