// Host memory for tensors: freed blocks are kept by size and handed out again, for a fresh block of some megabytes costs a page
// fault every 4 KB, more than many an op that fills it.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "../check.h"
#include "../memory.h"

namespace hstu::cpu {
namespace {

constexpr size_t kAlignment = 64;

// What may be kept: an eighth of the memory that this host or its container has, at most 2 GiB.
size_t max_cached() {
  static const size_t bytes = [] {
    size_t limit = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGE_SIZE)), container;
    if (std::ifstream("/sys/fs/cgroup/memory.max") >> container) limit = std::min(limit, container);
    return std::min(limit / 8, size_t(2) << 30);
  }();
  return bytes;
}

struct Cache {
  std::mutex mutex;
  std::unordered_map<size_t, std::vector<void*>> free;
  size_t bytes = 0;
};

Cache& cache() {
  static Cache& instance = *new Cache;  // leaked: finalizers may run after static destructors
  return instance;
}

// Sizes are rounded up to an eighth of their power of two, so that batches of nearly the same size share blocks.
size_t rounded(size_t bytes) {
  if (bytes <= 512) return (bytes + kAlignment - 1) / kAlignment * kAlignment + (bytes == 0) * kAlignment;
  size_t step = (size_t(1) << (63 - __builtin_clzll(bytes))) / 8;
  return (bytes + step - 1) / step * step;
}

void clear(Cache& c) noexcept {
  for (auto& [size, blocks] : c.free)
    for (void* block : blocks) std::free(block);
  c.free.clear();
  c.bytes = 0;
}

}  // namespace

void trim() noexcept {
  std::lock_guard<std::mutex> lock(cache().mutex);
  clear(cache());
}

void* allocate(size_t bytes) {
  size_t size = rounded(bytes);
  Cache& c = cache();
  {
    std::lock_guard<std::mutex> lock(c.mutex);
    auto found = c.free.find(size);
    if (found != c.free.end() && !found->second.empty()) {
      void* block = found->second.back();
      found->second.pop_back();
      c.bytes -= size;
      return block;
    }
  }
  void* block = std::aligned_alloc(kAlignment, size);
  if (!block) {
    trim();
    block = std::aligned_alloc(kAlignment, size);
  }
  HSTU_CHECK(block, kOutOfMemory, "out of host memory: ", bytes, " bytes wanted");
  return block;
}

void release(void* data, size_t bytes) noexcept {
  if (!data) return;
  size_t size = rounded(bytes);
  if (size > max_cached()) return std::free(data);
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  if (c.bytes + size > max_cached()) clear(c);  // sizes of earlier shapes: what is in use now comes back by itself
  try {
    c.free[size].push_back(data);
    c.bytes += size;
  } catch (...) {
    std::free(data);
  }
}

}  // namespace hstu::cpu
