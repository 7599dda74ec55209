// y = x W^T for integer 4-bit weights and a few rows of x, on the tensor cores.
//
// The weight is the 16-row operand of mma.m16n8k16 and eight rows of x are its 8 columns, so that
// one row of x costs no more tensor work than eight. A warp owns kTiles tiles of 16 weight rows,
// which share the fragments of x; the kWarps warps of a block take turns at slabs of 64 columns.
//
// The packed weight (quantkit.h, qk_w4a16_args) is in the order of the fragments: a lane's 16 bytes
// are its codes for four mma steps. The 64 columns of a slab are permuted within halves of 32 so
// that a lane's fragments of x for two steps are 16 neighbouring bytes of x, too: nothing goes
// through shared memory, and groups may be any multiple of 32 columns.
//
// Ladder, built but not timed on a GPU yet (benchmarks/gpu_session.sh):
//   1. Both operands from global memory into registers (this file), 16 bytes a load. Loads of codes
//      in flight a lane: 8 for 8 rows of x, 6 for 16 rows or for two groups a slab, 4 for both.
//      CUDA 13.0, in sm_80, 86, 89 and 90a alike: LDG.E.NA.128.CONSTANT for the codes, no local
//      memory, no spills, 116 to 128 registers, so two blocks a multiprocessor. Four tiles with
//      16 rows of x or with two groups a slab spilled, as did two tiles with both: not instantiated.
//   2. The next slab's x and scales are loaded one slab ahead, beside the codes.
//
// Sums: products of one slab and group in the tensor core's fp32, times the scale, added in fp32 in
// ascending order of a warp's slabs; then warps, then splits in ascending order. The division into
// warps and splits depends on N, K and the GPU alone, so that a row of y has the same bits whatever
// the other rows are. Nothing is added in the order of arrival.
//
// Source: the fragment order and the lop3 decoding are Marlin's (Frantar et al., "MARLIN",
// arXiv 2408.11743, section 3.4); the last block that arrives adds the splits as in the CUDA
// samples' threadFenceReduction.
#pragma once

#include <cstring>

#include "ptx.cuh"

namespace quantkit::cuda::w4a16 {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlab = 64;           // columns: four mma steps
constexpr int kTileRows = 16;
constexpr int kTileBytes = 512;     // of one tile and slab
constexpr int kTokenStride = 20;    // of a tile's sums in shared memory, in floats: 32 lanes, 32 banks

// Four tiles of 16 rows make a block of the packed tables.
constexpr int kBlockTiles = 4;
constexpr int kBlockRows = kBlockTiles * kTileRows;

template <int kTiles, int kTokens>
constexpr int shared_bytes() {
  return kWarps * kTiles * kTokens * kTokenStride * static_cast<int>(sizeof(float)) + 128;
}

// What a lane needs of the tables for one slab: for each group in it the scales and zeros of its
// weight rows.
template <int kTiles, int kGroups>
struct Tables {
  uint32_t scale[kGroups][kTiles];           // pairs: rows lane / 4 and lane / 4 + 8 of the tile
  uint32_t zero[kGroups][(kTiles + 1) / 2];  // bytes, likewise, of two tiles
};

// Eight columns of x from column k on, zero past the end. kVector: 16-byte aligned, and the number
// of columns is a multiple of 8.
template <bool kVector, class T>
__device__ __forceinline__ uint4 load_x(const T* row, int k, int columns) {
  if constexpr (kVector) {
    return k < columns ? load_global(reinterpret_cast<const uint4*>(row + k)) : uint4{0, 0, 0, 0};
  } else {
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t low = 0, high = 0;
      if (k + 2 * j < columns) low = bits_as<uint16_t>(load_global(row + k + 2 * j));
      if (k + 2 * j + 1 < columns) high = bits_as<uint16_t>(load_global(row + k + 2 * j + 1));
      pairs[j] = low | high << 16;
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

// kBytes of a table in qk_w4a16_args's order, as words.
template <int kBytes, int kWords>
__device__ __forceinline__ void load_words(const uint8_t* p, uint32_t (&out)[kWords]) {
  if constexpr (kBytes == 16) {
    const uint4 v = load_global(reinterpret_cast<const uint4*>(p));
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  } else if constexpr (kBytes == 8) {
    const uint2 v = load_global(reinterpret_cast<const uint2*>(p));
    out[0] = v.x, out[1] = v.y;
  } else if constexpr (kBytes == 4) {
    out[0] = load_global(reinterpret_cast<const uint32_t*>(p));
  } else {
    static_assert(kBytes == 2);
    out[0] = load_global(reinterpret_cast<const uint16_t*>(p));
  }
}

// How the launch walks K, beside the caller's arguments.
struct Walk {
  int slabs, slabs_a_split;
  uint32_t group_factor;  // group of half slab i is i * group_factor >> 31
};

// A lane's place in the tables, and how it moves along K.
template <int kTiles, int kGroups>
class TableReader {
 public:
  template <class T>
  __device__ __forceinline__ TableReader(const qk_w4a16_args& a, const Walk& walk, int first_tile,
                                         int g, T)
      : factor_(walk.group_factor), groups_(static_cast<int>(a.groups)) {
    static_assert(sizeof(T) == 2);
    const int64_t at = first_tile / kBlockTiles * a.groups * kBlockRows + g * (2 * kBlockTiles) +
                       2 * (first_tile % kBlockTiles);
    scales_ = static_cast<const uint8_t*>(a.scale) + at * 2;
    zeros_ = a.zero == nullptr ? nullptr : a.zero + at;
  }

  __device__ __forceinline__ void load(int slab, Tables<kTiles, kGroups>& out) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint64_t half_slab = static_cast<uint32_t>(2 * slab + i);
      int group = static_cast<int>(half_slab * factor_ >> 31);
      // The second half of the last slab may lie past the end, where x is zero.
      if (kGroups == 2 && group >= groups_) group = groups_ - 1;
      load_words<4 * kTiles>(scales_ + group * (2 * kBlockRows), out.scale[i]);
      if (zeros_ != nullptr) {
        load_words<2 * kTiles>(zeros_ + group * kBlockRows, out.zero[i]);
      } else {
#pragma unroll
        for (uint32_t& zero : out.zero[i]) zero = 0x08080808u;
      }
    }
  }

 private:
  const uint8_t *scales_, *zeros_;
  uint32_t factor_;
  int groups_;
};

// Weight fragments of one mma step of tile i.
template <class T, int kTiles, int kGroups>
__device__ __forceinline__ void decode(uint32_t word, const Tables<kTiles, kGroups>& tables,
                                       int group, int i, uint32_t (&weight)[4]) {
  const uint32_t bytes = tables.zero[group][i / 2];
  Int4<T>::decode(word,
                  i % 2 == 0 ? Int4<T>::template zeros<0>(bytes)
                             : Int4<T>::template zeros<2>(bytes),
                  weight);
}

// sum += scale * product for the rows of a lane, and product = 0.
template <class T>
__device__ __forceinline__ void add_scaled(float (&sum)[4], float (&product)[4], uint32_t scales) {
  const float2 scale = Pair<T>::to_floats(scales);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    sum[c] = fmaf(c < 2 ? scale.x : scale.y, product[c], sum[c]);
    product[c] = 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void write_y(const qk_w4a16_args& a, int64_t token, int64_t row,
                                        float y) {
  if (a.bias != nullptr) y += to_float(load_global(static_cast<const T*>(a.bias) + row));
  store_global(static_cast<T*>(a.y) + token * a.ldy + row, from_float<T>(y));
}

// Grid: x over kTiles tiles of weight rows, y over splits of K, z over 8 * kTokenTiles rows of x.
// kGroups: groups that a slab touches, 2 when the group size is an odd multiple of 32.
template <class T, int kTiles, int kTokenTiles, int kGroups, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    skinny_kernel(const qk_w4a16_args a, const Walk walk) {
  // Slabs in flight: 8 loads of 16 bytes a lane, fewer where the fragments of 16 rows of x or the
  // scales of two groups take the registers.
  constexpr int kDepth = (12 - 2 * kTokenTiles - 2 * kGroups) / kTiles;
  constexpr int kTokens = 8 * kTokenTiles;
  struct Reads {
    uint4 x[kTokenTiles][2];  // eight columns of each half of the slab
    Tables<kTiles, kGroups> tables;
  };
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int first_tile = static_cast<int>(blockIdx.x) * kTiles;
  const int64_t first_token = static_cast<int64_t>(blockIdx.z) * kTokens;
  const int begin = static_cast<int>(blockIdx.y) * walk.slabs_a_split;
  const int end =
      begin + walk.slabs_a_split < walk.slabs ? begin + walk.slabs_a_split : walk.slabs;
  const int columns = static_cast<int>(a.k);

  const int64_t block = first_tile / kBlockTiles;
  const uint8_t* codes = a.packed + block * walk.slabs * (kBlockTiles * kTileBytes) +
                         first_tile % kBlockTiles * kTileBytes + lane * 16;
  const TableReader<kTiles, kGroups> tables(a, walk, first_tile, g, T{});
  // Rows past the end read the last one again: their sums are not written.
  const T* x[kTokenTiles];
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const int64_t token = first_token + 8 * j + g;
    x[j] = static_cast<const T*>(a.x) + (token < a.m ? token : a.m - 1) * a.ldx;
  }

  launch_dependents();
  wait_for_previous();

  const auto load_codes = [&](int slab, uint4 (&q)[kTiles]) {
    const uint8_t* at = codes + static_cast<int64_t>(slab) * (kBlockTiles * kTileBytes);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) q[i] = load_once(at + i * kTileBytes);
  };
  const auto load_reads = [&](int slab, Reads& r) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        r.x[j][half] = load_x<kVector>(x[j], slab * kSlab + 32 * half + 8 * t, columns);
      }
    }
    tables.load(slab, r.tables);
  };

  float sum[kTiles][kTokenTiles][4] = {};
  const auto multiply = [&](const uint4 (&q)[kTiles], const Reads& r) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint32_t words[4] = {q[i].x, q[i].y, q[i].z, q[i].w};
      float product[kTokenTiles][4] = {};
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int group = kGroups == 2 ? step / 2 : 0;
        uint32_t weight[4];
        decode<T>(words[step], r.tables, group, i, weight);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const uint4& v = r.x[j][step / 2];
          const uint32_t pairs[2] = {step % 2 == 0 ? v.x : v.z, step % 2 == 0 ? v.y : v.w};
          mma_m16n8k16<T>(product[j], weight, pairs);
        }
        if (step == 3 || (kGroups == 2 && step == 1)) {
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            add_scaled<T>(sum[i][j], product[j], r.tables.scale[group][i]);
          }
        }
      }
    }
  };

  uint4 q[kDepth][kTiles];
  Reads now, next;
  int slab = begin + warp;
#pragma unroll
  for (int u = 0; u < kDepth; ++u) {
    if (slab + u * kWarps < end) load_codes(slab + u * kWarps, q[u]);
  }
  if (slab < end) load_reads(slab, next);
  for (; slab < end; slab += kDepth * kWarps) {
#pragma unroll
    for (int u = 0; u < kDepth; ++u) {
      const int at = slab + u * kWarps;
      if (at >= end) break;
      now = next;
      if (at + kWarps < end) load_reads(at + kWarps, next);
      multiply(q[u], now);
      if (at + kDepth * kWarps < end) load_codes(at + kDepth * kWarps, q[u]);
    }
  }

  SharedMemory memory;
  const SharedArray<float> partial =
      memory.array<float>(kWarps * kTiles * kTokens * kTokenStride);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = 8 * j + 2 * t + c % 2, row = g + 8 * (c / 2);
        partial.store(((warp * kTiles + i) * kTokens + token) * kTokenStride + row, sum[i][j][c]);
      }
    }
  }
  barrier();

  constexpr int kRows = kTiles * kTileRows;
  const int64_t first_row = static_cast<int64_t>(first_tile) * kTileRows;
  // partials [split][m][n]
  const auto at_split = [&](int64_t split, int64_t token, int64_t row) {
    return a.partials + (split * a.m + token) * a.n + row;
  };
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kTokens; i += kThreads) {
    const int row = i % kRows, token = i / kRows;
    if (first_row + row >= a.n || first_token + token >= a.m) continue;
    float y = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      y += partial.load(((w * kTiles + row / kTileRows) * kTokens + token) * kTokenStride +
                        row % kTileRows);
    }
    if (gridDim.y == 1) {
      write_y<T>(a, first_token + token, first_row + row, y);
    } else {
      store_global(at_split(blockIdx.y, first_token + token, first_row + row), y);
    }
  }
  if (gridDim.y == 1) return;

  // The block that arrives last adds the splits, in ascending order.
  const SharedArray<uint32_t> arrived = memory.array<uint32_t>(1);
  uint32_t* counter = a.counters + blockIdx.z * gridDim.x + blockIdx.x;
  fence_device();
  barrier();
  if (threadIdx.x == 0) arrived.store(0, atomic_add(counter, 1u));
  barrier();
  if (arrived.load(0) + 1 != gridDim.y) return;
  fence_device();
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kTokens; i += kThreads) {
    const int64_t row = first_row + i % kRows, token = first_token + i / kRows;
    if (row >= a.n || token >= a.m) continue;
    float y = 0.0f;
    for (unsigned split = 0; split < gridDim.y; ++split) {
      y += load_from_l2(at_split(split, token, row));
    }
    write_y<T>(a, token, row, y);
  }
  if (threadIdx.x == 0) store_global(counter, 0u);  // for the next call
}

// How a weight is divided among blocks: of N, K and the GPU, never of the number of rows of x.
struct Division {
  int tiles;   // of 16 weight rows, a block: 1, 2 or 4
  int splits;  // of K
};

inline Division divide(int64_t n, int64_t k, int multiprocessors) {
  const int64_t tiles = (n + kTileRows - 1) / kTileRows, slabs = (k + kSlab - 1) / kSlab;
  Division best{1, 1};
  double least = 0;
  for (int t = 1; t <= kBlockTiles; t *= 2) {
    for (int s = 1; s <= 8; s *= 2) {
      if (s > 1 && slabs < 2 * s * kWarps) break;  // every warp has two slabs or K is not split
      // Work of the busiest multiprocessor in tiles x slabs, plus what each block's warps read of x
      // and what a split's round trip through L2 costs, in the same unit.
      const int64_t blocks = (tiles + t - 1) / t * s;
      const double rounds = static_cast<double>((blocks + multiprocessors - 1) / multiprocessors);
      const double slabs_each = static_cast<double>((slabs + s - 1) / s);
      const double cost = rounds * slabs_each * (t + 0.25) + (s > 1 ? 32.0 : 0.0);
      if (least == 0 || cost < least) {
        least = cost;
        best = {t, s};
      }
    }
  }
  return best;
}

inline Walk walk_of(const qk_w4a16_args& a, int splits) {
  const int64_t slabs = (a.k + kSlab - 1) / kSlab, halves = a.group_size / 32;
  // ceil(2^31 / d) for groups of d half slabs: exact while K * group_size < 2^41.
  const uint32_t factor =
      a.groups == 1 ? 0u : static_cast<uint32_t>(((int64_t{1} << 31) + halves - 1) / halves);
  return {static_cast<int>(slabs), static_cast<int>((slabs + splits - 1) / splits), factor};
}

inline bool one_group_a_slab(const qk_w4a16_args& a) {
  return a.group_size % kSlab == 0 || a.groups == 1;
}

inline bool aligned_x(const qk_w4a16_args& a) {
  return a.k % 8 == 0 && a.ldx % 8 == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
}

template <class T, int kTiles, int kTokenTiles, int kGroups, bool kVector>
int launch_skinny(const qk_w4a16_args& a, int splits, cudaStream_t stream) {
  constexpr int kTokens = 8 * kTokenTiles;
  const int64_t tiles = (a.n + kTileRows - 1) / kTileRows;
  const dim3 grid(static_cast<unsigned>((tiles + kTiles - 1) / kTiles),
                  static_cast<unsigned>(splits),
                  static_cast<unsigned>((a.m + kTokens - 1) / kTokens));
  return launch(skinny_kernel<T, kTiles, kTokenTiles, kGroups, kVector>,
                Launch{grid, kThreads, shared_bytes<kTiles, kTokens>(), stream, a.overlap != 0}, a,
                walk_of(a, splits));
}

template <class T, int kTokenTiles, int kGroups>
int skinny_groups(const qk_w4a16_args& a, cudaStream_t stream) {
  const Division by = divide(a.n, a.k, a.multiprocessors);
  // Tiles divide rows of the weight alone: any number of them gives the same bits.
  if (!aligned_x(a)) return launch_skinny<T, 1, kTokenTiles, kGroups, false>(a, by.splits, stream);
  constexpr int kMost = 4 / (kTokenTiles * kGroups);  // tiles that fit the registers
  if constexpr (kMost == 4) {
    if (by.tiles == 4) return launch_skinny<T, 4, 1, 1, true>(a, by.splits, stream);
  }
  if constexpr (kMost >= 2) {
    if (by.tiles >= 2) {
      return launch_skinny<T, 2, kTokenTiles, kGroups, true>(a, by.splits, stream);
    }
  }
  return launch_skinny<T, 1, kTokenTiles, kGroups, true>(a, by.splits, stream);
}

template <class T>
int skinny(const qk_w4a16_args& a, cudaStream_t stream) {
  if (one_group_a_slab(a)) {
    return a.m <= 8 ? skinny_groups<T, 1, 1>(a, stream) : skinny_groups<T, 2, 1>(a, stream);
  }
  return a.m <= 8 ? skinny_groups<T, 1, 2>(a, stream) : skinny_groups<T, 2, 2>(a, stream);
}

// Up to this many rows each weight is read once or twice by the kernel above, then w4a16_gemm.cuh
// takes over.
constexpr int64_t kSkinnyRows = 32;

// One function a dtype, each in its own translation unit.
int linear_f16(const qk_w4a16_args& a, cudaStream_t stream);
int linear_bf16(const qk_w4a16_args& a, cudaStream_t stream);

}  // namespace quantkit::cuda::w4a16
