// A borrowed view of memory that a Storage owns. Made for one op call; owns nothing.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace hstu {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16, kInt32, kInt64 };
constexpr const char* kDtypeNames[] = {"float32", "float64", "bfloat16", "float16", "int32", "int64"};
constexpr int64_t kDtypeBytes[] = {4, 8, 2, 2, 4, 8};
inline const char* name_of(Dtype dtype) { return kDtypeNames[static_cast<int>(dtype)]; }
inline int64_t size_of(Dtype dtype) { return kDtypeBytes[static_cast<int>(dtype)]; }

enum class DeviceType : int { kCpu, kCuda };
struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// The queue that an op's work is put on. The CPU backend computes before it returns and ignores it.
struct Stream {
  Device device;
  void* handle = nullptr;
};

constexpr int kMaxRank = 5;

struct Tensor {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  Device device;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};  // in elements; row-major

  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  int64_t bytes() const { return size() * size_of(dtype); }
  // Product of all dims but the last: an op over the last dim sees [rows(), cols()].
  int64_t cols() const { return rank == 0 ? 1 : shape[rank - 1]; }
  int64_t rows() const {
    int64_t n = 1;
    for (int i = 0; i + 1 < rank; ++i) n *= shape[i];
    return n;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

struct TensorList {
  std::vector<Tensor> items;
};

// Pointer of an optional tensor, null where it is absent.
template <typename T>
T* data_or_null(const Tensor* tensor) {
  return tensor ? tensor->as<T>() : nullptr;
}

}  // namespace hstu
