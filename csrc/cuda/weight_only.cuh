// Weight-only linear layers on a GPU, for few rows of x, in the packed layout of quantkit.h.
//
// Ladder:
//   1. One thread an output, codes read byte by byte: uncoalesced, a small share of the bandwidth.
//   2. Sixteen-byte loads that a warp reads as 512 neighbouring bytes (this file): a thread owns
//      4 rows x one chunk of k, eight threads split k, and a block's warps take turns at slabs.
//      Each weight is read once for up to 16 rows of x; the arithmetic is fp32 on the CUDA cores,
//      which bounds it from about M = 4 on.
//   3. Tensor cores with the weight as the 16-row operand (mma.m16n8k16), split over k, in a layout
//      of its own: w4a16.cuh.
// For many rows the binding dequantizes once and calls the library's matrix product instead.
//
// Sums: each chunk's products are added in k order and scaled in fp32; lanes and then warps are
// added in a fixed tree. A row of y has the same bits whatever the other rows are.
#pragma once

#include "vectors.cuh"

namespace quantkit::cuda {

constexpr int kBlockRows = 16;
constexpr int kChunkBytes = 64;
constexpr int kBlocksTogether = 4;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRowsAThread = 4;
constexpr int kLanesAlongK = 8;  // lanes of a warp that share rows and split k

struct W4 {
  static constexpr int kCodes = 8;
  __device__ static void decode(uint32_t word, const SharedArray<float>& lut, float (&w)[kCodes]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      w[2 * j] = lut.load(static_cast<int>((word >> (4 * j)) & 15u));
      w[2 * j + 1] = lut.load(static_cast<int>((word >> (16 + 4 * j)) & 15u));
    }
  }
};

struct I8 {
  static constexpr int kCodes = 4;
  __device__ static void decode(uint32_t word, const SharedArray<float>&, float (&w)[kCodes]) {
#pragma unroll
    for (int j = 0; j < kCodes; ++j) {
      w[j] = static_cast<float>(static_cast<int32_t>(word << (24 - 8 * j)) >> 24);
    }
  }
};

struct F8 {
  static constexpr int kCodes = 4;
  __device__ static void decode(uint32_t word, const SharedArray<float>&, float (&w)[kCodes]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float2 pair =
          Pair<f16>::to_floats(e4m3x2_to_f16x2(static_cast<uint16_t>(word >> (16 * j))));
      w[2 * j] = pair.x;
      w[2 * j + 1] = pair.y;
    }
  }
};

// The codebook, if there is one, in shared memory: the first array of every kernel below.
__device__ inline SharedArray<float> shared_lut(SharedMemory& memory, const float* lut) {
  const SharedArray<float> copy = memory.array<float>(16);
  const int thread = static_cast<int>(threadIdx.x);
  if (lut != nullptr && thread < 16) copy.store(thread, load_global(lut + thread));
  barrier();
  return copy;
}

// As in cpu/layout.h: chunk c of a block is at base + c * step.
struct PackedBlock {
  int64_t base, step;
};
__device__ inline PackedBlock packed_block(int64_t block, int64_t blocks, int64_t chunks) {
  const int64_t first = block - block % kBlocksTogether;
  const int64_t together = blocks - first < kBlocksTogether ? blocks - first : kBlocksTogether;
  return {(first * chunks + block % kBlocksTogether) * kChunkBytes, together * kChunkBytes};
}

template <class T>
__device__ inline void unpack_pair(uint32_t pair, float* out) {
  const float2 both = Pair<T>::to_floats(pair);
  out[0] = both.x;
  out[1] = both.y;
}

// kCodes values of one row of x from column k on, zero past the end.
template <class T, int kCodes>
__device__ inline void load_x(const T* row, int64_t k, int64_t columns, bool vector,
                              float (&x)[kCodes]) {
  if (vector) {  // aligned, and columns is a multiple of kCodes
    if constexpr (kCodes == 8) {
      const uint4 raw = load_global(reinterpret_cast<const uint4*>(row + k));
      unpack_pair<T>(raw.x, x);
      unpack_pair<T>(raw.y, x + 2);
      unpack_pair<T>(raw.z, x + 4);
      unpack_pair<T>(raw.w, x + 6);
    } else {
      const uint2 raw = load_global(reinterpret_cast<const uint2*>(row + k));
      unpack_pair<T>(raw.x, x);
      unpack_pair<T>(raw.y, x + 2);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCodes; ++j) {
      x[j] = k + j < columns ? to_float(load_global(row + k + j)) : 0.0f;
    }
  }
}

template <int MT>
constexpr int linear_shared_bytes() {
  return 128 + kWarps * MT * kBlockRows * static_cast<int>(sizeof(float));
}

// Grid: x over blocks of 16 weight rows, y over tiles of MT rows of x.
template <class T, class Format, int MT>
__global__ void __launch_bounds__(kThreads)
    linear_kernel(const qk_weight_only_args a, int64_t chunks, bool vector_x) {
  constexpr int kCodes = Format::kCodes;
  SharedMemory memory;
  const SharedArray<float> lut = shared_lut(memory, a.lut);
  const SharedArray<float> partial = memory.array<float>(kWarps * MT * kBlockRows);

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int quad = lane % 4;  // rows 4 * quad .. 4 * quad + 3 of the block
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kBlockRows + quad * kRowsAThread;
  const int64_t first_m = static_cast<int64_t>(blockIdx.y) * MT;
  const T* x = static_cast<const T*>(a.x) + first_m * a.ldx;
  const PackedBlock at = packed_block(blockIdx.x, (a.n + kBlockRows - 1) / kBlockRows, chunks);
  const uint8_t* packed = static_cast<const uint8_t*>(a.packed) + at.base + quad * 16;
  const float* scales = static_cast<const float*>(a.scale);

  float acc[MT][kRowsAThread] = {};
  constexpr int kStride = kWarps * kLanesAlongK;
  int64_t chunk = warp * kLanesAlongK + lane / 4;
  uint4 next = {};
  if (chunk < chunks) next = load_once(packed + chunk * at.step);
  for (; chunk < chunks; chunk += kStride) {
    const uint4 codes = next;  // the load of the next chunk overlaps this one's arithmetic
    if (chunk + kStride < chunks) next = load_once(packed + (chunk + kStride) * at.step);

    const int64_t k = chunk * kCodes;
    const int64_t group = k / a.group_size;
    const uint32_t words[kRowsAThread] = {codes.x, codes.y, codes.z, codes.w};
    float scale[kRowsAThread], zero[kRowsAThread];
#pragma unroll
    for (int r = 0; r < kRowsAThread; ++r) {
      const int64_t row = first_row + r;
      const bool valid = row < a.n;
      scale[r] =
          valid ? load_global(scales + row * a.scale_stride_n + group * a.scale_stride_g) : 0.0f;
      zero[r] = valid && a.zero != nullptr
                    ? load_global(a.zero + row * a.zero_stride_n + group * a.zero_stride_g)
                    : 0.0f;
    }
    float weight[kRowsAThread][kCodes];
#pragma unroll
    for (int r = 0; r < kRowsAThread; ++r) {
      Format::decode(words[r], lut, weight[r]);
#pragma unroll
      for (int j = 0; j < kCodes; ++j) weight[r][j] -= zero[r];
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      if (first_m + m >= a.m) break;
      float value[kCodes];
      load_x<T, kCodes>(x + m * a.ldx, k, a.k, vector_x, value);
#pragma unroll
      for (int r = 0; r < kRowsAThread; ++r) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kCodes; ++j) sum = fmaf(weight[r][j], value[j], sum);
        acc[m][r] = fmaf(scale[r], sum, acc[m][r]);
      }
    }
  }

#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int r = 0; r < kRowsAThread; ++r) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        acc[m][r] += shuffle_xor(acc[m][r], step);
      }
      if (lane < 4) {
        partial.store((warp * MT + m) * kBlockRows + quad * kRowsAThread + r, acc[m][r]);
      }
    }
  }
  barrier();
  for (int i = static_cast<int>(threadIdx.x); i < MT * kBlockRows; i += kThreads) {
    const int m = i / kBlockRows, r = i % kBlockRows;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kBlockRows + r;
    if (first_m + m >= a.m || row >= a.n) continue;
    float y = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) y += partial.load((w * MT + m) * kBlockRows + r);
    if (a.bias != nullptr) y += load_as_float(a.bias, a.bias_dtype, row);
    store_global(static_cast<T*>(a.y) + (first_m + m) * a.ldy + row, from_float<T>(y));
  }
}

// y[n, k] = (decode(code) - zero) * scale in fp32, rounded once. One thread a word of codes.
template <class T, class Format>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const qk_weight_only_args a, int64_t chunks) {
  constexpr int kCodes = Format::kCodes;
  SharedMemory memory;
  const SharedArray<float> lut = shared_lut(memory, a.lut);
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = blockIdx.y;
  if (chunk >= chunks) return;
  const PackedBlock at =
      packed_block(row / kBlockRows, (a.n + kBlockRows - 1) / kBlockRows, chunks);
  const uint8_t* word = static_cast<const uint8_t*>(a.packed) + at.base + chunk * at.step +
                        row % kBlockRows * 4;
  float weight[kCodes];
  Format::decode(load_global(reinterpret_cast<const uint32_t*>(word)), lut, weight);
  const int64_t k = chunk * kCodes, group = k / a.group_size;
  const float scale = load_global(static_cast<const float*>(a.scale) + row * a.scale_stride_n +
                                  group * a.scale_stride_g);
  const float zero = a.zero == nullptr ? 0.0f
                                       : load_global(a.zero + row * a.zero_stride_n +
                                                     group * a.zero_stride_g);
  T* out = static_cast<T*>(a.y) + row * a.ldy + k;
#pragma unroll
  for (int j = 0; j < kCodes; ++j) {
    if (k + j < a.k) store_global(out + j, from_float<T>((weight[j] - zero) * scale));
  }
}

template <class T, class Format, int MT>
int launch_tiles(const qk_weight_only_args& a, int64_t chunks, bool vector_x,
                 cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((a.n + kBlockRows - 1) / kBlockRows),
                  static_cast<unsigned>((a.m + MT - 1) / MT));
  return launch(linear_kernel<T, Format, MT>,
                Launch{grid, kThreads, linear_shared_bytes<MT>(), stream}, a, chunks, vector_x);
}

template <class T, class Format>
int launch_linear(const qk_weight_only_args& a, cudaStream_t stream) {
  const int64_t chunks = (a.k + Format::kCodes - 1) / Format::kCodes;
  constexpr int kVectorBytes = Format::kCodes * static_cast<int>(sizeof(T));
  const bool vector_x = a.k % Format::kCodes == 0 && (a.ldx * sizeof(T)) % kVectorBytes == 0 &&
                        reinterpret_cast<uintptr_t>(a.x) % kVectorBytes == 0;
  if (a.m <= 1) return launch_tiles<T, Format, 1>(a, chunks, vector_x, stream);
  if (a.m <= 2) return launch_tiles<T, Format, 2>(a, chunks, vector_x, stream);
  if (a.m <= 4) return launch_tiles<T, Format, 4>(a, chunks, vector_x, stream);
  if (a.m <= 8) return launch_tiles<T, Format, 8>(a, chunks, vector_x, stream);
  return launch_tiles<T, Format, 16>(a, chunks, vector_x, stream);
}

template <class T, class Format>
int launch_dequantize(const qk_weight_only_args& a, cudaStream_t stream) {
  const int64_t chunks = (a.k + Format::kCodes - 1) / Format::kCodes;
  // gridDim.y ends at 65535: more rows take more launches.
  constexpr int64_t kMostRows = 65535 / 64 * 64;  // whole groups of four blocks
  for (int64_t first = 0; first < a.n; first += kMostRows) {
    qk_weight_only_args part = a;
    const int64_t rows = a.n - first < kMostRows ? a.n - first : kMostRows;
    part.n = a.n - first;
    part.packed = static_cast<const uint8_t*>(a.packed) + first / kBlockRows * chunks * kChunkBytes;
    part.scale = static_cast<const float*>(part.scale) + first * a.scale_stride_n;
    if (part.zero != nullptr) part.zero += first * a.zero_stride_n;
    part.y = static_cast<T*>(a.y) + first * a.ldy;
    const dim3 grid(static_cast<unsigned>((chunks + kThreads - 1) / kThreads),
                    static_cast<unsigned>(rows));
    const int status = launch(dequantize_kernel<T, Format>, Launch{grid, kThreads, 128, stream},
                              part, chunks);
    if (status != QK_OK) return status;
  }
  return QK_OK;
}

// One function a format, each in its own translation unit.
int w4_linear(const qk_weight_only_args& a, cudaStream_t stream);
int w4_dequantize(const qk_weight_only_args& a, cudaStream_t stream);
int w8_linear(const qk_weight_only_args& a, cudaStream_t stream);
int w8_dequantize(const qk_weight_only_args& a, cudaStream_t stream);

}  // namespace quantkit::cuda
