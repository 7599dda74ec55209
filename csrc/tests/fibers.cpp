// The host twin of a grid: blocks one after another, the threads of a block as fibers.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../cuda/device.cuh"

namespace quantkit::cuda {

dim3 threadIdx, blockIdx;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kWarpSize = 32;

struct Meeting {  // of the threads of a warp or a block
  unsigned expected = 0, arrived = 0;
  unsigned long generation = 0;
};

ucontext_t scheduler;
std::vector<ucontext_t> fibers;
std::vector<bool> finished;
std::vector<Meeting> warps;
std::vector<float> exchange;
Meeting block;
unsigned running = 0;
const std::function<void()>* body = nullptr;

void yield() { swapcontext(&fibers[running], &scheduler); }

void meet(Meeting& meeting) {
  const unsigned long generation = meeting.generation;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  while (meeting.generation == generation) yield();
}

void fiber_main() {
  (*body)();
  finished[running] = true;
  yield();
}

}  // namespace

void barrier() { meet(block); }

float shuffle_xor(float v, int mask) {
  const unsigned self = running;
  Meeting& warp = warps[self / kWarpSize];
  exchange[self] = v;
  meet(warp);
  const float other = exchange[self ^ static_cast<unsigned>(mask)];
  meet(warp);
  return other;
}

void run_grid(dim3 grid, int threads, const std::function<void()>& kernel) {
  const unsigned count = static_cast<unsigned>(threads);
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < count) stacks.push_back(std::make_unique<char[]>(kStackBytes));
  body = &kernel;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      fibers.assign(count, ucontext_t{});
      finished.assign(count, false);
      exchange.assign(count, 0.0f);
      warps.assign(count / kWarpSize, Meeting{kWarpSize, 0, 0});
      block = Meeting{count, 0, 0};
      for (unsigned t = 0; t < count; ++t) {
        getcontext(&fibers[t]);
        fibers[t].uc_stack.ss_sp = stacks[t].get();
        fibers[t].uc_stack.ss_size = kStackBytes;
        fibers[t].uc_link = &scheduler;
        makecontext(&fibers[t], fiber_main, 0);
      }
      for (unsigned left = count; left > 0;) {
        for (unsigned t = 0; t < count; ++t) {
          if (finished[t]) continue;
          running = t;
          threadIdx = dim3(t, 0, 0);
          swapcontext(&scheduler, &fibers[t]);
          if (finished[t]) --left;
        }
      }
    }
  }
}

}  // namespace quantkit::cuda
