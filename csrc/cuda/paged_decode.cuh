// Attention of one new token a sequence over its pages (flash-decoding): y = softmax(q K^T) V.
//
// A block takes a span of one sequence's pages for one key-value head, its four warps 16 tokens of
// each page. Keys and values go into shared memory by cp.async and become bf16 fragments once for
// all query heads of the key-value head, which are the 16 rows of the mma: scores are [16 heads,
// 16 tokens], and their accumulators are the probabilities' fragments without a move (Dao,
// "FlashAttention-2", arXiv 2307.08691). A warp has a softmax of its own, so that warps meet once,
// at the end of the span; spans meet in a second kernel (Dao et al., "Flash-Decoding", 2023).
//
// 8-bit pages: ldmatrix moves pairs of bytes. Not transposed, a lane gets four neighbouring
// dimensions of one key, which the query's fragments follow; transposed, two dimensions of two
// tokens, which become fragments of two tiles of 8 output columns, the even dimensions and the odd.
// A key's scale multiplies its scores, a value's its probability.
//
// How a sequence is cut into spans depends on its length alone, so its bits do not depend on the
// batch.
//
// Ladder, built but not timed on a GPU yet (benchmarks/gpu_session.sh):
//   1. This file. Registers, instructions and shared memory are in benchmarks/LOG.md.
#pragma once

#include "decode.cuh"
#include "quantkit/cuda_attention.h"

namespace quantkit::cuda::decode {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kHeads = 16;   // rows of an mma
constexpr int kTokens = 16;  // of a page, a warp
constexpr int kSpanPages = 4;
constexpr int kMostSpans = 64;
static_assert(kWarps * kTokens == QK_PAGE_TOKENS);

// Pages of a span, for a sequence that has so many.
__device__ __forceinline__ int span_of(int pages) {
  const int wanted = (pages + kMostSpans - 1) / kMostSpans;
  return wanted > kSpanPages ? wanted : kSpanPages;
}

// Spans of the longest sequence that fits a table of so many pages.
inline int64_t most_spans(int64_t pages) {
  const int64_t spans = (pages + kSpanPages - 1) / kSpanPages;
  return spans < kMostSpans ? spans : kMostSpans;
}

// ---- fragments of 16 tokens and 16 dimensions --------------------------------------------------

// bf16 pages. With t = lane % 4, a step's dimensions are 2t, 2t + 1, 2t + 8, 2t + 9 for queries and
// keys; tile i of the output has 8i + 2t and 8i + 2t + 1.
struct Bf16Pages {
  static constexpr int kBytes = 2;
  static constexpr bool kScales = false;

  __device__ __forceinline__ static int query_dim(int t, int pair) { return 2 * t + 8 * pair; }
  __device__ __forceinline__ static int output_dim(int t, int tile, int c) {
    return 8 * tile + 2 * t + c;
  }
  // tile: the address of 16 tokens, `stride` bytes apart. first, last: tokens 0 to 7 and 8 to 15 of
  // keys, or the two tiles of 8 output columns of values.
  __device__ __forceinline__ static void keys(uint32_t tile, int stride, int lane, int dim,
                                              uint32_t (&first)[2], uint32_t (&last)[2]) {
    // Matrices: tokens 0 to 7 and dimensions 0 to 7, then 8 to 15; the same of tokens 8 to 15.
    const int token = lane % 8 + lane / 16 * 8, column = lane / 8 % 2 * 8;
    uint32_t both[4];
    ldmatrix<4>(both, tile + static_cast<uint32_t>(token * stride + (dim + column) * 2));
    first[0] = both[0], first[1] = both[1], last[0] = both[2], last[1] = both[3];
  }
  __device__ __forceinline__ static void values(uint32_t tile, int stride, int lane, int dim,
                                                uint32_t (&first)[2], uint32_t (&last)[2]) {
    const int token = lane % 16, column = lane / 16 * 8;
    uint32_t both[4];
    ldmatrix<4, true>(both, tile + static_cast<uint32_t>(token * stride + (dim + column) * 2));
    first[0] = both[0], first[1] = both[1], last[0] = both[2], last[1] = both[3];
  }
};

// INT8 and e4m3 pages: Decode is Int8<bf16> or Fp8<bf16>. A step's dimensions are 4t to 4t + 3 for
// queries and keys; tile i of the output has 4t + i and 4t + 2 + i.
template <class Decode>
struct BytePages {
  static constexpr int kBytes = 1;
  static constexpr bool kScales = true;

  __device__ __forceinline__ static int query_dim(int t, int pair) { return 4 * t + 2 * pair; }
  __device__ __forceinline__ static int output_dim(int t, int tile, int c) {
    return 4 * t + 2 * c + tile;
  }
  __device__ __forceinline__ static void keys(uint32_t tile, int stride, int lane, int dim,
                                              uint32_t (&first)[2], uint32_t (&last)[2]) {
    uint32_t both[2];  // tokens 0 to 7, and 8 to 15
    ldmatrix<2>(both, tile + static_cast<uint32_t>(lane % 16 * stride + dim));
    Decode::decode(both[0], first[0], first[1]);
    Decode::decode(both[1], last[0], last[1]);
  }
  __device__ __forceinline__ static void values(uint32_t tile, int stride, int lane, int dim,
                                                uint32_t (&first)[2], uint32_t (&last)[2]) {
    uint32_t both[2];
    ldmatrix<2, true>(both, tile + static_cast<uint32_t>(lane % 16 * stride + dim));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Bytes: dimensions 2g and 2g + 1 of one token, then of the next.
      Decode::decode(permute_bytes(both[i], both[i], 0x3120u), first[i], last[i]);
    }
  }
};

// ---- shared memory -----------------------------------------------------------------------------

// A warp's 16 tokens of a page: rows of keys, rows of values, their scales.
template <class Pages, int kDims>
struct Tile {
  static constexpr int kRow = kDims * Pages::kBytes;
  static constexpr int kChunks = kRow / 16;
  // An odd number of 16 bytes: the eight rows of a matrix lie in different banks.
  static constexpr int kStride = kChunks % 2 == 1 ? kRow : kRow + 16;
  static constexpr int kValues = kTokens * kStride, kScales = 2 * kValues;
  static constexpr int kBytes = kScales + (Pages::kScales ? 2 * kTokens * 4 : 0);
  // As many in flight as every GPU from sm_80 on has room for in a block.
  static constexpr int kStages = 3 * kWarps * kBytes <= 99 * 1024 ? 3 : 2;
  static constexpr int kSumStride = kDims + 4;
  static constexpr int kSums = kWarps * kHeads * kSumStride;
  static constexpr int kAll = kStages * kWarps * kBytes;
  static constexpr int kAtEnd = (kSums + 2 * kWarps * kHeads + 64) * 4;
  static constexpr int kSharedBytes = kAll > kAtEnd ? kAll : kAtEnd;
};

// partials: sums [sequences][heads][spans][head_dim], then their maxima and totals
// [sequences][heads][spans][2].
struct Partials {
  float* sums;
  float2* totals;
};
__device__ __forceinline__ Partials partials_of(const qk_cuda_paged_decode_args& a, int64_t row,
                                                int span, int spans) {
  const int64_t rows = a.sequences * a.heads;
  const int64_t at = row * spans + span;
  return {a.partials + at * a.head_dim,
          reinterpret_cast<float2*>(a.partials + rows * spans * a.head_dim) + at};
}

constexpr float kNone = -INFINITY;

// Where nothing was seen the maximum is no number to subtract.
__device__ __forceinline__ float base_of(float most) { return most == kNone ? 0.0f : most; }

// Grid: x over spans of the longest sequence that fits, y over key-value heads and tiles of their
// query heads, z over sequences.
template <class Pages, int kDims>
__global__ void __launch_bounds__(kThreads, 2)
    span_kernel(const qk_cuda_paged_decode_args a, const int head_tiles) {
  using T = Tile<Pages, kDims>;
  constexpr int kSteps = kDims / 16;
  constexpr float kLog2e = 1.4426950408889634f;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t sequence = blockIdx.z;
  const int kv_head = static_cast<int>(blockIdx.y) / head_tiles;
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int first_head = static_cast<int>(blockIdx.y) % head_tiles * kHeads;  // of the group
  const int heads = group - first_head < kHeads ? group - first_head : kHeads;
  const int64_t head = static_cast<int64_t>(kv_head) * group + first_head;

  launch_dependents();
  wait_for_previous();

  const int length = load_global(a.lengths + sequence);
  const int first_seen =
      a.window > 0 && a.window < length ? length - static_cast<int>(a.window) : 0;
  const int all_pages = (length + QK_PAGE_TOKENS - 1) / QK_PAGE_TOKENS;
  const int span = span_of(all_pages);
  const int begin = static_cast<int>(blockIdx.x) * span;
  const int end = begin + span < all_pages ? begin + span : all_pages;
  if (begin >= end) return;

  SharedMemory memory;
  const SharedArray<uint8_t> tiles = memory.array<uint8_t>(T::kAll);
  const auto tile_at = [&](int stage) { return (stage * kWarps + warp) * T::kBytes; };
  const auto fetch = [&](int page) {
    const int first = page * QK_PAGE_TOKENS + warp * kTokens;
    if (page < end && first < length && first + kTokens > first_seen) {
      const int64_t number = load_global(a.pages + sequence * a.page_stride + page);
      const int64_t half = (number * a.kv_heads + kv_head) * 2;
      const int64_t row = half * QK_PAGE_TOKENS + warp * kTokens;
      const auto* data = static_cast<const uint8_t*>(a.data);
      const int to = tile_at((page - begin) % T::kStages);
#pragma unroll
      for (int i = lane; i < 2 * kTokens * T::kChunks; i += 32) {
        const int half_row = i / T::kChunks, chunk = i % T::kChunks;
        const int value = half_row / kTokens, token = half_row % kTokens;
        const bool seen = first + token < length && first + token >= first_seen;
        const int64_t from = (row + value * QK_PAGE_TOKENS + token) * T::kRow + chunk * 16;
        cp_async_16(tiles.address(to + value * T::kValues + token * T::kStride + chunk * 16),
                    data + (seen ? from : 0), seen ? 16 : 0);
      }
      if constexpr (Pages::kScales) {
        if (lane < 8) {  // 4 scales each; those of tokens that are not seen are not used
          const int value = lane / 4, four = lane % 4 * 4;
          cp_async_16(tiles.address(to + T::kScales + lane * 16),
                      a.scale + row + value * QK_PAGE_TOKENS + four);
        }
      }
    }
    cp_async_commit();  // an empty group keeps the count
  };
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) fetch(begin + i);

  uint32_t query[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = g + r % 2 * 8, dim = 16 * step + Pages::query_dim(t, r / 2);
      const auto* from = static_cast<const bf16*>(a.q) + sequence * a.ldq + (head + row) * kDims;
      query[step][r] =
          row < heads ? load_global(reinterpret_cast<const uint32_t*>(from + dim)) : 0u;
    }
  }

  float sum[2 * kSteps][4] = {};
  float most[2] = {kNone, kNone}, total[2] = {};
  const float scale = a.softcap > 0.0f ? a.score_scale / a.softcap : a.score_scale * kLog2e;
  for (int page = begin; page < end; ++page) {
    cp_async_wait<T::kStages - 2>();
    sync_warp();  // the tile is there for all lanes, and all are done with the one fetched next
    fetch(page + T::kStages - 1);
    const int first = page * QK_PAGE_TOKENS + warp * kTokens;
    if (first >= length || first + kTokens <= first_seen) continue;
    const int at = tile_at((page - begin) % T::kStages);

    float score[2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t keys[2][2];
      Pages::keys(tiles.address(at), T::kStride, lane, 16 * step, keys[0], keys[1]);
      mma_m16n8k16<bf16>(score[0], query[step], keys[0]);
      mma_m16n8k16<bf16>(score[1], query[step], keys[1]);
    }

    float value_scale[2][2];
    float larger[2] = {most[0], most[1]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 8 * i + 2 * t;
      float2 key_scale{1.0f, 1.0f};
      if constexpr (Pages::kScales) {
        const int from = at + T::kScales + token * 4;
        key_scale = tiles.template load_vector<float2>(from);
        const float2 v = tiles.template load_vector<float2>(from + kTokens * 4);
        value_scale[i][0] = v.x, value_scale[i][1] = v.y;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float& s = score[i][c];
        if constexpr (Pages::kScales) s *= c % 2 == 0 ? key_scale.x : key_scale.y;
        s *= scale;
        if (a.softcap > 0.0f) s = tanhf(s) * (a.softcap * kLog2e);
        const int position = first + token + c % 2;
        if (position >= length || position < first_seen) s = kNone;
        larger[c / 2] = fmaxf(larger[c / 2], s);  // drops NaN: its exponential shows it below
      }
    }
    uint32_t probability[4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      larger[r] = fmaxf(larger[r], shuffle_xor(larger[r], 1));
      larger[r] = fmaxf(larger[r], shuffle_xor(larger[r], 2));
      const float base = base_of(larger[r]), shrink = exp2f(most[r] - base);
      most[r] = larger[r];
      total[r] *= shrink;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float p[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          p[c] = exp2f(score[i][2 * r + c] - base);
          total[r] += p[c];
          if constexpr (Pages::kScales) {
            // A hidden token's scale may be anything: 0 times it may be NaN.
            p[c] = score[i][2 * r + c] == kNone ? 0.0f : p[c] * value_scale[i][c];
          }
        }
        probability[2 * i + r] = Pair<bf16>::from_floats(p[0], p[1]);
      }
#pragma unroll
      for (auto& tile : sum) tile[2 * r] *= shrink, tile[2 * r + 1] *= shrink;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t values[2][2];
      Pages::values(tiles.address(at + T::kValues), T::kStride, lane, 16 * step, values[0],
                    values[1]);
      mma_m16n8k16<bf16>(sum[2 * step], probability, values[0]);
      mma_m16n8k16<bf16>(sum[2 * step + 1], probability, values[1]);
    }
  }

  // The four warps' sums, through the shared memory of the tiles.
  cp_async_wait<0>();
  barrier();
  SharedMemory again;
  const SharedArray<float> sums = again.array<float>(T::kSums);
  const SharedArray<float2> totals = again.array<float2>(kWarps * kHeads);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += shuffle_xor(total[r], 1);
    total[r] += shuffle_xor(total[r], 2);
    const int row = warp * kHeads + g + 8 * r;
    if (t == 0) totals.store(row, float2{most[r], total[r]});
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int dim = i / 2 * 16 + Pages::output_dim(t, i % 2, c);
        sums.store(row * T::kSumStride + dim, sum[i][2 * r + c]);
      }
    }
  }
  barrier();
  for (int i = thread; i < heads * kDims; i += kThreads) {
    const int row = i / kDims, dim = i % kDims;
    float largest = kNone;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, totals.load(w * kHeads + row).x);
    float y = 0.0f, weight = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 of = totals.load(w * kHeads + row);
      const float factor = exp2f(of.x - base_of(largest));
      y = fmaf(factor, sums.load((w * kHeads + row) * T::kSumStride + dim), y);
      weight = fmaf(factor, of.y, weight);
    }
    const Partials to = partials_of(a, sequence * a.heads + head + row,
                                    static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    store_global(to.sums + dim, y);
    if (dim == 0) store_global(to.totals, float2{largest, weight});
  }
}

// Grid: x over heads, y over sequences; a thread has one dimension.
inline __global__ void merge_kernel(const qk_cuda_paged_decode_args a, const int most) {
  launch_dependents();
  wait_for_previous();
  const int dim = static_cast<int>(threadIdx.x);
  const int64_t sequence = blockIdx.y, head = blockIdx.x, row = sequence * a.heads + head;
  if (dim >= a.head_dim) return;
  const int length = load_global(a.lengths + sequence);
  const int pages = (length + QK_PAGE_TOKENS - 1) / QK_PAGE_TOKENS;
  const int spans = (pages + span_of(pages) - 1) / span_of(pages);
  float largest = kNone;
  for (int i = 0; i < spans; ++i) {
    largest = fmaxf(largest, load_from_l2(partials_of(a, row, i, most).totals).x);
  }
  float y = 0.0f, weight = 0.0f;
  for (int i = 0; i < spans; ++i) {
    const Partials from = partials_of(a, row, i, most);
    const float2 of = load_from_l2(from.totals);
    const float factor = exp2f(of.x - base_of(largest));
    y = fmaf(factor, load_from_l2(from.sums + dim), y);
    weight = fmaf(factor, of.y, weight);
  }
  store_global(static_cast<bf16*>(a.y) + sequence * a.ldy + head * a.head_dim + dim,
               from_float<bf16>(length > 0 ? y / weight : 0.0f));
}

template <class Pages, int kDims>
int launch_decode(const qk_cuda_paged_decode_args& a, cudaStream_t stream) {
  const int64_t group = a.heads / a.kv_heads;
  const int head_tiles = static_cast<int>((group + kHeads - 1) / kHeads);
  const int spans = static_cast<int>(most_spans(a.page_stride));
  const auto sequences = static_cast<unsigned>(a.sequences);
  const dim3 grid(static_cast<unsigned>(spans), static_cast<unsigned>(a.kv_heads * head_tiles),
                  sequences);
  const int status =
      launch(span_kernel<Pages, kDims>,
             Launch{grid, kThreads, Tile<Pages, kDims>::kSharedBytes, stream, a.overlap != 0}, a,
             head_tiles);
  if (status != QK_OK) return status;
  const dim3 rows(static_cast<unsigned>(a.heads), sequences);
  return launch(merge_kernel, Launch{rows, (kDims + 31) / 32 * 32, 0, stream, a.overlap != 0}, a,
                spans);
}

template <class Pages>
int paged_decode(const qk_cuda_paged_decode_args& a, cudaStream_t stream) {
  switch (a.head_dim) {
    case 64: return launch_decode<Pages, 64>(a, stream);
    case 80: return launch_decode<Pages, 80>(a, stream);
    case 96: return launch_decode<Pages, 96>(a, stream);
    default: return launch_decode<Pages, 128>(a, stream);
  }
}

}  // namespace quantkit::cuda::decode
