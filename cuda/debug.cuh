// What HSTU_DEBUG=1 adds: values that live on the device are checked before they are used, at the price of a wait.
#pragma once
#include <cstdlib>
#include <vector>

#include "common.cuh"

namespace hstu::cuda {

inline bool debugging() {
  static const bool on = [] {
    const char* text = std::getenv("HSTU_DEBUG");
    return text && text[0] == '1';
  }();
  return on;
}

// A tensor's values on the host. Waits for the stream.
template <typename T>
std::vector<T> values_of(const Tensor& tensor, Stream stream) {
  std::vector<T> values(size_t(tensor.size()));
  read(values.data(), tensor.data, values.size() * sizeof(T), stream);
  return values;
}

}  // namespace hstu::cuda
