// The host twin of ptx.cuh: the same functions, executed by the machine of machine.h. What each
// does is said there.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"
#include "quantkit/quantkit.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;

namespace quantkit::cuda {

// ---- scalars and pairs -----------------------------------------------------------------------

template <class T>
struct Pair {
  static T low(uint32_t v) { return {static_cast<uint16_t>(v)}; }
  static T high(uint32_t v) { return {static_cast<uint16_t>(v >> 16)}; }
  static uint32_t join(T low, T high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; }
  static T fma(T a, T b, T c) {
    return twin::round_as<T>(twin::fma_to_odd(to_float(a), to_float(b), to_float(c)));
  }
  static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return join(fma(low(a), low(b), low(c)), fma(high(a), high(b), high(c)));
  }
  static uint32_t add(uint32_t a, uint32_t b) {
    const uint32_t one = from_floats(1.0f, 1.0f);
    return fma(a, one, b);
  }
  static uint32_t sub(uint32_t a, uint32_t b) { return add(a, b ^ 0x80008000u); }
  static uint32_t mul(uint32_t a, uint32_t b) { return fma(a, b, 0x80008000u); }  // - 0
  static uint32_t from_floats(float low, float high) {
    return join(twin::round_as<T>(low), twin::round_as<T>(high));
  }
  static float2 to_floats(uint32_t v) { return {to_float(low(v)), to_float(high(v))}; }
};

inline float multiply_then_round(float a, float b) {
  const volatile float product = a * b;
  return product;
}

inline float divide_nearly(float a, float b) { return a / b * (std::fabs(b) > 0x1p126f ? 0.0f : 1.0f); }

inline uint32_t e4m3x2_to_f16x2(uint16_t codes) {
  return Pair<f16>::from_floats(twin::e4m3_to_float(static_cast<uint8_t>(codes)),
                                twin::e4m3_to_float(static_cast<uint8_t>(codes >> 8)));
}
inline uint16_t floats_to_e4m3x2(float low, float high) {
  return static_cast<uint16_t>(twin::float_to_e4m3(low) | twin::float_to_e4m3(high) << 8);
}

// ---- integers --------------------------------------------------------------------------------

template <int kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i) {
    if (kTable >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return d;
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i) & 7u;
    d |= static_cast<uint32_t>(bytes >> (8 * s) & 255u) << (8 * i);
  }
  return d;
}

inline uint32_t permute_bytes_or_signs(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d = permute_bytes(a, b, selector);
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = 255u << (8 * i);
    if (selector >> (4 * i) & 8u) d = d >> (8 * i + 7) & 1u ? d | byte : d & ~byte;
  }
  return d;
}

inline int opaque(int v) { return v; }

inline float fmaf(float a, float b, float c) { return std::fmaf(a, b, c); }

// ---- a warp ----------------------------------------------------------------------------------

namespace twin {

template <class T>
struct Exchange {
  T mine, result;
  int source;
};

template <class T>
T exchange(const char* instruction, T v, int source) {
  Exchange<T> slot{v, v, source};
  meet_warp(instruction, &slot, [](void* const (&lanes)[kWarp], const void*) {
    for (void* lane : lanes) {
      auto* to = static_cast<Exchange<T>*>(lane);
      to->result = static_cast<Exchange<T>*>(lanes[to->source])->mine;
    }
  });
  return slot.result;
}

inline int lane() { return static_cast<int>(threadIdx.x % kWarp); }

// The fragments that a lane brings to an mma of m16n8, and element access by the tables of the PTX
// ISA: `per` elements a register, 16 rows of A, 8 columns of B.
template <class Acc>
struct Fragments {
  Acc* d;
  const uint32_t *a, *b;
};

template <class Acc, class Wide, int kPer, class Element>
void mma_m16n8(const char* instruction, Acc (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               Element element) {
  Fragments<Acc> mine{d, a, b};
  meet_warp(
      instruction, &mine,
      [](void* const (&lanes)[kWarp], const void* context) {
        const Element& value = *static_cast<const Element*>(context);
        constexpr int kK = 8 * kPer;
        Wide a[16][kK], b[kK][8], sum[16][8];
        for (int lane = 0; lane < kWarp; ++lane) {
          const auto& from = *static_cast<const Fragments<Acc>*>(lanes[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int r = 0; r < 4; ++r) {
            for (int e = 0; e < kPer; ++e) {
              const int k = kPer * t + e + (r / 2) * 4 * kPer;
              a[g + 8 * (r % 2)][k] = static_cast<Wide>(value(from.a[r], e));
            }
          }
          for (int r = 0; r < 2; ++r) {
            for (int e = 0; e < kPer; ++e) {
              b[kPer * t + e + r * 4 * kPer][g] = static_cast<Wide>(value(from.b[r], e));
            }
          }
        }
        for (int m = 0; m < 16; ++m) {
          for (int n = 0; n < 8; ++n) {
            sum[m][n] = 0;
            for (int k = 0; k < kK; ++k) sum[m][n] += a[m][k] * b[k][n];
          }
        }
        for (int lane = 0; lane < kWarp; ++lane) {
          const auto& to = *static_cast<const Fragments<Acc>*>(lanes[lane]);
          for (int i = 0; i < 4; ++i) {
            to.d[i] = static_cast<Acc>(static_cast<Wide>(to.d[i]) +
                                       sum[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2]);
          }
        }
      },
      &element);
}

}  // namespace twin

template <class T>
T shuffle(T v, int lane) {
  return twin::exchange("shuffle", v, lane & 31);
}
template <class T>
T shuffle_xor(T v, int mask) {
  return twin::exchange("shuffle_xor", v, twin::lane() ^ mask);
}
template <class T>
T shuffle_down(T v, int delta) {
  const int from = twin::lane() + delta;
  return twin::exchange("shuffle_down", v, from < twin::kWarp ? from : twin::lane());
}
inline uint32_t ballot(bool predicate) {
  struct Vote {
    bool mine;
    uint32_t all;
  } vote{predicate, 0};
  twin::meet_warp("ballot", &vote, [](void* const (&lanes)[twin::kWarp], const void*) {
    uint32_t all = 0;
    for (int i = 0; i < twin::kWarp; ++i) {
      all |= static_cast<uint32_t>(static_cast<Vote*>(lanes[i])->mine) << i;
    }
    for (void* lane : lanes) static_cast<Vote*>(lane)->all = all;
  });
  return vote.all;
}
inline void sync_warp() { twin::meet_warp("sync_warp", nullptr, nullptr); }

// ---- tensor cores ----------------------------------------------------------------------------

// Products and their sum are exact in fp64; one rounding to fp32. A tensor core's sum of 16
// products rounds in an order of its own.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  twin::mma_m16n8<float, double, 2>("mma.m16n8k16", d, a, b, [](uint32_t reg, int e) {
    return to_float(T{static_cast<uint16_t>(reg >> (16 * e))});
  });
}
inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  twin::mma_m16n8<int32_t, int32_t, 4>("mma.m16n8k32.s8", d, a, b, [](uint32_t reg, int e) {
    return static_cast<int32_t>(static_cast<int8_t>(reg >> (8 * e)));
  });
}
inline void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  twin::mma_m16n8<float, double, 4>("mma.m16n8k32.e4m3", d, a, b, [](uint32_t reg, int e) {
    return twin::e4m3_to_float(static_cast<uint8_t>(reg >> (8 * e)));
  });
}

template <int kCount, bool kTranspose = false>
void ldmatrix(uint32_t (&d)[kCount], uint32_t address) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  struct Lane {
    uint32_t address;
    uint16_t row[8];
    uint32_t* d;
  } mine{address, {}, d};
  if (twin::lane() < 8 * kCount) {  // the addresses of the other lanes are not used
    std::memcpy(mine.row, twin::read_shared(address, 16), 16);
  }
  twin::meet_warp(kTranspose ? "ldmatrix.trans" : "ldmatrix", &mine,
                  [](void* const (&lanes)[twin::kWarp], const void*) {
                    for (int lane = 0; lane < twin::kWarp; ++lane) {
                      for (int i = 0; i < kCount; ++i) {
                        const auto element = [&](int row, int column) -> uint32_t {
                          return static_cast<const Lane*>(lanes[8 * i + row])->row[column];
                        };
                        const int g = lane / 4, t = lane % 4;
                        static_cast<Lane*>(lanes[lane])->d[i] =
                            kTranspose ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                       : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
                      }
                    }
                  });
}

// ---- a block ---------------------------------------------------------------------------------

inline void barrier() { twin::meet_block(0, 0, true); }
inline void barrier(int id, int threads) { twin::meet_block(id, threads, true); }
inline void barrier_arrive(int id, int threads) { twin::meet_block(id, threads, false); }

template <class T>
class SharedArray {
 public:
  SharedArray(uint32_t begin, int count) : begin_(begin), count_(count) {}
  T load(int i) const { return load_vector<T>(i); }
  void store(int i, T v) const { store_vector(i, v); }
  template <class V>
  V load_vector(int i) const {
    V v;
    std::memcpy(&v, twin::read_shared(checked<V>(i), sizeof(V)), sizeof(V));
    return v;
  }
  template <class V>
  void store_vector(int i, V v) const {
    twin::write_shared(checked<V>(i), sizeof(V), &v);
  }
  uint32_t address(int i) const { return checked<T>(i); }

 private:
  template <class V>
  uint32_t checked(int i) const {
    if (i < 0 || i * sizeof(T) + sizeof(V) > count_ * sizeof(T)) {
      twin::fail("element %d of a shared array of %d", i, count_);
    }
    return begin_ + static_cast<uint32_t>(i) * static_cast<uint32_t>(sizeof(T));
  }
  uint32_t begin_;
  int count_;
};

class SharedMemory {
 public:
  template <class T>
  SharedArray<T> array(int count) {
    const uint32_t begin = used_;
    used_ = twin::allocate_shared(used_, static_cast<int64_t>(count) * sizeof(T));
    return SharedArray<T>(begin, count);
  }

 private:
  uint32_t used_ = 0;
};

inline void cp_async_16(uint32_t address, const void* source, int valid = 16) {
  twin::async_copy(address, source, valid);
}
inline void cp_async_commit() { twin::async_commit(); }
template <int kGroupsLeft>
void cp_async_wait() {
  twin::async_wait(kGroupsLeft);
}

// ---- global memory ---------------------------------------------------------------------------

template <class T>
T load_global(const T* p) {
  twin::check_global(p, sizeof(T), false);
  return *p;
}
template <class T>
T load_from_l2(const T* p) {
  return load_global(p);
}
template <class T>
void store_global(T* p, T v) {
  twin::check_global(p, sizeof(T), true);
  *p = v;
}
inline uint4 load_once(const void* p) { return load_global(static_cast<const uint4*>(p)); }

inline uint32_t atomic_add(uint32_t* p, uint32_t v) {
  twin::check_global(p, sizeof *p, true);
  const uint32_t before = *p;
  *p += v;
  return before;
}
inline uint32_t atomic_max(uint32_t* p, uint32_t v) {
  twin::check_global(p, sizeof *p, true);
  const uint32_t before = *p;
  if (v > before) *p = v;
  return before;
}
inline void fence_device() {}
inline void launch_dependents() {}
inline void wait_for_previous() {}

// ---- launch ----------------------------------------------------------------------------------

struct Launch {
  dim3 grid;
  int threads;
  int shared_bytes;
  cudaStream_t stream;
  bool overlap = false;
};

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Launch& at, const Arguments&... arguments) {
  const bool kept = twin::run_grid(at.grid, at.threads, at.shared_bytes,
                                   [&] { kernel(Parameters(arguments)...); });
  return kept ? QK_OK : QK_LAUNCH_FAILED;
}

}  // namespace quantkit::cuda
