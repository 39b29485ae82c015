#include <algorithm>
#include <atomic>
#include <cstring>

#include "boundary.h"

namespace hstu {
namespace {

constexpr napi_type_tag kTensorTag = {0x68737475f00d4c1bULL, 0x9f3a1e7754b2c6d8ULL};
constexpr size_t kGuardBytes = 64;
constexpr unsigned char kGuardByte = 0xA5;
std::atomic<int> violations{0};

void adjust(napi_env env, int64_t bytes) {
  int64_t total;
  addon_of(env).bytes += bytes;
  napi_adjust_external_memory(env, bytes, &total);
}

// The last reference of this environment to a storage takes its bytes off the account.
void let_go(napi_env env, Handle& handle) {
  if (!handle.storage) return;
  addon_of(env).tensors -= 1;
  if (handle.storage.use_count() == 1) adjust(env, -int64_t(handle.storage->bytes()));
  handle.storage.reset();
}

void finalize(napi_env env, void* data, void*) {
  std::unique_ptr<Handle> handle(static_cast<Handle*>(data));
  let_go(env, *handle);
}

void wrap(napi_env env, napi_value object, std::unique_ptr<Handle> handle) {
  HSTU_CHECK(napi_type_tag_object(env, object, &kTensorTag) == napi_ok, kInvalidArgument, "object is already a tensor");
  HSTU_CHECK(napi_wrap(env, object, handle.get(), finalize, nullptr, nullptr) == napi_ok, kInvalidArgument,
             "cannot wrap this object as a tensor");
  handle.release();
  addon_of(env).tensors += 1;
}

std::string name_of(Device device) {
  return device.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::string shape_text(const Napi::Array& dims) {
  std::string text = "[";
  for (uint32_t i = 0; i < dims.Length(); ++i) text += (i ? ", " : "") + dims.Get(i).ToString().Utf8Value();
  return text + "]";
}

Tensor view_of(const Napi::Value& dtype, const Napi::Value& shape, const Napi::Value& device) {
  Tensor view;
  std::string dtype_name = dtype.As<Napi::String>(), device_name = device.As<Napi::String>();
  int found = -1;
  for (int i = 0; i < int(std::size(kDtypeNames)); ++i)
    if (dtype_name == kDtypeNames[i]) found = i;
  HSTU_CHECK(found >= 0, kDtype, "unknown dtype '", dtype_name, "'");
  view.dtype = Dtype(found);
  view.device = device_of(device_name);
  Napi::Array dims = shape.As<Napi::Array>();
  HSTU_CHECK(dims.Length() <= uint32_t(kMaxRank), kShape, "a tensor has at most ", kMaxRank, " dims, got ", dims.Length());
  view.rank = int(dims.Length());
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    double dim = dims.Get(uint32_t(i)).As<Napi::Number>().DoubleValue();
    HSTU_CHECK(dim >= 0 && dim == double(int64_t(dim)), kShape, "dim ", i, " must be a non-negative integer, got ", dim);
    view.shape[i] = int64_t(dim);
    view.strides[i] = stride;
    HSTU_CHECK(!__builtin_mul_overflow(stride, std::max<int64_t>(view.shape[i], 1), &stride) && stride < (int64_t(1) << 53),
               kShape, "a tensor of shape ", shape_text(dims), " is too large: 2^53 elements or more");
  }
  return view;
}

Handle& live(napi_env env, napi_value value) {
  Handle* handle = handle_of(env, value);
  HSTU_CHECK(handle, kInvalidArgument, "not a tensor");
  HSTU_CHECK(handle->storage, kDisposed, "tensor is disposed");
  return *handle;
}

// create(object, dtype, shape, device, zero)
napi_value create(const Napi::CallbackInfo& info) {
  napi_env env = info.Env();
  return guarded(env, [&]() -> napi_value {
    auto handle = std::make_unique<Handle>();
    handle->view = view_of(info[1], info[2], info[3]);
    bool zero = info[4].As<Napi::Boolean>();
    Stream stream = stream_of(addon_of(env), handle->view.device);
    try {
      handle->storage = std::make_shared<Storage>(handle->view.bytes(), stream, zero, addon_of(env).guards);
    } catch (const Error& error) {
      if (std::strcmp(error.code, kOutOfMemory) != 0) throw;
      std::string shape = shape_text(info[2].As<Napi::Array>());
      throw Error(kOutOfMemory, message(name_of(handle->view.dtype), shape, " of ", handle->view.bytes(), " bytes: ", error.what()));
    }
    handle->view.data = handle->storage->data();
    int64_t bytes = int64_t(handle->storage->bytes());
    wrap(env, info[0], std::move(handle));
    adjust(env, bytes);
    return nullptr;
  });
}

// create_view(object, source, shape, element_offset): same storage, other shape.
napi_value create_view(const Napi::CallbackInfo& info) {
  napi_env env = info.Env();
  return guarded(env, [&]() -> napi_value {
    Handle& source = live(env, info[1]);
    auto handle = std::make_unique<Handle>();
    handle->view = view_of(Napi::String::New(env, name_of(source.view.dtype)), info[2], Napi::String::New(env, name_of(source.view.device)));
    double offset = info[3].As<Napi::Number>().DoubleValue();
    HSTU_CHECK(offset >= 0 && offset == double(int64_t(offset)) && offset + double(handle->view.size()) <= double(source.view.size()),
               kShape, "view of ", handle->view.size(), " elements at ", offset, " is not inside a tensor of ", source.view.size());
    handle->storage = source.storage;
    handle->view.data = static_cast<char*>(source.view.data) + int64_t(offset) * size_of(source.view.dtype);
    wrap(env, info[0], std::move(handle));
    return nullptr;
  });
}

napi_value dispose(const Napi::CallbackInfo& info) {
  napi_env env = info.Env();
  return guarded(env, [&]() -> napi_value {
    Handle* handle = handle_of(env, info[0]);
    HSTU_CHECK(handle, kInvalidArgument, "dispose: not a tensor");
    let_go(env, *handle);
    return nullptr;
  });
}

napi_value is_disposed(const Napi::CallbackInfo& info) {
  Handle* handle = handle_of(info.Env(), info[0]);
  return Napi::Boolean::New(info.Env(), !handle || !handle->storage);
}

template <bool kWrite>
napi_value transfer(const Napi::CallbackInfo& info) {
  napi_env env = info.Env();
  return guarded(env, [&]() -> napi_value {
    HostView view = host_view(env, info[0], info[1]);
    if (view.bytes == 0) return nullptr;
    kWrite ? device::write(view.tensor.data, view.host, view.bytes, view.stream)
           : device::read(view.host, view.tensor.data, view.bytes, view.stream);
    return nullptr;
  });
}

napi_value memory(const Napi::CallbackInfo& info) {
  Addon& addon = addon_of(info.Env());
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("tensors", double(addon.tensors));
  result.Set("bytes", double(addon.bytes));
  return result;
}

napi_value set_error_class(const Napi::CallbackInfo& info) {
  napi_create_reference(info.Env(), info[0], 1, &addon_of(info.Env()).error_class);
  return nullptr;
}

napi_value set_guards(const Napi::CallbackInfo& info) {
  addon_of(info.Env()).guards = info[0].As<Napi::Boolean>();
  return nullptr;
}

// Storages freed so far, in this process, with a guard byte overwritten.
napi_value guard_violations(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), violations.load()); }

}  // namespace

Device device_of(const std::string& name) {
  if (name == "cpu") return {};
  int index = -1, end = 0;
  bool known = std::sscanf(name.c_str(), "cuda:%d%n", &index, &end) == 1 && size_t(end) == name.size() && index >= 0;
  HSTU_CHECK(known, kInvalidArgument, "unknown device '", name, "': 'cpu', or 'cuda:' and a number");
  return {DeviceType::kCuda, index};
}

Storage::Storage(size_t bytes, Stream stream, bool zero, bool guarded)
    : bytes_(bytes), allocated_(bytes + (guarded ? 2 * kGuardBytes : 0)), stream_(stream), guarded_(guarded) {
  base_ = device::allocate(allocated_, stream_);
  data_ = static_cast<char*>(base_) + (guarded ? kGuardBytes : 0);
  if (guarded) {
    device::fill(base_, kGuardByte, kGuardBytes, stream_);
    device::fill(static_cast<char*>(data_) + bytes, kGuardByte, kGuardBytes, stream_);
    device::fill(data_, 0xFF, bytes, stream_);  // NaN: an output that an op leaves unwritten shows
  }
  if (zero) device::fill(data_, 0, bytes, stream_);
}

Storage::~Storage() {
  if (guarded_) {
    unsigned char guards[2 * kGuardBytes] = {};
    try {  // a lost device throws: its own error tells
      device::read(guards, base_, kGuardBytes, stream_);
      device::read(guards + kGuardBytes, static_cast<char*>(data_) + bytes_, kGuardBytes, stream_);
    } catch (const Error&) {
    }
    if (std::any_of(guards, std::end(guards), [](unsigned char byte) { return byte != kGuardByte; })) violations.fetch_add(1);
  }
  device::release(base_, allocated_, stream_);
}

Addon::~Addon() {
  for (const Stream& stream : streams) device::close_stream(stream);
}

Stream stream_of(Addon& addon, Device device) {
  if (device.type == DeviceType::kCpu) return {};
  for (const Stream& stream : addon.streams)
    if (stream.device == device) return stream;
  addon.streams.push_back(device::open_stream(device));
  return addon.streams.back();
}

Addon& addon_of(napi_env env) {
  void* data = nullptr;
  napi_get_instance_data(env, &data);
  return *static_cast<Addon*>(data);
}

Handle* handle_of(napi_env env, napi_value value) {
  napi_valuetype type;
  bool tagged = false;
  void* data = nullptr;
  if (napi_typeof(env, value, &type) != napi_ok || type != napi_object) return nullptr;
  if (napi_check_object_type_tag(env, value, &kTensorTag, &tagged) != napi_ok || !tagged) return nullptr;
  if (napi_unwrap(env, value, &data) != napi_ok) return nullptr;
  return static_cast<Handle*>(data);
}

HostView host_view(napi_env env, const Napi::Value& tensor, const Napi::Value& array) {
  Handle& handle = live(env, tensor);
  HSTU_CHECK(array.IsTypedArray(), kInvalidArgument, "expected a typed array");
  size_t bytes = array.As<Napi::TypedArray>().ByteLength();  // 0 where the buffer is detached
  HSTU_CHECK(int64_t(bytes) == handle.view.bytes(), kShape, "typed array of ", bytes, " bytes does not match a tensor of ",
             handle.view.bytes());
  void* host = nullptr;  // by typedarray_info, which also takes a SharedArrayBuffer
  napi_get_typedarray_info(env, array, nullptr, nullptr, &host, nullptr, nullptr);
  return {handle.view, handle.storage->stream(), host, bytes};
}

napi_value error_object(napi_env env, const char* code, const std::string& text) {
  napi_value error_class = nullptr, error = nullptr, arguments[2];
  napi_create_string_utf8(env, code, NAPI_AUTO_LENGTH, &arguments[0]);
  napi_create_string_utf8(env, text.c_str(), text.size(), &arguments[1]);
  if (addon_of(env).error_class) napi_get_reference_value(env, addon_of(env).error_class, &error_class);
  if (!error_class || napi_new_instance(env, error_class, 2, arguments, &error) != napi_ok)
    napi_create_error(env, arguments[0], arguments[1], &error);
  return error;
}

void throw_js(napi_env env, const char* code, const std::string& text) { napi_throw(env, error_object(env, code, text)); }

void register_storage(Napi::Object exports) {
  add_function(exports, "create", create);
  add_function(exports, "create_view", create_view);
  add_function(exports, "dispose", dispose);
  add_function(exports, "is_disposed", is_disposed);
  add_function(exports, "write", transfer<true>);
  add_function(exports, "read", transfer<false>);
  add_function(exports, "memory", memory);
  add_function(exports, "set_error_class", set_error_class);
  add_function(exports, "set_guards", set_guards);
  add_function(exports, "guard_violations", guard_violations);
}

}  // namespace hstu
