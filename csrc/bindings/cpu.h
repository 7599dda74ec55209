// What the files of CPU operators share.
#pragma once

#include "check.h"

namespace quantkit::binding {

inline void finish(const char* op, int status) {
  check_status(op, status, qk_status_message(status));
}

// Follow torch.set_num_threads unless quantkit.ops.set_num_threads was called.
inline void follow_torch_threads() {
  qk_set_default_threads(static_cast<int32_t>(torch::stable::get_num_threads()));
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::string shape(const std::vector<int64_t>& sizes) {
  std::ostringstream out;
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "[") << sizes[i];
  out << ']';
  return out.str();
}

inline bool has_shape(const Tensor& t, const std::vector<int64_t>& sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(i) == sizes[i];
  return same;
}

// A dense fp32 CPU tensor of exactly this shape.
inline Tensor table(const char* op, const char* what, const Tensor& t,
                    const std::vector<int64_t>& sizes) {
  require(has_shape(t, sizes), op, what, " has shape ", shape_of(t), ", must be ", shape(sizes));
  require(t.scalar_type() == ScalarType::Float, op, what, " has dtype ", name_of(t.scalar_type()),
          ", must be float32; convert it with .float()");
  require(!t.is_cuda(), op, what, " is on a GPU, must be on the CPU");
  return dense(t);
}

inline const float* floats(const Tensor& t) {
  return static_cast<const float*>(t.const_data_ptr());
}

}  // namespace quantkit::binding
