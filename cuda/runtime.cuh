// The state of the CUDA runtime layer: one DeviceState a device and process, one Lane a stream, one Queue for each owner of blocks on it.
// Shared by runtime.cu, memory.cu and graph.cu; all of it is leaked, for finalizers may run after static destructors.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../csrc/block_cache.h"
#include "stream.cuh"

namespace hstu::cuda {

// Pinned memory that small copies to the device pass through, filled in a ring of segments; a segment's event says that the device has
// read it. Writing waits only for a segment filled a whole ring ago.
struct Staging {
  static constexpr size_t kSegment = size_t(1) << 20;
  static constexpr int kSegments = 8;
  char* base = nullptr;
  cudaEvent_t read[kSegments] = {};
  int segment = 0;
  size_t filled = 0;  // of this segment
};

struct Queue;

// One stream of a device: an environment's while it lives, then the next one's that asks.
struct Lane {
  int device = 0;
  cudaStream_t stream = nullptr;
  bool capturing = false;       // changes under DeviceState::mutex
  std::vector<void*> deferred;  // blocks dropped while capturing
  Staging staging;
  std::unique_ptr<Queue> queue;

  void drop(void* block) noexcept;
};

// What a Stream's handle points to: blocks freed into it are handed out again in the order of its stream.
struct Queue : StreamHandle {
  Queue(Lane& lane, std::shared_ptr<BlockCache> cache) : StreamHandle{lane.stream}, lane(lane), cache(std::move(cache)) {}
  Lane& lane;
  const std::shared_ptr<BlockCache> cache;
  int64_t live = 0;  // blocks handed out
  bool closed = false;

  // For a queue made with new: it goes with the last block.
  void close() noexcept {
    closed = true;
    if (live == 0) delete this;
  }
};

struct DeviceState {
  int index = 0;
  uint64_t total = 0;  // bytes of memory
  cudaMemPool_t pool = nullptr;
  MemoryAccount account, pinned_account;
  std::unique_ptr<BlockCache> pinned;  // host memory that read-backs arrive in
  std::mutex mutex;                    // of what follows
  std::vector<Lane*> lanes, idle;
  cudaStream_t beside = nullptr;    // for allocations while another stream is captured
  std::vector<cudaEvent_t> events;  // of read-backs that have ended
};

DeviceState& state_of(int device);
inline Queue& queue_of(Stream stream) { return *static_cast<Queue*>(static_cast<StreamHandle*>(stream.handle)); }

// Throws where the stream's work is being captured into a graph: what the host gives or wants now would not be of its replays.
void refuse_in_capture(Stream stream, const char* what);

// Throws kDeviceLost once an error that ends the context was seen.
void check_alive();
bool is_lost() noexcept;
std::string name_of(int device);

}  // namespace hstu::cuda
