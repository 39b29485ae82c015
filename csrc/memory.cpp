#include "memory.h"

#include <cstdlib>
#include <cstring>

#include "check.h"

// HSTU_BY_DEVICE(stream, cuda call, cpu call): without CUDA no such stream can exist, for open_stream throws.
#ifdef HSTU_CUDA
#define HSTU_BY_DEVICE(device, on_cuda, on_cpu)              \
  if ((device).type == DeviceType::kCuda) return on_cuda;    \
  return on_cpu
#else
#define HSTU_BY_DEVICE(device, on_cuda, on_cpu) \
  (void)(device);                               \
  return on_cpu
#endif

namespace hstu::device {
namespace {

Readback host_copy(const void* data, size_t bytes) {
  Readback pending{std::malloc(bytes ? bytes : 1), nullptr, bytes, 0};
  HSTU_CHECK(pending.host, kOutOfMemory, "out of memory on cpu: ", bytes, " bytes requested for a copy");
  if (bytes) std::memcpy(pending.host, data, bytes);
  return pending;
}

}  // namespace

#ifdef HSTU_CUDA
const bool kCudaCompiled = true;
const Availability& cuda_availability() { return cuda::availability(); }
Stream open_stream(Device device) { return cuda::open_stream(device.index); }
#else
const bool kCudaCompiled = false;
const Availability& cuda_availability() {
  static const Availability& none = *new Availability{false, "ERR_HSTU_CUDA_UNAVAILABLE", "this addon was built without CUDA", 0, 0, {}};
  return none;
}
Stream open_stream(Device device) {
  throw Error(kCudaUnavailable, message("device cuda:", device.index, " is unavailable: ", cuda_availability().reason));
}
#endif

void close_stream(Stream stream) noexcept { HSTU_BY_DEVICE(stream.device, cuda::close_stream(stream), void()); }
void begin_op(Stream stream, const char* op) { HSTU_BY_DEVICE(stream.device, cuda::begin_op(stream, op), void(op)); }
void end_op(Stream stream, const char* op) { HSTU_BY_DEVICE(stream.device, cuda::end_op(stream, op), void(op)); }

void* allocate(size_t bytes, Stream stream) {
  HSTU_BY_DEVICE(stream.device, cuda::allocate(bytes, stream), cpu::allocate(bytes));
}
void release(void* data, size_t bytes, Stream stream) noexcept {
  HSTU_BY_DEVICE(stream.device, cuda::release(data, bytes, stream), cpu::release(data, bytes));
}
void fill(void* data, int byte, size_t bytes, Stream stream) {
  if (bytes == 0) return;
  HSTU_BY_DEVICE(stream.device, cuda::fill(data, byte, bytes, stream), void(std::memset(data, byte, bytes)));
}
void write(void* data, const void* host, size_t bytes, Stream stream) {
  HSTU_BY_DEVICE(stream.device, cuda::write(data, host, bytes, stream), void(std::memcpy(data, host, bytes)));
}
void read(void* host, const void* data, size_t bytes, Stream stream) {
  HSTU_BY_DEVICE(stream.device, cuda::read(host, data, bytes, stream), void(std::memcpy(host, data, bytes)));
}
Readback begin_read(const void* data, size_t bytes, Stream stream) {
  HSTU_BY_DEVICE(stream.device, cuda::begin_read(data, bytes, stream), host_copy(data, bytes));
}
void wait_read(const Readback& pending) {
#ifdef HSTU_CUDA
  if (pending.event) cuda::wait_read(pending);
#else
  (void)pending;
#endif
}
void end_read(Readback& pending) noexcept {
#ifdef HSTU_CUDA
  if (pending.event) return cuda::end_read(pending);
#endif
  std::free(pending.host);
  pending.host = nullptr;
}
MemoryStatistics memory_statistics(Device device) { HSTU_BY_DEVICE(device, cuda::memory_statistics(device.index), cpu::memory_statistics()); }
void set_memory_limit(uint64_t bytes, Device device) {
  HSTU_BY_DEVICE(device, cuda::set_memory_limit(bytes, device.index), cpu::set_memory_limit(bytes));
}
void trim(Device device) { HSTU_BY_DEVICE(device, cuda::trim(device.index), cpu::trim()); }

#ifdef HSTU_CUDA
Graph* open_graph(Stream stream, Graph* pool) {
  HSTU_CHECK(stream.device.type == DeviceType::kCuda, kInvalidArgument, "a graph is of a CUDA device");
  return cuda::open_graph(stream, pool);
}
Stream begin_capture(Graph& graph) { return cuda::begin_capture(graph); }
void end_capture(Graph& graph, bool keep) { cuda::end_capture(graph, keep); }
void launch_graph(Graph& graph) { cuda::launch_graph(graph); }
void close_graph(Graph* graph) noexcept { cuda::close_graph(graph); }
#else
// No graph can exist here, for none can be opened.
Graph* open_graph(Stream, Graph*) { throw Error(kInvalidArgument, "a graph is of a CUDA device"); }
Stream begin_capture(Graph&) { return {}; }
void end_capture(Graph&, bool) {}
void launch_graph(Graph&) {}
void close_graph(Graph*) noexcept {}
#endif

}  // namespace hstu::device
