// A small fixed pool for kernels that last microseconds.
//
// Each thread owns a contiguous share of the units, so that it reads a contiguous share of the
// weights, and claims them one at a time; one that has finished takes from the others' shares. A
// thread that the operating system delays thus loses units instead of holding everyone up, and a
// worker that wakes too late to join simply misses the job: the caller never waits for a thread
// that has not started. Results must not depend on which thread runs a unit, and here none do.
#pragma once

#include <cstdint>

namespace quantkit {

using UnitFn = void (*)(void* ctx, int64_t unit);

// Calls fn(ctx, u) once for each u in [0, units) and returns when all are done. fn must not throw.
// A call from inside a unit, or while another thread holds the pool, runs on the caller alone.
void parallel_units(int64_t units, UnitFn fn, void* ctx);

template <class F>
void parallel_for(int64_t units, F&& body) {
  parallel_units(
      units, [](void* ctx, int64_t unit) { (*static_cast<F*>(ctx))(unit); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Threads that somebody else owns; see qk_executor in quantkit.h. nullptr: the pool of this file.
using Executor = void (*)(int32_t threads, void (*body)(void* ctx, int32_t index), void* ctx);
void set_executor(Executor executor);

void set_num_threads(int threads);      // 0: follow the default
void set_default_threads(int threads);
int num_threads();

// Memory for one call on the current thread, 64-byte aligned, kept for the next call.
// nullptr when the system has none left. Slots are independent buffers.
void* scratch(int slot, int64_t bytes);
inline constexpr int kScratchSlots = 4;

}  // namespace quantkit
