// Storage is the only owner of tensor memory. A JavaScript Tensor is an object tagged and wrapped with one Handle, which holds one
// reference; views share the storage. Handles belong to one environment (main thread or worker) and are touched on its thread only.
#pragma once
#include <js_native_api_types.h>

#include <memory>
#include <string>

#include "memory.h"
#include "tensor.h"

namespace hstu {

class Storage {
 public:
  // guarded (tests): guard bytes before and after, NaN inside; the destructor counts a storage whose guards were overwritten.
  Storage(size_t bytes, Device device, bool zero, bool guarded);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* base_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_, allocated_;
  Device device_;
  bool guarded_;
};

// State of the addon in one environment.
struct Addon {
  napi_ref error_class = nullptr;
  int64_t tensors = 0;  // live handles
  int64_t bytes = 0;    // of live storages, as reported to V8
  bool guards = false;  // allocate with guard bytes (tests)
};

struct Handle {
  std::shared_ptr<Storage> storage;  // empty once disposed
  Tensor view;
};

Addon& addon_of(napi_env env);
// The handle behind a tagged object, or null when `value` is something else.
Handle* handle_of(napi_env env, napi_value value);
// Throws the error class registered by the library, with `code` and `message`.
void throw_js(napi_env env, const char* code, const std::string& message);
void register_storage(napi_env env, napi_value exports);

}  // namespace hstu
