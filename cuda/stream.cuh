// What a launcher needs of the runtime: checked CUDA calls, the stream behind a Stream, scratch memory.
#pragma once
#include <cuda_runtime.h>

#include "../csrc/check.h"
#include "../csrc/memory.h"

namespace hstu::cuda {

// Throws the Error that belongs to a CUDA status: out of memory, device lost (sticky; every later call says so), or other.
[[noreturn]] void fail(cudaError_t status, const char* what, const char* file, int line);
#define CUDA_CHECK(call)                                                             \
  do {                                                                               \
    cudaError_t status_ = (call);                                                    \
    if (status_ != cudaSuccess) ::hstu::cuda::fail(status_, #call, __FILE__, __LINE__); \
  } while (0)

// What Stream::handle points to; runtime.cuh has the rest of it.
struct StreamHandle {
  cudaStream_t stream = nullptr;
};
inline cudaStream_t handle_of(Stream stream) { return static_cast<StreamHandle*>(stream.handle)->stream; }

// Stream-ordered scratch memory of one call.
template <typename T>
class Scratch {
 public:
  Scratch(int64_t size, Stream stream) : bytes_(size_t(size) * sizeof(T)), stream_(stream), data_(static_cast<T*>(allocate(bytes_, stream))) {}
  ~Scratch() { release(data_, bytes_, stream_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }
  T* get() const { return data_; }
  void zero() { CUDA_CHECK(cudaMemsetAsync(data_, 0, bytes_, handle_of(stream_))); }

 private:
  size_t bytes_;
  Stream stream_;
  T* data_;
};

}  // namespace hstu::cuda
