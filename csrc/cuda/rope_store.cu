// Norms of query and key heads, rotary embedding, and the write of keys and values into pages.
//
// A warp has one head of one token. A lane holds pairs of dimensions that are turned together, so
// that nothing but the norm and the largest magnitude crosses lanes. It is one small launch: a
// token of an 8B Llama is 12 KB. Products of the rotation are rounded before they are added, so
// that a key without a norm gets the codes of the reference to the bit.
//
// Ladder, built but not timed on a GPU yet (benchmarks/gpu_session.sh):
//   1. This file. Registers are in benchmarks/LOG.md.
#include "quantkit/cuda_attention.h"
#include "vectors.cuh"

namespace quantkit::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kPairs = 2;  // a lane: head_dim is at most 128

struct Pairs {
  float2 v[kPairs];
};

// Dimensions of pair p: turned by angle p where p < rotary_dim / 2, else neighbours that stay.
__device__ __forceinline__ int2 dims_of(int p, int rotary_dim) {
  const int half = rotary_dim / 2;
  if (p < half) return {p, p + half};
  return {2 * p, 2 * p + 1};
}

template <class V, class F>
__device__ __forceinline__ V over_warp(V v, F combine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = combine(v, shuffle_xor(v, mask));
  return v;
}

__device__ __forceinline__ Pairs load_head(const bf16* from, int lane, int head_dim,
                                           int rotary_dim) {
  Pairs x{};
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int p = lane + 32 * i;
    if (2 * p >= head_dim) continue;
    const int2 at = dims_of(p, rotary_dim);
    x.v[i] = {to_float(load_global(from + at.x)), to_float(load_global(from + at.y))};
  }
  return x;
}

__device__ __forceinline__ void normalize(Pairs& x, const float* weight, float epsilon, int lane,
                                          int head_dim, int rotary_dim) {
  float squares = 0.0f;
#pragma unroll
  for (const float2& v : x.v) squares += v.x * v.x + v.y * v.y;
  squares = over_warp(squares, [](float a, float b) { return a + b; });
  const float factor = 1.0f / sqrtf(squares / static_cast<float>(head_dim) + epsilon);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int p = lane + 32 * i;
    if (2 * p >= head_dim) continue;
    const int2 at = dims_of(p, rotary_dim);
    x.v[i].x *= factor * load_global(weight + at.x);
    x.v[i].y *= factor * load_global(weight + at.y);
  }
}

__device__ __forceinline__ void rotate(Pairs& x, const float* cos, const float* sin, int lane,
                                       int rotary_dim) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int p = lane + 32 * i;
    if (2 * p >= rotary_dim) continue;
    const float c = load_global(cos + p), s = load_global(sin + p);
    const float2 v = x.v[i];
    x.v[i] = {multiply_then_round(v.x, c) - multiply_then_round(v.y, s),
              multiply_then_round(v.y, c) + multiply_then_round(v.x, s)};
  }
}

__device__ __forceinline__ bool all_finite(const Pairs& x) {
  bool finite = true;
#pragma unroll
  for (const float2& v : x.v) finite = finite && fabsf(v.x) < INFINITY && fabsf(v.y) < INFINITY;
  return ballot(finite) == 0xffffffffu;
}

// NaN if any is: magnitudes are ordered as their bits, with NaN on top.
__device__ __forceinline__ float absmax(const Pairs& x) {
  const auto larger = [](uint32_t a, uint32_t b) { return a > b ? a : b; };
  uint32_t most = 0;
#pragma unroll
  for (const float2& v : x.v) {
    most = larger(most, bits_as<uint32_t>(v.x) & 0x7fffffffu);
    most = larger(most, bits_as<uint32_t>(v.y) & 0x7fffffffu);
  }
  return bits_as<float>(over_warp(most, larger));
}

// As quantize_int8 and the CPU's pages have it.
__device__ __forceinline__ uint8_t int8_code(float v, float inverse) {
  float f = multiply_then_round(v, inverse);
  f = f > -128.0f ? f : -128.0f;  // a NaN, too: the scale holds it already
  f = f < 127.0f ? f : 127.0f;
  return static_cast<uint8_t>(bits_as<uint32_t>(f + 12582912.0f));
}

__device__ __forceinline__ void store_row(const qk_cuda_rope_store_args& a, const Pairs& x,
                                          int64_t row, bool value, int lane) {
  const int head_dim = static_cast<int>(a.head_dim), rotary = static_cast<int>(a.rotary_dim);
  float scale = 1.0f;
  if (a.kv_dtype != QK_KV_BF16) {
    const float most = absmax(x);
    // A key that is not finite keeps a scale that is not: saturated it would pass for a number.
    if (a.fixed != nullptr && most < INFINITY) {
      scale = load_global(a.fixed + (value ? 1 : 0));
    } else if (a.kv_dtype == QK_KV_INT8) {
      scale = most / 127.5f;
      if (scale < 1.17549435e-38f) scale = 1.0f;
    } else {
      scale = most / 448.0f;
      if (scale == 0.0f) scale = 1.0f;
    }
    if (lane == 0) store_global(a.scale + row, scale);
  }
  const float inverse = a.kv_dtype == QK_KV_INT8 ? 1.0f / scale : 0.0f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int p = lane + 32 * i;
    if (2 * p >= head_dim) continue;
    const int2 at = dims_of(p, rotary);
    const float2 v = x.v[i];
    if (a.kv_dtype == QK_KV_BF16) {
      bf16* to = static_cast<bf16*>(a.data) + row * head_dim;
      store_global(to + at.x, from_float<bf16>(v.x));
      store_global(to + at.y, from_float<bf16>(v.y));
      continue;
    }
    uint8_t* to = static_cast<uint8_t*>(a.data) + row * head_dim;
    if (a.kv_dtype == QK_KV_INT8) {
      store_global(to + at.x, int8_code(v.x, inverse));
      store_global(to + at.y, int8_code(v.y, inverse));
    } else {
      // Adding 0 turns -0 into +0, as the activation quantizers do.
      const uint16_t both = floats_to_e4m3x2(v.x / scale + 0.0f, v.y / scale + 0.0f);
      store_global(to + at.x, static_cast<uint8_t>(both));
      store_global(to + at.y, static_cast<uint8_t>(both >> 8));
    }
  }
}

// The sequence that a token belongs to: the last one that starts at or before it, and has tokens.
__device__ __forceinline__ int64_t sequence_of(const qk_cuda_rope_store_args& a, int64_t token) {
  int64_t low = 0, high = a.sequences - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (load_global(a.starts + middle) <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Grid: x over tokens, y over kWarps heads of queries, keys and values.
__global__ void __launch_bounds__(32 * kWarps) rope_store_kernel(const qk_cuda_rope_store_args a) {
  launch_dependents();
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t token = blockIdx.x, head = static_cast<int64_t>(blockIdx.y) * kWarps + warp;
  if (head >= a.heads + 2 * a.kv_heads || token >= load_global(a.starts + a.sequences)) return;
  const int head_dim = static_cast<int>(a.head_dim), rotary = static_cast<int>(a.rotary_dim);
  const int64_t sequence = sequence_of(a, token);
  const int64_t position =
      load_global(a.past + sequence) + token - load_global(a.starts + sequence);
  const bf16* row = static_cast<const bf16*>(a.qkv) + token * a.ld_qkv;

  Pairs x = load_head(row + head * head_dim, lane, head_dim, rotary);
  const bool query = head < a.heads, value = head >= a.heads + a.kv_heads;
  if (!value) {
    const float* norm = query ? a.q_norm : a.k_norm;
    if (norm != nullptr) normalize(x, norm, a.norm_epsilon, lane, head_dim, rotary);
    rotate(x, a.cos + position * (rotary / 2), a.sin + position * (rotary / 2), lane, rotary);
  }
  if (query) {
    bf16* to = static_cast<bf16*>(a.q) + token * a.ldq + head * head_dim;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int p = lane + 32 * i;
      if (2 * p >= head_dim) continue;
      const int2 at = dims_of(p, rotary);
      store_global(to + at.x, from_float<bf16>(x.v[i].x));
      store_global(to + at.y, from_float<bf16>(x.v[i].y));
    }
    return;
  }
  // A value that is no number is stored as zeros with a key of NaNs: it makes NaN of the queries
  // that see it and of no other.
  const int64_t kv_head = (head - a.heads) % a.kv_heads;
  const Pairs values = value ? x
                             : load_head(row + (a.heads + a.kv_heads + kv_head) * head_dim, lane,
                                         head_dim, rotary);
  if (!all_finite(values)) {
#pragma unroll
    for (float2& v : x.v) v = value ? float2{0.0f, 0.0f} : float2{NAN, NAN};
  }
  const int64_t page =
      load_global(a.pages + sequence * a.page_stride + position / QK_PAGE_TOKENS);
  const int64_t half = (page * a.kv_heads + kv_head) * 2 + (value ? 1 : 0);
  store_row(a, x, half * QK_PAGE_TOKENS + position % QK_PAGE_TOKENS, value, lane);
}

int check(const qk_cuda_rope_store_args& a) {
  if (a.sequences < 0 || a.tokens < 0 || a.page_stride <= 0) return QK_INVALID_ARGUMENT;
  if (a.kv_heads <= 0 || a.heads < 0) return QK_INVALID_ARGUMENT;
  if (a.rotary_dim < 0 || a.rotary_dim % 2 != 0 || a.rotary_dim > a.head_dim) {
    return QK_INVALID_ARGUMENT;
  }
  if (a.head_dim <= 0 || a.head_dim % 16 != 0 || a.head_dim > 64 * kPairs) return QK_UNSUPPORTED;
  if (a.kv_dtype < QK_KV_BF16 || a.kv_dtype > QK_KV_FP8) return QK_UNSUPPORTED;
  const bool scaled = a.kv_dtype != QK_KV_BF16;
  return scaled != (a.scale != nullptr) || (a.fixed != nullptr && !scaled) ? QK_INVALID_ARGUMENT
                                                                           : QK_OK;
}

}  // namespace
}  // namespace quantkit::cuda

int qk_cuda_rope_store(const qk_cuda_rope_store_args* args, void* stream) {
  using namespace quantkit::cuda;
  if (const int status = check(*args)) return status;
  if (args->sequences == 0 || args->tokens == 0) return QK_OK;
  const int64_t rows = args->heads + 2 * args->kv_heads;
  const dim3 grid(static_cast<unsigned>(args->tokens),
                  static_cast<unsigned>((rows + kWarps - 1) / kWarps));
  return launch(rope_store_kernel,
                Launch{grid, 32 * kWarps, 0, static_cast<cudaStream_t>(stream)}, *args);
}
