// What JavaScript asks of the backends beside memory: what there is to compute on, how fast it can be, the pool.
#include "boundary.h"

namespace hstu {
namespace {

napi_value set_num_threads(const Napi::CallbackInfo& info) {
  cpu::set_num_threads(info[0].As<Napi::Number>().Int32Value());
  return nullptr;
}

// What there is to compute on: the CPU's threads and instruction set; CUDA, or why not.
napi_value backend(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
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

// The pool of the device of this tensor's stream: {used, peak, reserved, free, total} in bytes; also where `trim` wants it smaller.
napi_value pool(const Napi::CallbackInfo& info) {
  napi_env env = info.Env();
  return guarded(env, [&]() -> napi_value {
    Stream stream = stream_of(addon_of(env), device_of(info[0].As<Napi::String>()));
    if (info[1].As<Napi::Boolean>()) device::trim(stream);
    PoolStatistics statistics = device::pool_statistics(stream.device);
    Napi::Object result = Napi::Object::New(env);
    result.Set("used", double(statistics.used));
    result.Set("peak", double(statistics.peak));
    result.Set("reserved", double(statistics.reserved));
    result.Set("free", double(statistics.free));
    result.Set("total", double(statistics.total));
    return result;
  });
}

// What the device can do at most, for benches: {gflops, gbps}.
napi_value ceilings(const Napi::CallbackInfo& info) {
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("gflops", cpu::fma_peak_gflops());
  result.Set("gbps", cpu::copy_gbps());
  return result;
}

}  // namespace

void register_devices(Napi::Object exports) {
  add_function(exports, "set_num_threads", set_num_threads);
  add_function(exports, "backend", backend);
  add_function(exports, "pool", pool);
  add_function(exports, "ceilings", ceilings);
}

}  // namespace hstu
