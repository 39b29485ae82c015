// The binder: bind() makes a JavaScript function from an op's C++ signature. At a call it walks the parameter pack, reads each argument
// by its C++ type, checks it (count, type, tag, disposed, one device), calls the backend of that device and turns errors into HstuError.
#pragma once
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "boundary.h"
#include "ops.h"

namespace hstu {

// One parameter of an op: its name from the stringised list, its kind for the generated TypeScript.
struct Parameter {
  std::string name, kind;
};

struct Call {  // while its arguments are read
  napi_env env;
  Addon& addon;
  const char* op;
  const std::vector<Parameter>& parameters;
  const napi_value* values;
  size_t index = 0;
  std::optional<Device> device;
  std::string device_from;

  napi_value next() { return values[index++]; }
  std::string where() const { return std::string(op) + ": " + parameters[index - 1].name; }

  Tensor tensor(napi_value value, const std::string& suffix = "") {
    Handle* handle = handle_of(env, value);
    HSTU_CHECK(handle, kInvalidArgument, where(), suffix, " must be a Tensor");
    HSTU_CHECK(handle->storage, kDisposed, where(), suffix, " is disposed");
    if (!device) {
      device = handle->view.device;
      device_from = parameters[index - 1].name + suffix;
    }
    HSTU_CHECK(*device == handle->view.device, kDevice, where(), suffix, " is on ", name_of(handle->view.device), ", ", device_from, " is on ",
               name_of(*device));
    if (Capture* capture = addon.capture; capture && capture->keep && handle->storage->stream().handle != capture->stream.handle)
      capture->kept.insert(handle->storage);
    return handle->view;
  }
};

// How each C++ parameter type is read, held during the call, and passed on.
template <typename P, typename = void>
struct Argument;

template <typename T>
struct TensorReference {
  Tensor held;
  TensorReference(Call& call) : held(call.tensor(call.next())) {}
  T& pass() { return held; }
};
template <>
struct Argument<Tensor&> : TensorReference<Tensor> {
  using TensorReference::TensorReference;
  static std::string kind() { return "Tensor"; }
};
template <>
struct Argument<const Tensor&> : TensorReference<const Tensor> {
  using TensorReference::TensorReference;
  static std::string kind() { return "Tensor"; }
};

template <typename T>
struct OptionalTensor {
  std::optional<Tensor> held;
  OptionalTensor(Call& call) {
    napi_value value = call.next();
    napi_valuetype type;
    napi_typeof(call.env, value, &type);
    if (type != napi_null && type != napi_undefined) held = call.tensor(value);
  }
  T* pass() { return held ? &*held : nullptr; }
  static std::string kind() { return "Tensor | null"; }
};
template <>
struct Argument<Tensor*> : OptionalTensor<Tensor> {
  using OptionalTensor::OptionalTensor;
};
template <>
struct Argument<const Tensor*> : OptionalTensor<const Tensor> {
  using OptionalTensor::OptionalTensor;
};

template <>
struct Argument<TensorList> {
  TensorList held;
  Argument(Call& call) {
    napi_value array = call.next();
    bool is_array = false;
    uint32_t length = 0;
    napi_is_array(call.env, array, &is_array);
    HSTU_CHECK(is_array, kInvalidArgument, call.where(), " must be an array of Tensors");
    napi_get_array_length(call.env, array, &length);
    for (uint32_t i = 0; i < length; ++i) {
      napi_value item;
      napi_get_element(call.env, array, i, &item);
      held.items.push_back(call.tensor(item, message("[", i, "]")));
    }
  }
  TensorList& pass() { return held; }
  static std::string kind() { return "readonly Tensor[]"; }
};

template <typename T>
struct Argument<T, std::enable_if_t<std::is_same_v<T, double> || std::is_same_v<T, int>>> {
  T held;
  Argument(Call& call) {
    double number = 0;
    HSTU_CHECK(napi_get_value_double(call.env, call.next(), &number) == napi_ok, kInvalidArgument, call.where(), " must be a number");
    held = T(number);
    HSTU_CHECK((std::is_same_v<T, double> || double(held) == number), kInvalidArgument, call.where(), " must be a 32-bit integer, got ", number);
  }
  T pass() { return held; }
  static std::string kind() { return "number"; }
};

template <>
struct Argument<int64_t> {
  int64_t held = 0;
  Argument(Call& call) {
    bool lossless = false;
    napi_status status = napi_get_value_bigint_int64(call.env, call.next(), &held, &lossless);
    HSTU_CHECK(status == napi_ok && lossless, kInvalidArgument, call.where(), " must be a bigint of 64 bits");
  }
  int64_t pass() { return held; }
  static std::string kind() { return "bigint"; }
};

template <>
struct Argument<bool> {
  bool held = false;
  Argument(Call& call) {
    HSTU_CHECK(napi_get_value_bool(call.env, call.next(), &held) == napi_ok, kInvalidArgument, call.where(), " must be a boolean");
  }
  bool pass() { return held; }
  static std::string kind() { return "boolean"; }
};

template <typename E>
struct Argument<E, std::enable_if_t<std::is_enum_v<E>>> {
  int held = -1;
  Argument(Call& call) {
    char text[32] = "";
    size_t length = 0;
    napi_get_value_string_utf8(call.env, call.next(), text, sizeof text, &length);
    for (size_t i = 0; i < EnumNames<E>::values.size(); ++i)
      if (std::string_view(text, length) == EnumNames<E>::values[i]) held = int(i);
    HSTU_CHECK(held >= 0, kInvalidArgument, call.where(), " must be one of ", kind(), ", got '", text, "'");
  }
  E pass() { return E(held); }
  static std::string kind() {
    std::string kinds;
    for (const char* value : EnumNames<E>::values) kinds += (kinds.empty() ? "'" : " | '") + std::string(value) + "'";
    return kinds;
  }
};

template <>
struct Argument<Stream> {
  Stream held;
  Argument(Call& call) : held(stream_of(call.addon, call.device.value_or(Device{}))) {}
  Stream pass() { return held; }
  static std::string kind() { return ""; }
};

template <typename... P>
std::vector<Parameter> describe(const char* list, void (*)(P...)) {
  std::vector<Parameter> parameters;
  for (const std::string& kind : {Argument<P>::kind()...}) {
    const char* end = std::strchr(list, ',') ? std::strchr(list, ',') : list + std::strlen(list);
    const char* begin = end;
    while (begin > list && (std::isalnum(static_cast<unsigned char>(begin[-1])) || begin[-1] == '_')) --begin;
    parameters.push_back({std::string(begin, end), kind});
    list = *end ? end + 1 : end;
  }
  parameters.pop_back();  // Stream, which the binder supplies
  return parameters;
}

// What a bound function needs at a call, one static object an op.
template <typename... P>
struct Op {
  const char* name;
  std::vector<Parameter> parameters;
  void (*cpu)(P...);
  void (*cuda)(P...);
};

template <typename... P, size_t... I>
void run(Call& call, const Op<P...>& op, std::index_sequence<I...>) {
  std::tuple<Argument<P>...> arguments{Argument<P>(call)...};  // braces: read left to right
  auto* backend = call.device.value_or(Device{}).type == DeviceType::kCpu ? op.cpu : op.cuda;
  HSTU_CHECK(backend, kCudaUnavailable, op.name, ": this addon was built without CUDA");
  Stream stream = std::get<sizeof...(P) - 1>(arguments).held;
  HSTU_CHECK(!call.addon.capture || stream.device == call.addon.capture->stream.device, kDevice, op.name, " runs on ", name_of(stream.device),
             " while a graph of ", name_of(call.addon.capture->stream.device), " is captured: it would not be part of the graph");
  device::begin_op(stream, op.name);
  backend(std::get<I>(arguments).pass()...);
  device::end_op(stream, op.name);
}

template <typename... P>
napi_value invoke(napi_env env, napi_callback_info info) {
  constexpr size_t kCount = sizeof...(P) - 1;
  napi_value values[kCount + 1];
  size_t count = kCount + 1;
  void* data = nullptr;
  napi_get_cb_info(env, info, &count, values, nullptr, &data);
  const auto& op = *static_cast<const Op<P...>*>(data);
  try {
    HSTU_CHECK(count == kCount, kInvalidArgument, op.name, ": expected ", kCount, " arguments, got ", count);
    Call call{.env = env, .addon = addon_of(env), .op = op.name, .parameters = op.parameters, .values = values, .index = 0, .device = {}, .device_from = {}};
    run(call, op, std::index_sequence_for<P...>{});
  } catch (const Error& error) {
    throw_js(env, error.code, error.what());
  } catch (const std::bad_alloc&) {
    throw_js(env, kOutOfMemory, std::string(op.name) + ": out of host memory");
  } catch (const std::exception& error) {
    throw_js(env, kInvalidArgument, std::string(op.name) + ": " + error.what());
  }
  return nullptr;
}

template <typename... P>
void bind(Napi::Object exports, Napi::Object signatures, const char* name, const char* list, void (*cpu)(P...), void (*cuda)(P...)) {
  static std::vector<std::unique_ptr<Op<P...>>>& ops = *new std::vector<std::unique_ptr<Op<P...>>>;  // leaked: no static teardown
  Napi::Env env = exports.Env();
  ops.push_back(std::make_unique<Op<P...>>(Op<P...>{name, describe(list, cpu), cpu, cuda}));
  napi_value fn;
  napi_create_function(env, name, NAPI_AUTO_LENGTH, invoke<P...>, ops.back().get(), &fn);
  exports.Set(name, Napi::Value(env, fn));
  Napi::Array kinds = Napi::Array::New(env);
  for (const Parameter& parameter : ops.back()->parameters) kinds.Set(kinds.Length(), parameter.name + ": " + parameter.kind);
  signatures.Set(name, kinds);
}

}  // namespace hstu
