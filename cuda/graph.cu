// CUDA graphs. What is captured allocates from a queue of the graph's own, so a graph holds no memory nodes: its blocks are ordinary
// memory that is handed out again within a capture in the order of the stream, and stays the graph's between launches. Equal captures
// get equal blocks, so that an executable graph can be updated in place. Graphs of one stream may share their blocks: launches run one
// after the other, and what a tensor holds is nobody else's.
#include "runtime.cuh"

namespace hstu {

struct Graph {
  cuda::Lane& lane;
  cuda::Queue* queue;
  cudaGraphExec_t exec = nullptr;
};

namespace cuda {
namespace {

void set_capturing(Lane& lane, bool capturing) {
  DeviceState& state = state_of(lane.device);
  std::lock_guard<std::mutex> lock(state.mutex);
  if (capturing) CUDA_CHECK(cudaStreamBeginCapture(lane.stream, cudaStreamCaptureModeRelaxed));
  lane.capturing = capturing;
  if (capturing) return;
  for (void* block : lane.deferred) cudaFreeAsync(block, lane.stream);
  lane.deferred.clear();
}

// Memory for a stream that is being captured comes by another one, and is there for any stream when this returns.
void* make_beside(Lane& lane, size_t bytes) {
  DeviceState& state = state_of(lane.device);
  void* data = nullptr;
  CUDA_CHECK(cudaSetDevice(lane.device));
  {
    std::lock_guard<std::mutex> lock(state.mutex);
    if (!state.beside) CUDA_CHECK(cudaStreamCreateWithFlags(&state.beside, cudaStreamNonBlocking));
  }
  cudaError_t status = cudaMallocAsync(&data, bytes, state.beside);
  if (status == cudaErrorMemoryAllocation) return cudaGetLastError(), nullptr;
  CUDA_CHECK(status);
  CUDA_CHECK(cudaStreamSynchronize(state.beside));
  return data;
}

}  // namespace

Graph* open_graph(Stream stream, Graph* pool) {
  Lane& lane = queue_of(stream).lane;
  HSTU_CHECK(!pool || &pool->lane == &lane, kInvalidArgument, "graphs that share memory are of one device");
  auto make = [&lane](size_t bytes) { return make_beside(lane, bytes); };
  auto drop = [&lane](void* block) { lane.drop(block); };
  auto cache = pool ? pool->queue->cache : std::make_shared<BlockCache>(state_of(lane.device).account, UINT64_MAX, make, drop);
  auto queue = std::make_unique<Queue>(lane, std::move(cache));
  return new Graph{lane, queue.release()};
}

Stream begin_capture(Graph& graph) {
  check_alive();
  HSTU_CHECK(!graph.lane.capturing, kInvalidArgument, "a graph is captured on this stream already");
  CUDA_CHECK(cudaSetDevice(graph.lane.device));
  if (!graph.exec) graph.lane.queue->cache->clear();  // what is kept for reuse there, the graph may need
  set_capturing(graph.lane, true);
  return Stream{{DeviceType::kCuda, graph.lane.device}, static_cast<StreamHandle*>(graph.queue)};
}

void end_capture(Graph& graph, bool keep) {
  cudaGraph_t captured = nullptr;
  cudaError_t status = cudaStreamEndCapture(graph.lane.stream, &captured);
  set_capturing(graph.lane, false);
  if (status == cudaSuccess && keep) {
    if (graph.exec) {
      cudaGraphExecUpdateResultInfo info;
      if (cudaGraphExecUpdate(graph.exec, captured, &info) != cudaSuccess) {  // another topology
        cudaGetLastError();
        cudaGraphExecDestroy(graph.exec);
        graph.exec = nullptr;
      }
    }
    if (!graph.exec) status = cudaGraphInstantiate(&graph.exec, captured, 0);
  }
  if (captured) cudaGraphDestroy(captured);
  if (!keep) return void(cudaGetLastError());  // what broke it is on its way to the caller
  if (status != cudaSuccess) fail(status, "capture of a CUDA graph", __FILE__, __LINE__);
}

void launch_graph(Graph& graph) {
  check_alive();
  HSTU_CHECK(!graph.lane.capturing, kInvalidArgument, "a graph cannot be launched while one is captured");
  HSTU_CHECK(graph.exec, kInvalidArgument, "the graph holds no capture");
  CUDA_CHECK(cudaSetDevice(graph.lane.device));
  CUDA_CHECK(cudaGraphLaunch(graph.exec, graph.lane.stream));
}

void close_graph(Graph* graph) noexcept {
  if (graph->exec && !is_lost()) cudaGraphExecDestroy(graph->exec);  // a launch under way is finished first
  graph->queue->close();
  delete graph;
}

}  // namespace cuda
}  // namespace hstu
