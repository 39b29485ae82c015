#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "boundary.h"

namespace hstu {
namespace {

constexpr size_t kGuardBytes = 64;
constexpr unsigned char kGuardByte = 0xA5;
std::atomic<int> violations{0};

// V8 is told of memory so that its collector frees tensors which nobody disposed of; it collects when it hears of much more. A training step
// makes and frees the same gigabyte again and again, so growth is told by sixteenths, and shrinkage down to the most that was held in the
// last second; what the collector itself freed, at once.
constexpr int64_t kUnreported = 1 << 20;
constexpr auto kPatience = std::chrono::seconds(1);

void adjust(Addon& addon, napi_env env, int64_t bytes, bool collected = false) {
  addon.bytes += bytes;
  addon.most = std::max(addon.most, addon.bytes);
  int64_t told = addon.reported;
  if (collected || addon.bytes - told >= told / 16) {
    told = addon.bytes;
  } else if (auto now = std::chrono::steady_clock::now(); now - addon.since >= kPatience) {
    told = std::min(told, addon.most);
    addon.most = addon.bytes;
    addon.since = now;
  }
  if (std::abs(told - addon.reported) < kUnreported) return;
  int64_t total;
  napi_adjust_external_memory(env, told - addon.reported, &total);
  addon.reported = told;
}

// The last reference of this environment to a storage takes its bytes off the account.
void let_go(napi_env env, Handle& handle, bool collected) {
  if (!handle.storage) return;
  Addon& addon = addon_of(env);
  addon.tensors -= 1;
  if (handle.storage.use_count() == 1) adjust(addon, env, -int64_t(handle.storage->bytes()), collected);
  handle.storage.reset();
}

void finalize(napi_env env, void* data, void*) {
  std::unique_ptr<Handle> handle(static_cast<Handle*>(data));
  addon_of(env).handles.erase(handle.get());
  let_go(env, *handle, true);
}

void wrap(Addon& addon, napi_env env, napi_value object, std::unique_ptr<Handle> handle) {
  HSTU_CHECK(napi_wrap(env, object, handle.get(), finalize, nullptr, nullptr) == napi_ok, kInvalidArgument,
             "cannot wrap this object as a tensor");
  addon.handles.insert(handle.release());
  addon.tensors += 1;
}

std::string shape_text(const Tensor& view) {
  std::string text = "[";
  for (int i = 0; i < view.rank; ++i) text += (i ? ", " : "") + std::to_string(view.shape[i]);
  return text + "]";
}

Dtype dtype_of(std::string_view name) {
  for (int i = 0; i < int(std::size(kDtypeNames)); ++i)
    if (name == kDtypeNames[i]) return Dtype(i);
  throw Error(kDtype, message("unknown dtype '", name, "'"));
}

Tensor view_of(napi_env env, Dtype dtype, napi_value shape, Device device) {
  Tensor view;
  view.dtype = dtype;
  view.device = device;
  uint32_t rank = 0;
  HSTU_CHECK(napi_get_array_length(env, shape, &rank) == napi_ok, kInvalidArgument, "a shape is an array of numbers");
  HSTU_CHECK(rank <= uint32_t(kMaxRank), kShape, "a tensor has at most ", kMaxRank, " dims, got ", rank);
  view.rank = int(rank);
  for (int i = 0; i < view.rank; ++i) {
    napi_value element;
    double dim = 0;
    napi_get_element(env, shape, uint32_t(i), &element);
    HSTU_CHECK(napi_get_value_double(env, element, &dim) == napi_ok, kInvalidArgument, "dim ", i, " must be a number");
    HSTU_CHECK(dim >= 0 && dim == double(int64_t(dim)), kShape, "dim ", i, " must be a non-negative integer, got ", dim);
    view.shape[i] = int64_t(dim);
  }
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.strides[i] = stride;
    HSTU_CHECK(!__builtin_mul_overflow(stride, std::max<int64_t>(view.shape[i], 1), &stride) && stride < (int64_t(1) << 53),
               kShape, "a tensor of shape ", shape_text(view), " is too large: 2^53 elements or more");
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
napi_value create(napi_env env, const napi_value* arguments) {
  Addon& addon = addon_of(env);
  auto handle = std::make_unique<Handle>();
  Tensor& view = handle->view;
  view = view_of(env, dtype_of(Text(env, arguments[1])), arguments[2], device_of(Text(env, arguments[3])));
  bool zero = false;
  napi_get_value_bool(env, arguments[4], &zero);
  try {
    handle->storage = std::make_shared<Storage>(view.bytes(), stream_of(addon, view.device), zero, addon.guards);
  } catch (const Error& error) {
    if (std::strcmp(error.code, kOutOfMemory) != 0) throw;
    throw Error(kOutOfMemory, message(name_of(view.dtype), shape_text(view), " of ", view.bytes(), " bytes: ", error.what()));
  }
  view.data = handle->storage->data();
  int64_t bytes = int64_t(handle->storage->bytes());
  wrap(addon, env, arguments[0], std::move(handle));
  adjust(addon, env, bytes);
  return nullptr;
}

// create_view(object, source, shape, element_offset): same storage, other shape.
napi_value create_view(napi_env env, const napi_value* arguments) {
  Handle& source = live(env, arguments[1]);
  auto handle = std::make_unique<Handle>();
  handle->view = view_of(env, source.view.dtype, arguments[2], source.view.device);
  double offset = -1;
  napi_get_value_double(env, arguments[3], &offset);
  HSTU_CHECK(offset >= 0 && offset == double(int64_t(offset)) && offset + double(handle->view.size()) <= double(source.view.size()),
             kShape, "view of ", handle->view.size(), " elements at ", offset, " is not inside a tensor of ", source.view.size());
  handle->storage = source.storage;
  handle->view.data = static_cast<char*>(source.view.data) + int64_t(offset) * size_of(source.view.dtype);
  wrap(addon_of(env), env, arguments[0], std::move(handle));
  return nullptr;
}

napi_value dispose(napi_env env, const napi_value* arguments) {
  Handle* handle = handle_of(env, arguments[0]);
  HSTU_CHECK(handle, kInvalidArgument, "dispose: not a tensor");
  let_go(env, *handle, false);
  return nullptr;
}

napi_value is_disposed(napi_env env, const napi_value* arguments) {
  Handle* handle = handle_of(env, arguments[0]);
  return Napi::Boolean::New(env, !handle || !handle->storage);
}

template <bool kWrite>
napi_value transfer(napi_env env, const napi_value* arguments) {
  HostView view = host_view(env, arguments[0], arguments[1]);
  if (view.bytes == 0) return nullptr;
  kWrite ? device::write(view.tensor.data, view.host, view.bytes, view.stream)
         : device::read(view.host, view.tensor.data, view.bytes, view.stream);
  return nullptr;
}

napi_value memory(napi_env env, const napi_value*) {
  Addon& addon = addon_of(env);
  Napi::Object result = Napi::Object::New(env);
  result.Set("tensors", double(addon.tensors));
  result.Set("bytes", double(addon.bytes));
  return result;
}

napi_value set_error_class(napi_env env, const napi_value* arguments) {
  napi_create_reference(env, arguments[0], 1, &addon_of(env).error_class);
  return nullptr;
}

napi_value set_guards(napi_env env, const napi_value* arguments) {
  napi_get_value_bool(env, arguments[0], &addon_of(env).guards);
  return nullptr;
}

// Storages freed so far, in this process, with a guard byte overwritten.
napi_value guard_violations(napi_env env, const napi_value*) { return Napi::Number::New(env, violations.load()); }

}  // namespace

Device device_of(std::string_view name) {
  if (name == "cpu") return {};
  int index = -1;
  const char* end = name.data() + name.size();
  auto [parsed, error] = std::from_chars(name.data() + std::min<size_t>(name.size(), 5), end, index);
  HSTU_CHECK(name.starts_with("cuda:") && error == std::errc() && parsed == end && index >= 0, kInvalidArgument, "unknown device '", name, "': 'cpu', or 'cuda:' and a number");
  return {DeviceType::kCuda, index};
}

std::string name_of(Device device) {
  return device.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
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
    try {
      device::read(guards, base_, kGuardBytes, stream_);
      device::read(guards + kGuardBytes, static_cast<char*>(data_) + bytes_, kGuardBytes, stream_);
      if (std::any_of(guards, std::end(guards), [](unsigned char byte) { return byte != kGuardByte; })) violations.fetch_add(1);
    } catch (const Error&) {  // a lost device, whose own error tells, or a capture
    }
  }
  device::release(base_, allocated_, stream_);
}

Addon::~Addon() {
  for (const Stream& stream : streams) device::close_stream(stream);
}

Stream stream_of(Addon& addon, Device device) {
  if (addon.capture && addon.capture->stream.device == device) return addon.capture->stream;
  if (device.type == DeviceType::kCpu) return {};
  for (const Stream& stream : addon.streams)
    if (stream.device == device) return stream;
  addon.streams.push_back(device::open_stream(device));
  return addon.streams.back();
}

void release(napi_env env, std::unordered_set<std::shared_ptr<Storage>>& kept) {
  for (const std::shared_ptr<Storage>& storage : kept)
    if (storage.use_count() == 1) adjust(addon_of(env), env, -int64_t(storage->bytes()));
  kept.clear();
}

Addon& addon_of(napi_env env) {
  void* data = nullptr;
  napi_get_instance_data(env, &data);
  return *static_cast<Addon*>(data);
}

Handle* handle_of(napi_env env, napi_value value) {
  void* data = nullptr;
  if (napi_unwrap(env, value, &data) != napi_ok) return nullptr;
  auto* handle = static_cast<Handle*>(data);
  return addon_of(env).handles.contains(handle) ? handle : nullptr;
}

HostView host_view(napi_env env, napi_value tensor, napi_value array) {
  Handle& handle = live(env, tensor);
  bool typed = false;
  HSTU_CHECK(napi_is_typedarray(env, array, &typed) == napi_ok && typed, kInvalidArgument, "expected a typed array");
  size_t bytes = Napi::TypedArray(env, array).ByteLength();  // 0 where the buffer is detached
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
