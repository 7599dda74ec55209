// y = x W^T for more rows of x than a few: the packed layouts and arithmetic of skinny.cuh.
//
// A block computes 64 weight rows x kTokens rows of x. Codes and x go through shared memory by
// cp.async, kStages slabs of 64 columns deep, with one barrier a slab; each of four warps owns two
// tiles of weight rows and half of the rows of x. The layout's order of columns makes a lane's
// fragments of x for half a slab neighbouring bytes, so one load from shared memory does the work
// of ldmatrix. Some rows lie with their halves of 32 columns exchanged, so that the lanes that are
// served together, 2 rows x 4 lanes of 16 bytes or 4 rows x 4 lanes of 8, read all 32 banks once.
//
// Sums: slabs in ascending order. A row of y has the same bits whatever the other rows are, as long
// as this kernel runs: skinny.cuh divides K.
#pragma once

#include "skinny.cuh"

namespace quantkit::cuda::frame {

constexpr int kStages = 4;
constexpr int kGemmWarps = 4;
constexpr int kGemmThreads = 32 * kGemmWarps;
constexpr int kEights = kSlab / 8;  // of a row of x and slab
constexpr int kSumStride = kBlockRows + 4;

template <class Format, int kTokenTiles>
constexpr int gemm_shared_bytes() {
  constexpr int kTokens = 16 * kTokenTiles;
  constexpr int kEightBytes = static_cast<int>(sizeof(typename Format::Eight));
  constexpr int kStageBytes = kTokens * kEights * kEightBytes + kSlabBytes<Format>;
  constexpr int kSums = kTokens * kSumStride * 4;
  return kStages * kStageBytes > kSums ? kStages * kStageBytes : kSums;
}

// kTokenTiles tiles of 8 rows of x a warp, two warps beside each other. Grid: x over tiles of rows
// of x, y over blocks of 64 weight rows, so that neighbours share the weight in L2.
template <class Format, int kTokenTiles>
__global__ void __launch_bounds__(kGemmThreads, 2)
    gemm_kernel(const typename Format::Args a, const Walk walk) {
  using Sum = typename Format::Sum;
  using Eight = typename Format::Eight;
  constexpr int kTokens = 16 * kTokenTiles;
  constexpr int kTogether = 16 / static_cast<int>(sizeof(Eight));  // eights of one cp.async
  constexpr int kHalfSteps = Format::kSteps / 2;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int row_tile = 2 * (warp / 2), token_half = warp % 2;
  const int block = static_cast<int>(blockIdx.y);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int columns = static_cast<int>(a.k);
  const uint8_t* codes =
      a.packed + static_cast<int64_t>(block) * walk.slabs * kSlabBytes<Format> + thread * 16;
  const typename Format::template Reader<2> tables(a, walk, block * kBlockTiles + row_tile, g);

  launch_dependents();
  wait_for_previous();

  Sum sum[2][kTokenTiles][4] = {};
  {
    SharedMemory memory;
    const SharedArray<Eight> xs = memory.array<Eight>(kStages * kTokens * kEights);
    const SharedArray<uint4> qs = memory.array<uint4>(kStages * kGemmThreads * Format::kWords);
    static_assert(kGemmThreads * Format::kWords * 16 == kSlabBytes<Format>);
    const auto eight_at = [](int stage, int token, int eight) {
      return (stage * kTokens + token) * kEights + (eight ^ (token / kTogether % 2 * 4));
    };
    const auto fetch = [&](int slab) {
      if (slab < walk.slabs) {
        const int stage = slab % kStages;
#pragma unroll
        for (int w = 0; w < Format::kWords; ++w) {
          cp_async_16(qs.address((stage * Format::kWords + w) * kGemmThreads + thread),
                      codes + static_cast<int64_t>(slab) * kSlabBytes<Format> +
                          w * (kGemmThreads * 16));
        }
        constexpr int kChunks = kEights / kTogether;  // 16 bytes each, of a row
#pragma unroll
        for (int i = 0; i < kTokens * kChunks / kGemmThreads; ++i) {
          const int token = (i * kGemmThreads + thread) / kChunks;
          const int eight = thread % kChunks * kTogether;
          const int k = slab * kSlab + 8 * eight;
          // Rows past the end read the last one again: their sums are not written.
          const int64_t row = (first_token + token < a.m ? first_token + token : a.m - 1) * a.ldx;
          if constexpr (Format::kVector) {
            const bool inside = k < columns;
            cp_async_16(xs.address(eight_at(stage, token, eight)),
                        static_cast<const uint8_t*>(a.x) +
                            (row + (inside ? k : 0)) * static_cast<int>(sizeof(Eight) / 8),
                        inside ? 16 : 0);
          } else {
#pragma unroll
            for (int e = 0; e < kTogether; ++e) {
              xs.store(eight_at(stage, token, eight + e),
                       Format::template load_eight<false>(a.x, row, k + 8 * e, columns));
            }
          }
        }
      }
      cp_async_commit();  // an empty group past the end keeps the count
    };

    typename Format::template Tables<2> now, next;
    tables.load(0, next);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch(i);
    Sum product[2][kTokenTiles][4] = {};
    for (int slab = 0; slab < walk.slabs; ++slab) {
      cp_async_wait<kStages - 2>();
      barrier();  // the slab is there for all, and all are done with the stage that is fetched next
      fetch(slab + kStages - 1);
      now = next;
      if (slab + 1 < walk.slabs) tables.load(slab + 1, next);
      const int stage = slab % kStages;
      uint4 q[2][Format::kWords];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int w = 0; w < Format::kWords; ++w) {
          q[i][w] = qs.load(stage * (kGemmThreads * Format::kWords) +
                            ((row_tile + i) * Format::kWords + w) * 32 + lane);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int group = Format::kGroups == 2 ? half : 0;
        uint32_t weight[2][kHalfSteps][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int s = 0; s < kHalfSteps; ++s) {
            Format::template weights<2>(q[i], half * kHalfSteps + s, now, group, i, weight[i][s]);
          }
        }
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const int tile = (token_half * kTokenTiles + j) * 8;
          const Eight v = xs.load(eight_at(stage, tile + g, 4 * half + t));
          typename Format::XScales x_scale{};
          if (ends_group<Format>((half + 1) * kHalfSteps - 1)) {
            Format::load_x_scales(a, walk, first_token + tile + 2 * t, slab, x_scale);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int s = 0; s < kHalfSteps; ++s) {
              uint32_t pairs[2];
              Format::pairs(v, half * kHalfSteps + s, pairs);
              Format::multiply(Format::kGroups == 0 ? sum[i][j] : product[i][j], weight[i][s],
                               pairs);
            }
            if constexpr (Format::kGroups > 0) {
              if (ends_group<Format>((half + 1) * kHalfSteps - 1)) {
                Format::template fold<2>(sum[i][j], product[i][j], now, group, i, x_scale);
              }
            }
          }
        }
      }
    }
  }

  // Through shared memory once more, so that neighbouring lanes write neighbouring rows.
  barrier();
  SharedMemory memory;
  const SharedArray<Sum> sums = memory.array<Sum>(kTokens * kSumStride);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = (token_half * kTokenTiles + j) * 8 + 2 * t + c % 2;
        const int row = (row_tile + i) * kTileRows + g + 8 * (c / 2);
        sums.store(token * kSumStride + row, sum[i][j][c]);
      }
    }
  }
  barrier();
  for (int i = thread; i < kTokens * kBlockRows; i += kGemmThreads) {
    const int64_t token = first_token + i / kBlockRows;
    const int64_t row = static_cast<int64_t>(block) * kBlockRows + i % kBlockRows;
    if (token < a.m && row < a.n) {
      Format::write(a, token, row, sums.load(i / kBlockRows * kSumStride + i % kBlockRows));
    }
  }
}

template <class Format, int kTokenTiles>
int launch_gemm(const typename Format::Args& a, cudaStream_t stream) {
  constexpr int kTokens = 16 * kTokenTiles;
  const dim3 grid(static_cast<unsigned>((a.m + kTokens - 1) / kTokens),
                  static_cast<unsigned>((a.n + kBlockRows - 1) / kBlockRows));
  return launch(gemm_kernel<Format, kTokenTiles>,
                Launch{grid, kGemmThreads, gemm_shared_bytes<Format, kTokenTiles>(), stream,
                       a.overlap != 0},
                a, walk_of(a.k, a.group_size, 1));
}

template <class Format>
int gemm(const typename Format::Args& a, cudaStream_t stream) {
  // How many rows of x a block takes changes no bit: sums of rows never meet.
  if constexpr (Format::kWide) {
    if (a.m > 64) return launch_gemm<Format, 8>(a, stream);
  }
  return launch_gemm<Format, 4>(a, stream);
}

template <class Format>
int linear(const typename Format::Args& a, cudaStream_t stream) {
  return a.m <= kSkinnyRows ? skinny<Format>(a, stream) : gemm<Format>(a, stream);
}

}  // namespace quantkit::cuda::frame
