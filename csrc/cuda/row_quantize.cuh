// Rows of activations to 8-bit codes, alone or behind what makes the row: the RMS norm with its
// residual sum, and the gated activation. One block a row, one pass over device memory.
//
// A row is staged in shared memory as 16-bit floats (fp32 while the norm's sum of squares is not
// known). A thread reads back only what it wrote itself, so the only barriers are those of the
// block's maximum and sum; with a scale for each 128 columns, 16 lanes hold a group and there are
// none.
//
// The arithmetic is that of cpu/activations.h, to the bit: the row is rounded to the dtype of the
// activations first, and scale and quotient are rounded to it again. Norms and gates are fp32 as on
// the CPU, with another order of the sum and another exp: their results differ in the last fp32
// place, and so in a rounding to 16 bits now and then.
//
// Ladder, built but not timed on a GPU yet (benchmarks/gpu_session.sh):
//   1. Two kernels, norm and quantize: the row travels to memory and back.
//   2. Staged in shared memory, 16 bytes a load and 8 codes a store. CUDA 13.0, sm_80, 86, 89 and
//      90a: LDG.E.128 and STG.E.64, no spills, 31 to 47 registers. IEEE division takes some ten
//      instructions an element, which is more than a row's bytes take at full bandwidth.
//   3. A product with the reciprocal in its place, to the bit (`Divisor`), and the sigmoid's to 2 ulp
//      (this file).
//
// Source: dynamic per-token scales as in compressed-tensors; fused norm and quantization as in
// vLLM's rms_norm_dynamic_per_token_quant.
#pragma once

#include "quantkit/cuda.h"
#include "vectors.cuh"

namespace quantkit::cuda::rows {

constexpr int kMostThreads = 512;
constexpr int kGroup = 128;  // columns: 16 lanes of 8
constexpr int kMostBytes = 96 * 1024;

enum Output { kValues, kTokenCodes, kGroupCodes, kStaticCodes };

// Where a row goes.
struct Sink {
  Output output;
  int32_t format, arith_dtype;  // of codes
  void* scale;                  // of T when written, of arith_dtype when read
  uint8_t* q;                   // [m, k]
  void* y;                      // values, rows ldy elements apart
  int64_t ldy;
};

inline bool known(int32_t dtype) { return dtype == QK_F16 || dtype == QK_BF16; }

// The sink of a quantizer of rows of k columns of `dtype`, or a status.
inline int codes_sink(const qk_quantize_args& a, int32_t dtype, int64_t k, Sink& sink) {
  if (a.group_size <= 0 || a.q == nullptr || a.scale == nullptr) return QK_INVALID_ARGUMENT;
  if (a.format != QK_I8 && a.format != QK_F8) return QK_UNSUPPORTED;
  if (a.group_size < k && (a.group_size != kGroup || a.format != QK_F8)) return QK_UNSUPPORTED;
  if (a.scale_given && a.group_size < k) return QK_UNSUPPORTED;
  if (!a.scale_given && a.arith_dtype != dtype) return QK_UNSUPPORTED;
  const Output output =
      a.scale_given ? kStaticCodes : a.group_size < k ? kGroupCodes : kTokenCodes;
  sink = {output, a.format, a.arith_dtype, a.scale, a.q, nullptr, 0};
  return QK_OK;
}

// ---- a block's sum and maximum ---------------------------------------------------------------

// Of all threads, in every thread, in an order that depends on their number alone. `scratch` has an
// element a warp; two barriers, so that it can be used again.
template <class V, class Combine>
__device__ __forceinline__ V over_block(V v, const SharedArray<V>& scratch, Combine combine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = combine(v, shuffle_xor(v, mask));
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / 32;
  if (thread % 32 == 0) scratch.store(thread / 32, v);
  barrier();
  V all = scratch.load(0);
  for (int i = 1; i < warps; ++i) all = combine(all, scratch.load(i));
  barrier();
  return all;
}

// Magnitudes are ordered as their bits, with NaN on top: a NaN becomes the maximum and the scale.
template <int kCount>
__device__ __forceinline__ uint32_t magnitude(const float (&v)[kCount]) {
  uint32_t most = 0;
#pragma unroll
  for (float f : v) {
    const uint32_t bits = bits_as<uint32_t>(f) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// ---- codes -----------------------------------------------------------------------------------

__device__ __forceinline__ float round_to(float v, int dtype) {
  if (dtype == QK_F32) return v;
  return dtype == QK_F16 ? to_float(from_float<f16>(v)) : to_float(from_float<bf16>(v));
}

template <class T>
constexpr float kEpsilon = 0.0f;
template <>
constexpr float kEpsilon<f16> = 0.0009765625f;
template <>
constexpr float kEpsilon<bf16> = 0.0078125f;

template <class T>
__device__ __forceinline__ float scale_of(uint32_t most, int format) {
  const float scale =
      to_float(from_float<T>(bits_as<float>(most) / (format == QK_I8 ? 127.5f : 448.0f)));
  return scale == 0.0f ? kEpsilon<T> : scale;
}

// Clamped to [-128, 127] and rounded half to even: two's complement in the low bits of the sum. A
// NaN becomes 0, its scale is NaN already.
__device__ __forceinline__ uint32_t int8_code(float v) {
  v = v == v ? v : 0.0f;
  v = v < -128.0f ? -128.0f : v;
  v = v > 127.0f ? 127.0f : v;
  return bits_as<uint32_t>(v + 12582912.0f) & 255u;
}

// What values are divided by. Where value, scale and result have the same 16-bit type, the product
// with the scale's reciprocal rounds to the quotient's bits: a quotient of numbers of 11 (8) bits is
// 2^-23 (2^-17) of itself away from every point where rounding turns, which has a bit more, and the
// test of all pairs finds no other result. Tiny products, past the reciprocals of a float, have code 0.
struct Divisor {
  float scale, inverse;  // 0: divide
};

__device__ __forceinline__ Divisor divisor_of(float scale, bool one_type) {
  const bool multiply = one_type && scale > 0x1p-100f && scale < 0x1p100f;
  return {scale, multiply ? 1.0f / scale : 0.0f};
}

// The codes of four values, lowest column in the lowest byte.
__device__ __forceinline__ uint32_t code_word(const float (&v)[4], const Divisor& by, int format,
                                              int arith) {
  float quotient[4];
  if (by.inverse != 0.0f) {
#pragma unroll
    for (int j = 0; j < 4; ++j) quotient[j] = round_to(v[j] * by.inverse, arith);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) quotient[j] = round_to(v[j] / by.scale, arith);
  }
  if (format == QK_I8) {
    return int8_code(quotient[0]) | int8_code(quotient[1]) << 8 | int8_code(quotient[2]) << 16 |
           int8_code(quotient[3]) << 24;
  }
  // Adding 0 turns -0 into +0, as the zero point of compressed-tensors does.
  const uint32_t low = floats_to_e4m3x2(quotient[0] + 0.0f, quotient[1] + 0.0f);
  const uint32_t high = floats_to_e4m3x2(quotient[2] + 0.0f, quotient[3] + 0.0f);
  return low | high << 16;
}

__device__ __forceinline__ uint2 codes_of(const float (&v)[8], const Divisor& by, int format,
                                          int arith) {
  const float low[4] = {v[0], v[1], v[2], v[3]}, high[4] = {v[4], v[5], v[6], v[7]};
  return {code_word(low, by, format, arith), code_word(high, by, format, arith)};
}

template <bool kVector>
__device__ __forceinline__ void store_codes(uint8_t* row, int column, int columns, uint2 codes) {
  if constexpr (kVector) {
    store_global(reinterpret_cast<uint2*>(row + column), codes);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t word = j < 4 ? codes.x : codes.y;
      if (column + j < columns) {
        store_global(row + column + j, static_cast<uint8_t>(word >> (8 * (j % 4))));
      }
    }
  }
}

// Calls use(i) for each vector of eight columns that this thread owns.
template <class Use>
__device__ __forceinline__ void for_own_vectors(int columns, Use use) {
  const int step = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); 8 * i < columns; i += step) use(i);
}

// ---- sources: a row into shared memory -------------------------------------------------------

// Each has stage(row, columns, staged, scratch), after which vector i of the row, rounded to T, is
// at staged[i * kSlots] for the thread that owns it: i % blockDim.x.

template <class T_>
struct Plain {
  using T = T_;
  static constexpr int kSlots = 1;
  const T* x;
  int64_t ldx;

  template <bool kVector>
  __device__ __forceinline__ void stage(int64_t row, int columns, const SharedArray<uint4>& staged,
                                        const SharedArray<float>&) const {
    const T* from = x + row * ldx;
    for_own_vectors(columns, [&](int i) {
      staged.store(i, load_x<kVector>(from, 8 * i, columns));
    });
  }
};

template <class T_>
struct Gated {
  using T = T_;
  static constexpr int kSlots = 1;
  const T* x;  // gate, then up
  int64_t ldx;
  int32_t kind;

  __device__ __forceinline__ float act(float g) const {
    if (kind == QK_GATE_SILU) return divide_nearly(g, 1.0f + expf(-g));
    return 0.5f * g * (1.0f + tanhf(0.7978845608028654f * (g + 0.044715f * g * g * g)));
  }

  template <bool kVector>
  __device__ __forceinline__ void stage(int64_t row, int columns, const SharedArray<uint4>& staged,
                                        const SharedArray<float>&) const {
    const T* gate = x + row * ldx;
    for_own_vectors(columns, [&](int i) {
      float g[8], up[8];
      to_floats<T>(load_x<kVector>(gate, 8 * i, columns), g);
      to_floats<T>(load_x<kVector>(gate + columns, 8 * i, columns), up);
#pragma unroll
      for (int j = 0; j < 8; ++j) g[j] = act(g[j]) * up[j];
      staged.store(i, from_floats<T>(g));
    });
  }
};

template <class T_>
struct Norm {
  using T = T_;
  static constexpr int kSlots = 2;
  qk_add_rms_norm_args a;

  // residual + branch, eight columns from k on, written back if there is a branch.
  template <bool kVector>
  __device__ __forceinline__ void sum(int64_t row, int k, int columns, float (&v)[8]) const {
    float* at = a.residual + row * a.ld_residual + k;
    if constexpr (kVector) {
      const auto low = load_from_l2(reinterpret_cast<const float4*>(at));
      const auto high = load_from_l2(reinterpret_cast<const float4*>(at) + 1);
      const float both[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = both[j];
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = k + j < columns ? load_from_l2(at + j) : 0.0f;
    }
    if (a.branch == nullptr) return;
    const int64_t first = row * a.ld_branch;
    float b[8] = {};
    if (kVector && a.branch_dtype == QK_F16) {
      to_floats<f16>(load_x<kVector>(static_cast<const f16*>(a.branch) + first, k, columns), b);
    } else if (kVector && a.branch_dtype == QK_BF16) {
      to_floats<bf16>(load_x<kVector>(static_cast<const bf16*>(a.branch) + first, k, columns), b);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (k + j < columns) b[j] = load_as_float(a.branch, a.branch_dtype, first + k + j);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] += b[j];
    if constexpr (kVector) {
      store_global(reinterpret_cast<float4*>(at), float4{v[0], v[1], v[2], v[3]});
      store_global(reinterpret_cast<float4*>(at) + 1, float4{v[4], v[5], v[6], v[7]});
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (k + j < columns) store_global(at + j, v[j]);
      }
    }
  }

  template <bool kVector>
  __device__ __forceinline__ void load_weight(int k, int columns, float (&out)[8]) const {
    if constexpr (kVector) {
      const auto low = load_global(reinterpret_cast<const float4*>(a.weight + k));
      const auto high = load_global(reinterpret_cast<const float4*>(a.weight + k) + 1);
      out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
      out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) out[j] = k + j < columns ? load_global(a.weight + k + j) : 0.0f;
    }
  }

  template <bool kVector>
  __device__ __forceinline__ void stage(int64_t row, int columns, const SharedArray<uint4>& staged,
                                        const SharedArray<float>& scratch) const {
    float squares = 0.0f;
    for_own_vectors(columns, [&](int i) {
      float v[8];
      sum<kVector>(row, 8 * i, columns, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares = fmaf(v[j], v[j], squares);
      staged.store(2 * i, bits_as<uint4>(float4{v[0], v[1], v[2], v[3]}));
      staged.store(2 * i + 1, bits_as<uint4>(float4{v[4], v[5], v[6], v[7]}));
    });
    const float total =
        over_block(squares, scratch, [](float one, float other) { return one + other; });
    const float factor = 1.0f / sqrtf(total / static_cast<float>(columns) + a.epsilon);
    for_own_vectors(columns, [&](int i) {
      const float4 low = bits_as<float4>(staged.load(2 * i));
      const float4 high = bits_as<float4>(staged.load(2 * i + 1));
      float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      float weight[8];
      load_weight<kVector>(8 * i, columns, weight);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = v[j] * factor * weight[j];
      staged.store(2 * i, from_floats<T>(v));
    });
  }
};

// ---- the kernel ------------------------------------------------------------------------------

// Grid: a block a row.
template <class Source, bool kVector>
__global__ void __launch_bounds__(kMostThreads)
    row_kernel(const Source source, const Sink sink, int columns) {
  using T = typename Source::T;
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int vectors = (columns + 7) / 8;
  SharedMemory memory;
  const SharedArray<float> sums = memory.array<float>(kMostThreads / 32);
  const SharedArray<uint32_t> maxima = memory.array<uint32_t>(kMostThreads / 32);
  const SharedArray<uint4> staged = memory.array<uint4>(vectors * Source::kSlots);

  source.template stage<kVector>(row, columns, staged, sums);

  const auto staged_at = [&](int i, float (&v)[8]) {
    to_floats<T>(staged.load(i * Source::kSlots), v);
  };
  if (sink.output == kValues) {
    T* y = static_cast<T*>(sink.y) + row * sink.ldy;
    for (int i = thread; i < vectors; i += threads) {
      if constexpr (kVector) {
        store_global(reinterpret_cast<uint4*>(y) + i, staged.load(i * Source::kSlots));
      } else {
        float v[8];
        staged_at(i, v);
        for (int j = 0; j < 8 && 8 * i + j < columns; ++j) {
          store_global(y + 8 * i + j, from_float<T>(v[j]));
        }
      }
    }
    return;
  }

  uint8_t* q = sink.q + row * columns;
  if (sink.output == kGroupCodes) {
    const int groups = (columns + kGroup - 1) / kGroup;
    // Whole warps: the lanes of a group meet in shuffles.
    for (int i = thread; i < (vectors + 31) / 32 * 32; i += threads) {
      float v[8] = {};
      if (i < vectors) staged_at(i, v);
      uint32_t most = magnitude(v);
#pragma unroll
      for (int mask = 8; mask > 0; mask /= 2) most = larger(most, shuffle_xor(most, mask));
      if (i >= vectors) continue;
      const float scale = scale_of<T>(most, sink.format);
      if (i % 16 == 0) {
        store_global(static_cast<T*>(sink.scale) + row * groups + i / 16, from_float<T>(scale));
      }
      store_codes<kVector>(q, 8 * i, columns,
                           codes_of(v, divisor_of(scale, true), sink.format, sink.arith_dtype));
    }
    return;
  }

  float scale;
  if (sink.output == kStaticCodes) {
    scale = load_as_float(sink.scale, sink.arith_dtype, 0);
  } else {
    uint32_t most = 0;
    for (int i = thread; i < vectors; i += threads) {
      float v[8];
      staged_at(i, v);
      most = larger(most, magnitude(v));
    }
    scale = scale_of<T>(over_block(most, maxima, larger), sink.format);
    if (thread == 0) store_global(static_cast<T*>(sink.scale) + row, from_float<T>(scale));
  }
  const Divisor by = divisor_of(scale, sink.arith_dtype != QK_F32);
  for (int i = thread; i < vectors; i += threads) {
    float v[8];
    staged_at(i, v);
    store_codes<kVector>(q, 8 * i, columns, codes_of(v, by, sink.format, sink.arith_dtype));
  }
}

template <class Source>
int launch_rows(const Source& source, const Sink& sink, int64_t m, int64_t columns, bool vector,
                cudaStream_t stream) {
  const int vectors = static_cast<int>((columns + 7) / 8);
  const int threads = vectors < kMostThreads ? (vectors + 31) / 32 * 32 : kMostThreads;
  const int shared = 256 + (vectors * Source::kSlots + 7) / 8 * 128;
  const Launch at{dim3(static_cast<unsigned>(m)), threads, shared, stream};
  const int width = static_cast<int>(columns);
  const bool stores = columns % 8 == 0 &&
                      (sink.output == kValues ? aligned(sink.y, 16) && sink.ldy % 8 == 0
                                              : aligned(sink.q, 8));
  return vector && stores ? launch(row_kernel<Source, true>, at, source, sink, width)
                          : launch(row_kernel<Source, false>, at, source, sink, width);
}

}  // namespace quantkit::cuda::rows
