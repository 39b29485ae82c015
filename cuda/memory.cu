// Memory of a device: blocks kept by stream over the driver's stream-ordered pool, copies through pinned memory, statistics.
#include <cstring>

#include "runtime.cuh"

namespace hstu::cuda {
namespace {

void open_staging(Staging& staging) {
  for (cudaEvent_t& event : staging.read)
    if (!event) CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  CUDA_CHECK(cudaHostAlloc(reinterpret_cast<void**>(&staging.base), Staging::kSegment * Staging::kSegments, cudaHostAllocDefault));
}

// Room for `bytes` (at most a segment) that the device does not read any more.
char* reserve(Staging& staging, size_t bytes, cudaStream_t stream) {
  if (!staging.base) open_staging(staging);
  if (staging.filled + bytes > Staging::kSegment) {
    CUDA_CHECK(cudaEventRecord(staging.read[staging.segment], stream));
    staging.segment = (staging.segment + 1) % Staging::kSegments;
    staging.filled = 0;
    CUDA_CHECK(cudaEventSynchronize(staging.read[staging.segment]));
  }
  char* room = staging.base + staging.segment * Staging::kSegment + staging.filled;
  staging.filled += (bytes + 15) / 16 * 16;
  return room;
}

// An event that the thread which waits for it sleeps on.
cudaEvent_t take_event(DeviceState& state) {
  std::lock_guard<std::mutex> lock(state.mutex);
  cudaEvent_t event = nullptr;
  if (state.events.empty()) {
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync));
  } else {
    event = state.events.back();
    state.events.pop_back();
  }
  return event;
}

}  // namespace

void* allocate(size_t bytes, Stream stream) {
  check_alive();
  if (bytes == 0) return nullptr;
  Queue& queue = queue_of(stream);
  void* data = queue.cache->take(bytes);
  if (!data) {
    trim(stream.device.index);
    data = queue.cache->take(bytes);
  }
  if (!data) out_of_memory(name_of(stream.device.index), bytes, memory_statistics(stream.device.index));
  ++queue.live;
  return data;
}

void release(void* data, size_t bytes, Stream stream) noexcept {
  if (!data) return;
  Queue& queue = queue_of(stream);
  queue.cache->give(data, bytes);
  if (--queue.live == 0 && queue.closed) delete &queue;
}

void fill(void* data, int byte, size_t bytes, Stream stream) {
  if (bytes) CUDA_CHECK(cudaMemsetAsync(data, byte, bytes, handle_of(stream)));
}

// Host memory may be reused as soon as this returns.
void write(void* device, const void* host, size_t bytes, Stream stream) {
  check_alive();
  refuse_in_capture(stream, "writing a tensor from");
  CUDA_CHECK(cudaSetDevice(stream.device.index));
  Staging& staging = queue_of(stream).lane.staging;
  for (size_t begin = 0; begin < bytes; begin += Staging::kSegment) {
    size_t count = bytes - begin < Staging::kSegment ? bytes - begin : Staging::kSegment;
    char* room = reserve(staging, count, handle_of(stream));
    std::memcpy(room, static_cast<const char*>(host) + begin, count);
    CUDA_CHECK(cudaMemcpyAsync(static_cast<char*>(device) + begin, room, count, cudaMemcpyHostToDevice, handle_of(stream)));
  }
}

void read(void* host, const void* device, size_t bytes, Stream stream) {
  check_alive();
  refuse_in_capture(stream, "reading a tensor to");
  CUDA_CHECK(cudaSetDevice(stream.device.index));
  if (bytes) CUDA_CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, handle_of(stream)));
  CUDA_CHECK(cudaStreamSynchronize(handle_of(stream)));
}

Readback begin_read(const void* device, size_t bytes, Stream stream) {
  check_alive();
  refuse_in_capture(stream, "reading a tensor to");
  DeviceState& state = state_of(stream.device.index);
  CUDA_CHECK(cudaSetDevice(state.index));
  Readback pending{state.pinned->take(bytes), nullptr, bytes, state.index};
  HSTU_CHECK(pending.host, kOutOfMemory, "out of pinned host memory: ", bytes, " bytes requested for a read-back");
  try {
    pending.event = take_event(state);
    if (bytes) CUDA_CHECK(cudaMemcpyAsync(pending.host, device, bytes, cudaMemcpyDeviceToHost, handle_of(stream)));
    CUDA_CHECK(cudaEventRecord(static_cast<cudaEvent_t>(pending.event), handle_of(stream)));
  } catch (...) {
    end_read(pending);
    throw;
  }
  return pending;
}

void wait_read(const Readback& pending) {
  CUDA_CHECK(cudaSetDevice(pending.device));
  CUDA_CHECK(cudaEventSynchronize(static_cast<cudaEvent_t>(pending.event)));
}

void end_read(Readback& pending) noexcept {
  DeviceState& state = state_of(pending.device);
  state.pinned->give(pending.host, pending.bytes);
  std::lock_guard<std::mutex> lock(state.mutex);
  if (pending.event) state.events.push_back(static_cast<cudaEvent_t>(pending.event));
  pending.event = pending.host = nullptr;
}

MemoryStatistics memory_statistics(int device) {
  DeviceState& state = state_of(device);
  uint64_t reserved = 0;
  size_t free = 0, total = 0;
  CUDA_CHECK(cudaSetDevice(device));
  CUDA_CHECK(cudaMemPoolGetAttribute(state.pool, cudaMemPoolAttrReservedMemCurrent, &reserved));
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  std::lock_guard<std::mutex> lock(state.account.mutex);
  return {state.account.used, state.account.peak, reserved, free, total, state.account.limit};
}

void set_memory_limit(uint64_t bytes, int device) {
  DeviceState& state = state_of(device);
  uint64_t keep = bytes;  // what is free beyond it, the pool gives back when it can
  CUDA_CHECK(cudaMemPoolSetAttribute(state.pool, cudaMemPoolAttrReleaseThreshold, &keep));
  std::lock_guard<std::mutex> lock(state.account.mutex);
  state.account.limit = bytes;
}

void trim(int device) {
  DeviceState& state = state_of(device);
  CUDA_CHECK(cudaSetDevice(device));
  std::lock_guard<std::mutex> lock(state.mutex);
  for (Lane* lane : state.lanes) {
    if (lane->capturing) continue;
    lane->queue->cache->clear();
    CUDA_CHECK(cudaStreamSynchronize(lane->stream));
  }
  CUDA_CHECK(cudaMemPoolTrimTo(state.pool, 0));
}

}  // namespace hstu::cuda
