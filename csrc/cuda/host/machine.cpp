#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace quantkit::cuda {

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace twin {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMostThreads = 1024;
constexpr int kBarriers = 16;

using Clock = std::vector<uint32_t>;  // by thread: how much of its past is known

struct Meeting {  // at a barrier or an instruction of a warp
  const char* name = nullptr;
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  Clock known[2];  // of those that arrived, by the generation's parity: some may yet have to read it
  void* lanes[kWarp] = {};
};

struct Copy {
  uint32_t address;
  const void* source;
  int valid;
};

struct Thread {
  Fiber fiber;
  bool finished = false;
  const char* waits_at = nullptr;
  const Meeting* waits_for = nullptr;
  uint64_t generation = 0;  // of that meeting, when it began to wait
  Clock clock;
  std::vector<Copy> open;                 // cp.async since the last commit
  std::deque<std::vector<Copy>> groups;   // committed, oldest first
};

struct Read {
  uint32_t time = 0;
  uint8_t bytes = 0;  // one bit a byte of the word
};

struct Word {  // of shared memory, 4 bytes
  uint32_t write_time[4] = {};
  int16_t writer[4] = {-1, -1, -1, -1};
  uint8_t in_flight = 0;
  std::vector<Read> reads;  // by thread; empty before the first
};

struct Range {
  uintptr_t begin, end;
  bool writable;
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One launch at a time, on one thread of the host.
std::vector<Thread> threads;
std::vector<Meeting> warps, barriers;
std::vector<uint32_t> memory;  // words, so that vectors in it are aligned
std::vector<Word> words;
std::vector<Range> watched;
std::string error;
uint32_t seed = 0;
int shared_size = 0;
int running = 0;
bool failed = false;
Fiber scheduler;
const std::function<void()>* body = nullptr;

uint8_t* shared_base() { return reinterpret_cast<uint8_t*>(memory.data()); }

void yield() { switch_fiber(threads[running].fiber, scheduler); }

void fiber_main() {
  try {
    (*body)();
  } catch (const std::exception& problem) {
    if (!failed) {
      char where[128];
      std::snprintf(where, sizeof where, "block (%u, %u, %u), thread %d: ", blockIdx.x, blockIdx.y,
                    blockIdx.z, running);
      error = where + std::string(problem.what());
    }
    failed = true;
  }
  threads[running].finished = true;
  for (;;) yield();
}

void merge(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

// Counts this thread in; true for the one that completes the meeting.
bool arrive(Meeting& meeting) {
  Thread& self = threads[running];
  Clock& known = meeting.known[meeting.generation % 2];
  if (meeting.arrived++ == 0) known.assign(self.clock.size(), 0);
  merge(known, self.clock);
  ++self.clock[running];
  return meeting.arrived == meeting.expected;
}

void wait_for(const Meeting& meeting, uint64_t generation) {
  Thread& self = threads[running];
  self.waits_at = meeting.name;
  self.waits_for = &meeting;
  self.generation = generation;
  while (meeting.generation == generation) yield();
  self.waits_for = nullptr;
}

void complete(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.generation;
}

bool knows(const Thread& thread, int other, uint32_t time) { return time <= thread.clock[other]; }

void record(uint32_t address, int bytes, bool write) {
  if (address + static_cast<int64_t>(bytes) > shared_size) {
    fail("%d bytes at %u of shared memory, which has %d", bytes, address, shared_size);
  }
  if (address % static_cast<uint32_t>(bytes) != 0) {
    fail("%d bytes at %u of shared memory: not aligned", bytes, address);
  }
  Thread& self = threads[running];
  const uint32_t now = self.clock[running];
  for (uint32_t at = address; at < address + static_cast<uint32_t>(bytes); at = at / 4 * 4 + 4) {
    Word& word = words[at / 4];
    const uint32_t end = std::min(at / 4 * 4 + 4, address + static_cast<uint32_t>(bytes));
    uint8_t mask = 0;
    for (uint32_t i = at; i < end; ++i) mask |= static_cast<uint8_t>(1u << (i % 4));
    if (word.in_flight & mask) {
      fail("shared memory at %u is %s while a cp.async to it has not been waited for", at,
           write ? "written" : "read");
    }
    for (uint32_t i = at; i < end; ++i) {
      const int writer = word.writer[i % 4];
      if (writer >= 0 && writer != running && !knows(self, writer, word.write_time[i % 4])) {
        fail("shared memory at %u is %s without a barrier after thread %d wrote it", i,
             write ? "written" : "read", writer);
      }
    }
    if (!write) {
      if (word.reads.empty()) word.reads.resize(threads.size());
      Read& read = word.reads[running];
      read.bytes = static_cast<uint8_t>((read.time == now ? read.bytes : 0) | mask);
      read.time = now;
      continue;
    }
    for (int t = 0; t < static_cast<int>(word.reads.size()); ++t) {
      const Read& read = word.reads[t];
      if (t != running && (read.bytes & mask) && !knows(self, t, read.time)) {
        fail("shared memory at %u is written without a barrier after thread %d read it", at, t);
      }
    }
    for (uint32_t i = at; i < end; ++i) {
      word.writer[i % 4] = static_cast<int16_t>(running);
      word.write_time[i % 4] = now;
    }
  }
}

void set_in_flight(uint32_t address, bool value) {
  for (uint32_t i = 0; i < 4; ++i) words[address / 4 + i].in_flight = value ? 15 : 0;
}

// One stack a thread, below each a page that must not be touched; kept for the next launch.
char* stack_of(int thread) {
  constexpr size_t kGuard = 64 * 1024, kEach = kStackBytes + kGuard;
  static char* const all = [] {
    void* p = mmap(nullptr, kEach * kMostThreads, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    for (int t = 0; t < kMostThreads; ++t) {
      mprotect(static_cast<char*>(p) + kEach * t, kGuard, PROT_NONE);
    }
    return static_cast<char*>(p);
  }();
  return all + kEach * thread + kGuard;
}

void start_block(int count) {
  threads.assign(count, Thread{});
  for (int t = 0; t < count; ++t) {
    // A thread's time starts at 1: nobody knows anything of another's first steps.
    threads[t].clock.assign(count, 0);
    threads[t].clock[t] = 1;
    start_fiber(threads[t].fiber, stack_of(t), kStackBytes, fiber_main);
  }
  warps.assign(count / kWarp, Meeting{});
  for (Meeting& warp : warps) warp.expected = kWarp;
  barriers.assign(kBarriers, Meeting{});
  memory.assign(static_cast<size_t>(shared_size + 15) / 16 * 4 + 4, 0xffffffffu);
  words.assign(memory.size(), Word{});
}

void explain_deadlock() {
  error = "";
  for (size_t t = 0; t < threads.size(); ++t) {
    char line[160];
    std::snprintf(line, sizeof line, "block (%u, %u, %u): thread %zu %s%s; ", blockIdx.x,
                  blockIdx.y, blockIdx.z, t, threads[t].finished ? "has ended" : "waits at ",
                  threads[t].finished ? "" : threads[t].waits_at);
    const bool news = t == 0 || threads[t].finished != threads[t - 1].finished ||
                      threads[t].waits_for != threads[t - 1].waits_for;
    if (news && error.size() < 1500) error += line;
  }
  error += "threads diverged at a collective instruction";
  failed = true;
}

void run_block(int count, const std::vector<int>& order) {
  start_block(count);
  for (int left = count; left > 0 && !failed;) {
    bool progress = false;
    for (const int t : order) {
      Thread& thread = threads[t];
      if (thread.finished) continue;
      if (thread.waits_for && thread.waits_for->generation == thread.generation) continue;
      progress = true;
      running = t;
      threadIdx = dim3(static_cast<unsigned>(t), 0, 0);
      switch_fiber(scheduler, thread.fiber);
      if (failed) return;
      if (thread.finished) --left;
    }
    if (!progress) explain_deadlock();
  }
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure(text);
}

bool run_grid(dim3 grid, int count, int shared_bytes, const std::function<void()>& kernel) {
  failed = false;
  error.clear();
  if (count <= 0 || count > kMostThreads || count % kWarp != 0) {
    error = "a block has " + std::to_string(count) + " threads, must be 32 to 1024 in whole warps";
    return false;
  }
  if (shared_bytes > 227 * 1024) {
    error = std::to_string(shared_bytes) + " bytes of shared memory, most is 232448";
    return false;
  }
  shared_size = shared_bytes;
  body = &kernel;
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(count), 1, 1);
  std::mt19937 random(seed);
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::vector<unsigned> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (seed != 0) std::shuffle(blocks.begin(), blocks.end(), random);
  for (const unsigned block : blocks) {
    if (seed != 0) std::shuffle(order.begin(), order.end(), random);
    blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    run_block(count, order);
    if (failed) return false;
  }
  return true;
}

void meet_warp(const char* instruction, void* mine, WarpAction act, const void* context) {
  Meeting& warp = warps[running / kWarp];
  if (warp.arrived > 0 && std::strcmp(warp.name, instruction) != 0) {
    fail("at %s while other threads of its warp are at %s", instruction, warp.name);
  }
  warp.name = instruction;
  warp.lanes[running % kWarp] = mine;
  const uint64_t generation = warp.generation;
  // Only sync_warp, whose action is null, orders memory.
  Thread& self = threads[running];
  const bool last = act == nullptr ? arrive(warp) : ++warp.arrived == kWarp;
  if (last) {
    if (act != nullptr) act(warp.lanes, context);
    complete(warp);
  } else {
    wait_for(warp, generation);
  }
  if (act == nullptr) merge(self.clock, warp.known[generation % 2]);
}

void meet_block(int id, int count, bool wait) {
  const int expected = count == 0 ? static_cast<int>(threads.size()) : count;
  if (id < 0 || id >= kBarriers) fail("barrier %d, must be 0 to 15", id);
  if (expected % kWarp != 0) fail("barrier %d for %d threads: not whole warps", id, expected);
  Meeting& meeting = barriers[id];
  if (meeting.arrived > 0 && meeting.expected != expected) {
    fail("barrier %d for %d threads, others wait there for %d", id, expected, meeting.expected);
  }
  meeting.expected = expected;
  meeting.name = "a barrier";
  const uint64_t generation = meeting.generation;
  if (arrive(meeting)) {
    complete(meeting);
  } else if (wait) {
    wait_for(meeting, generation);
  }
  if (wait) merge(threads[running].clock, meeting.known[generation % 2]);
}

uint32_t allocate_shared(uint32_t used, int64_t bytes) {
  if (bytes < 0 || used + bytes > shared_size) {
    fail("an array of %lld bytes at %u of shared memory, which has %d", static_cast<long long>(bytes),
         used, shared_size);
  }
  return used + static_cast<uint32_t>((bytes + 127) / 128 * 128);
}

const uint8_t* read_shared(uint32_t address, int bytes) {
  record(address, bytes, false);
  return shared_base() + address;
}

void write_shared(uint32_t address, int bytes, const void* from) {
  record(address, bytes, true);
  std::memcpy(shared_base() + address, from, static_cast<size_t>(bytes));
}

void async_copy(uint32_t address, const void* source, int valid) {
  if (valid < 0 || valid > 16) fail("cp.async of %d bytes, must be 0 to 16", valid);
  if (valid > 0) {
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0) fail("cp.async from %p: not aligned", source);
    check_global(source, valid, false);
  }
  record(address, 16, true);  // the copy may land at any time from here on
  set_in_flight(address, true);
  threads[running].open.push_back({address, source, valid});
}

void async_commit() {
  Thread& self = threads[running];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void async_wait(int groups_left) {
  Thread& self = threads[running];
  while (static_cast<int>(self.groups.size()) > groups_left) {
    for (const Copy& copy : self.groups.front()) {
      set_in_flight(copy.address, false);
      uint8_t bytes[16] = {};
      if (copy.valid > 0) std::memcpy(bytes, copy.source, static_cast<size_t>(copy.valid));
      write_shared(copy.address, 16, bytes);
    }
    self.groups.pop_front();
  }
}

void check_global(const void* p, int bytes, bool write) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  // cp.async checks its own alignment: it may read fewer bytes than it is aligned to.
  if ((bytes & (bytes - 1)) == 0 && bytes <= 16 && begin % static_cast<uintptr_t>(bytes) != 0) {
    fail("%d bytes of global memory at %p: not aligned", bytes, p);
  }
  if (watched.empty()) return;
  for (const Range& range : watched) {
    if (begin >= range.begin && begin + static_cast<uintptr_t>(bytes) <= range.end) {
      if (write && !range.writable) fail("global memory at %p is written, it is an input", p);
      return;
    }
  }
  fail("%d bytes of global memory %s at %p, outside every argument", bytes,
       write ? "written" : "read", p);
}

}  // namespace twin
}  // namespace quantkit::cuda

using namespace quantkit::cuda;

extern "C" {
__attribute__((visibility("default"))) const char* qk_twin_error() { return twin::error.c_str(); }
__attribute__((visibility("default"))) void qk_twin_watch(void* memory, int64_t bytes,
                                                          int writable) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  if (bytes == 0) {
    twin::watched.clear();
  } else {
    twin::watched.push_back({begin, begin + static_cast<uintptr_t>(bytes), writable != 0});
  }
}
__attribute__((visibility("default"))) void qk_twin_shuffle(uint32_t seed) { twin::seed = seed; }
}
