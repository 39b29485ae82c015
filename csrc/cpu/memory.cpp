// Host memory for tensors. Freed blocks are kept, for a fresh block of some megabytes costs a page fault every 4 KB, more than many an
// op that fills it.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>

#include "../block_cache.h"
#include "../check.h"

namespace hstu::cpu {
namespace {

constexpr size_t kAlignment = 64;

// A number of bytes in a file of the kernel's, or `otherwise`.
uint64_t bytes_in(const char* file, uint64_t otherwise) {
  uint64_t bytes = 0;
  return std::ifstream(file) >> bytes ? bytes : otherwise;
}

// What this host or its container has.
uint64_t total_memory() {
  static const uint64_t total = std::min(uint64_t(sysconf(_SC_PHYS_PAGES)) * uint64_t(sysconf(_SC_PAGE_SIZE)),
                                         bytes_in("/sys/fs/cgroup/memory.max", UINT64_MAX));
  return total;
}

uint64_t free_memory() {
  uint64_t available = 0;
  std::ifstream file("/proc/meminfo");
  for (std::string name; file >> name;)
    if (name == "MemAvailable:" && file >> available) available *= 1024;
  uint64_t container = bytes_in("/sys/fs/cgroup/memory.max", UINT64_MAX), taken = bytes_in("/sys/fs/cgroup/memory.current", 0);
  return std::min(available, container > taken ? container - taken : 0);
}

MemoryAccount& account() {
  static MemoryAccount& instance = *new MemoryAccount;  // leaked: finalizers may run after static destructors
  return instance;
}

BlockCache& cache() {
  static BlockCache& instance = *new BlockCache(
      account(), std::min(total_memory() / 8, uint64_t(2) << 30), [](size_t bytes) { return std::aligned_alloc(kAlignment, bytes); }, std::free);
  return instance;
}

}  // namespace

void trim() noexcept { cache().clear(); }

void* allocate(size_t bytes) {
  void* block = cache().take(bytes);
  if (!block) {
    trim();
    block = cache().take(bytes);
  }
  if (!block) out_of_memory("cpu", bytes, memory_statistics());
  return block;
}

void release(void* data, size_t bytes) noexcept {
  if (data) cache().give(data, bytes);
}

MemoryStatistics memory_statistics() {
  MemoryAccount& held = account();
  std::lock_guard<std::mutex> lock(held.mutex);
  return {held.used, held.peak, held.reserved, free_memory(), total_memory(), held.limit};
}

void set_memory_limit(uint64_t bytes) {
  std::lock_guard<std::mutex> lock(account().mutex);
  account().limit = bytes;
}

}  // namespace hstu::cpu
