// Every unit runs exactly once, whatever the number of threads, and writes are visible afterwards.
// Meant to be run under -fsanitize=thread as well.
#include "../cpu/thread_pool.h"

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

int failures = 0;

void expect(bool holds, const char* what, int64_t detail) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s (%ld)\n", what, static_cast<long>(detail));
}

void check_round(int64_t units, int64_t round) {
  std::vector<int64_t> hits(static_cast<size_t>(units), 0);  // plain memory: a race would show
  quantkit::parallel_for(units, [&](int64_t unit) {
    for (volatile int delay = 0; delay < 300;) delay = delay + 1;  // let the workers join
    hits[static_cast<size_t>(unit)] += round;
  });
  for (const int64_t hit : hits) expect(hit == round, "a unit did not run exactly once", round);
}

}  // namespace

int main() {
  for (int64_t round = 1; round <= 20000; ++round) {
    if (round % 500 == 0) quantkit::set_num_threads(1 + static_cast<int>(round / 500 % 5));
    if (round % 2000 == 0) {  // long enough for the workers to fall asleep
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    check_round(round % 17, round);
  }
  // A unit that starts work of its own runs it alone instead of waiting for itself.
  quantkit::set_num_threads(3);
  std::vector<int64_t> sums(8, 0);
  quantkit::parallel_for(8, [&](int64_t outer) {
    quantkit::parallel_for(5, [&](int64_t inner) { sums[static_cast<size_t>(outer)] += inner; });
  });
  for (const int64_t sum : sums) expect(sum == 10, "nested work was lost", sum);
  // Two callers at once.
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 2; ++caller) {
    callers.emplace_back([] {
      for (int64_t round = 1; round <= 2000; ++round) check_round(9, round);
    });
  }
  for (std::thread& caller : callers) caller.join();
  std::printf("%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
