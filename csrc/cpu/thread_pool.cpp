// Ladder:
//   1. OpenMP fork/join: 5-15 us a region when its threads have gone to sleep.
//   2. Condition variable for every job: 10-50 us to wake a worker.
//   3. Spin for a while, then sleep on a futex (this file): under 1 us back to back, and an idle
//      pool costs nothing. The spin is kept short because torch's OpenMP threads may want the
//      same cores between our calls.
#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace quantkit {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

constexpr int kMaxThreads = 256;
constexpr int kSpins = 4000;  // about 50-100 us of pauses before a worker sleeps

// One word holds the whole life of a job, so that joining it is a single compare-and-swap:
// the job's number, whether it still takes workers, and how many are inside.
constexpr uint64_t kActiveMask = 0xffff;
constexpr uint64_t kOpen = 1u << 16;
constexpr uint64_t kJobOne = 1u << 17;

// A call's units, divided among its threads.
class Job {
 public:
  void divide(int64_t units, UnitFn fn, void* ctx, int threads) {
    fn_ = fn;
    ctx_ = ctx;
    threads_ = threads;
    for (int t = 0; t < threads; ++t) {
      shares_[t].next.store(units * t / threads, std::memory_order_relaxed);
      shares_[t].end = units * (t + 1) / threads;
    }
  }
  int threads() const { return threads_; }

  // The thread's own share, then what is left of the others'.
  void work(int self) {
    for (int i = 0; i < threads_; ++i) {
      Share& share = shares_[(self + i) % threads_];
      while (share.next.load(std::memory_order_relaxed) < share.end) {
        const int64_t unit = share.next.fetch_add(1, std::memory_order_relaxed);
        if (unit < share.end) fn_(ctx_, unit);
      }
    }
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  UnitFn fn_ = nullptr;
  void* ctx_ = nullptr;
  int threads_ = 1;
  Share shares_[kMaxThreads];
};

class Pool {
 public:
  void run(int64_t units, UnitFn fn, void* ctx, int threads) {
    job_.divide(units, fn, ctx, threads);
    grow(threads - 1);
    state_.store((state_.load(std::memory_order_relaxed) & ~kActiveMask) + kJobOne + kOpen,
                 std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) state_.notify_all();
    job_.work(0);
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    while ((state_.load(std::memory_order_acquire) & kActiveMask) != 0) relax();
  }

 private:
  void grow(int workers) {
    while (static_cast<int>(workers_.size()) < workers) {
      const int index = static_cast<int>(workers_.size());
      try {
        workers_.emplace_back([this, index] { worker(index); });
      } catch (const std::system_error&) {
        return;  // the system has no thread left: the caller does the work
      }
      workers_.back().detach();  // the pool lives as long as the process
    }
  }

  void worker(int index);

  std::atomic<uint64_t> state_{0};
  std::atomic<int> sleeping_{0};
  std::vector<std::thread> workers_;
  Job job_;
};

thread_local bool inside_unit = false;

void Pool::worker(int index) {
  inside_unit = true;
  uint64_t seen = 0;
  for (;;) {
    uint64_t state = state_.load(std::memory_order_acquire);
    for (int spin = 0; !(state & kOpen) || (state & ~kActiveMask) == seen; ++spin) {
      if (spin < kSpins) {
        relax();
      } else {
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        const uint64_t now = state_.load(std::memory_order_seq_cst);
        if (!(now & kOpen) || (now & ~kActiveMask) == seen) state_.wait(now);
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
      }
      state = state_.load(std::memory_order_acquire);
    }
    if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
    seen = state & ~kActiveMask;
    if (index + 1 < job_.threads()) job_.work(index + 1);
    state_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

// Threads do not survive fork(): a child starts a new pool and leaves the old one's memory alone.
std::atomic<Pool*> pool{nullptr};
std::mutex* pool_mutex = nullptr;
std::once_flag fork_handler;

void reset_after_fork() {
  pool.store(nullptr);
  pool_mutex = new std::mutex;
}

std::atomic<Executor> executor{nullptr};
std::atomic<int> requested{0};
std::atomic<int> fallback{0};

// One thread's part of a job on somebody else's threads.
void work_inside(void* job, int32_t index) {
  const bool before = inside_unit;
  inside_unit = true;
  static_cast<Job*>(job)->work(index);
  inside_unit = before;
}

struct Scratch {
  void* memory[kScratchSlots] = {};
  int64_t bytes[kScratchSlots] = {};
  ~Scratch() {
    for (void* m : memory) std::free(m);
  }
};
thread_local Scratch local;

}  // namespace

void parallel_units(int64_t units, UnitFn fn, void* ctx) {
  std::call_once(fork_handler, [] {
    pool_mutex = new std::mutex;
    pthread_atfork(nullptr, nullptr, reset_after_fork);
  });
  const int threads = units < num_threads() ? static_cast<int>(units) : num_threads();
  if (threads > 1 && !inside_unit) {
    if (const Executor run = executor.load(std::memory_order_relaxed)) {
      static thread_local Job job;
      job.divide(units, fn, ctx, threads);
      run(threads, work_inside, &job);
      return;
    }
    std::unique_lock<std::mutex> lock(*pool_mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      Pool* current = pool.load();
      if (current == nullptr) pool.store(current = new Pool);
      inside_unit = true;
      current->run(units, fn, ctx, threads);
      inside_unit = false;
      return;
    }
  }
  for (int64_t unit = 0; unit < units; ++unit) fn(ctx, unit);
}

void set_executor(Executor chosen) { executor.store(chosen); }

void set_num_threads(int threads) {
  requested.store(threads > kMaxThreads ? kMaxThreads : threads);
}
void set_default_threads(int threads) { fallback.store(threads); }

int num_threads() {
  const int explicit_count = requested.load(std::memory_order_relaxed);
  if (explicit_count > 0) return explicit_count;
  int count = fallback.load(std::memory_order_relaxed);
  if (count <= 0) {
    count = static_cast<int>(std::thread::hardware_concurrency());
    fallback.store(count > 0 ? count : 1);
  }
  return count <= 0 ? 1 : (count > kMaxThreads ? kMaxThreads : count);
}

void* scratch(int slot, int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  // Exactly what was asked for, so that one byte more shows.
  if (local.bytes[slot] != bytes || local.memory[slot] == nullptr) {
    std::free(local.memory[slot]);
    local.memory[slot] = nullptr;
    if (posix_memalign(&local.memory[slot], 64, static_cast<size_t>(bytes)) != 0) return nullptr;
    local.bytes[slot] = bytes;
  }
#endif
  if (local.bytes[slot] < bytes) {
    std::free(local.memory[slot]);
    const int64_t size = (bytes + 4095) / 4096 * 4096;
    local.memory[slot] = std::aligned_alloc(64, static_cast<size_t>(size));
    local.bytes[slot] = local.memory[slot] == nullptr ? 0 : size;
  }
  return local.memory[slot];
}

}  // namespace quantkit
