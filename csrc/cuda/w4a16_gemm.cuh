// The layer of w4a16.cuh for more rows of x than a few: the same packed layout and arithmetic.
//
// A block computes 64 weight rows x kTokens rows of x. Codes and x go through shared memory by
// cp.async, kStages slabs of 64 columns deep, with one barrier a slab; each of four warps owns two
// tiles of weight rows and half of the rows of x. The layout's order of columns makes a lane's
// fragments of x for two mma steps 16 neighbouring bytes, so one 16-byte load from shared memory
// does the work of ldmatrix. Chunks of odd rows lie with their halves of 32 columns exchanged: a
// quarter warp, 2 rows x 4 chunks, then reads all 32 banks once.
//
// Ladder, built but not timed on a GPU yet (benchmarks/gpu_session.sh):
//   1. mma.sync with four stages (this file). CUDA 13.0: no spills; on sm_90a 168 to 203 registers
//      with 64 rows of x a block and 238 to 250 with 128, two blocks a multiprocessor either way.
//      On Hopper mma.sync ends at about three quarters of wgmma's rate.
//
// Sums: slabs in ascending order, each group's products times the scale in fp32. A row of y has the
// same bits whatever the other rows are, as long as this kernel runs: w4a16.cuh divides K.
#pragma once

#include "w4a16.cuh"

namespace quantkit::cuda::w4a16 {

constexpr int kGemmStages = 4;
constexpr int kGemmWarps = 4;
constexpr int kGemmThreads = 32 * kGemmWarps;
constexpr int kChunks = kSlab / 8;  // 16 bytes of x: of a row and slab
constexpr int kSumStride = kBlockRows + 4;

template <int kTokenTiles>
constexpr int gemm_shared_bytes() {
  constexpr int kTokens = 16 * kTokenTiles;
  constexpr int kStageBytes = kTokens * kChunks * 16 + kBlockTiles * kTileBytes;
  constexpr int kSums = kTokens * kSumStride * static_cast<int>(sizeof(float));
  return kGemmStages * kStageBytes > kSums ? kGemmStages * kStageBytes : kSums;
}

// kTokenTiles tiles of 8 rows of x a warp, two warps beside each other. Grid: x over tiles of rows
// of x, y over blocks of 64 weight rows, so that neighbours share the weight in L2.
template <class T, int kTokenTiles, int kGroups, bool kVector>
__global__ void __launch_bounds__(kGemmThreads, 2)
    gemm_kernel(const qk_w4a16_args a, const Walk walk) {
  constexpr int kTokens = 16 * kTokenTiles;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int row_tile = 2 * (warp / 2), token_half = warp % 2;
  const int block = static_cast<int>(blockIdx.y);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int columns = static_cast<int>(a.k);
  const uint8_t* codes = a.packed +
                         static_cast<int64_t>(block) * walk.slabs * (kBlockTiles * kTileBytes) +
                         thread * 16;
  const TableReader<2, kGroups> tables(a, walk, block * kBlockTiles + row_tile, g, T{});

  launch_dependents();
  wait_for_previous();

  float sum[2][kTokenTiles][4] = {};
  {
    SharedMemory memory;
    const SharedArray<uint4> xs = memory.array<uint4>(kGemmStages * kTokens * kChunks);
    const SharedArray<uint4> qs = memory.array<uint4>(kGemmStages * kGemmThreads);
    static_assert(kGemmThreads * 16 == kBlockTiles * kTileBytes);
    const auto chunk_at = [](int stage, int token, int chunk) {
      return (stage * kTokens + token) * kChunks + (chunk ^ (token % 2 * 4));
    };
    const auto fetch = [&](int slab) {
      if (slab < walk.slabs) {
        const int stage = slab % kGemmStages;
        cp_async_16(qs.address(stage * kGemmThreads + thread),
                    codes + static_cast<int64_t>(slab) * (kBlockTiles * kTileBytes));
#pragma unroll
        for (int i = 0; i < kTokens * kChunks / kGemmThreads; ++i) {
          const int token = (i * kGemmThreads + thread) / kChunks, chunk = thread % kChunks;
          const int k = slab * kSlab + 8 * chunk;
          // Rows past the end read the last one again: their sums are not written.
          const int64_t row = first_token + token < a.m ? first_token + token : a.m - 1;
          const T* source = static_cast<const T*>(a.x) + row * a.ldx;
          if constexpr (kVector) {
            const bool inside = k < columns;
            cp_async_16(xs.address(chunk_at(stage, token, chunk)), source + (inside ? k : 0),
                        inside ? 16 : 0);
          } else {
            xs.store(chunk_at(stage, token, chunk), load_x<false>(source, k, columns));
          }
        }
      }
      cp_async_commit();  // an empty group past the end keeps the count
    };

    Tables<2, kGroups> now, next;
    tables.load(0, next);
#pragma unroll
    for (int i = 0; i < kGemmStages - 1; ++i) fetch(i);
    float product[2][kTokenTiles][4] = {};
    for (int slab = 0; slab < walk.slabs; ++slab) {
      cp_async_wait<kGemmStages - 2>();
      barrier();  // the slab is there for all, and all are done with the stage that is fetched next
      fetch(slab + kGemmStages - 1);
      now = next;
      if (slab + 1 < walk.slabs) tables.load(slab + 1, next);
      const int stage = slab % kGemmStages;
      const uint4 q[2] = {qs.load(stage * kGemmThreads + row_tile * 32 + lane),
                          qs.load(stage * kGemmThreads + (row_tile + 1) * 32 + lane)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int group = kGroups == 2 ? half : 0;
        uint32_t weight[2][2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          decode<T>(half == 0 ? q[i].x : q[i].z, now, group, i, weight[i][0]);
          decode<T>(half == 0 ? q[i].y : q[i].w, now, group, i, weight[i][1]);
        }
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const int token = (token_half * kTokenTiles + j) * 8 + g;
          const uint4 v = xs.load(chunk_at(stage, token, 4 * half + t));
          const uint32_t first[2] = {v.x, v.y}, second[2] = {v.z, v.w};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma_m16n8k16<T>(product[i][j], weight[i][0], first);
            mma_m16n8k16<T>(product[i][j], weight[i][1], second);
            if (half == 1 || kGroups == 2) {
              add_scaled<T>(sum[i][j], product[i][j], now.scale[group][i]);
            }
          }
        }
      }
    }
  }

  // Through shared memory once more, so that neighbouring lanes write neighbouring rows.
  barrier();
  SharedMemory memory;
  const SharedArray<float> sums = memory.array<float>(kTokens * kSumStride);
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
      write_y<T>(a, token, row, sums.load(i / kBlockRows * kSumStride + i % kBlockRows));
    }
  }
}

template <class T, int kTokenTiles, int kGroups, bool kVector>
int launch_gemm(const qk_w4a16_args& a, cudaStream_t stream) {
  constexpr int kTokens = 16 * kTokenTiles;
  const dim3 grid(static_cast<unsigned>((a.m + kTokens - 1) / kTokens),
                  static_cast<unsigned>((a.n + kBlockRows - 1) / kBlockRows));
  return launch(gemm_kernel<T, kTokenTiles, kGroups, kVector>,
                Launch{grid, kGemmThreads, gemm_shared_bytes<kTokenTiles>(), stream,
                       a.overlap != 0},
                a, walk_of(a, 1));
}

template <class T, int kGroups>
int gemm_groups(const qk_w4a16_args& a, cudaStream_t stream) {
  // How many rows of x a block takes changes no bit: sums of rows never meet.
  if (!aligned_x(a)) return launch_gemm<T, 4, kGroups, false>(a, stream);
  return a.m <= 64 ? launch_gemm<T, 4, kGroups, true>(a, stream)
                   : launch_gemm<T, 8, kGroups, true>(a, stream);
}

template <class T>
int gemm(const qk_w4a16_args& a, cudaStream_t stream) {
  return one_group_a_slab(a) ? gemm_groups<T, 1>(a, stream) : gemm_groups<T, 2>(a, stream);
}

}  // namespace quantkit::cuda::w4a16
