// Integer 4-bit weights and 16-bit activations on the tensor cores.
//
// A lane's 16 bytes of packed weight (quantkit.h, qk_w4a16_args) are its codes for the four mma
// steps of a slab; groups may be any multiple of 32 columns.
//
// Ladder, built but not timed on a GPU yet (benchmarks/gpu_session.sh):
//   1. Both operands from global memory into registers (skinny.cuh). Loads of codes in flight a
//      lane: 8 for 8 rows of x, 6 for 16 rows or for two groups a slab, 4 for both. CUDA 13.0,
//      sm_80 and sm_90a, bf16: LDG.E.NA.128.CONSTANT for the codes, no local memory, no spills, 119
//      to 128 registers, so two blocks a multiprocessor. Four tiles with 16 rows of x or with two
//      groups a slab spilled, as did two tiles with both: not instantiated.
//   2. The next slab's x and scales are loaded one slab ahead, beside the codes.
//   3. Many rows: mma.sync with four cp.async stages (gemm.cuh). No spills; on sm_90a 170 to 203
//      registers with 64 rows of x a block and 238 to 251 with 128, two blocks a multiprocessor
//      either way. On Hopper mma.sync ends at about three quarters of wgmma's rate.
//
// Sums: products of one slab and group in the tensor core's fp32, times the scale, added in fp32.
//
// Source: the fragment order and the lop3 decoding are Marlin's (Frantar et al., "MARLIN",
// arXiv 2408.11743, section 3.4).
#pragma once

#include "gemm.cuh"
#include "scale_table.cuh"

namespace quantkit::cuda::w4a16 {

template <class T, int kGroups_, bool kVector_>
struct Format : frame::Activations16<T> {
  using Args = qk_w4a16_args;
  using XScales = typename frame::Activations16<T>::XScales;
  static constexpr int kWords = 1, kGroups = kGroups_;
  static constexpr bool kVector = kVector_, kWide = kVector;
  template <int kTokenTiles>
  static constexpr int kLoads = 12 - 2 * kTokenTiles - 2 * kGroups;
  template <int kTokenTiles>
  static constexpr int kMostTiles = kVector ? 4 / (kTokenTiles * kGroups) : 1;
  template <int kTiles>
  using Tables = frame::ScaleTable<kTiles, kGroups>;

  template <int kTiles>
  struct Reader : frame::ScaleTableReader<kTiles, kGroups, 0x08080808u> {
    __device__ __forceinline__ Reader(const Args& a, const frame::Walk& walk, int first_tile, int g)
        : frame::ScaleTableReader<kTiles, kGroups, 0x08080808u>(a.scale, a.zero, a.groups, walk,
                                                                first_tile, g) {}
  };

  __device__ __forceinline__ static void load_x_scales(const Args&, const frame::Walk&, int64_t,
                                                       int, XScales&) {}

  template <int kTiles>
  __device__ __forceinline__ static void weights(const uint4 (&q)[1], int step,
                                                 const Tables<kTiles>& tables, int group, int i,
                                                 uint32_t (&out)[4]) {
    const uint32_t words[4] = {q[0].x, q[0].y, q[0].z, q[0].w};
    const uint32_t bytes = tables.zero[group][i / 2];
    Int4<T>::decode(words[step],
                    i % 2 == 0 ? Int4<T>::template zeros<0>(bytes)
                               : Int4<T>::template zeros<2>(bytes),
                    out);
  }

  template <int kTiles>
  __device__ __forceinline__ static void fold(float (&sum)[4], float (&product)[4],
                                              const Tables<kTiles>& tables, int group, int i,
                                              const XScales&) {
    frame::add_scaled<T>(sum, product, tables.scale[group][i]);
  }
};

inline bool aligned_x(const qk_w4a16_args& a) {
  return a.k % 8 == 0 && a.ldx % 8 == 0 && aligned(a.x, 16);
}

template <class T>
int linear(const qk_w4a16_args& a, cudaStream_t stream) {
  if (frame::one_group_a_slab(a.k, a.group_size)) {
    return aligned_x(a) ? frame::linear<Format<T, 1, true>>(a, stream)
                        : frame::linear<Format<T, 1, false>>(a, stream);
  }
  return aligned_x(a) ? frame::linear<Format<T, 2, true>>(a, stream)
                      : frame::linear<Format<T, 2, false>>(a, stream);
}

// One function a dtype, each in its own translation unit.
int linear_f16(const qk_w4a16_args& a, cudaStream_t stream);
int linear_bf16(const qk_w4a16_args& a, cudaStream_t stream);

}  // namespace quantkit::cuda::w4a16
