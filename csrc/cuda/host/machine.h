// The machine that runs kernels on a CPU: blocks one after another, the threads of a block as
// fibers that yield at barriers and at the instructions of a warp.
//
// It is stricter than a GPU. A launch fails, with a message, on
//   - threads of a warp at different collective instructions, or a barrier that not all reach;
//   - two accesses to the same shared memory, one of them a write, that no barrier orders (vector
//     clocks, so the order in which fibers happen to run does not matter);
//   - shared memory that is read or written while a cp.async to it has not been waited for;
//   - accesses outside shared memory or its arrays, outside watched global memory, or misaligned.
// Shared memory starts as NaNs. What it cannot show: races between blocks through global memory,
// the tensor cores' rounding, bank conflicts, registers, speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace quantkit::cuda {

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
// Those of the fiber that is running.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace twin {

constexpr int kWarp = 32;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs the kernel once for each thread of the grid. False if it broke a rule: see error().
bool run_grid(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel);

// Waits until the 32 threads of the warp are here; the last one runs act on what each brought.
using WarpAction = void (*)(void* const (&lanes)[kWarp], const void* context);
void meet_warp(const char* instruction, void* mine, WarpAction act, const void* context = nullptr);
// Waits for `threads` of the block (0: all) at barrier `id`, or only counts as arrived.
void meet_block(int id, int threads, bool wait);

// Shared memory by its byte address. Reads and writes are checked and recorded.
const uint8_t* read_shared(uint32_t address, int bytes);
void write_shared(uint32_t address, int bytes, const void* from);
uint32_t allocate_shared(uint32_t used, int64_t bytes);

// cp.async: nothing is copied before the group is waited for.
void async_copy(uint32_t address, const void* source, int valid);
void async_commit();
void async_wait(int groups_left);

// Fails if p is misaligned or, once any memory is watched, not inside a watched range.
void check_global(const void* p, int bytes, bool write);

}  // namespace twin
}  // namespace quantkit::cuda

// ---- for tests, by ctypes --------------------------------------------------------------------

extern "C" {
// What the last failed launch did wrong.
const char* qk_twin_error();
// Global memory that kernels may touch; 0 bytes forgets all ranges.
void qk_twin_watch(void* memory, int64_t bytes, int writable);
// 0: blocks and threads in ascending order. Anything else: shuffled by this seed.
void qk_twin_shuffle(uint32_t seed);
}
