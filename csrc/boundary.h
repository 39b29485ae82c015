// What the parts of the addon share where C++ meets JavaScript. For the files that speak Node-API alone.
#pragma once
#include <napi.h>

#include <string_view>

#include "check.h"
#include "storage.h"

namespace hstu {

// A string argument on the stack, cut off where it is longer than any name.
class Text {
 public:
  Text(napi_env env, napi_value value) {
    HSTU_CHECK(napi_get_value_string_utf8(env, value, text_, sizeof text_, &length_) == napi_ok, kInvalidArgument, "expected a string");
  }
  operator std::string_view() const { return {text_, length_}; }

 private:
  char text_[64];
  size_t length_ = 0;
};

// What a function of the addon that is no op is written as: it gets kMostArguments values, undefined where the caller gave fewer.
using Function = napi_value (*)(napi_env env, const napi_value* arguments);
constexpr size_t kMostArguments = 5;

// Adds a function to the exports. What it throws becomes a JavaScript error.
inline void add_function(Napi::Object exports, const char* name, Function function) {
  auto call = [](napi_env env, napi_callback_info info) -> napi_value {
    napi_value arguments[kMostArguments];
    size_t count = kMostArguments;
    void* data = nullptr;
    napi_get_cb_info(env, info, &count, arguments, nullptr, &data);
    try {
      return reinterpret_cast<Function>(data)(env, arguments);
    } catch (const Error& error) {
      throw_js(env, error.code, error.what());
    } catch (const std::bad_alloc&) {
      throw_js(env, kOutOfMemory, "out of host memory");
    } catch (const Napi::Error& error) {
      throw_js(env, kInvalidArgument, error.Message());
    } catch (const std::exception& error) {
      throw_js(env, kInvalidArgument, error.what());
    }
    return nullptr;
  };
  napi_value value;
  napi_create_function(exports.Env(), name, NAPI_AUTO_LENGTH, call, reinterpret_cast<void*>(function), &value);
  exports.Set(name, value);
}

// A tensor and the typed array that its values are copied from or into, of exactly its size in bytes.
struct HostView {
  const Tensor& tensor;
  Stream stream;
  void* host;
  size_t bytes;
};
HostView host_view(napi_env env, napi_value tensor, napi_value array);

void register_storage(Napi::Object exports);
void register_readback(Napi::Object exports);
void register_graphs(Napi::Object exports);
void register_pages(Napi::Object exports);
void register_vocabulary(Napi::Object exports);
void register_devices(Napi::Object exports);

}  // namespace hstu
