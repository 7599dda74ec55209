// 8-bit weights and activations on the tensor cores.
//
// INT8: mma.m16n8k32 with exact int32 sums; the scales of token and channel meet the finished sum.
//
// FP8: both operands become f16, exactly, and products are summed in fp32 by mma.m16n8k16. CUDA
// 13.0 compiles mma.m16n8k32.e4m3 to the same conversions and HMMA on sm_90a, for every mma anew;
// here a weight is converted once for all rows of x that meet it, sm_80 and 86 run it too, and no
// bits of the sum are lost as in wgmma's fp8 (about 14 are kept: DeepSeek-V3, arXiv 2412.19437,
// section 3.3.2). Where fp8 mma.sync is native, half of its rate is given away.
//
// Ladder, built but not timed on a GPU yet (benchmarks/gpu_session.sh):
//   1. The frame of w4a16.cuh with 32 bytes of codes a lane, tile and slab, and 8 of x for half a
//      slab (this file). CUDA 13.0, sm_80 and sm_90a: LDG.E.NA.128.CONSTANT for the codes,
//      LDG.E.64 for x, IMMA.16832.S8.S8 and HMMA.16816.F32; few rows 66 to 128 registers, two
//      blocks a multiprocessor, many rows 98 to 217 by LDGSTS.E.BYPASS.128. Group scales with x
//      unaligned spilled four bytes with eight loads of codes in flight a lane: six there.
#pragma once

#include "quantkit/cuda.h"
#include "w8a16.cuh"

namespace quantkit::cuda::w8 {

// Rows of bytes.
template <bool kVector_>
struct Activations8 {
  using Args = qk_w8a8_args;
  using Eight = uint2;
  static constexpr int kWords = 2;
  static constexpr bool kVector = kVector_, kWide = kVector;
  template <int kTokenTiles>
  static constexpr int kLoads = kVector ? 8 : 6;
  template <int kTokenTiles>
  static constexpr int kMostTiles = kVector ? 2 : 1;

  template <bool kAligned>
  __device__ __forceinline__ static uint2 load_eight(const void* x, int64_t row, int k,
                                                     int columns) {
    const uint8_t* at = static_cast<const uint8_t*>(x) + row + k;
    if constexpr (kAligned) {
      return k < columns ? load_global(reinterpret_cast<const uint2*>(at)) : uint2{0, 0};
    } else {
      uint32_t words[2] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (k + i < columns) {
          words[i / 4] |= static_cast<uint32_t>(load_global(at + i)) << (8 * (i % 4));
        }
      }
      return {words[0], words[1]};
    }
  }

  __device__ __forceinline__ static float x_scale(const Args& a, int64_t token, int64_t group) {
    return load_as_float(a.x_scale, a.x_scale_dtype, token * a.x_scale_stride + group);
  }

  __device__ __forceinline__ static void write_scaled(const Args& a, int64_t token, int64_t row,
                                                      float y) {
    if (a.bias != nullptr) y += load_as_float(a.bias, a.bias_dtype, row);
    const int64_t at = token * a.ldy + row;
    if (a.y_dtype == QK_F32) {
      store_global(static_cast<float*>(a.y) + at, y);
    } else if (a.y_dtype == QK_F16) {
      store_global(static_cast<f16*>(a.y) + at, from_float<f16>(y));
    } else {
      store_global(static_cast<bf16*>(a.y) + at, from_float<bf16>(y));
    }
  }
};

// One scale a token and a channel, both applied at the end.
template <bool kVector>
struct ChannelScales : Activations8<kVector> {
  using Args = qk_w8a8_args;
  static constexpr int kGroups = 0;
  struct XScales {};
  template <int kTiles>
  struct Tables {};
  template <int kTiles>
  struct Reader {
    __device__ __forceinline__ Reader(const Args&, const frame::Walk&, int, int) {}
    __device__ __forceinline__ void load(int, Tables<kTiles>&) const {}
  };

  __device__ __forceinline__ static void load_x_scales(const Args&, const frame::Walk&, int64_t,
                                                       int, XScales&) {}
  template <class Sum>
  __device__ __forceinline__ static void write(const Args& a, int64_t token, int64_t row, Sum sum) {
    const float scale =
        Activations8<kVector>::x_scale(a, token, 0) * load_global(a.scale + row);
    Activations8<kVector>::write_scaled(a, token, row,
                                        multiply_then_round(static_cast<float>(sum), scale));
  }
};

template <bool kVector>
struct Int8Channels : ChannelScales<kVector> {
  using Sum = int32_t;
  static constexpr int kSteps = 2;

  template <int kTiles>
  __device__ __forceinline__ static void weights(
      const uint4 (&q)[2], int step,
      const typename ChannelScales<kVector>::template Tables<kTiles>&, int, int,
      uint32_t (&out)[4]) {
    out[0] = q[step].x, out[1] = q[step].y, out[2] = q[step].z, out[3] = q[step].w;
  }
  __device__ __forceinline__ static void pairs(const uint2& v, int, uint32_t (&out)[2]) {
    out[0] = v.x, out[1] = v.y;
  }
  __device__ __forceinline__ static void multiply(int32_t (&sum)[4], const uint32_t (&weight)[4],
                                                  const uint32_t (&x)[2]) {
    mma_m16n8k32_s8(sum, weight, x);
  }
};

// e4m3 operands of mma.m16n8k16 in f16.
struct Fp8Operands {
  using Sum = float;
  static constexpr int kSteps = 4;

  template <int kTiles, class Tables>
  __device__ __forceinline__ static void weights(const uint4 (&q)[2], int step, const Tables&, int,
                                                 int, uint32_t (&out)[4]) {
    const uint2 words = step_words(q, step);
    Fp8<f16>::decode(words.x, out[0], out[2]);
    Fp8<f16>::decode(words.y, out[1], out[3]);
  }
  __device__ __forceinline__ static void pairs(const uint2& v, int step, uint32_t (&out)[2]) {
    Fp8<f16>::decode(step % 2 == 0 ? v.x : v.y, out[0], out[1]);
  }
  __device__ __forceinline__ static void multiply(float (&sum)[4], const uint32_t (&weight)[4],
                                                  const uint32_t (&x)[2]) {
    mma_m16n8k16<f16>(sum, weight, x);
  }
};

template <bool kVector>
struct Fp8Channels : ChannelScales<kVector>, Fp8Operands {};

// A scale for each group of columns of a token and of a channel: blocks of 128 x 128 have the same
// for 128 channels.
template <bool kVector>
struct Fp8Groups : Activations8<kVector>, Fp8Operands {
  using Args = qk_w8a8_args;
  static constexpr int kGroups = 1;
  struct XScales {
    float first, second;  // of a lane's two rows of x in the sums
  };
  template <int kTiles>
  struct Tables {
    float2 scale[kTiles];  // rows g and g + 8 of the tile
  };
  template <int kTiles>
  class Reader {
   public:
    __device__ __forceinline__ Reader(const Args& a, const frame::Walk& walk, int first_tile, int g)
        : walk_(walk) {
      using namespace frame;
      scales_ = a.scale + first_tile / kBlockTiles * a.groups * kBlockRows +
                g * (2 * kBlockTiles) + 2 * (first_tile % kBlockTiles);
    }
    __device__ __forceinline__ void load(int slab, Tables<kTiles>& out) const {
      const float* at = scales_ + walk_.group_of(2 * slab) * frame::kBlockRows;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        out.scale[i] = load_global(reinterpret_cast<const float2*>(at) + i);
      }
    }

   private:
    const float* scales_;
    frame::Walk walk_;
  };

  __device__ __forceinline__ static void load_x_scales(const Args& a, const frame::Walk& walk,
                                                       int64_t token, int slab, XScales& out) {
    const int group = walk.group_of(2 * slab);
    const int64_t last = a.m - 1;  // rows past it are not written
    out.first = Activations8<kVector>::x_scale(a, token < last ? token : last, group);
    out.second = Activations8<kVector>::x_scale(a, token + 1 < last ? token + 1 : last, group);
  }
  template <int kTiles>
  __device__ __forceinline__ static void fold(float (&sum)[4], float (&product)[4],
                                              const Tables<kTiles>& tables, int, int i,
                                              const XScales& x) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float scale = (c < 2 ? tables.scale[i].x : tables.scale[i].y) *
                          (c % 2 == 0 ? x.first : x.second);
      sum[c] = fmaf(scale, product[c], sum[c]);
      product[c] = 0.0f;
    }
  }
  __device__ __forceinline__ static void write(const Args& a, int64_t token, int64_t row, float y) {
    Activations8<kVector>::write_scaled(a, token, row, y);
  }
};

template <template <bool> class Format>
int linear(const qk_w8a8_args& a, cudaStream_t stream) {
  const bool vector = a.k % 16 == 0 && a.ldx % 16 == 0 && aligned(a.x, 16);
  return vector ? frame::linear<Format<true>>(a, stream) : frame::linear<Format<false>>(a, stream);
}

}  // namespace quantkit::cuda::w8
