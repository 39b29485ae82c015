// What the parts of the addon share where C++ meets JavaScript. For binding.cpp, storage.cpp, readback.cpp and devices.cpp alone.
#pragma once
#include <napi.h>

#include "check.h"
#include "storage.h"

namespace hstu {

// Turns a native Error (or an allocation failure) into a JavaScript one at the boundary.
template <typename Fn>
napi_value guarded(napi_env env, Fn&& fn) {
  try {
    return fn();
  } catch (const Error& error) {
    throw_js(env, error.code, error.what());
  } catch (const Napi::Error& error) {
    throw_js(env, kInvalidArgument, error.Message());
  } catch (const std::exception& error) {
    throw_js(env, kInvalidArgument, error.what());
  }
  return nullptr;
}

inline void add_function(Napi::Object exports, const char* name, napi_value (*fn)(const Napi::CallbackInfo&)) {
  exports.Set(name, Napi::Function::New(exports.Env(), [fn](const Napi::CallbackInfo& info) { return Napi::Value(info.Env(), fn(info)); }, name));
}

// A tensor and the typed array that its values are copied from or into, of exactly its size in bytes.
struct HostView {
  const Tensor& tensor;
  Stream stream;
  void* host;
  size_t bytes;
};
HostView host_view(napi_env env, const Napi::Value& tensor, const Napi::Value& array);

void register_storage(Napi::Object exports);
void register_readback(Napi::Object exports);
void register_devices(Napi::Object exports);

}  // namespace hstu
