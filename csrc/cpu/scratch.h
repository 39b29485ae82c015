// Scratch memory of one call, from the tensor allocator's cache.
#pragma once
#include <cstring>

#include "../memory.h"

namespace hstu::cpu {

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size, bool zero = false) : bytes_(size_t(size) * sizeof(T)), data_(static_cast<T*>(allocate(bytes_))) {
    if (zero) std::memset(data_, 0, bytes_);
  }
  ~Scratch() { release(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }
  T* get() const { return data_; }

 private:
  size_t bytes_;
  T* data_;
};

}  // namespace hstu::cpu
