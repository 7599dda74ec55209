// INT8 and FP8 weights and 16-bit activations on the tensor cores: codes become exact pairs of the
// activations' dtype in registers, channel or group scales are applied to a group's sum.
//
// Ladder, built but not timed on a GPU yet (benchmarks/gpu_session.sh):
//   1. fp32 on the CUDA cores, for up to 16 rows of x: weight_only.cuh.
//   2. The frame of w4a16.cuh with 32 bytes of codes a lane, tile and slab (this file). CUDA 13.0,
//      sm_80, 86, 89 and 90a: LDG.E.NA.128.CONSTANT for the codes, LDG.E.128 for x, few rows 86 to
//      128 registers, many rows 156 to 254, no spills but 64 bytes of stack in one kernel: FP8
//      codes, fp16, 128 rows, on sm_90a. 128 rows of x a block with two groups a slab spilled on
//      sm_80: not instantiated. Four tiles a warp would leave no slab in flight.
//
// Sums: as in w4a16.cuh.
#pragma once

#include "gemm.cuh"
#include "quantkit/cuda.h"
#include "scale_table.cuh"

namespace quantkit::cuda::w8 {

// Words of a lane's 32 bytes that hold the four columns of mma step `step` of 16 columns: of row g,
// and of row g + 8.
__device__ __forceinline__ uint2 step_words(const uint4 (&q)[2], int step) {
  const uint4& half = q[step / 2];
  return step % 2 == 0 ? uint2{half.x, half.y} : uint2{half.z, half.w};
}

// Decode: Int8<T> or Fp8<T>.
template <class T, class Decode, int kGroups_, bool kVector_>
struct WeightOnly : frame::Activations16<T> {
  using Args = qk_w8a16_args;
  using XScales = typename frame::Activations16<T>::XScales;
  static constexpr int kWords = 2, kGroups = kGroups_;
  static constexpr bool kVector = kVector_, kWide = kVector && kGroups == 1;
  template <int kTokenTiles>
  static constexpr int kLoads = 12 - 2 * kTokenTiles - 2 * kGroups;
  template <int kTokenTiles>
  static constexpr int kMostTiles = kVector ? 2 / (kTokenTiles * kGroups) : 1;
  template <int kTiles>
  using Tables = frame::ScaleTable<kTiles, kGroups>;

  template <int kTiles>
  struct Reader : frame::ScaleTableReader<kTiles, kGroups, 0> {
    __device__ __forceinline__ Reader(const Args& a, const frame::Walk& walk, int first_tile, int g)
        : frame::ScaleTableReader<kTiles, kGroups, 0>(a.scale, nullptr, a.groups, walk, first_tile,
                                                      g) {}
  };

  __device__ __forceinline__ static void load_x_scales(const Args&, const frame::Walk&, int64_t,
                                                       int, XScales&) {}

  template <int kTiles>
  __device__ __forceinline__ static void weights(const uint4 (&q)[2], int step,
                                                 const Tables<kTiles>&, int, int,
                                                 uint32_t (&out)[4]) {
    const uint2 words = step_words(q, step);
    Decode::decode(words.x, out[0], out[2]);
    Decode::decode(words.y, out[1], out[3]);
  }

  template <int kTiles>
  __device__ __forceinline__ static void fold(float (&sum)[4], float (&product)[4],
                                              const Tables<kTiles>& tables, int group, int i,
                                              const XScales&) {
    frame::add_scaled<T>(sum, product, tables.scale[group][i]);
  }
};

template <class T, class Decode>
int weight_only(const qk_w8a16_args& a, cudaStream_t stream) {
  const bool vector = a.k % 8 == 0 && a.ldx % 8 == 0 && aligned(a.x, 16);
  if (frame::one_group_a_slab(a.k, a.group_size)) {
    return vector ? frame::linear<WeightOnly<T, Decode, 1, true>>(a, stream)
                  : frame::linear<WeightOnly<T, Decode, 1, false>>(a, stream);
  }
  return vector ? frame::linear<WeightOnly<T, Decode, 2, true>>(a, stream)
                : frame::linear<WeightOnly<T, Decode, 2, false>>(a, stream);
}

// One function a dtype, each in its own translation unit.
int w8a16_f16(const qk_w8a16_args& a, cudaStream_t stream);
int w8a16_bf16(const qk_w8a16_args& a, cudaStream_t stream);

}  // namespace quantkit::cuda::w8
