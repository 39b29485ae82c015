// A CUDA device made of host threads: a stream is a thread with a queue, memory is malloc's, an op is the CPU backend's, run when its
// turn in the stream comes. It is as late and as strict as a device may be: FAKE_CUDA_DELAY_MS slows everything put on a stream, freed
// memory is overwritten, what a capture forbids breaks the capture. FAKE_CUDA_FAIL names a file: while it holds name=status, calls of that
// name fail. FAKE_CUDA_LOG names a file that every call's name goes to. FAKE_CUDA_DEVICES sets the number of devices (default 1),
// FAKE_CUDA_DRIVER the version of CUDA that the driver has (13000; 0 is no driver).
#include <cuda_runtime.h>
#include <fcntl.h>
#include <nvtx3/nvToolsExt.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <unordered_map>
#include <vector>

#include "../../../csrc/ops.h"
#include "../../../cuda/stream.cuh"

using Work = std::function<void()>;
struct Node {
  const void* kind;  // of two graphs of one topology, the kinds are the same in turn
  Work work;
};
struct FakeGraph {
  std::vector<Node> nodes;
};
struct FakeGraphExec {
  std::vector<Node> nodes;
};
struct FakeEvent {
  std::atomic<uint64_t> recorded{0}, reached{0};
};
struct FakeStream {
  std::mutex mutex;
  std::deque<Work> queue;
  std::atomic<uint64_t> put{0}, done{0};
  std::atomic<uint32_t> wake{0};
  bool capturing = false, broken = false;
  std::vector<Node> captured;

  FakeStream() { std::thread([this] { run(); }).detach(); }

  void run() {
    while (true) {
      Work work;
      uint32_t seen = wake;
      {
        std::lock_guard<std::mutex> lock(mutex);
        if (!queue.empty()) {
          work = std::move(queue.front());
          queue.pop_front();
        }
      }
      if (!work) {
        wake.wait(seen);
        continue;
      }
      static const char* delay = std::getenv("FAKE_CUDA_DELAY_MS");
      if (delay) std::this_thread::sleep_for(std::chrono::milliseconds(atoi(delay)));
      work();
      done.fetch_add(1);
      done.notify_all();
    }
  }
  void add(const void* kind, Work work) {
    if (capturing) return captured.push_back({kind, std::move(work)});
    {
      std::lock_guard<std::mutex> lock(mutex);
      queue.push_back(std::move(work));
    }
    put.fetch_add(1);
    wake.fetch_add(1);
    wake.notify_all();
  }
  void wait() {
    for (uint64_t wanted = put, seen; (seen = done) < wanted;) done.wait(seen);
  }
};

namespace {

constexpr size_t kTotal = size_t(1) << 30;
std::mutex memory_mutex;
std::unordered_map<void*, size_t> allocated;
size_t reserved = 0;
thread_local cudaError_t last = cudaSuccess;

cudaError_t called(const char* name) {
  static const char* log = std::getenv("FAKE_CUDA_LOG");
  static const char* fail = std::getenv("FAKE_CUDA_FAIL");
  if (log) {
    std::string line = std::string(name) + "\n";
    int file = open(log, O_WRONLY | O_APPEND | O_CREAT, 0644);
    if (file < 0 || write(file, line.data(), line.size()) < 0) std::abort();
    close(file);
  }
  std::string wanted;
  if (fail && std::ifstream(fail) >> wanted && wanted.rfind(std::string(name) + "=", 0) == 0)
    return last = atoi(wanted.c_str() + std::strlen(name) + 1);
  return cudaSuccess;
}
#define CALLED() \
  if (cudaError_t status = called(__func__)) return status

// A call that a capture does not allow on its stream.
#define REFUSED_IN_CAPTURE(stream)     \
  if ((stream)->capturing) {           \
    (stream)->broken = true;           \
    return last = cudaErrorStreamCaptureUnsupported; \
  }

int devices() {
  static const char* text = std::getenv("FAKE_CUDA_DEVICES");
  return text ? atoi(text) : 1;
}

}  // namespace

int nvtxRangePushA(const char* name) { return called(("range " + std::string(name)).c_str()), 0; }
int nvtxRangePop() { return called("end of range"), 0; }

cudaError_t cudaDriverGetVersion(int* version) {
  static const char* text = std::getenv("FAKE_CUDA_DRIVER");
  return *version = text ? atoi(text) : 13000, cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  CALLED();
  return *count = devices(), cudaSuccess;
}
cudaError_t fake_get_attributes() { return called("cudaFuncGetAttributes"); }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"Fake", 9, 0, 1, kTotal};
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "fakeError"; }
const char* cudaGetErrorString(cudaError_t status) {
  static thread_local std::string text;
  return (text = "status " + std::to_string(status)).c_str();
}
cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
cudaError_t cudaSetDevice(int) {
  CALLED();
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  *total = kTotal, *free = kTotal - reserved;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { return *pool = nullptr, cudaSuccess; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  return *static_cast<uint64_t*>(value) = reserved, cudaSuccess;
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return called(__func__); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  CALLED();
  return *stream = new FakeStream, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  CALLED();
  REFUSED_IN_CAPTURE(stream);
  return stream->wait(), cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  CALLED();
  return *event = new FakeEvent, cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  CALLED();
  REFUSED_IN_CAPTURE(stream);
  uint64_t number = event->recorded.fetch_add(1) + 1;
  stream->add(event, [event, number] {
    event->reached = number;
    event->reached.notify_all();
  });
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  CALLED();
  for (uint64_t wanted = event->recorded, seen; (seen = event->reached) < wanted;) event->reached.wait(seen);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** data, size_t bytes, cudaStream_t stream) {
  CALLED();
  REFUSED_IN_CAPTURE(stream);  // CUDA would make a memory node of it; this library never wants one
  std::lock_guard<std::mutex> lock(memory_mutex);
  if (bytes > kTotal - reserved) return last = cudaErrorMemoryAllocation;
  *data = std::malloc(bytes);
  std::memset(*data, 0xDD, bytes);
  allocated[*data] = bytes;
  reserved += bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* data, cudaStream_t stream) {
  CALLED();
  REFUSED_IN_CAPTURE(stream);
  std::lock_guard<std::mutex> lock(memory_mutex);
  auto found = allocated.find(data);
  if (found == allocated.end()) std::abort();
  size_t bytes = found->second;
  allocated.erase(found);
  reserved -= bytes;
  stream->add(data, [data, bytes] {
    std::memset(data, 0xEE, bytes);
    std::free(data);
  });
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  CALLED();
  return *data = std::malloc(bytes), cudaSuccess;
}
cudaError_t cudaFreeHost(void* data) {
  CALLED();
  return std::free(data), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int byte, size_t bytes, cudaStream_t stream) {
  CALLED();
  stream->add(reinterpret_cast<const void*>(&cudaMemsetAsync), [=] { std::memset(data, byte, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  CALLED();
  if (kind != cudaMemcpyDeviceToDevice) REFUSED_IN_CAPTURE(stream);
  stream->add(reinterpret_cast<const void*>(&cudaMemcpyAsync), [=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  CALLED();
  REFUSED_IN_CAPTURE(stream);
  stream->capturing = true, stream->broken = false;
  stream->captured.clear();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!stream->capturing) return last = cudaErrorInvalidValue;
  stream->capturing = false;
  *graph = nullptr;
  CALLED();
  if (stream->broken) return last = cudaErrorStreamCaptureInvalidated;
  return *graph = new FakeGraph{std::move(stream->captured)}, cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  CALLED();
  return *exec = new FakeGraphExec{graph->nodes}, cudaSuccess;
}
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t graph, cudaGraphExecUpdateResultInfo*) {
  CALLED();
  bool same = exec->nodes.size() == graph->nodes.size();
  for (size_t i = 0; same && i < graph->nodes.size(); ++i) same = exec->nodes[i].kind == graph->nodes[i].kind;
  if (!same) return last = cudaErrorGraphExecUpdateFailure;
  return exec->nodes = graph->nodes, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  CALLED();
  REFUSED_IN_CAPTURE(stream);
  for (const Node& node : exec->nodes) stream->add(node.kind, node.work);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }

// Ops: arguments by value, as a kernel launch takes them.
namespace hstu::cuda {
namespace {

template <typename P>
struct Held {
  std::remove_cvref_t<P> value;
  Held(P p) : value(p) {}
  P pass() { return value; }
};
template <typename P>
struct HeldPointer {
  std::optional<Tensor> value;
  HeldPointer(P p) : value(p ? std::optional<Tensor>(*p) : std::nullopt) {}
  P pass() { return value ? &*value : nullptr; }
};
template <>
struct Held<Tensor*> : HeldPointer<Tensor*> {
  using HeldPointer::HeldPointer;
};
template <>
struct Held<const Tensor*> : HeldPointer<const Tensor*> {
  using HeldPointer::HeldPointer;
};

template <typename... P>
void later(Stream stream, void (*op)(P...), std::type_identity_t<P>... arguments) {
  if (cudaError_t status = called("launch")) fail(status, "launch", __FILE__, __LINE__);
  auto held = std::make_shared<std::tuple<Held<P>...>>(Held<P>(arguments)...);
  handle_of(stream)->add(reinterpret_cast<const void*>(op), [op, held] {
    try {
      std::apply([op](auto&... argument) { op(argument.pass()...); }, *held);
    } catch (const Error& error) {
      std::fprintf(stderr, "fake_cuda: %s\n", error.what());
    }
  });
}

}  // namespace
}  // namespace hstu::cuda

// Made from ops.h by ops.mjs: one definition an op.
#include <fake_ops.inc>
