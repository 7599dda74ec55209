// Rows of activations times a Hadamard matrix S ⊗ B / sqrt(order), behind the gated activation if
// wanted, to 16-bit floats or 8-bit codes. One block a row, one pass over device memory.
//
// A row is `runs` of `base` values: B multiplies within runs, S between them.
//   1. B on the tensor cores, out of device memory: products of 16-bit values with 1 and -1 are exact,
//      and sums are fp32. A lane loads eight bytes, which are its share of a fragment: columns are
//      permuted in B's fragments, and wider loads would straddle runs of 28. B comes as signs, four
//      fragments a word.
//   2. S on the fragments of the sums: the lowest bit of a run's number lies within a register pair,
//      two bits in lanes, the next ones in tiles.
//   3. The row into shared memory, and the rest of S in passes of up to four bits there. The last
//      pass scales, rounds to the dtype of the activations and finds the row's largest magnitude.
//   4. Codes, as in row_quantize.cuh.
//
// Banks: a store has eight neighbours from each of four places, 2 * base words apart. Those are the
// four quarters of the banks where base is 4 times an odd number; else `Row::place` makes them so.
// Reads are of neighbours. So no access of a base that is a multiple of 4 waits for another.
//
// Ladder, built but not timed on a GPU yet (benchmarks/gpu_session.sh):
//   1. Gate, product and quantizer as three kernels: 13 bytes a column instead of 5.
//   2. B by fp32 sums in registers: `base` of them a value, where memory leaves time for some 35
//      instructions; 28 for Llama-3's MLP.
//   3. This file. Registers, instructions and the floor are in benchmarks/LOG.md.
//
// Source: Ashkboos et al., "QuaRot", arXiv 2404.00456, section 4, stage 1d; Paley's matrices as in
// quantkit/hadamard.py. Agarwal et al., "HadaCore", arXiv 2412.09621, has S on tensor cores, too,
// which rounds between its factors to 16 bits.
#pragma once

#include "row_quantize.cuh"

namespace quantkit::cuda::hadamard {

using rows::Sink;

constexpr int kMostThreads = 512;
constexpr int kMostBytes = 227 * 1024;  // of shared memory

struct Matrix {
  const uint32_t* signs;  // of B: see qk_cuda_hadamard_args
  int base, runs;         // orders of B and S
  float scale;            // 1 / sqrt(base * runs)
};

// ---- sources: four columns of a row, as two pairs of T -----------------------------------------

// Each has a Held, what `load` reads from memory, and makes the pairs of it in `four`: so that many
// loads are under way before the first is waited for.

template <class T_>
struct Plain {
  using T = T_;
  using Held = uint2;
  const T* x;
  int64_t ldx;

  template <bool kVector>
  __device__ __forceinline__ Held load(int64_t row, int k, int count, int) const {
    return load_four<kVector>(x + row * ldx + k, count);
  }
  __device__ __forceinline__ uint2 four(const Held& held) const { return held; }
};

template <class T_>
struct Gated {
  using T = T_;
  struct Held {
    uint2 gate, up;
  };
  rows::Gated<T> from;

  template <bool kVector>
  __device__ __forceinline__ Held load(int64_t row, int k, int count, int columns) const {
    const T* gate = from.x + row * from.ldx + k;
    return {load_four<kVector>(gate, count), load_four<kVector>(gate + columns, count)};
  }
  __device__ __forceinline__ uint2 four(const Held& held) const {
    return {pair(held.gate.x, held.up.x), pair(held.gate.y, held.up.y)};
  }
  __device__ __forceinline__ uint32_t pair(uint32_t gate, uint32_t up) const {
    const float2 g = Pair<T>::to_floats(gate), u = Pair<T>::to_floats(up);
    return Pair<T>::from_floats(from.act(g.x) * u.x, from.act(g.y) * u.y);
  }
};

// ---- the row in shared memory ------------------------------------------------------------------

// Floats of a row of so many columns: whole tiles of `runs` runs, and whole rounds of the banks.
template <class I>
__host__ __device__ constexpr I places(I columns, I base, int runs) {
  const I tile = base * runs;
  return ((columns + tile - 1) / tile * tile + 31) / 32 * 32;
}

struct Row {
  SharedArray<float> values;
  int mask;

  // Of column k: bits 5 and 6, as far as the mask has them, are added to bits 3 and 4. So aligned
  // vectors of up to eight stay together, and 8 * base columns on is 8 * base places on.
  __device__ __forceinline__ int place(int k) const { return k ^ (k >> 5 & mask) << 3; }

  __device__ __forceinline__ static int mask_for(int base) {
    return base % 16 == 0 ? 3 : base % 8 == 0 ? 1 : 0;
  }
};

template <int kWidth>
struct alignas(4 * kWidth) Floats {
  float v[kWidth];
};

__device__ __forceinline__ void sum_and_difference(float& a, float& b) {
  const float sum = a + b;
  b = a - b;
  a = sum;
}

// ---- B, and S within a warp --------------------------------------------------------------------

// Two elements of an A fragment: 1, or -1 where bit 15 or 31 is set.
template <class T>
__device__ __forceinline__ uint32_t signed_ones(uint32_t signs) {
  return (signs & 0x80008000u) | Pair<T>::from_floats(1.0f, 1.0f);
}

// v[tile][2h + i] belongs to run 8 tile + 2 (lane % 4) + i. S of order `runs`, as far as it reaches.
template <int kTiles>
__device__ __forceinline__ void butterflies_in_warp(float (&v)[kTiles][4], int runs, int lane) {
  if (runs > 1) {
#pragma unroll
    for (auto& tile : v) {
      sum_and_difference(tile[0], tile[1]);
      sum_and_difference(tile[2], tile[3]);
    }
  }
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    if (runs <= 2 * mask) continue;
    const float sign = lane & mask ? -1.0f : 1.0f;
#pragma unroll
    for (auto& tile : v) {
#pragma unroll
      for (float& f : tile) f = fmaf(f, sign, shuffle_xor(f, mask));
    }
  }
#pragma unroll
  for (int half = 1; half < kTiles; half *= 2) {
    if (runs <= 8 * half) continue;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile & half) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_and_difference(v[tile][i], v[tile + half][i]);
    }
  }
}

// A warp takes 8 * kTiles runs at a time. kSteps: 16 columns each, at least as many as B has.
template <int kSteps, int kTiles, bool kVector, class Source>
__device__ __forceinline__ void multiply_runs(const Source& source, int64_t row, int columns,
                                              const Matrix& h, const Row& y) {
  using T = typename Source::T;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, g = lane / 4, t = lane % 4;
  constexpr int kAtOnce = 4;  // loads of a lane: with 32 warps an SM has 64 KB of them under way
  const int runs = columns / h.base, steps = (h.base + 15) / 16, words = (steps + 3) / 4;
  const int stride = 8 * kTiles * static_cast<int>(blockDim.x) / 32;
  for (int first = 8 * kTiles * (thread / 32); first < runs; first += stride) {
    uint2 x[kTiles * kSteps];
#pragma unroll
    for (int some = 0; some < kTiles * kSteps; some += kAtOnce) {
      typename Source::Held held[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int tile = (some + i) / kSteps, step = (some + i) % kSteps;
        const int run = first + 8 * tile + g, at = 16 * step + 4 * t;
        const int count = run < runs ? h.base - at : 0;
        held[i] = source.template load<kVector>(row, run * h.base + at, count, columns);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if ((some + i) % kSteps < steps) x[some + i] = source.four(held[i]);
      }
    }
#pragma unroll 1
    for (int band = 0; band < steps; ++band) {
      float sums[kTiles][4] = {};
      uint32_t signs = 0;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step >= steps) break;
        if (step % 4 == 0) {
          signs = load_global(h.signs + (band * words + step / 4) * 32 + lane);
        }
        uint32_t a[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = signed_ones<T>(signs << (4 * (step % 4) + r));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint2& four = x[tile * kSteps + step];
          const uint32_t b[2] = {four.x, four.y};
          mma_m16n8k16<T>(sums[tile], a, b);
        }
      }
      butterflies_in_warp(sums, h.runs, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int run = first + 2 * t + i % 2, c = 16 * band + g + 8 * (i / 2);
        if (c >= h.base) continue;
        const int at = y.place(run * h.base + c);
        // Runs past the row have places of their own: see shared_bytes.
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          y.values.store(at + 8 * tile * h.base, sums[tile][i]);
        }
      }
    }
  }
}

// ---- the rest of S -----------------------------------------------------------------------------

// kBits stages of S, on values `stride` columns apart and more; kLast: then scaled and rounded to T.
// The largest magnitude of what this thread has rounded.
template <int kBits, bool kLast, class T>
__device__ __forceinline__ uint32_t pass(const Row& y, int columns, int stride, float scale) {
  constexpr int kCount = 1 << kBits, kWidth = kBits == 4 ? 2 : 4;  // 32 values at the most
  using V = Floats<kWidth>;
  const int step = static_cast<int>(blockDim.x), units = (columns / kCount + kWidth - 1) / kWidth;
  uint32_t most = 0;
#pragma unroll 1
  for (int unit = static_cast<int>(threadIdx.x); unit < units; unit += step) {
    int first = kWidth * unit;
    if constexpr (kBits > 0) first += first / stride * stride * (kCount - 1);
    const int at = y.place(first);
    V v[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = y.values.template load_vector<V>(at + i * stride);
    const int to = opaque(at), apart = opaque(stride);
#pragma unroll
    for (int half = 1; half < kCount; half *= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i & half) continue;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum_and_difference(v[i].v[j], v[i + half].v[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kLast) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          // Only a row of runs of 1 or 2 ends within a vector: it has no stages here.
          const bool inside = kBits > 0 || first + j < columns;
          v[i].v[j] = inside ? to_float(from_float<T>(v[i].v[j] * scale)) : 0.0f;
        }
        most = rows::larger(most, rows::magnitude(v[i].v));
      }
      y.values.template store_vector<V>(to + i * apart, v[i]);
    }
  }
  return most;
}

template <class T>
__device__ __forceinline__ uint32_t last_pass(const Row& y, int columns, int stride, float scale,
                                              int bits) {
  switch (bits) {
    case 0: return pass<0, true, T>(y, columns, stride, scale);
    case 1: return pass<1, true, T>(y, columns, stride, scale);
    case 2: return pass<2, true, T>(y, columns, stride, scale);
    case 3: return pass<3, true, T>(y, columns, stride, scale);
    default: return pass<4, true, T>(y, columns, stride, scale);
  }
}

// ---- where a row goes --------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void store_values(T* to, const float (&v)[4], int count, bool vector) {
  if (vector) {
    const uint2 pairs{Pair<T>::from_floats(v[0], v[1]), Pair<T>::from_floats(v[2], v[3])};
    store_global(reinterpret_cast<uint2*>(to), pairs);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < count) store_global(to + j, from_float<T>(v[j]));
  }
}

__device__ __forceinline__ void store_word(uint8_t* to, uint32_t word, int count, bool vector) {
  if (vector) {
    store_global(reinterpret_cast<uint32_t*>(to), word);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < count) store_global(to + j, static_cast<uint8_t>(word >> (8 * j)));
  }
}

// `most`: the largest magnitude of the row, for a scale a token.
template <class T>
__device__ __forceinline__ void write_row(const Row& y, const Sink& sink, int64_t row, int columns,
                                          uint32_t most, bool vector) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int vectors = (columns + 3) / 4, groups = (columns + rows::kGroup - 1) / rows::kGroup;
  float scale = 1.0f;
  if (sink.output == rows::kTokenCodes) {
    scale = rows::scale_of<T>(most, sink.format);
    if (thread == 0) store_global(static_cast<T*>(sink.scale) + row, from_float<T>(scale));
  } else if (sink.output == rows::kStaticCodes) {
    scale = load_as_float(sink.scale, sink.arith_dtype, 0);
  }
  rows::Divisor by = rows::divisor_of(scale, sink.arith_dtype != QK_F32);
  // Whole warps: the 32 lanes of a group meet in shuffles.
#pragma unroll 1
  for (int i = thread; i < (vectors + 31) / 32 * 32; i += threads) {
    float v[4] = {};
    if (i < vectors) {
      const auto held = y.values.template load_vector<Floats<4>>(y.place(4 * i));
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = held.v[j];
    }
    if (sink.output == rows::kGroupCodes) {
      uint32_t group = rows::magnitude(v);
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) {
        group = rows::larger(group, shuffle_xor(group, mask));
      }
      scale = rows::scale_of<T>(group, sink.format);
      by = rows::divisor_of(scale, true);
      if (i % 32 == 0) {
        store_global(static_cast<T*>(sink.scale) + row * groups + i / 32, from_float<T>(scale));
      }
    }
    if (i >= vectors) continue;
    const int k = 4 * i, count = columns - k;
    if (sink.output == rows::kValues) {
      store_values(static_cast<T*>(sink.y) + row * sink.ldy + k, v, count, vector);
    } else {
      const uint32_t word = rows::code_word(v, by, sink.format, sink.arith_dtype);
      store_word(sink.q + row * columns + k, word, count, vector);
    }
  }
}

// ---- the kernel --------------------------------------------------------------------------------

// Grid: a block a row. `bits`: what S has beyond a warp's runs.
template <class Source, int kSteps, int kTiles, bool kVector>
__global__ void __launch_bounds__(kMostThreads, kSteps <= 2 ? 2 : 1)
    hadamard_kernel(const Source source, const Sink sink, const Matrix h, int columns, int bits,
                    bool vector) {
  using T = typename Source::T;
  const int64_t row = blockIdx.x;
  SharedMemory memory;
  const SharedArray<uint32_t> maxima = memory.array<uint32_t>(kMostThreads / 32);
  const Row y{memory.array<float>(places(columns, h.base, 8 * kTiles)), Row::mask_for(h.base)};

  multiply_runs<kSteps, kTiles, kVector>(source, row, columns, h, y);
  barrier();
  int stride = 8 * kTiles * h.base;
  for (; bits > 4; bits -= 3, stride *= 8) {
    pass<3, false, T>(y, columns, stride, 1.0f);
    barrier();
  }
  uint32_t most = last_pass<T>(y, columns, stride, h.scale, bits);
  most = rows::over_block(most, maxima, rows::larger);
  write_row<T>(y, sink, row, columns, most, vector);
}

// Which kernel: columns of B's fragments in steps of 16, and tiles of eight runs that a warp takes at a
// time. Runs of up to 32 have their fragments in few registers; of longer ones a warp takes fewer.
// Rows that cannot be read by eight bytes take the way that serves all.
struct Shape {
  int steps, tiles;
};
inline Shape shape_for(int64_t base, bool vector) {
  if (!vector || base > 160) return {32, 1};
  return base > 32 ? Shape{10, 2} : Shape{2, 4};
}

inline int64_t shared_bytes(int64_t columns, int64_t base, bool vector) {
  return 128 + 4 * places(columns, base, 8 * shape_for(base, vector).tiles);
}

template <int kSteps, int kTiles, bool kVector, class Source>
int launch_tiles(const Source& source, const Sink& sink, const Matrix& h, int64_t m, int columns,
                 cudaStream_t stream) {
  const int tiles = (columns / h.base + 8 * kTiles - 1) / (8 * kTiles);
  const int threads = tiles < kMostThreads / 32 ? 32 * tiles : kMostThreads;
  int bits = 0;
  while (8 * kTiles << bits < h.runs) ++bits;
  const bool stores = columns % 4 == 0 &&
                      (sink.output == rows::kValues ? aligned(sink.y, 8) && sink.ldy % 4 == 0
                                                    : aligned(sink.q, 4));
  const auto shared = static_cast<int>(shared_bytes(columns, h.base, kVector));
  const Launch at{dim3(static_cast<unsigned>(m)), threads, shared, stream};
  return launch(hadamard_kernel<Source, kSteps, kTiles, kVector>, at, source, sink, h, columns, bits,
                stores);
}

template <class Source>
int launch_rows(const Source& source, const Sink& sink, const Matrix& h, int64_t m, int columns,
                bool vector, cudaStream_t stream) {
  if (!vector) return launch_tiles<32, 1, false>(source, sink, h, m, columns, stream);
  switch (shape_for(h.base, true).steps) {
    case 2: return launch_tiles<2, 4, true>(source, sink, h, m, columns, stream);
    case 10: return launch_tiles<10, 2, true>(source, sink, h, m, columns, stream);
    default: return launch_tiles<32, 1, true>(source, sink, h, m, columns, stream);
  }
}

}  // namespace quantkit::cuda::hadamard
