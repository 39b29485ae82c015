// What each backend gives the storage layer and its own ops: memory, copies, and what there is to know of the device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "tensor.h"

namespace hstu {

// What this process holds of a device, and what the device has, in bytes.
constexpr uint64_t kNoMemoryLimit = UINT64_MAX;
struct MemoryStatistics {
  uint64_t used = 0;      // handed out: tensors, scratch
  uint64_t peak = 0;      // the most that was used
  uint64_t reserved = 0;  // used, and kept to be handed out again
  uint64_t free = 0, total = 0;
  uint64_t limit = kNoMemoryLimit;  // of reserved
};

// What each backend gives the storage layer. allocate throws Error{kOutOfMemory}; release is stream-ordered and never throws.
namespace cpu __attribute__((visibility("hidden"))) {
void* allocate(size_t bytes);
void release(void* data, size_t bytes) noexcept;
void trim() noexcept;
MemoryStatistics memory_statistics();
void set_memory_limit(uint64_t bytes);
int num_threads();
void set_num_threads(int count);
const char* instruction_set();
double fma_peak_gflops();  // of a register-only loop on all threads
double copy_gbps();        // read plus write, memory to memory
}  // namespace cpu

struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0, multiprocessors = 0;
  size_t memory = 0;
};
struct Availability {
  bool usable = false;
  const char* code = "ERR_HSTU_CUDA_UNAVAILABLE";  // of the error that an explicit 'cuda' throws
  std::string reason;                              // why not
  int driver = 0, runtime = 0;                     // versions as CUDA counts them: 13000 = 13.0
  std::vector<DeviceInfo> devices;
};
// A read-back under way: begin on the JavaScript thread, wait on any, end once.
struct Readback {
  void* host;
  void* event;
  size_t bytes;
  int device;
};

// What ops put on one stream, recorded instead of run, to be launched as a whole; and the memory that they used.
struct Graph;

// Implemented in cuda/runtime.cu, memory.cu and graph.cu; named in a build without CUDA by nobody.
namespace cuda __attribute__((visibility("hidden"))) {
const Availability& availability();
Stream open_stream(int device);
void close_stream(Stream stream) noexcept;  // the next one that opens a stream gets it
void begin_op(Stream stream, const char* op);
void end_op(Stream stream, const char* op);  // under HSTU_DEBUG=1 waits for the op and names it in its error
void* allocate(size_t bytes, Stream stream);
void release(void* data, size_t bytes, Stream stream) noexcept;
void fill(void* data, int byte, size_t bytes, Stream stream);
void write(void* device, const void* host, size_t bytes, Stream stream);  // host may be reused when it returns
void read(void* host, const void* device, size_t bytes, Stream stream);   // waits
Readback begin_read(const void* device, size_t bytes, Stream stream);
void wait_read(const Readback& pending);
void end_read(Readback& pending) noexcept;
MemoryStatistics memory_statistics(int device);
void set_memory_limit(uint64_t bytes, int device);
void trim(int device);  // waits for the device
Graph* open_graph(Stream stream, Graph* pool);  // with memory of its own, or that of another graph of the stream
Stream begin_capture(Graph& graph);         // the stream of what is captured: its memory is the graph's
void end_capture(Graph& graph, bool keep);  // what was captured before is replaced, or stays where `keep` is false
void launch_graph(Graph& graph);
void close_graph(Graph* graph) noexcept;  // its memory stays until the last tensor on it is gone
}  // namespace cuda

// Both backends by the stream's device: the one place that knows which backends this build has.
namespace device {
extern const bool kCudaCompiled;
const Availability& cuda_availability();
Stream open_stream(Device device);
void close_stream(Stream stream) noexcept;
void begin_op(Stream stream, const char* op);
void end_op(Stream stream, const char* op);
void* allocate(size_t bytes, Stream stream);
void release(void* data, size_t bytes, Stream stream) noexcept;
void fill(void* data, int byte, size_t bytes, Stream stream);
void write(void* data, const void* host, size_t bytes, Stream stream);
void read(void* host, const void* data, size_t bytes, Stream stream);
Readback begin_read(const void* data, size_t bytes, Stream stream);
void wait_read(const Readback& pending);
void end_read(Readback& pending) noexcept;
MemoryStatistics memory_statistics(Device device);
void set_memory_limit(uint64_t bytes, Device device);  // of this process; throws where the device is unavailable, as the others do
void trim(Device device);                              // gives back what is kept and not used
Graph* open_graph(Stream stream, Graph* pool);         // of a CUDA stream
Stream begin_capture(Graph& graph);
void end_capture(Graph& graph, bool keep);
void launch_graph(Graph& graph);
void close_graph(Graph* graph) noexcept;
}  // namespace device

}  // namespace hstu
