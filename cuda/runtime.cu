// Devices and streams: which devices there are and why not, the one place where CUDA statuses become Errors, the streams of
// environments. cudart is linked statically and opens the driver lazily, so all of this loads on a host without one.
#include "runtime.cuh"

#include <nvtx3/nvToolsExt.h>

#include <cstdlib>

namespace hstu::cuda {
namespace {

std::mutex& lost_mutex() {
  static std::mutex& mutex = *new std::mutex;
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

[[noreturn]] void throw_lost() {
  std::lock_guard<std::mutex> lock(lost_mutex());
  throw Error(kDeviceLost, "the CUDA device was lost; restart the process. First error: " + lost_reason());
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

// Whether this thread is in a range. An op that throws leaves it open: the next one closes it.
thread_local bool in_range = false;

void leave_range() {
  if (in_range) nvtxRangePop();
  in_range = false;
}

constexpr uint64_t kMostPinned = uint64_t(256) << 20;  // kept for the next read-back

Lane* open_lane(DeviceState& state) {
  auto lane = std::make_unique<Lane>();
  lane->device = state.index;
  CUDA_CHECK(cudaStreamCreateWithFlags(&lane->stream, cudaStreamNonBlocking));
  Lane* raw = lane.get();
  auto make = [raw](size_t bytes) -> void* {
    void* data = nullptr;
    CUDA_CHECK(cudaSetDevice(raw->device));
    cudaError_t status = cudaMallocAsync(&data, bytes, raw->stream);
    if (status != cudaErrorMemoryAllocation) CUDA_CHECK(status);
    if (status != cudaSuccess) cudaGetLastError();
    return status == cudaSuccess ? data : nullptr;
  };
  auto cache = std::make_shared<BlockCache>(state.account, state.total / 8, make, [raw](void* block) { raw->drop(block); });
  lane->queue = std::make_unique<Queue>(*lane, std::move(cache));
  state.lanes.push_back(raw);
  return lane.release();
}

}  // namespace

const Availability& availability() {
  static const Availability& found = *new Availability(find());
  return found;
}

std::string name_of(int device) { return "cuda:" + std::to_string(device); }

void fail(cudaError_t status, const char* what, const char* file, int line) {
  cudaGetLastError();  // clears what is not sticky
  std::string text = message(what, ": ", cudaGetErrorName(status), " (", cudaGetErrorString(status), ") at ", file, ":", line);
  if (status == cudaErrorMemoryAllocation) {
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw Error(kOutOfMemory, message(text, "; free ", free, " of ", total, " bytes"));
  }
  if (is_sticky(status)) {
    {
      std::lock_guard<std::mutex> lock(lost_mutex());
      if (!lost.exchange(true)) lost_reason() = text;
    }
    throw_lost();
  }
  throw Error(kDevice, text);
}

// A lost context, or a process whose runtime is unloading, has nothing left to free.
void Lane::drop(void* block) noexcept {
  if (is_lost()) return;
  if (capturing) return deferred.push_back(block);
  cudaFreeAsync(block, stream);
}

bool is_lost() noexcept { return lost.load(std::memory_order_relaxed); }

void check_alive() {
  if (is_lost()) throw_lost();
}

void refuse_in_capture(Stream stream, const char* what) {
  HSTU_CHECK(!queue_of(stream).lane.capturing, kInvalidArgument, what,
             " the host is not possible while a CUDA graph is captured: do it before, or after a replay");
}

DeviceState& state_of(int device) {
  static std::mutex& mutex = *new std::mutex;
  static std::vector<DeviceState*>& states = *new std::vector<DeviceState*>;
  std::lock_guard<std::mutex> lock(mutex);
  while (int(states.size()) <= device) states.push_back(nullptr);
  if (!states[device]) {
    auto state = std::make_unique<DeviceState>();
    state->index = device;
    state->total = availability().devices[device].memory;
    CUDA_CHECK(cudaDeviceGetDefaultMemPool(&state->pool, device));
    uint64_t keep = UINT64_MAX;  // freed memory stays in the pool until it is trimmed
    CUDA_CHECK(cudaMemPoolSetAttribute(state->pool, cudaMemPoolAttrReleaseThreshold, &keep));
    auto make = [](size_t bytes) -> void* {
      void* data = nullptr;
      if (cudaHostAlloc(&data, bytes, cudaHostAllocDefault) == cudaSuccess) return data;
      cudaGetLastError();
      return nullptr;
    };
    state->pinned = std::make_unique<BlockCache>(state->pinned_account, kMostPinned, make, [](void* block) { cudaFreeHost(block); });
    states[device] = state.release();
  }
  return *states[device];
}

Stream open_stream(int device) {
  check_alive();
  const Availability& found = availability();
  if (!found.usable) throw Error(found.code, message("device ", name_of(device), " is unavailable: ", found.reason));
  HSTU_CHECK(device >= 0 && device < int(found.devices.size()), kCudaUnavailable, "there is no device ", name_of(device), "; this host has ",
             found.devices.size());
  CUDA_CHECK(cudaSetDevice(device));
  DeviceState& state = state_of(device);
  std::lock_guard<std::mutex> lock(state.mutex);
  if (state.idle.empty()) state.idle.push_back(open_lane(state));
  Lane* lane = state.idle.back();
  state.idle.pop_back();
  return Stream{{DeviceType::kCuda, device}, static_cast<StreamHandle*>(lane->queue.get())};
}

void close_stream(Stream stream) noexcept {
  DeviceState& state = state_of(stream.device.index);
  std::lock_guard<std::mutex> lock(state.mutex);
  state.idle.push_back(&queue_of(stream).lane);
}

void begin_op(Stream stream, const char* op) {
  check_alive();
  CUDA_CHECK(cudaSetDevice(stream.device.index));
  leave_range();
  nvtxRangePushA(op);
  in_range = true;
}

void end_op(Stream stream, const char* op) {
  leave_range();
  static const bool debug = [] {
    const char* text = std::getenv("HSTU_DEBUG");
    return text && text[0] == '1';
  }();
  if (!debug || queue_of(stream).lane.capturing) return;
  cudaError_t status = cudaStreamSynchronize(handle_of(stream));
  if (status != cudaSuccess) fail(status, op, "HSTU_DEBUG", 0);
}

}  // namespace hstu::cuda
