#include "block_cache.h"

#include <algorithm>

#include "check.h"

namespace hstu {
namespace {

constexpr size_t kAlignment = 64;

// Sizes are rounded up to an eighth of their power of two, so that batches of nearly the same size share blocks.
size_t rounded(size_t bytes) {
  if (bytes <= 512) return (bytes + kAlignment - 1) / kAlignment * kAlignment + (bytes == 0) * kAlignment;
  size_t step = (size_t(1) << (63 - __builtin_clzll(bytes))) / 8;
  return (bytes + step - 1) / step * step;
}

}  // namespace

BlockCache::BlockCache(MemoryAccount& account, uint64_t most_kept, Make make, Drop drop)
    : account_(account), most_kept_(most_kept), make_(std::move(make)), drop_(std::move(drop)) {}

void* BlockCache::take(size_t bytes) {
  size_t size = rounded(bytes);
  void* block = nullptr;
  {
    std::lock_guard<std::mutex> lock(account_.mutex);
    auto found = free_.find(size);
    if (found != free_.end() && !found->second.empty()) {
      block = found->second.back();
      found->second.pop_back();
      kept_ -= size;
    } else {
      if (size > account_.limit || account_.reserved > account_.limit - size) return nullptr;
      account_.reserved += size;
    }
    account_.used += size;
    if (block) account_.peak = std::max(account_.peak, account_.used);
  }
  if (block) return block;
  auto undo = [&] {
    std::lock_guard<std::mutex> lock(account_.mutex);
    account_.used -= size;
    account_.reserved -= size;
  };
  try {
    block = make_(size);
  } catch (...) {
    undo();
    throw;
  }
  if (!block) {
    undo();
    return nullptr;
  }
  std::lock_guard<std::mutex> lock(account_.mutex);
  account_.peak = std::max(account_.peak, account_.used);  // what was refused was never used
  return block;
}

void BlockCache::give(void* block, size_t bytes) noexcept {
  size_t size = rounded(bytes);
  std::lock_guard<std::mutex> lock(account_.mutex);
  account_.used -= size;
  if (size <= most_kept_) {
    if (kept_ > most_kept_ - size) clear_locked();  // sizes of earlier shapes: what is in use now comes back by itself
    try {
      free_[size].push_back(block);
      kept_ += size;
      return;
    } catch (...) {
    }
  }
  account_.reserved -= size;
  drop_(block);
}

void BlockCache::clear() noexcept {
  std::lock_guard<std::mutex> lock(account_.mutex);
  clear_locked();
}

void BlockCache::clear_locked() noexcept {
  for (auto& [size, blocks] : free_)
    for (void* block : blocks) drop_(block);
  free_.clear();
  account_.reserved -= kept_;
  kept_ = 0;
}

void out_of_memory(const std::string& device, size_t bytes, const MemoryStatistics& statistics) {
  bool limited = rounded(bytes) > statistics.limit || statistics.used > statistics.limit - rounded(bytes);
  uint64_t under = statistics.limit > statistics.used ? statistics.limit - statistics.used : 0;
  throw Error(kOutOfMemory,
              limited ? message("out of memory on ", device, ": ", bytes, " bytes requested, ", under, " free of the limit of ",
                                statistics.limit, " (setMemoryLimit)")
                      : message("out of memory on ", device, ": ", bytes, " bytes requested, ", statistics.free, " free of ", statistics.total));
}

}  // namespace hstu
