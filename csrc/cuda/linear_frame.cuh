// What the tensor-core linear layers share: y = x W^T in packed layouts of fragments, where the
// weight is the 16-row operand of an mma and eight rows of x are its 8 columns.
//
// A format (w4a16.cuh, fp4a16.cuh, w8a16.cuh, w8a8.cuh) is a struct that says how a lane gets the
// fragments of one mma step; skinny.cuh and gemm.cuh walk over them. Weight rows go in tiles of 16
// and blocks of four tiles, columns in slabs of 64, which are kSteps mma steps. Within each half of
// 32 columns lane t = lane % 4 owns columns 8t .. 8t + 7, so that its fragments of x are neighbours
// in memory.
//
//   Args      the C ABI's arguments; x, ldx, m, n, k, packed, partials, counters, multiprocessors
//             and overlap are read here
//   Sum       float, or int32_t where sums are exact
//   Eight     eight columns of a row of x: uint4 for 16-bit elements, uint2 for bytes
//   kWords    times 16 bytes: a lane's codes of one tile and slab
//   kSteps    mma steps of a slab
//   kGroups   scales of a row that a slab meets: 1 or 2, or 0 if they wait for the end or are in
//             the weights
//   kVector   rows of x are aligned to 16 bytes and have whole ones
//   kLoads, kMostTiles, kWide         what the registers allow: loads of codes in flight and tiles
//                                     a warp for a number of tiles of x, 128 rows of x a block
//   Tables<kTiles>, Reader<kTiles>    a lane's scales for one slab, and where they come from
//   XScales                           scales of a lane's two rows of x, for one group
//   weights, pairs, multiply          the operands of one step, and the mma
//   fold                              sum += scaled product, product = 0
//   write                             one element of y, from its finished sum
#pragma once

#include "vectors.cuh"

namespace quantkit::cuda::frame {

constexpr int kSlab = 64;  // columns
constexpr int kTileRows = 16;
constexpr int kLoadBytes = 512;  // of a warp
constexpr int kBlockTiles = 4;
constexpr int kBlockRows = kBlockTiles * kTileRows;

// How the launch walks K, beside the caller's arguments.
struct Walk {
  int slabs, slabs_a_split;
  uint32_t group_factor;  // group of half slab i is i * group_factor >> 31

  __device__ __forceinline__ int group_of(int half_slab) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(half_slab)) *
                                group_factor >>
                            31);
  }
};

inline Walk walk_of(int64_t k, int64_t group_size, int splits) {
  const int64_t slabs = (k + kSlab - 1) / kSlab, halves = group_size / 32;
  // ceil(2^31 / d) for groups of d half slabs: exact while K * group_size < 2^41.
  const uint32_t factor =
      group_size >= k ? 0u : static_cast<uint32_t>(((int64_t{1} << 31) + halves - 1) / halves);
  return {static_cast<int>(slabs), static_cast<int>((slabs + splits - 1) / splits), factor};
}

inline bool one_group_a_slab(int64_t k, int64_t group_size) {
  return group_size % kSlab == 0 || group_size >= k;
}

// Bytes of one block of 64 weight rows and one slab.
template <class Format>
constexpr int kSlabBytes = kBlockTiles * Format::kWords * kLoadBytes;

// The step's half of the slab.
template <class Format>
__device__ __forceinline__ constexpr int half_of(int step) {
  return step / (Format::kSteps / 2);
}

// The step's last: a group ends behind it.
template <class Format>
__device__ __forceinline__ constexpr bool ends_group(int step) {
  return Format::kGroups > 0 &&
         (step == Format::kSteps - 1 || (Format::kGroups == 2 && step == Format::kSteps / 2 - 1));
}

}  // namespace quantkit::cuda::frame
