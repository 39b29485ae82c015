// What JavaScript asks of the backends beside memory: what there is to compute on, how fast it can be, what of its memory is used.
#include <limits>

#include "boundary.h"

namespace hstu {
namespace {

// The device of this name; throws where it is unavailable.
Device opened(napi_env env, napi_value name) { return stream_of(addon_of(env), device_of(Text(env, name))).device; }

napi_value set_num_threads(napi_env env, const napi_value* arguments) {
  int32_t count = 0;
  HSTU_CHECK(napi_get_value_int32(env, arguments[0], &count) == napi_ok, kInvalidArgument, "set_num_threads: expected a number");
  cpu::set_num_threads(count);
  return nullptr;
}

// What there is to compute on: the CPU's threads and instruction set; CUDA, or why not.
napi_value backend(napi_env env, const napi_value*) {
  Napi::Object result = Napi::Object::New(env), cuda = Napi::Object::New(env);
  result.Set("threads", cpu::num_threads());
  result.Set("instructionSet", cpu::instruction_set());
  const Availability& found = device::cuda_availability();
  cuda.Set("compiled", device::kCudaCompiled);
  cuda.Set("usable", found.usable);
  cuda.Set("code", found.code);
  cuda.Set("reason", found.reason);
  cuda.Set("driver", found.driver);
  cuda.Set("runtime", found.runtime);
  Napi::Array devices = Napi::Array::New(env);
  for (const DeviceInfo& device : found.devices) {
    Napi::Object entry = Napi::Object::New(env);
    entry.Set("name", device.name);
    entry.Set("computeCapability", std::to_string(device.major) + "." + std::to_string(device.minor));
    entry.Set("multiprocessors", device.multiprocessors);
    entry.Set("memory", double(device.memory));
    devices.Set(devices.Length(), entry);
  }
  cuda.Set("devices", devices);
  result.Set("cuda", cuda);
  return result;
}

// Of this process: {used, peak, reserved, free, total, limit} in bytes.
napi_value memory_statistics(napi_env env, const napi_value* arguments) {
  MemoryStatistics statistics = device::memory_statistics(opened(env, arguments[0]));
  Napi::Object result = Napi::Object::New(env);
  result.Set("used", double(statistics.used));
  result.Set("peak", double(statistics.peak));
  result.Set("reserved", double(statistics.reserved));
  result.Set("free", double(statistics.free));
  result.Set("total", double(statistics.total));
  result.Set("limit", statistics.limit == kNoMemoryLimit ? std::numeric_limits<double>::infinity() : double(statistics.limit));
  return result;
}

// set_memory_limit(device, bytes): infinity lifts it.
napi_value set_memory_limit(napi_env env, const napi_value* arguments) {
  Device device = opened(env, arguments[0]);
  double bytes = -1;
  napi_get_value_double(env, arguments[1], &bytes);
  HSTU_CHECK(bytes >= 0, kInvalidArgument, "setMemoryLimit: the limit must be a number of bytes, got ", bytes);
  device::set_memory_limit(bytes < 0x1p63 ? uint64_t(bytes) : kNoMemoryLimit, device);
  return nullptr;
}

napi_value trim(napi_env env, const napi_value* arguments) {
  device::trim(opened(env, arguments[0]));
  return nullptr;
}

// What the device can do at most, for benches: {gflops, gbps}.
napi_value ceilings(napi_env env, const napi_value*) {
  Napi::Object result = Napi::Object::New(env);
  result.Set("gflops", cpu::fma_peak_gflops());
  result.Set("gbps", cpu::copy_gbps());
  return result;
}

}  // namespace

void register_devices(Napi::Object exports) {
  add_function(exports, "set_num_threads", set_num_threads);
  add_function(exports, "backend", backend);
  add_function(exports, "memory_statistics", memory_statistics);
  add_function(exports, "set_memory_limit", set_memory_limit);
  add_function(exports, "trim", trim);
  add_function(exports, "ceilings", ceilings);
}

}  // namespace hstu
