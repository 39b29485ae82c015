// Storage is the only owner of tensor memory. A JavaScript Tensor is an object wrapped with one Handle, which holds one
// reference; views share the storage. Handles belong to one environment (main thread or worker) and are touched on its thread only.
#pragma once
#include <js_native_api_types.h>

#include <chrono>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "memory.h"
#include "tensor.h"

namespace hstu {

class Storage {
 public:
  // guarded (tests): guard bytes before and after, NaN inside; the destructor counts a storage whose guards were overwritten.
  Storage(size_t bytes, Stream stream, bool zero, bool guarded);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  Stream stream() const { return stream_; }

 private:
  bool on_device() const { return stream_.device.type == DeviceType::kCuda; }
  void fill(void* data, int byte, size_t bytes);
  bool guards_intact() const;

  void* base_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_, allocated_;
  Stream stream_;  // of the environment that made it: freed in order with the work that used it
  bool guarded_;
};

class Reader;

// Set while the work of one stream is captured into a graph.
struct Capture {
  Stream stream;  // of the graph: what is made meanwhile is the graph's
  bool keep;      // whether the graph keeps the tensors that its ops use: for captures that are launched more than once
  std::unordered_set<std::shared_ptr<Storage>> kept;
};

// State of the addon in one environment.
struct Addon {
  ~Addon();
  napi_ref error_class = nullptr;
  std::unordered_set<struct Handle*> handles;  // what a tensor is known by: other objects are wrapped too, by us and by other addons
  int64_t tensors = 0;                         // live handles
  int64_t bytes = 0;    // of live storages
  int64_t reported = 0;  // of them, to V8
  int64_t most = 0;      // of bytes, since then:
  std::chrono::steady_clock::time_point since;
  bool guards = false;  // allocate with guard bytes (tests)
  std::vector<Stream> streams;  // one compute stream a CUDA device, opened when first used
  Capture* capture = nullptr;
  Reader* reader = nullptr;     // of readback.cpp, made by the first read; its cleanup hook ends it
};

struct Handle {
  std::shared_ptr<Storage> storage;  // empty once disposed
  Tensor view;
};

Addon& addon_of(napi_env env);
// The queue of this environment on a device; throws where the device is unavailable.
Stream stream_of(Addon& addon, Device device);
// Lets go of tensors that a graph kept.
void release(napi_env env, std::unordered_set<std::shared_ptr<Storage>>& kept);
// The handle behind a tagged object, or null when `value` is something else.
Handle* handle_of(napi_env env, napi_value value);
// An instance of the error class registered by the library, with `code` and `message`; throws it.
napi_value error_object(napi_env env, const char* code, const std::string& message);
void throw_js(napi_env env, const char* code, const std::string& message);
// 'cpu', or 'cuda:' and a number.
Device device_of(std::string_view name);
std::string name_of(Device device);

}  // namespace hstu
