// The parts of a decoder's forward pass on the CPU, through LibTorch's stable ABI. Schemas live in
// quantkit/ops/schema.py.
#include "cpu.h"
#include "quantkit/decoder.h"

namespace quantkit::binding {
namespace {

// A result that is written row by row, like `like` with another last dimension.
struct Output {
  Tensor tensor;
  int32_t dtype;
  void* data;

  Output(std::vector<int64_t> sizes, int32_t code, const Tensor& like)
      : tensor(empty(std::move(sizes), scalar_type_of(code), like)),
        dtype(code),
        data(tensor.mutable_data_ptr()) {}
};

Tensor int32_tensor(const char* op, const char* what, const Tensor& t, int64_t dims) {
  require(t.scalar_type() == ScalarType::Int, op, what, " has dtype ", name_of(t.scalar_type()),
          ", must be int32; convert it with .int()");
  require(t.dim() == dims, op, what, " has shape ", shape_of(t), ", must have ", dims,
          " dimensions");
  require(!t.is_cuda(), op, what, " is on a GPU, must be on the CPU");
  return dense(t);
}

const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

// Memory of a tensor that is written, or only read: a copy-on-write tensor is copied for the first.
void* memory_of(const Tensor& t, bool written) {
  return written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
}

// One layer's pages.
struct PagesArgument {
  qk_kv_cache cache{};
  int64_t kv_heads, head_dim;

  PagesArgument(const char* op, const Tensor& kv, const std::optional<Tensor>& scale,
                int64_t dtype, bool written) {
    require(dtype >= QK_KV_F32 && dtype <= QK_KV_FP8, op, "kv_dtype ", dtype,
            " is unknown; use 0 for float32, 1 for bfloat16, 2 for int8 or 3 for float8_e4m3fn");
    require(kv.scalar_type() == ScalarType::Byte && kv.dim() == 4 && kv.size(2) == 2 &&
                kv.is_contiguous() && !kv.is_cuda(),
            op, "kv has dtype ", name_of(kv.scalar_type()), " and shape ", shape_of(kv),
            ", must be contiguous uint8 [pages, kv_heads, 2, page bytes] on the CPU; make it with"
            " quantkit.ops.new_kv_pages");
    const int64_t column = qk_kv_page_bytes(static_cast<int32_t>(dtype), 1);
    head_dim = kv.size(3) / column;
    kv_heads = kv.size(1);
    require(kv_heads > 0 && head_dim > 0 && head_dim % 16 == 0 && head_dim <= 512 &&
                kv.size(3) == head_dim * column,
            op, "kv has shape ", shape_of(kv), ": ", kv.size(3), " bytes are no page of ",
            int{QK_PAGE_TOKENS}, " tokens of a head dimension that is a multiple of 16 up to 512,"
            " at ", column / QK_PAGE_TOKENS, " bytes a value");
    cache.dtype = static_cast<int32_t>(dtype);
    cache.pages = kv.size(0);
    cache.data = memory_of(kv, written);
    if (dtype < QK_KV_INT8) return;
    require(scale.has_value(), op, "kv_scale is missing; 8-bit pages need one");
    const std::vector<int64_t> sizes{cache.pages, kv_heads, 2, QK_PAGE_TOKENS};
    require(scale->scalar_type() == ScalarType::Float && has_shape(*scale, sizes) &&
                scale->is_contiguous() && !scale->is_cuda(),
            op, "kv_scale has dtype ", name_of(scale->scalar_type()), " and shape ",
            shape_of(*scale), ", must be contiguous float32 ", shape(sizes), " on the CPU");
    cache.scale = static_cast<float*>(memory_of(*scale, written));
  }
};

// A ragged batch, checked down to its page numbers.
struct SequencesArgument {
  Tensor starts, past, pages;
  qk_sequences sequences{};

  SequencesArgument(const char* op, const Tensor& starts_, const Tensor& past_,
                    const Tensor& pages_, int64_t tokens, int64_t page_count, int64_t positions)
      : starts(int32_tensor(op, "starts", starts_, 1)),
        past(int32_tensor(op, "past", past_, 1)),
        pages(int32_tensor(op, "pages", pages_, 2)) {
    const int64_t count = past.size(0);
    require(starts.size(0) == count + 1 && pages.size(0) == count, op, "starts has ",
            starts.size(0), " values and pages has ", pages.size(0), " rows, must be ", count + 1,
            " and ", count, " for ", count, " sequences (the length of past)");
    sequences.count = count;
    sequences.starts = ints(starts);
    sequences.past = ints(past);
    sequences.pages = ints(pages);
    sequences.page_stride = pages.size(1);
    require(sequences.starts[0] == 0 && sequences.starts[count] == tokens, op,
            "starts goes from ", sequences.starts[0], " to ", sequences.starts[count],
            ", must go from 0 to the number of tokens, ", tokens);
    for (int64_t s = 0; s < count; ++s) {
      const int64_t fresh = int64_t{sequences.starts[s + 1]} - sequences.starts[s];
      const int64_t end = sequences.past[s] + fresh;
      require(fresh >= 1 && sequences.past[s] >= 0, op, "sequence ", s, " has ", fresh,
              " new tokens behind ", sequences.past[s], "; must be at least 1 behind at least 0");
      require(positions < 0 || end <= positions, op, "sequence ", s, " ends at position ", end,
              ", past the ", positions, " rows of cos and sin");
      const int64_t used = (end + QK_PAGE_TOKENS - 1) / QK_PAGE_TOKENS;
      require(used <= sequences.page_stride, op, "sequence ", s, " needs ", used,
              " pages of ", int{QK_PAGE_TOKENS}, " tokens; pages has ", sequences.page_stride,
              " columns");
      for (int64_t p = 0; p < used; ++p) {
        const int32_t page = sequences.pages[s * sequences.page_stride + p];
        require(page >= 0 && page < page_count, op, "pages[", s, ", ", p, "] is ", page,
                ", must be in 0..", page_count - 1);
      }
    }
  }
};

Tensor add_rms_norm(Tensor residual, std::optional<Tensor> branch, Tensor weight, double epsilon,
                    int64_t dtype) {
  const char* op = "add_rms_norm";
  require(residual.dim() >= 1 && residual.size(residual.dim() - 1) > 0, op, "residual has shape ",
          shape_of(residual), ", must be [..., N] with N positive");
  require(residual.scalar_type() == ScalarType::Float, op, "residual has dtype ",
          name_of(residual.scalar_type()), ", must be float32");
  require(residual.is_contiguous(), op,
          "residual must be contiguous: it is written in place; call .contiguous() on it before");
  const Rows rows = rows_of(op, "residual", residual);
  qk_add_rms_norm_args args{};
  args.m = rows.m;
  args.n = args.ld_residual = args.ldy = rows.k;
  const Tensor scale = table(op, "weight", weight, {args.n});
  args.weight = floats(scale);
  args.epsilon = static_cast<float>(epsilon);
  args.residual = static_cast<float*>(residual.mutable_data_ptr());
  std::optional<Rows> added;
  if (branch.has_value()) {
    require(has_shape(*branch, with_last(residual, args.n)), op, "branch has shape ",
            shape_of(*branch), ", must be that of residual, ", shape_of(residual));
    require_same_device(op, "branch", *branch, residual);
    added = rows_of(op, "branch", *branch);
    args.branch = added->data;
    args.ld_branch = added->stride;
    args.branch_dtype = float_dtype(op, "branch", *branch);
  }
  Output y(with_last(residual, args.n), out_dtype(op, dtype), residual);
  args.y = y.data;
  args.y_dtype = y.dtype;
  follow_torch_threads();
  finish(op, qk_add_rms_norm(&args));
  return y.tensor;
}

Tensor gated_activation(Tensor gate_up, int64_t kind) {
  const char* op = "gated_activation";
  require(kind == QK_GATE_SILU || kind == QK_GATE_GELU_TANH, op, "kind ", kind,
          " is unknown; use 0 for silu or 1 for gelu_tanh");
  const Rows rows = rows_of(op, "gate_up", gate_up);
  require(rows.k > 0 && rows.k % 2 == 0, op, "gate_up has shape ", shape_of(gate_up),
          ", its last dimension must be even: all of gate, then all of up");
  qk_gate_args args{};
  args.kind = static_cast<int32_t>(kind);
  args.m = rows.m;
  args.n = args.ldy = rows.k / 2;
  args.x = rows.data;
  args.ldx = rows.stride;
  Output y(with_last(gate_up, args.n), float_dtype(op, "gate_up", gate_up), gate_up);
  args.dtype = y.dtype;
  args.y = y.data;
  follow_torch_threads();
  finish(op, qk_gated_activation(&args));
  return y.tensor;
}

Tensor hadamard(Tensor x, Tensor factor, int64_t order) {
  const char* op = "hadamard";
  require(factor.dim() == 2 && factor.size(0) >= 1 && factor.size(0) <= QK_LARGEST_BASE &&
              factor.size(1) == (factor.size(0) + 15) / 16 * 16,
          op, "factor has shape ", shape_of(factor),
          ", must be [B, B rounded up to a multiple of 16] with B in 1..", int{QK_LARGEST_BASE},
          "; make it with quantkit.hadamard.factor");
  const int64_t base = factor.size(0), runs = order / base;
  require(order > 0 && order % base == 0 && (runs & (runs - 1)) == 0, op, "order ", order,
          " must be a power of two times ", base, ", the rows of factor");
  const Rows rows = rows_of(op, "x", x);
  require(rows.k > 0 && rows.k % order == 0, op, "x has shape ", shape_of(x),
          ", its last dimension must be a multiple of the order ", order);
  const Tensor dense_factor = table(op, "factor", factor, {base, factor.size(1)});
  qk_hadamard_args args{};
  args.hadamard = {order, base, floats(dense_factor)};
  args.m = rows.m;
  args.n = args.ldy = rows.k;
  args.x = rows.data;
  args.ldx = rows.stride;
  Output y(with_last(x, args.n), float_dtype(op, "x", x), x);
  args.dtype = y.dtype;
  args.y = y.data;
  follow_torch_threads();
  finish(op, qk_hadamard_rows(&args));
  return y.tensor;
}

Tensor embed(Tensor tokens, Tensor table, double scale) {
  const char* op = "embed";
  require(table.dim() == 2 && table.size(1) > 0, op, "table has shape ", shape_of(table),
          ", must be [V, N] with N positive");
  const bool wide = tokens.scalar_type() == ScalarType::Long;
  require(wide || tokens.scalar_type() == ScalarType::Int, op, "tokens have dtype ",
          name_of(tokens.scalar_type()), ", must be int32 or int64");
  require_same_device(op, "tokens", tokens, table);
  const Rows rows = rows_of(op, "table", table);
  const Tensor ids = dense(tokens);
  std::vector<int64_t> sizes(static_cast<size_t>(tokens.dim()) + 1, rows.k);
  for (int64_t i = 0; i < tokens.dim(); ++i) sizes[static_cast<size_t>(i)] = tokens.size(i);
  std::vector<int32_t> narrow(static_cast<size_t>(tokens.numel()));
  for (size_t i = 0; i < narrow.size(); ++i) {
    const int64_t id = wide ? static_cast<const int64_t*>(ids.const_data_ptr())[i] : ints(ids)[i];
    require(id >= 0 && id < rows.m, op, "tokens hold ", id, " at place ", i, ", must be in 0..",
            rows.m - 1, ", the rows of table");
    narrow[i] = static_cast<int32_t>(id);
  }
  Output y(sizes, QK_F32, table);
  qk_embed_args args{};
  args.count = static_cast<int64_t>(narrow.size());
  args.vocab = rows.m;
  args.n = args.ldy = rows.k;
  args.tokens = narrow.data();
  args.table = rows.data;
  args.ld_table = rows.stride;
  args.table_dtype = float_dtype(op, "table", table);
  args.scale = static_cast<float>(scale);
  args.y = static_cast<float*>(y.data);
  follow_torch_threads();
  finish(op, qk_embed(&args));
  return y.tensor;
}

Tensor rope_store_kv(Tensor qkv, std::optional<Tensor> q_norm, std::optional<Tensor> k_norm,
                     Tensor cos, Tensor sin, Tensor starts, Tensor past, Tensor pages, Tensor kv,
                     std::optional<Tensor> kv_scale, int64_t kv_dtype, double epsilon) {
  const char* op = "rope_store_kv";
  const PagesArgument cache(op, kv, kv_scale, kv_dtype, true);
  require(qkv.dim() == 2, op, "qkv has shape ", shape_of(qkv),
          ", must be [tokens, (heads + 2 kv_heads) * head_dim]");
  const Rows rows = rows_of(op, "qkv", qkv);
  const int64_t heads = rows.k / cache.head_dim - 2 * cache.kv_heads;
  require(rows.k % cache.head_dim == 0 && heads > 0 && heads % cache.kv_heads == 0, op,
          "qkv has shape ", shape_of(qkv), ", must be [tokens, (heads + 2 * ", cache.kv_heads,
          ") * ", cache.head_dim, "] with heads a multiple of kv_heads, for kv ", shape_of(kv));
  require(cos.dim() == 2 && 2 * cos.size(1) <= cache.head_dim, op, "cos has shape ", shape_of(cos),
          ", must be [positions, rotary_dim / 2] with rotary_dim at most head_dim = ",
          cache.head_dim);
  const std::vector<int64_t> angles{cos.size(0), cos.size(1)};
  const Tensor c = table(op, "cos", cos, angles), s = table(op, "sin", sin, angles);
  const SequencesArgument batch(op, starts, past, pages, rows.m, cache.cache.pages, angles[0]);
  qk_rope_store_args args{};
  std::optional<Tensor> qn, kn;
  if (q_norm.has_value()) {
    qn = table(op, "q_norm", *q_norm, {cache.head_dim});
    args.q_norm = floats(*qn);
  }
  if (k_norm.has_value()) {
    kn = table(op, "k_norm", *k_norm, {cache.head_dim});
    args.k_norm = floats(*kn);
  }
  Output q({rows.m, heads, cache.head_dim}, float_dtype(op, "qkv", qkv), qkv);
  args.sequences = &batch.sequences;
  args.kv = &cache.cache;
  args.heads = heads;
  args.kv_heads = cache.kv_heads;
  args.head_dim = cache.head_dim;
  args.rotary_dim = 2 * angles[1];
  args.max_positions = angles[0];
  args.qkv = rows.data;
  args.ld_qkv = rows.stride;
  args.dtype = q.dtype;
  args.norm_epsilon = static_cast<float>(epsilon);
  args.cos = floats(c);
  args.sin = floats(s);
  args.q = q.data;
  args.ldq = heads * cache.head_dim;
  follow_torch_threads();
  finish(op, qk_rope_store(&args));
  return q.tensor;
}

Tensor paged_attention(Tensor q, Tensor starts, Tensor past, Tensor pages, Tensor kv,
                       std::optional<Tensor> kv_scale, int64_t kv_dtype, double scale,
                       double softcap, int64_t window) {
  const char* op = "paged_attention";
  const PagesArgument cache(op, kv, kv_scale, kv_dtype, false);
  require(q.dim() == 3 && q.size(2) == cache.head_dim && q.size(1) > 0 &&
              q.size(1) % cache.kv_heads == 0,
          op, "q has shape ", shape_of(q), ", must be [tokens, heads, ", cache.head_dim,
          "] with heads a multiple of kv_heads = ", cache.kv_heads, ", for kv ", shape_of(kv));
  require(softcap >= 0, op, "softcap ", softcap, " must be positive, or 0 for none");
  require(window >= 0, op, "window ", window, " must be positive, or 0 for all keys");
  const Tensor queries = dense(q);
  const SequencesArgument batch(op, starts, past, pages, q.size(0), cache.cache.pages, -1);
  Output y({q.size(0), q.size(1), q.size(2)}, float_dtype(op, "q", q), q);
  qk_attention_args args{};
  args.sequences = &batch.sequences;
  args.kv = &cache.cache;
  args.precision = y.dtype == QK_BF16 ? QK_PRECISION_BF16 : QK_PRECISION_F32;
  args.heads = q.size(1);
  args.kv_heads = cache.kv_heads;
  args.head_dim = cache.head_dim;
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.window = window;
  args.dtype = y.dtype;
  args.q = queries.const_data_ptr();
  args.y = y.data;
  args.ldq = args.ldy = args.heads * args.head_dim;
  follow_torch_threads();
  finish(op, qk_paged_attention(&args));
  return y.tensor;
}

}  // namespace
}  // namespace quantkit::binding

STABLE_TORCH_LIBRARY_IMPL(quantkit, CPU, m) {
  using namespace quantkit::binding;
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
  m.impl("hadamard", TORCH_BOX(&hadamard));
  m.impl("embed", TORCH_BOX(&embed));
  m.impl("rope_store_kv", TORCH_BOX(&rope_store_kv));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
}
