// Small kernels that show what one instruction of ptx.cuh does, or break one rule of the machine in
// host/machine.h. tests/ops/test_twin.py runs them; compiled by nvcc, the first group checks the
// twin against a GPU.
#include "../cuda/decode.cuh"
#include "../cuda/decode_fp4.cuh"

namespace quantkit::cuda {
namespace {

// a [16, K] and b [8, K] row-major bytes, d [16, 8] 32-bit. Fragments by the tables of the PTX ISA.
template <class Acc, int kBytesOfK, class Multiply>
__device__ void mma_by_table(const uint8_t* a, const uint8_t* b, Acc* d, Multiply multiply) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const auto word = [](const uint8_t* rows, int row, int byte) {
    return load_global(reinterpret_cast<const uint32_t*>(rows + row * kBytesOfK + byte));
  };
  const uint32_t af[4] = {word(a, g, 4 * t), word(a, g + 8, 4 * t), word(a, g, 4 * t + 16),
                          word(a, g + 8, 4 * t + 16)};
  const uint32_t bf[2] = {word(b, g, 4 * t), word(b, g, 4 * t + 16)};
  Acc acc[4];
  for (int i = 0; i < 4; ++i) acc[i] = d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  multiply(acc, af, bf);
  for (int i = 0; i < 4; ++i) store_global(d + (g + 8 * (i / 2)) * 8 + 2 * t + i % 2, acc[i]);
}

template <class T>
__global__ void mma_16bit(const uint8_t* a, const uint8_t* b, float* d) {
  mma_by_table<float, 32>(a, b, d, [](auto& acc, auto& af, auto& bf) {
    mma_m16n8k16<T>(acc, af, bf);
  });
}
__global__ void mma_s8(const uint8_t* a, const uint8_t* b, int32_t* d) {
  mma_by_table<int32_t, 32>(a, b, d, [](auto& acc, auto& af, auto& bf) {
    mma_m16n8k32_s8(acc, af, bf);
  });
}
__global__ void mma_e4m3(const uint8_t* a, const uint8_t* b, float* d) {
  mma_by_table<float, 32>(a, b, d, [](auto& acc, auto& af, auto& bf) {
    mma_m16n8k32_e4m3(acc, af, bf);
  });
}

// a [16, 16] and b [16, 8] (not transposed), both row-major bf16, through shared memory.
__global__ void mma_by_ldmatrix(const uint8_t* a, const uint8_t* b, float* d) {
  SharedMemory memory;
  const SharedArray<uint16_t> as = memory.array<uint16_t>(16 * 16);
  const SharedArray<uint16_t> bs = memory.array<uint16_t>(16 * 8);
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  as.store_vector(8 * lane, load_global(reinterpret_cast<const uint4*>(a) + lane));
  if (lane < 16) bs.store_vector(8 * lane, load_global(reinterpret_cast<const uint4*>(b) + lane));
  sync_warp();
  uint32_t af[4], bf[2];
  ldmatrix<4>(af, as.address(lane % 16 * 16 + lane / 16 * 8));
  ldmatrix<2, true>(bf, bs.address(lane % 16 * 8));
  float acc[4] = {};
  mma_m16n8k16<bf16>(acc, af, bf);
  for (int i = 0; i < 4; ++i) store_global(d + (g + 8 * (i / 2)) * 8 + 2 * t + i % 2, acc[i]);
}

// out [5, 32]: what each lane gets.
__global__ void warp_exchange(uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t mine = 100u + static_cast<uint32_t>(lane);
  store_global(out + lane, shuffle(mine, (lane * 7 + 3) % 32));
  store_global(out + 32 + lane, shuffle_xor(mine, 5));
  store_global(out + 64 + lane, shuffle_down(mine, 4));
  store_global(out + 96 + lane, ballot(lane % 3 == 0));
  store_global(out + 128 + lane, permute_bytes(0x33221100u, 0x77665544u, 0x7052u + mine % 4));
}

// in [n, 3] pairs -> out [n, 4]: sum, difference, product, multiply-add.
template <class T>
__global__ void pair_arithmetic(const uint32_t* in, uint32_t* out, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) {
    const uint32_t a = load_global(in + 3 * i), b = load_global(in + 3 * i + 1),
                   c = load_global(in + 3 * i + 2);
    store_global(out + 4 * i, Pair<T>::add(a, b));
    store_global(out + 4 * i + 1, Pair<T>::sub(a, b));
    store_global(out + 4 * i + 2, Pair<T>::mul(a, b));
    store_global(out + 4 * i + 3, Pair<T>::fma(a, b, c));
  }
}

// in [n] floats -> out [n, 3]: the bits of v as f16, bf16, and e4m3 there and back to f16.
__global__ void conversions(const float* in, uint32_t* out, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) {
    const float v = load_global(in + i);
    store_global(out + 3 * i, Pair<f16>::from_floats(v, -v));
    store_global(out + 3 * i + 1, Pair<bf16>::from_floats(v, -v));
    store_global(out + 3 * i + 2, e4m3x2_to_f16x2(floats_to_e4m3x2(v, -v)));
  }
}

// in [n] words -> out [n, 4] pairs, for the zero points i % 16 and i / 16 % 16.
template <class T>
__global__ void int4_decode(const uint32_t* in, uint32_t* out, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) {
    uint32_t pairs[4];
    const Int4Zeros zeros = Int4<T>::template zeros<2>(static_cast<uint32_t>(i % 16) << 16 |
                                                       static_cast<uint32_t>(i / 16 % 16) << 24);
    Int4<T>::decode(load_global(in + i), zeros, pairs);
    for (int j = 0; j < 4; ++j) store_global(out + 4 * i + j, pairs[j]);
  }
}

// in [n] words -> out [n, 8] pairs: E2M1, then NF4.
template <class T>
__global__ void fp4_decode(const uint32_t* in, uint32_t* out, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) {
    uint32_t pairs[2][4];
    decode_e2m1<T>(load_global(in + i), pairs[0]);
    decode_nf4<T>(load_global(in + i), pairs[1]);
    for (int j = 0; j < 8; ++j) store_global(out + 8 * i + j, pairs[j / 4][j % 4]);
  }
}

enum Mistake { kNone, kNoWait, kWaitTooFew, kNoBarrier, kOverwrites };

// in [4, 64, 4] words through two buffers of one stage each to out, by 64 threads; each thread
// stores what its neighbour loaded. The last row is half zeros: cp.async of 8 bytes.
__global__ void pipeline(const uint32_t* in, uint32_t* out, int mistake) {
  SharedMemory memory;
  const SharedArray<uint32_t> stages = memory.array<uint32_t>(2 * 64 * 4);
  const int thread = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int step) {
    if (step < 4) {
      cp_async_16(stages.address((step % 2 * 64 + thread) * 4), in + (step * 64 + thread) * 4,
                  step < 3 ? 16 : 8);
    }
    cp_async_commit();
  };
  fetch(0);
  for (int step = 0; step < 4; ++step) {
    fetch(step + 1);
    if (mistake == kWaitTooFew) {
      cp_async_wait<2>();
    } else if (mistake != kNoWait) {
      cp_async_wait<1>();
    }
    if (mistake != kNoBarrier) barrier();
    const int neighbour = (thread + 33) % 64;
    const uint4 v = stages.load_vector<uint4>((step % 2 * 64 + neighbour) * 4);
    store_global(reinterpret_cast<uint4*>(out + (step * 64 + thread) * 4), v);
    if (mistake != kOverwrites) barrier();
  }
}

// Two warps hand a number to two others by a named barrier; the first two do not wait.
__global__ void producers(uint32_t* out) {
  SharedMemory memory;
  const SharedArray<uint32_t> slots = memory.array<uint32_t>(64);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 64) {
    slots.store(thread, static_cast<uint32_t>(thread * thread));
    barrier_arrive(1, 128);
  } else {
    barrier(1, 128);
    store_global(out + thread - 64, slots.load(127 - thread));
  }
}

enum Broken {
  kOutsideArray,
  kOutsideShared,
  kMisalignedShared,
  kMisalignedGlobal,
  kOutsideGlobal,
  kMixedCollectives,
  kLaneLeft,
  kBarrierNotReached,
  kWarpNotSynced,
  kPoison,
  kWritesInput,
  kRules,
};

__global__ void break_rule(int rule, const uint32_t* in, uint32_t* out) {
  SharedMemory memory;
  const int thread = static_cast<int>(threadIdx.x);
  if (rule == kOutsideShared) memory.array<uint32_t>(1 << 14).store(0, 1u);
  const SharedArray<uint32_t> words = memory.array<uint32_t>(64);
  if (rule == kPoison) store_global(out + thread, words.load(thread));
  words.store(thread, 1u);
  switch (rule) {
    case kOutsideArray: words.store(thread + 64, 1u); break;
    case kMisalignedShared: words.load_vector<uint4>(4 * thread % 32 + 1); break;
    case kMisalignedGlobal: load_once(in + 1); break;
    case kOutsideGlobal: load_global(in + 64); break;
    case kMixedCollectives:
      if (thread % 2) {
        shuffle(1, 0);
      } else {
        ballot(true);
      }
      break;
    case kLaneLeft:
      if (thread == 5) return;
      sync_warp();
      break;
    case kBarrierNotReached:
      if (thread < 32) barrier();
      break;
    case kWarpNotSynced: words.load(thread ^ 1); break;
    case kWritesInput: store_global(const_cast<uint32_t*>(in), 1u); break;
    default: break;
  }
}

template <class... Parameters, class... Arguments>
int run(void (*kernel)(Parameters...), int threads, const Arguments&... arguments) {
  return launch(kernel, Launch{dim3(1), threads, 2048, nullptr}, arguments...);
}

}  // namespace
}  // namespace quantkit::cuda

using namespace quantkit::cuda;

extern "C" {
// kind: 0 bf16, 1 f16, 2 int8, 3 e4m3, 4 bf16 through ldmatrix.
QK_EXPORT int qk_probe_mma(int kind, const uint8_t* a, const uint8_t* b, void* d) {
  float* f = static_cast<float*>(d);
  switch (kind) {
    case 0: return run(mma_16bit<bf16>, 32, a, b, f);
    case 1: return run(mma_16bit<f16>, 32, a, b, f);
    case 2: return run(mma_s8, 32, a, b, static_cast<int32_t*>(d));
    case 3: return run(mma_e4m3, 32, a, b, f);
    case 4: return run(mma_by_ldmatrix, 32, a, b, f);
    default: return QK_INVALID_ARGUMENT;
  }
}
QK_EXPORT int qk_probe_warp(uint32_t* out) { return run(warp_exchange, 32, out); }
QK_EXPORT int qk_probe_pairs(int is_f16, const uint32_t* in, uint32_t* out, int n) {
  return is_f16 ? run(pair_arithmetic<f16>, 32, in, out, n)
                : run(pair_arithmetic<bf16>, 32, in, out, n);
}
QK_EXPORT int qk_probe_conversions(const float* in, uint32_t* out, int n) {
  return run(conversions, 32, in, out, n);
}
QK_EXPORT int qk_probe_int4(int is_f16, const uint32_t* in, uint32_t* out, int n) {
  return is_f16 ? run(int4_decode<f16>, 32, in, out, n) : run(int4_decode<bf16>, 32, in, out, n);
}
QK_EXPORT int qk_probe_fp4(int is_f16, const uint32_t* in, uint32_t* out, int n) {
  return is_f16 ? run(fp4_decode<f16>, 32, in, out, n) : run(fp4_decode<bf16>, 32, in, out, n);
}
QK_EXPORT int qk_probe_pipeline(int mistake, const uint32_t* in, uint32_t* out) {
  return run(pipeline, 64, in, out, mistake);
}
QK_EXPORT int qk_probe_producers(uint32_t* out) { return run(producers, 128, out); }
QK_EXPORT int qk_probe_break(int rule, const uint32_t* in, uint32_t* out) {
  return run(break_rule, 64, rule, in, out);
}
}
