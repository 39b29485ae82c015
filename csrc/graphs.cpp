// CUDA graphs for JavaScript: an object is tagged and wrapped with a graph, as a Tensor is with its handle.
#include "boundary.h"

namespace hstu {
namespace {

constexpr napi_type_tag kGraphTag = {0x68737475c0ffee11ULL, 0x51d0c7a9e4b83f26ULL};

struct Captured {
  Graph* graph = nullptr;  // null once disposed
  std::unordered_set<std::shared_ptr<Storage>> kept;
};

void close(napi_env env, Captured& captured) {
  if (!captured.graph) return;
  device::close_graph(captured.graph);
  captured.graph = nullptr;
  release(env, captured.kept);
}

Captured& captured_of(napi_env env, napi_value object) {
  napi_valuetype type;
  bool tagged = false;
  void* data = nullptr;
  HSTU_CHECK(napi_typeof(env, object, &type) == napi_ok && type == napi_object, kInvalidArgument, "not a graph");
  HSTU_CHECK(napi_check_object_type_tag(env, object, &kGraphTag, &tagged) == napi_ok && tagged, kInvalidArgument, "not a graph");
  HSTU_CHECK(napi_unwrap(env, object, &data) == napi_ok, kInvalidArgument, "not a graph");
  return *static_cast<Captured*>(data);
}

Captured& live(napi_env env, napi_value object) {
  Captured& captured = captured_of(env, object);
  HSTU_CHECK(captured.graph, kDisposed, "graph is disposed");
  return captured;
}

// graph_create(object, device, pool): with memory of its own, or with that of the graph `pool`.
napi_value graph_create(napi_env env, const napi_value* arguments) {
  Addon& addon = addon_of(env);
  HSTU_CHECK(!addon.capture, kInvalidArgument, "a graph cannot be captured inside another's capture");
  auto captured = std::make_unique<Captured>();
  napi_valuetype type;
  napi_typeof(env, arguments[2], &type);
  Graph* pool = type == napi_undefined || type == napi_null ? nullptr : live(env, arguments[2]).graph;
  captured->graph = device::open_graph(stream_of(addon, device_of(Text(env, arguments[1]))), pool);
  auto finalize = [](napi_env env, void* data, void*) {
    std::unique_ptr<Captured> captured(static_cast<Captured*>(data));
    close(env, *captured);
  };
  bool wrapped = napi_type_tag_object(env, arguments[0], &kGraphTag) == napi_ok &&
                 napi_wrap(env, arguments[0], captured.get(), finalize, nullptr, nullptr) == napi_ok;
  if (!wrapped) close(env, *captured);
  HSTU_CHECK(wrapped, kInvalidArgument, "cannot wrap this object as a graph");
  captured.release();
  return nullptr;
}

// graph_capture(object, fn, keep): what fn returns. What its ops put on the stream is recorded in place of what was before.
napi_value graph_capture(napi_env env, const napi_value* arguments) {
  Addon& addon = addon_of(env);
  Captured& captured = live(env, arguments[0]);
  HSTU_CHECK(!addon.capture, kInvalidArgument, "a graph cannot be captured inside another's capture");
  bool keep = false;
  napi_value undefined, result = nullptr;
  napi_get_value_bool(env, arguments[2], &keep);
  napi_get_undefined(env, &undefined);
  Capture capture{device::begin_capture(*captured.graph), keep, {}};
  addon.capture = &capture;
  bool ended = napi_call_function(env, undefined, arguments[1], 0, nullptr, &result) == napi_ok;  // or threw, or the worker is terminated
  addon.capture = nullptr;
  try {
    device::end_capture(*captured.graph, ended);
  } catch (...) {
    release(env, capture.kept);
    throw;
  }
  release(env, ended ? captured.kept : capture.kept);
  if (ended) captured.kept = std::move(capture.kept);
  return result;
}

napi_value graph_launch(napi_env env, const napi_value* arguments) {
  device::launch_graph(*live(env, arguments[0]).graph);
  return nullptr;
}

napi_value graph_dispose(napi_env env, const napi_value* arguments) {
  HSTU_CHECK(!addon_of(env).capture, kInvalidArgument, "a graph cannot be disposed inside a capture");
  close(env, captured_of(env, arguments[0]));
  return nullptr;
}

}  // namespace

void register_graphs(Napi::Object exports) {
  add_function(exports, "graph_create", graph_create);
  add_function(exports, "graph_capture", graph_capture);
  add_function(exports, "graph_launch", graph_launch);
  add_function(exports, "graph_dispose", graph_dispose);
}

}  // namespace hstu
