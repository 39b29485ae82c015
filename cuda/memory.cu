// The CUDA runtime of the storage layer: which devices there are and why not, streams, the stream-ordered pool, copies through pinned
// staging, and the one place where CUDA statuses become Errors. cudart is linked statically and opens the driver lazily, so all of this
// loads on a host without one.
#include <nvtx3/nvToolsExt.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "common.cuh"

namespace hstu::cuda {
namespace {

std::mutex& lost_mutex() {
  static std::mutex& mutex = *new std::mutex;  // leaked: finalizers may run after static destructors
  return mutex;
}
std::string& lost_reason() {
  static std::string& reason = *new std::string;
  return reason;
}
std::atomic<bool> lost{false};

// Errors after which the context is gone for good.
bool is_sticky(cudaError_t status) {
  switch (status) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorDevicesUnavailable:
      return true;
    default:
      return false;
  }
}

std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

__global__ void probe_kernel() {}

Availability find() {
  Availability found;
  int driver = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&found.runtime);
  found.driver = driver;
  if (driver == 0) {
    found.reason = "no NVIDIA driver was found on this host";
    return found;
  }
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    found.code = kDriverTooOld;
    found.reason = "the NVIDIA driver supports CUDA " + version_text(driver) + ", this build needs " + version_text(found.runtime) +
                   " (driver 580 or later)";
    return found;
  }
  if (status != cudaSuccess || count == 0) {
    found.reason = status == cudaSuccess || status == cudaErrorNoDevice ? "the driver reports no CUDA device"
                                                                        : std::string("the driver reports: ") + cudaGetErrorString(status);
    cudaGetLastError();
    return found;
  }
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) continue;
    found.devices.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount, properties.totalGlobalMem});
  }
  // A build whose kernels do not cover the device loads fine and fails at the first launch: ask now.
  cudaFuncAttributes attributes;
  status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status != cudaSuccess) {
    cudaGetLastError();
    const DeviceInfo& device = found.devices.empty() ? DeviceInfo{} : found.devices[0];
    found.reason = message("this build holds no kernels for ", device.name, " (SM ", device.major, ".", device.minor,
                           "): ", cudaGetErrorString(status));
    return found;
  }
  found.usable = true;
  return found;
}

// Per device: the pool that tensors come from, and pinned staging through which copies pass in chunks, two in flight.
constexpr size_t kStaging = size_t(4) << 20;
struct DeviceState {
  cudaMemPool_t pool = nullptr;
  std::mutex staging_mutex;
  void* staging[2] = {};
  cudaEvent_t staged[2] = {};
};

DeviceState& state_of(int device) {
  static std::mutex& mutex = *new std::mutex;  // leaked, like all process-wide state: finalizers may run after static destructors
  static std::vector<DeviceState*>& states = *new std::vector<DeviceState*>;
  std::lock_guard<std::mutex> lock(mutex);
  while (int(states.size()) <= device) states.push_back(nullptr);
  if (!states[device]) {
    auto state = std::make_unique<DeviceState>();
    CUDA_CHECK(cudaDeviceGetDefaultMemPool(&state->pool, device));
    uint64_t keep = UINT64_MAX;  // freed memory stays in the pool until it is trimmed
    CUDA_CHECK(cudaMemPoolSetAttribute(state->pool, cudaMemPoolAttrReleaseThreshold, &keep));
    for (int i = 0; i < 2; ++i) {
      CUDA_CHECK(cudaHostAlloc(&state->staging[i], kStaging, cudaHostAllocDefault));
      CUDA_CHECK(cudaEventCreateWithFlags(&state->staged[i], cudaEventDisableTiming));
    }
    states[device] = state.release();
  }
  return *states[device];
}

}  // namespace

const Availability& availability() {
  static const Availability& found = *new Availability(find());
  return found;
}

void fail(cudaError_t status, const char* what, const char* file, int line) {
  cudaGetLastError();  // clears what is not sticky
  std::string text = message(what, ": ", cudaGetErrorName(status), " (", cudaGetErrorString(status), ") at ", file, ":", line);
  if (status == cudaErrorMemoryAllocation) {
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw Error(kOutOfMemory, message(text, "; free ", free, " of ", total, " bytes"));
  }
  if (is_sticky(status)) {
    std::lock_guard<std::mutex> lock(lost_mutex());
    if (!lost.exchange(true)) lost_reason() = text;
    throw Error(kDeviceLost, "the CUDA device was lost; restart the process. First error: " + lost_reason());
  }
  throw Error(kDevice, text);
}

void check_alive() {
  if (!lost.load(std::memory_order_relaxed)) return;
  std::lock_guard<std::mutex> lock(lost_mutex());
  throw Error(kDeviceLost, "the CUDA device was lost; restart the process. First error: " + lost_reason());
}

Stream open_stream(int device) {
  check_alive();
  const Availability& found = availability();
  if (!found.usable) throw Error(found.code, message("device cuda:", device, " is unavailable: ", found.reason));
  HSTU_CHECK(device >= 0 && device < int(found.devices.size()), kCudaUnavailable, "there is no device cuda:", device, "; this host has ",
             found.devices.size());
  CUDA_CHECK(cudaSetDevice(device));
  state_of(device);
  cudaStream_t stream;
  CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return Stream{{DeviceType::kCuda, device}, stream};
}

void begin_op(Stream stream, const char* op) {
  check_alive();
  CUDA_CHECK(cudaSetDevice(stream.device.index));
  nvtxRangePushA(op);
}

void end_op(Stream stream, const char* op) {
  nvtxRangePop();
  static const bool debug = [] {
    const char* text = std::getenv("HSTU_DEBUG");
    return text && text[0] == '1';
  }();
  if (!debug) return;
  cudaError_t status = cudaStreamSynchronize(handle_of(stream));
  if (status != cudaSuccess) fail(status, op, "HSTU_DEBUG", 0);
}

void* allocate(size_t bytes, Stream stream) {
  check_alive();
  if (bytes == 0) return nullptr;
  void* data = nullptr;
  CUDA_CHECK(cudaSetDevice(stream.device.index));
  cudaError_t status = cudaMallocAsync(&data, bytes, handle_of(stream));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    CUDA_CHECK(cudaStreamSynchronize(handle_of(stream)));
    CUDA_CHECK(cudaMemPoolTrimTo(state_of(stream.device.index).pool, 0));
    status = cudaMallocAsync(&data, bytes, handle_of(stream));
  }
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw Error(kOutOfMemory, message("out of memory on cuda:", stream.device.index, ": ", bytes, " bytes requested, ", free, " free of ", total));
  }
  CUDA_CHECK(status);
  return data;
}

void release(void* data, size_t, Stream stream) noexcept {
  // A lost context, or a process whose runtime is unloading, has nothing left to free.
  if (data && !lost.load(std::memory_order_relaxed)) cudaFreeAsync(data, handle_of(stream));
}

void fill(void* data, int byte, size_t bytes, Stream stream) {
  if (bytes) CUDA_CHECK(cudaMemsetAsync(data, byte, bytes, handle_of(stream)));
}

// Host memory may be reused as soon as this returns: it has been copied into pinned memory, chunk by chunk.
void write(void* device, const void* host, size_t bytes, Stream stream) {
  check_alive();
  CUDA_CHECK(cudaSetDevice(stream.device.index));
  DeviceState& state = state_of(stream.device.index);
  std::lock_guard<std::mutex> lock(state.staging_mutex);
  for (size_t begin = 0, turn = 0; begin < bytes; begin += kStaging, turn ^= 1) {
    size_t count = bytes - begin < kStaging ? bytes - begin : kStaging;
    CUDA_CHECK(cudaEventSynchronize(state.staged[turn]));
    std::memcpy(state.staging[turn], static_cast<const char*>(host) + begin, count);
    CUDA_CHECK(cudaMemcpyAsync(static_cast<char*>(device) + begin, state.staging[turn], count, cudaMemcpyHostToDevice, handle_of(stream)));
    CUDA_CHECK(cudaEventRecord(state.staged[turn], handle_of(stream)));
  }
}

void read(void* host, const void* device, size_t bytes, Stream stream) {
  check_alive();
  CUDA_CHECK(cudaSetDevice(stream.device.index));
  if (bytes) CUDA_CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, handle_of(stream)));
  CUDA_CHECK(cudaStreamSynchronize(handle_of(stream)));
}

Readback begin_read(const void* device, size_t bytes, Stream stream) {
  check_alive();
  CUDA_CHECK(cudaSetDevice(stream.device.index));
  Readback pending{nullptr, nullptr, bytes, stream.device.index};
  CUDA_CHECK(cudaHostAlloc(&pending.host, bytes ? bytes : 1, cudaHostAllocDefault));
  cudaEvent_t event = nullptr;
  cudaError_t status = cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync);
  if (status == cudaSuccess) status = cudaMemcpyAsync(pending.host, device, bytes, cudaMemcpyDeviceToHost, handle_of(stream));
  if (status == cudaSuccess) status = cudaEventRecord(event, handle_of(stream));
  pending.event = event;
  if (status != cudaSuccess) {
    end_read(pending);
    fail(status, "read-back", __FILE__, __LINE__);
  }
  return pending;
}

void wait_read(const Readback& pending) {
  CUDA_CHECK(cudaSetDevice(pending.device));
  CUDA_CHECK(cudaEventSynchronize(static_cast<cudaEvent_t>(pending.event)));
}

void end_read(Readback& pending) noexcept {
  if (pending.event) cudaEventDestroy(static_cast<cudaEvent_t>(pending.event));
  if (pending.host) cudaFreeHost(pending.host);
  pending.event = pending.host = nullptr;
}

PoolStatistics pool_statistics(int device) {
  PoolStatistics statistics;
  cudaMemPool_t pool = state_of(device).pool;
  CUDA_CHECK(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrUsedMemCurrent, &statistics.used));
  CUDA_CHECK(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrUsedMemHigh, &statistics.peak));
  CUDA_CHECK(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReservedMemCurrent, &statistics.reserved));
  CUDA_CHECK(cudaSetDevice(device));
  size_t free = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  statistics.free = free, statistics.total = total;
  return statistics;
}

void trim(Stream stream) {
  CUDA_CHECK(cudaStreamSynchronize(handle_of(stream)));
  CUDA_CHECK(cudaMemPoolTrimTo(state_of(stream.device.index).pool, 0));
}

}  // namespace hstu::cuda
