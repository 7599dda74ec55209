// The CUDA operators on keys and values in pages.
#include "cuda.h"
#include "quantkit/cuda_attention.h"

namespace quantkit::binding {
namespace {

// Pages of one layer, and which sequence has which.
struct Pages {
  int32_t kv_dtype;
  int64_t kv_heads, head_dim;
  void* data;
  float* scale = nullptr;

  Pages(const char* op, Tensor& kv, std::optional<Tensor>& kv_scale, int64_t dtype,
        const Tensor& like) {
    require(dtype >= QK_KV_BF16 && dtype <= QK_KV_FP8, op, "kv_dtype ", dtype,
            " is not held on a GPU; use 1 for bfloat16, 2 for int8 or 3 for fp8");
    kv_dtype = static_cast<int32_t>(dtype);
    const int64_t bytes = QK_PAGE_TOKENS * (kv_dtype == QK_KV_BF16 ? 2 : 1);
    require(kv.scalar_type() == ScalarType::Byte && kv.dim() == 4 && kv.size(1) > 0 &&
                kv.size(2) == 2 && kv.size(3) % bytes == 0 && kv.is_contiguous(),
            op, "kv has shape ", shape_of(kv), ", must be contiguous uint8 [pages, kv_heads, 2, ",
            bytes, " * head_dim]; make it with quantkit.ops.new_kv_rows");
    require_same_device(op, "kv", kv, like);
    kv_heads = kv.size(1);
    head_dim = kv.size(3) / bytes;
    data = kv.mutable_data_ptr();
    require_aligned(op, "kv", data);
    require(kv_scale.has_value() == (kv_dtype != QK_KV_BF16), op,
            "kv_scale goes with int8 and fp8 pages, and only with them");
    if (!kv_scale.has_value()) return;
    require(kv_scale->scalar_type() == ScalarType::Float && kv_scale->dim() == 4 &&
                kv_scale->size(0) == kv.size(0) && kv_scale->size(1) == kv_heads &&
                kv_scale->size(2) == 2 && kv_scale->size(3) == QK_PAGE_TOKENS &&
                kv_scale->is_contiguous(),
            op, "kv_scale has shape ", shape_of(*kv_scale), ", must be contiguous float32 [",
            kv.size(0), ", ", kv_heads, ", 2, 64] for these pages");
    require_same_device(op, "kv_scale", *kv_scale, like);
    scale = static_cast<float*>(kv_scale->mutable_data_ptr());
    require_aligned(op, "kv_scale", scale);
  }
};

template <class T>
const T* table(const char* op, const char* what, const Tensor& t, ScalarType dtype,
               const std::vector<int64_t>& sizes, const Tensor& like) {
  bool fits = t.scalar_type() == dtype && t.is_contiguous() &&
              t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = t.size(static_cast<int64_t>(i)) == sizes[i];
  }
  std::string wanted;
  for (const int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  require(fits, op, what, " has shape ", shape_of(t), " and dtype ", name_of(t.scalar_type()),
          ", must be contiguous ", name_of(dtype), " [", wanted, "]");
  require_same_device(op, what, t, like);
  return static_cast<const T*>(t.const_data_ptr());
}

const float* floats(const char* op, const char* what, const Tensor& t,
                    const std::vector<int64_t>& sizes, const Tensor& like) {
  return table<float>(op, what, t, ScalarType::Float, sizes, like);
}

const int32_t* ints(const char* op, const char* what, const Tensor& t,
                    const std::vector<int64_t>& sizes, const Tensor& like) {
  return table<int32_t>(op, what, t, ScalarType::Int, sizes, like);
}

Tensor rope_store_kv_rows(Tensor qkv, std::optional<Tensor> q_norm, std::optional<Tensor> k_norm,
                          Tensor cos, Tensor sin, Tensor starts, Tensor past, Tensor pages,
                          Tensor kv, std::optional<Tensor> kv_scale,
                          std::optional<Tensor> kv_fixed, int64_t kv_dtype, double epsilon) {
  const char* op = "rope_store_kv_rows";
  const Pages cache(op, kv, kv_scale, kv_dtype, qkv);
  require(cache.head_dim > 0 && cache.head_dim % 16 == 0 && cache.head_dim <= 128, op, "head_dim ",
          cache.head_dim, " must be a multiple of 16, at most 128");
  require(qkv.scalar_type() == ScalarType::BFloat16 && qkv.dim() == 2, op, "qkv has shape ",
          shape_of(qkv), " and dtype ", name_of(qkv.scalar_type()),
          ", must be bfloat16 [tokens, (heads + 2 kv_heads) * head_dim]");
  const Rows rows = rows_of(op, "qkv", qkv);
  const int64_t heads = rows.k / cache.head_dim - 2 * cache.kv_heads;
  require(rows.k % cache.head_dim == 0 && heads > 0 && heads % cache.kv_heads == 0, op,
          "qkv has shape ", shape_of(qkv), ", must be [tokens, (heads + 2 * ", cache.kv_heads,
          ") * ", cache.head_dim, "] with heads a multiple of kv_heads, for kv ", shape_of(kv));
  require(cos.dim() == 2 && 2 * cos.size(1) <= cache.head_dim, op, "cos has shape ", shape_of(cos),
          ", must be [positions, rotary_dim / 2] with rotary_dim at most head_dim = ",
          cache.head_dim);
  require(pages.dim() == 2 && pages.size(1) > 0, op, "pages have shape ", shape_of(pages),
          ", must be [sequences, P]");
  qk_cuda_rope_store_args a{};
  a.sequences = pages.size(0);
  a.tokens = rows.m;
  a.starts = ints(op, "starts", starts, {a.sequences + 1}, qkv);
  a.past = ints(op, "past", past, {a.sequences}, qkv);
  a.page_stride = pages.size(1);
  a.pages = ints(op, "pages", pages, {a.sequences, a.page_stride}, qkv);
  a.kv_dtype = cache.kv_dtype;
  a.data = cache.data;
  a.scale = cache.scale;
  if (kv_fixed.has_value()) {
    require(cache.scale != nullptr, op,
            "kv_fixed goes with int8 and fp8 pages, and only with them");
    a.fixed = floats(op, "kv_fixed", *kv_fixed, {2}, qkv);
  }
  a.heads = heads;
  a.kv_heads = cache.kv_heads;
  a.head_dim = cache.head_dim;
  a.rotary_dim = 2 * cos.size(1);
  a.qkv = rows.data;
  a.ld_qkv = rows.stride;
  if (q_norm.has_value()) a.q_norm = floats(op, "q_norm", *q_norm, {a.head_dim}, qkv);
  if (k_norm.has_value()) a.k_norm = floats(op, "k_norm", *k_norm, {a.head_dim}, qkv);
  a.norm_epsilon = static_cast<float>(epsilon);
  a.cos = floats(op, "cos", cos, {cos.size(0), cos.size(1)}, qkv);
  a.sin = floats(op, "sin", sin, {cos.size(0), cos.size(1)}, qkv);
  Tensor q = empty({rows.m, heads, a.head_dim}, ScalarType::BFloat16, qkv);
  a.q = q.mutable_data_ptr();
  a.ldq = heads * a.head_dim;
  const int32_t device = qkv.get_device_index();
  const DeviceGuard guard(device);
  check_launch(op, qk_cuda_rope_store(&a, current_stream(device)));
  return q;
}

Tensor paged_decode_attention(Tensor q, Tensor lengths, Tensor pages, Tensor kv,
                              std::optional<Tensor> kv_scale, int64_t kv_dtype, double scale,
                              double softcap, int64_t window) {
  const char* op = "paged_decode_attention";
  const Pages cache(op, kv, kv_scale, kv_dtype, q);
  const int64_t dims = cache.head_dim;
  require(dims == 64 || dims == 80 || dims == 96 || dims == 128, op, "head_dim ", dims,
          " has no kernel; it must be 64, 80, 96 or 128");
  require(q.scalar_type() == ScalarType::BFloat16 && q.dim() == 3 && q.size(2) == dims &&
              q.size(1) > 0 && q.size(1) % cache.kv_heads == 0 && q.is_contiguous(),
          op, "q has shape ", shape_of(q), " and dtype ", name_of(q.scalar_type()),
          ", must be contiguous bfloat16 [sequences, heads, ", dims,
          "] with heads a multiple of kv_heads = ", cache.kv_heads, ", for kv ", shape_of(kv));
  require(softcap >= 0, op, "softcap ", softcap, " must be positive, or 0 for none");
  require(window >= 0, op, "window ", window, " must be positive, or 0 for all keys");
  require(q.size(0) <= 65535, op, q.size(0), " sequences: a call takes at most 65535");
  require(pages.dim() == 2 && pages.size(1) > 0, op, "pages have shape ", shape_of(pages),
          ", must be [sequences, P]");
  qk_cuda_paged_decode_args a{};
  a.sequences = q.size(0);
  a.lengths = ints(op, "lengths", lengths, {a.sequences}, q);
  a.page_stride = pages.size(1);
  a.pages = ints(op, "pages", pages, {a.sequences, a.page_stride}, q);
  a.kv_dtype = cache.kv_dtype;
  a.data = cache.data;
  a.scale = cache.scale;
  a.heads = q.size(1);
  a.kv_heads = cache.kv_heads;
  a.head_dim = dims;
  a.score_scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.window = window;
  a.q = q.const_data_ptr();
  require(reinterpret_cast<uintptr_t>(a.q) % 4 == 0, op,
          "q does not start at a multiple of 4 bytes; pass a tensor of its own, not a view");
  Tensor y = empty({q.size(0), q.size(1), dims}, ScalarType::BFloat16, q);
  a.y = y.mutable_data_ptr();
  a.ldq = a.ldy = a.heads * dims;
  const int32_t device = q.get_device_index();
  const DeviceGuard guard(device);
  a.overlap = gpu(device).major >= 9;
  const int64_t count = qk_cuda_paged_decode_partials(a.sequences, a.heads, dims, a.page_stride);
  // Freed when this returns, in stream order: the caching allocator reuses it behind the kernels.
  Tensor partials = empty({count}, ScalarType::Float, q);
  a.partials = static_cast<float*>(partials.mutable_data_ptr());
  check_launch(op, qk_cuda_paged_decode(&a, current_stream(device)));
  return y;
}

}  // namespace
}  // namespace quantkit::binding

STABLE_TORCH_LIBRARY_IMPL(quantkit, CUDA, m) {
  using namespace quantkit::binding;
  m.impl("rope_store_kv_rows", TORCH_BOX(&rope_store_kv_rows));
  m.impl("paged_decode_attention", TORCH_BOX(&paged_decode_attention));
}
