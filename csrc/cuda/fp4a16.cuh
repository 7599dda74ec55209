// NVFP4, MXFP4 and NF4 weights and 16-bit activations on the tensor cores, in the frame of
// w4a16.cuh: codes become exact pairs of the activations' dtype in registers (decode_fp4.cuh).
//
// Where the scales go:
//   NVFP4  Into the weights: the 16 columns that share a scale lie in two of the four lanes of a
//          step, so a sum of one step mixes groups. A product of e2m1 and e4m3 has six significant
//          bits and lies between 2^-10 and 2688, so it is exact in f16 and bf16, and no group ends
//          before K does.
//   MXFP4  To the sums of 32 columns, in fp32: e8m0 reaches further than either 16-bit float.
//   NF4    To the sums of a slab, as in w4a16.cuh.
//
// Ladder, built but not timed on a GPU yet (benchmarks/gpu_session.sh):
//   1. Codebooks in shared memory on the CUDA cores, for up to 16 rows of x: weight_only.cuh.
//   2. The frame (this file). Registers and instructions are in benchmarks/LOG.md; four tiles a
//      warp of NVFP4 spilled 12 bytes on sm_80: not instantiated. At full bandwidth an H200 has 1.7
//      integer instructions for a 4-bit weight, which NF4's two tables exceed: next would be pairs
//      of codes looked up in shared memory (Guo et al., "FLUTE", arXiv 2407.10960).
//
// Sums: as in w4a16.cuh; NVFP4's run through all of a warp's slabs in the tensor core's fp32.
#pragma once

#include "decode_fp4.cuh"
#include "gemm.cuh"
#include "quantkit/cuda.h"
#include "scale_table.cuh"

namespace quantkit::cuda::fp4 {

// What the three share.
template <class T, int kGroups_, bool kVector_>
struct Codes : frame::Activations16<T> {
  using Args = qk_fp4a16_args;
  using XScales = typename frame::Activations16<T>::XScales;
  static constexpr int kWords = 1, kGroups = kGroups_;
  static constexpr bool kVector = kVector_, kWide = kVector;
  template <int kTokenTiles>
  static constexpr int kLoads = 12 - 2 * kTokenTiles - 2 * (kGroups > 0 ? kGroups : 1);
  template <int kTokenTiles>
  static constexpr int kMostTiles =
      !kVector ? 1 : kGroups == 0 ? 2 : 4 / (kTokenTiles * kGroups);

  __device__ __forceinline__ static void load_x_scales(const Args&, const frame::Walk&, int64_t,
                                                       int, XScales&) {}
  __device__ __forceinline__ static uint32_t word(const uint4 (&q)[1], int step) {
    const uint32_t words[4] = {q[0].x, q[0].y, q[0].z, q[0].w};
    return words[step];
  }
};

// One-byte scales of a lane's rows: byte 2h + i is that of half h of the slab and row g + 8i.
template <int kTiles>
struct ByteTable {
  uint32_t scale[kTiles];
};

// kParts: scales of a row for each half of a slab.
template <int kTiles, int kParts>
class ByteTableReader {
 public:
  __device__ __forceinline__ ByteTableReader(const qk_fp4a16_args& a, const frame::Walk& walk,
                                             int first_tile, int g) {
    using frame::kBlockTiles;
    // Lane t of a row's four owns columns 8t on: the part it needs is that of column 8t.
    const int part = static_cast<int>(threadIdx.x) % 4 * kParts / 4;
    scales_ = static_cast<const uint8_t*>(a.scale) +
              static_cast<int64_t>(first_tile / kBlockTiles) * walk.slabs * kSlabBytes +
              ((g * kParts + part) * kBlockTiles + first_tile % kBlockTiles) * 4;
  }
  __device__ __forceinline__ void load(int slab, ByteTable<kTiles>& out) const {
    frame::load_words<4 * kTiles>(scales_ + static_cast<int64_t>(slab) * kSlabBytes, out.scale);
  }

 private:
  static constexpr int kSlabBytes = frame::kBlockRows * 2 * kParts;
  const uint8_t* scales_;
};

// Each of two values of f16 to a pair of itself in T.
template <class T>
__device__ __forceinline__ void twice(uint32_t both, uint32_t (&out)[2]);
template <>
__device__ __forceinline__ void twice<f16>(uint32_t both, uint32_t (&out)[2]) {
  out[0] = permute_bytes(both, both, 0x1010u);
  out[1] = permute_bytes(both, both, 0x3232u);
}
template <>
__device__ __forceinline__ void twice<bf16>(uint32_t both, uint32_t (&out)[2]) {
  const float2 values = Pair<f16>::to_floats(both);
  out[0] = Pair<bf16>::from_floats(values.x, values.x);
  out[1] = Pair<bf16>::from_floats(values.y, values.y);
}

template <class T, bool kVector>
struct Nvfp4 : Codes<T, 0, kVector> {
  using Base = Codes<T, 0, kVector>;
  template <int kTiles>
  using Tables = ByteTable<kTiles>;
  template <int kTiles>
  using Reader = ByteTableReader<kTiles, 2>;

  template <int kTiles>
  __device__ __forceinline__ static void weights(const uint4 (&q)[1], int step,
                                                 const Tables<kTiles>& tables, int, int i,
                                                 uint32_t (&out)[4]) {
    decode_e2m1<T>(Base::word(q, step), out);
    const int half = frame::half_of<Base>(step);
    const uint32_t both = e4m3x2_to_f16x2(static_cast<uint16_t>(tables.scale[i] >> (16 * half)));
    uint32_t scales[2];  // of rows g and g + 8
    twice<T>(both, scales);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = Pair<T>::mul(out[j], scales[j % 2]);
  }

  __device__ __forceinline__ static void write(const qk_fp4a16_args& a, int64_t token, int64_t row,
                                               float y) {
    Base::write(a, token, row, y / load_global(a.global_scale));
  }
};

// 2^(exponent - 127), NaN for 255.
__device__ __forceinline__ float e8m0_to_float(uint32_t exponent) {
  // Neither 2^-127 nor NaN has its exponent's bits alone: the one is 0, the other infinity.
  const uint32_t fraction = ((exponent + 1) & 255u) <= 1 ? 0x00400000u : 0u;
  return bits_as<float>(exponent << 23 | fraction);
}

template <class T, bool kVector>
struct Mxfp4 : Codes<T, 2, kVector> {
  using Base = Codes<T, 2, kVector>;
  template <int kTiles>
  using Tables = ByteTable<kTiles>;
  template <int kTiles>
  using Reader = ByteTableReader<kTiles, 1>;

  template <int kTiles>
  __device__ __forceinline__ static void weights(const uint4 (&q)[1], int step,
                                                 const Tables<kTiles>&, int, int,
                                                 uint32_t (&out)[4]) {
    decode_e2m1<T>(Base::word(q, step), out);
  }
  template <int kTiles>
  __device__ __forceinline__ static void fold(float (&sum)[4], float (&product)[4],
                                              const Tables<kTiles>& tables, int half, int i,
                                              const typename Base::XScales&) {
    const uint32_t both = tables.scale[i] >> (16 * half);
    frame::add_scaled(sum, product,
                      float2{e8m0_to_float(both & 255u), e8m0_to_float(both >> 8 & 255u)});
  }
};

template <class T, bool kVector>
struct Nf4Groups : Codes<T, 1, kVector> {
  using Base = Codes<T, 1, kVector>;
  template <int kTiles>
  using Tables = frame::ScaleTable<kTiles, 1>;
  template <int kTiles>
  struct Reader : frame::ScaleTableReader<kTiles, 1, 0> {
    __device__ __forceinline__ Reader(const qk_fp4a16_args& a, const frame::Walk& walk,
                                      int first_tile, int g)
        : frame::ScaleTableReader<kTiles, 1, 0>(a.scale, nullptr, a.groups, walk, first_tile, g) {}
  };

  template <int kTiles>
  __device__ __forceinline__ static void weights(const uint4 (&q)[1], int step,
                                                 const Tables<kTiles>&, int, int,
                                                 uint32_t (&out)[4]) {
    decode_nf4<T>(Base::word(q, step), out);
  }
  template <int kTiles>
  __device__ __forceinline__ static void fold(float (&sum)[4], float (&product)[4],
                                              const Tables<kTiles>& tables, int group, int i,
                                              const typename Base::XScales&) {
    frame::add_scaled<T>(sum, product, tables.scale[group][i]);
  }
};

template <template <class, bool> class Format, class T>
int linear(const qk_fp4a16_args& a, cudaStream_t stream) {
  const bool vector = a.k % 8 == 0 && a.ldx % 8 == 0 && aligned(a.x, 16);
  return vector ? frame::linear<Format<T, true>>(a, stream)
                : frame::linear<Format<T, false>>(a, stream);
}

template <class T>
int linear(const qk_fp4a16_args& a, cudaStream_t stream) {
  if (a.format == QK_NF4) return linear<Nf4Groups, T>(a, stream);
  qk_fp4a16_args by_slab = a;
  by_slab.group_size = a.k;  // tables of bytes have a row a slab: no group is looked up
  return a.format == QK_NVFP4 ? linear<Nvfp4, T>(by_slab, stream)
                              : linear<Mxfp4, T>(by_slab, stream);
}

// One function a dtype, each in its own translation unit.
int linear_f16(const qk_fp4a16_args& a, cudaStream_t stream);
int linear_bf16(const qk_fp4a16_args& a, cudaStream_t stream);

}  // namespace quantkit::cuda::fp4
