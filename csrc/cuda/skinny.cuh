// y = x W^T for a few rows of x, bound by the bytes of the weight (linear_frame.cuh has the words).
//
// One row of x costs no more tensor work than eight. A warp owns kTiles tiles of 16 weight rows,
// which share the fragments of x; the kWarps warps of a block take turns at slabs of 64 columns.
// Both operands go from global memory into registers, 16 bytes a load of codes: a lane's fragments
// are neighbours in memory, so nothing goes through shared memory before the sums of the warps do.
//
// Sums: a warp's slabs in ascending order; then warps, then splits in ascending order. The division
// into warps and splits depends on N, K and the GPU alone, so that a row of y has the same bits
// whatever the other rows are. Nothing is added in the order of arrival.
//
// Source: the last block that arrives adds the splits as in the CUDA samples' threadFenceReduction.
#pragma once

#include "linear_frame.cuh"

namespace quantkit::cuda::frame {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTokenStride = 20;  // of a tile's sums in shared memory, in words: 32 lanes, 32 banks

template <int kTiles, int kTokens>
constexpr int skinny_shared_bytes() {
  return kWarps * kTiles * kTokens * kTokenStride * 4 + 128;
}

// Slabs of codes in flight: as many as the format's loads of 16 bytes a lane allow.
template <class Format, int kTiles, int kTokenTiles>
constexpr int kDepth = Format::template kLoads<kTokenTiles> / (kTiles * Format::kWords);

// Grid: x over kTiles tiles of weight rows, y over splits of K, z over 8 * kTokenTiles rows of x.
template <class Format, int kTiles, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 2)
    skinny_kernel(const typename Format::Args a, const Walk walk) {
  using Sum = typename Format::Sum;
  constexpr int kDeep = kDepth<Format, kTiles, kTokenTiles>;
  static_assert(kDeep > 0);
  constexpr int kTokens = 8 * kTokenTiles;
  struct Reads {
    typename Format::Eight x[kTokenTiles][2];  // of each half of the slab
    typename Format::XScales x_scale[kTokenTiles];
    typename Format::template Tables<kTiles> tables;
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
  const uint8_t* codes = a.packed + block * walk.slabs * kSlabBytes<Format> +
                         first_tile % kBlockTiles * (Format::kWords * kLoadBytes) + lane * 16;
  const typename Format::template Reader<kTiles> tables(a, walk, first_tile, g);
  // Rows past the end read the last one again: their sums are not written.
  int64_t x[kTokenTiles];
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const int64_t token = first_token + 8 * j + g;
    x[j] = (token < a.m ? token : a.m - 1) * a.ldx;
  }

  launch_dependents();
  wait_for_previous();

  const auto load_codes = [&](int slab, uint4 (&q)[kTiles][Format::kWords]) {
    const uint8_t* at = codes + static_cast<int64_t>(slab) * kSlabBytes<Format>;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int w = 0; w < Format::kWords; ++w) {
        q[i][w] = load_once(at + (i * Format::kWords + w) * kLoadBytes);
      }
    }
  };
  const auto load_reads = [&](int slab, Reads& r) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        r.x[j][half] = Format::template load_eight<Format::kVector>(
            a.x, x[j], slab * kSlab + 32 * half + 8 * t, columns);
      }
      Format::load_x_scales(a, walk, first_token + 8 * j + 2 * t, slab, r.x_scale[j]);
    }
    tables.load(slab, r.tables);
  };

  Sum sum[kTiles][kTokenTiles][4] = {};
  const auto multiply = [&](const uint4 (&q)[kTiles][Format::kWords], const Reads& r) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      Sum product[kTokenTiles][4] = {};
#pragma unroll
      for (int step = 0; step < Format::kSteps; ++step) {
        const int half = half_of<Format>(step), group = Format::kGroups == 2 ? half : 0;
        uint32_t weight[4];
        Format::template weights<kTiles>(q[i], step, r.tables, group, i, weight);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          uint32_t pairs[2];
          Format::pairs(r.x[j][half], step, pairs);
          Format::multiply(Format::kGroups == 0 ? sum[i][j] : product[j], weight, pairs);
          if constexpr (Format::kGroups > 0) {
            if (ends_group<Format>(step)) {
              Format::template fold<kTiles>(sum[i][j], product[j], r.tables, group, i,
                                            r.x_scale[j]);
            }
          }
        }
      }
    }
  };

  uint4 q[kDeep][kTiles][Format::kWords];
  Reads now, next;
  int slab = begin + warp;
#pragma unroll
  for (int u = 0; u < kDeep; ++u) {
    if (slab + u * kWarps < end) load_codes(slab + u * kWarps, q[u]);
  }
  if (slab < end) load_reads(slab, next);
  for (; slab < end; slab += kDeep * kWarps) {
#pragma unroll
    for (int u = 0; u < kDeep; ++u) {
      const int at = slab + u * kWarps;
      if (at >= end) break;
      now = next;
      if (at + kWarps < end) load_reads(at + kWarps, next);
      multiply(q[u], now);
      if (at + kDeep * kWarps < end) load_codes(at + kDeep * kWarps, q[u]);
    }
  }

  SharedMemory memory;
  const SharedArray<Sum> partial = memory.array<Sum>(kWarps * kTiles * kTokens * kTokenStride);
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
    return reinterpret_cast<Sum*>(a.partials) + (split * a.m + token) * a.n + row;
  };
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kTokens; i += kThreads) {
    const int row = i % kRows, token = i / kRows;
    if (first_row + row >= a.n || first_token + token >= a.m) continue;
    Sum y = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      y += partial.load(((w * kTiles + row / kTileRows) * kTokens + token) * kTokenStride +
                        row % kTileRows);
    }
    if (gridDim.y == 1) {
      Format::write(a, first_token + token, first_row + row, y);
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
    Sum y = 0;
    for (unsigned split = 0; split < gridDim.y; ++split) {
      y += load_from_l2(at_split(split, token, row));
    }
    Format::write(a, token, row, y);
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

template <class Format, int kTiles, int kTokenTiles>
int launch_skinny(const typename Format::Args& a, int splits, cudaStream_t stream) {
  constexpr int kTokens = 8 * kTokenTiles;
  const int64_t tiles = (a.n + kTileRows - 1) / kTileRows;
  const dim3 grid(static_cast<unsigned>((tiles + kTiles - 1) / kTiles),
                  static_cast<unsigned>(splits),
                  static_cast<unsigned>((a.m + kTokens - 1) / kTokens));
  return launch(skinny_kernel<Format, kTiles, kTokenTiles>,
                Launch{grid, kThreads, skinny_shared_bytes<kTiles, kTokens>(), stream,
                       a.overlap != 0},
                a, walk_of(a.k, a.group_size, splits));
}

// kMost: tiles a warp that the format's registers allow. Tiles divide rows of the weight alone: any
// number of them gives the same bits.
template <class Format, int kTokenTiles, int kMost>
int skinny_tiles(const typename Format::Args& a, cudaStream_t stream) {
  const Division by = divide(a.n, a.k, a.multiprocessors);
  if constexpr (kMost >= 4) {
    if (by.tiles == 4) return launch_skinny<Format, 4, kTokenTiles>(a, by.splits, stream);
  }
  if constexpr (kMost >= 2) {
    if (by.tiles >= 2) return launch_skinny<Format, 2, kTokenTiles>(a, by.splits, stream);
  }
  return launch_skinny<Format, 1, kTokenTiles>(a, by.splits, stream);
}

// Up to this many rows each weight is read once or twice by the kernel above, then gemm.cuh takes
// over.
constexpr int64_t kSkinnyRows = 32;

template <class Format>
int skinny(const typename Format::Args& a, cudaStream_t stream) {
  return a.m <= 8 ? skinny_tiles<Format, 1, Format::template kMostTiles<1>>(a, stream)
                  : skinny_tiles<Format, 2, Format::template kMostTiles<2>>(a, stream);
}

inline int64_t partials_needed(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  if (m > kSkinnyRows) return 0;
  const int splits = divide(n, k, multiprocessors).splits;
  return splits == 1 ? 0 : splits * m * n;
}

inline int64_t counters_needed(int64_t m, int64_t n) {
  if (m > kSkinnyRows) return 0;
  return (n + kTileRows - 1) / kTileRows * ((m + 7) / 8);  // the most blocks of any division
}

}  // namespace quantkit::cuda::frame
