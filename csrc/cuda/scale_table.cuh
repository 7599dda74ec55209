// Scales and zero points of 16-bit tables, in the order in which lanes need them:
// [ceil(n / 64)][groups][8 g][4 tiles][2], for row 16 tile + g + 8 i.
#pragma once

#include "decode.cuh"
#include "linear_frame.cuh"

namespace quantkit::cuda::frame {

// What a lane needs of the tables for one slab: for each group in it the scales and zeros of its
// weight rows.
template <int kTiles, int kGroups>
struct ScaleTable {
  uint32_t scale[kGroups][kTiles];           // pairs: rows lane / 4 and lane / 4 + 8 of the tile
  uint32_t zero[kGroups][(kTiles + 1) / 2];  // bytes, likewise, of two tiles
};

// kBytes of a table, as words.
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

// A lane's place in the tables, and how it moves along K. Without zeros, kDefaultZero stands in
// all four bytes of a word.
template <int kTiles, int kGroups, uint32_t kDefaultZero>
class ScaleTableReader {
 public:
  __device__ __forceinline__ ScaleTableReader(const void* scale, const uint8_t* zero,
                                              int64_t groups, const Walk& walk, int first_tile,
                                              int g)
      : walk_(walk), groups_(static_cast<int>(groups)) {
    const int64_t at = first_tile / kBlockTiles * groups * kBlockRows + g * (2 * kBlockTiles) +
                       2 * (first_tile % kBlockTiles);
    scales_ = static_cast<const uint8_t*>(scale) + at * 2;
    zeros_ = zero == nullptr ? nullptr : zero + at;
  }

  __device__ __forceinline__ void load(int slab, ScaleTable<kTiles, kGroups>& out) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      int group = walk_.group_of(2 * slab + i);
      // The second half of the last slab may lie past the end, where x is zero.
      if (kGroups == 2 && group >= groups_) group = groups_ - 1;
      load_words<4 * kTiles>(scales_ + group * (2 * kBlockRows), out.scale[i]);
      if (zeros_ != nullptr) {
        load_words<2 * kTiles>(zeros_ + group * kBlockRows, out.zero[i]);
      } else {
#pragma unroll
        for (uint32_t& zero : out.zero[i]) zero = kDefaultZero;
      }
    }
  }

 private:
  const uint8_t *scales_, *zeros_;
  Walk walk_;
  int groups_;
};

// sum += scale * product for the rows of a lane, and product = 0.
__device__ __forceinline__ void add_scaled(float (&sum)[4], float (&product)[4], float2 scale) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    sum[c] = fmaf(c < 2 ? scale.x : scale.y, product[c], sum[c]);
    product[c] = 0.0f;
  }
}
template <class T>
__device__ __forceinline__ void add_scaled(float (&sum)[4], float (&product)[4], uint32_t scales) {
  add_scaled(sum, product, Pair<T>::to_floats(scales));
}

// Rows of x in 16-bit floats T against weights that are decoded to T.
template <class T>
struct Activations16 {
  using Sum = float;
  using Eight = uint4;
  static constexpr int kSteps = 4;
  struct XScales {};

  template <bool kVector>
  __device__ __forceinline__ static Eight load_eight(const void* x, int64_t row, int k,
                                                     int columns) {
    return load_x<kVector>(static_cast<const T*>(x) + row, k, columns);
  }
  __device__ __forceinline__ static void pairs(const Eight& v, int step, uint32_t (&out)[2]) {
    out[0] = step % 2 == 0 ? v.x : v.z;
    out[1] = step % 2 == 0 ? v.y : v.w;
  }
  __device__ __forceinline__ static void multiply(float (&product)[4], const uint32_t (&weight)[4],
                                                  const uint32_t (&x)[2]) {
    mma_m16n8k16<T>(product, weight, x);
  }
  template <class Args>
  __device__ __forceinline__ static void write(const Args& a, int64_t token, int64_t row, float y) {
    if (a.bias != nullptr) y += to_float(load_global(static_cast<const T*>(a.bias) + row));
    store_global(static_cast<T*>(a.y) + token * a.ldy + row, from_float<T>(y));
  }
};

}  // namespace quantkit::cuda::frame
