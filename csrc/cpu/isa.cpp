// Which kernels this CPU can run, and which of them are in use.
#include <atomic>
#include <cstring>

#include "kernel_table.h"

namespace quantkit {
namespace {

struct Entry {
  const char* name;
  bool (*supported)();
  const KernelTable& (*table)();
};

// Slowest first; the last supported one is the default.
const Entry kEntries[] = {
    {"generic", [] { return true; }, generic_kernels},
#if defined(QK_X86)
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c") != 0;
     },
     avx2_kernels},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512vnni");
     },
     avx512_kernels},
    {"avx512bf16",
     [] {
       return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
     },
     avx512bf16_kernels},
#endif
};

const Entry* find(const char* name) {
  for (const Entry& entry : kEntries) {
    if (std::strcmp(entry.name, name) == 0) return &entry;
  }
  return nullptr;
}

const KernelTable& best() {
  const Entry* chosen = nullptr;
  for (const Entry& entry : kEntries) {
    if (entry.supported()) chosen = &entry;
  }
  return chosen->table();
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = current.load(std::memory_order_acquire);
  if (table == nullptr) current.store(table = &best(), std::memory_order_release);
  return *table;
}

bool isa_supported(const char* name) {
  const Entry* entry = find(name);
  return entry != nullptr && entry->supported();
}

bool set_isa(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    current.store(&best());
    return true;
  }
  if (!isa_supported(name)) return false;
  current.store(&find(name)->table());
  return true;
}

}  // namespace quantkit
