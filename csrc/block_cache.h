// Blocks of memory, kept by size and handed out again, with the statistics and the limit of the device they are on. Both backends
// allocate through it: a fresh block costs page faults on the host, and microseconds of the driver on CUDA.
#pragma once
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "memory.h"

namespace hstu {

// What this process holds of one device, by all its caches. The mutex guards the caches too.
struct MemoryAccount {
  std::mutex mutex;
  uint64_t used = 0, peak = 0, reserved = 0, limit = kNoMemoryLimit;
};

// Blocks of one owner: the host, a CUDA stream, a CUDA graph.
class BlockCache {
 public:
  using Make = std::function<void*(size_t bytes)>;  // null where there is no memory
  using Drop = std::function<void(void* block)>;    // must not throw

  // Keeps at most `most_kept` bytes of free blocks.
  BlockCache(MemoryAccount& account, uint64_t most_kept, Make make, Drop drop);
  ~BlockCache() { clear(); }
  BlockCache(const BlockCache&) = delete;
  BlockCache& operator=(const BlockCache&) = delete;

  void* take(size_t bytes);  // null where the device, or its limit, has no room
  void give(void* block, size_t bytes) noexcept;
  void clear() noexcept;  // drops the free blocks

 private:
  void clear_locked() noexcept;

  MemoryAccount& account_;
  const uint64_t most_kept_;
  uint64_t kept_ = 0;
  Make make_;
  Drop drop_;
  std::unordered_map<size_t, std::vector<void*>> free_;
};

// Throws kOutOfMemory with what was asked for, what is free, and the total or the limit that it did not fit into.
[[noreturn]] void out_of_memory(const std::string& device, size_t bytes, const MemoryStatistics& statistics);

}  // namespace hstu
