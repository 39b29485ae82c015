// Whether and how a device runs kernels of sm_90a.
#pragma once
#include <algorithm>
#include <atomic>

#include "../common.cuh"

namespace hstu::cuda::sm90 {

inline int processors() {
  int device = 0, count = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Whether this build and device run machine code of sm_90a. Elsewhere, also where PTX of another architecture is compiled, those kernels
// are empty. One `kernel` stands for all of its build.
inline bool runs_hopper(const void* kernel) {
  static std::atomic<int8_t> known[64];
  int device = 0, major = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  if (device < 64 && known[device] != 0) return known[device] > 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  bool runs = false;
  if (major == 9) {
    cudaFuncAttributes attributes{};
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    runs = attributes.binaryVersion == 90 && attributes.ptxVersion == 90 && attributes.numRegs > 64;  // sm_90 without the a: empty, too
  }
  if (device < 64) known[device] = runs ? 1 : -1;
  return runs;
}

// How many clusters of `blocks` blocks, one block a processor, the current device runs side by side; 0 where it runs none.
template <auto kKernel>
int clusters_at_once(int blocks, int threads, size_t shared) {
  static std::atomic<int> known[64];  // one more than counted
  int device = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  if (int told = device < 64 ? known[device].load() : 0) return told - 1;
  allow_shared(kKernel, shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kKernel, &config) != cudaSuccess) cudaGetLastError(), count = 0;
  count = std::min(count, processors() / blocks);
  if (device < 64) known[device] = count + 1;
  return count;
}

// Clusters of `blocks` blocks, one block a processor, of which some may wait for others of their cluster.
template <typename... P, typename... A>
void launch_clusters(void (*kernel)(P...), int blocks, int64_t clusters, int threads, size_t shared, Stream stream, A&&... arguments) {
  if (clusters == 0) return;
  allow_shared(kernel, shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks * std::min<int64_t>(clusters, processors() / blocks)));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = handle_of(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...));
}

}  // namespace hstu::cuda::sm90
