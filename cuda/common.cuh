// What every kernel file shares: launches, conversions, warp and block reductions, vector loads; from stream.cuh checks and scratch memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../csrc/check.h"
#include "../csrc/dispatch.h"
#include "../csrc/math.h"
#include "../csrc/ops.h"
#include "stream.cuh"

namespace hstu::cuda {

// Lets a kernel use `bytes` of dynamic shared memory, where the current device has them.
template <typename Kernel>
void allow_shared(Kernel* kernel, size_t bytes) {
  int device = 0, most = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  HSTU_CHECK(bytes <= size_t(most), kDevice, "these sizes need ", bytes, " bytes of shared memory a block, cuda:", device, " has ", most,
             ": use a smaller head dim, or another GPU");
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

// launch(kernel, grid, block, shared bytes, stream, arguments...): a launch that is checked. An empty grid launches nothing.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream, A&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024) allow_shared(kernel, shared);
  kernel<<<grid, block, shared, handle_of(stream)>>>(std::forward<A>(arguments)...);
  CUDA_CHECK(cudaGetLastError());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for a grid-stride loop over n elements: enough to fill any device, few enough to start at once.
inline dim3 blocks_for(int64_t n, int per_block, int64_t most = 65535) {
  int64_t blocks = ceil_div(n, per_block);
  return dim3(unsigned(blocks < most ? blocks : most));
}

// pick_dtype(op, dtype, [&](auto zero) { using T = decltype(zero); ... }): the CUDA backend's float types.
template <typename Fn>
void pick_dtype(const char* op, Dtype dtype, Fn&& fn) {
  if (dtype == Dtype::kFloat32) return fn(float{});
  if (dtype == Dtype::kBFloat16) return fn(__nv_bfloat16{});
  if (dtype == Dtype::kFloat16) return fn(__half{});
  throw Error(kDtype, message(op, ": dtype must be float32, bfloat16 or float16 on CUDA, got ", name_of(dtype)));
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return x;
}

constexpr unsigned kFullWarp = 0xffffffffu;

// How often a warp arrives at a barrier in shared memory: one lane does so for all, after __syncwarp. compute-sanitizer's racecheck does
// not see that this puts the other lanes' accesses before the arrival; a build for it (HSTU_RACECHECK) lets each lane arrive.
#ifdef HSTU_RACECHECK
constexpr int kArrivalsOfWarp = 32;
#else
constexpr int kArrivalsOfWarp = 1;
#endif
// Whether this lane arrives for its warp.
__device__ __forceinline__ bool arrives(int lane) { return kArrivalsOfWarp > 1 || lane == 0; }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullWarp, x, lane);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, lane));
  return x;
}

// Sum over a block of at most 1024 threads, known to every thread. `shared` holds 33 floats. Fixed order.
__device__ __forceinline__ float block_sum(float x, float* shared) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  if (warp == 0) {
    float y = lane < warps ? shared[lane] : 0.f;
    y = warp_sum(y);
    if (lane == 0) shared[32] = y;
  }
  __syncthreads();
  return shared[32];
}

}  // namespace hstu::cuda
