// Element-wise ops: one function of the index over n elements.
#pragma once
#include "packed.cuh"

namespace hstu::cuda {

constexpr int kMapThreads = 256;

// fn.at<kN>(i) makes elements i .. i + kN - 1. A thread takes kN neighbours a step of the grid; the last n % kN elements are taken one
// by one.
template <int kN, typename Fn>
__global__ void __launch_bounds__(kMapThreads) map_kernel(int64_t n, Fn fn) {
  int64_t index = int64_t(blockIdx.x) * kMapThreads + threadIdx.x, step = int64_t(gridDim.x) * kMapThreads;
  for (int64_t i = index; i < n / kN; i += step) fn.template at<kN>(i * kN);
  if (kN > 1 && index < n % kN) fn.template at<1>(n / kN * kN + index);
}

// `whole`: the pointers allow vectors of kN elements.
template <int kN, typename Fn>
void map(int64_t n, bool whole, Fn fn, Stream stream) {
  constexpr int64_t kMostBlocks = 1 << 20;
  if (n == 0) return;
  if (whole)
    launch(map_kernel<kN, Fn>, blocks_for(ceil_div(n, kN), kMapThreads, kMostBlocks), kMapThreads, 0, stream, n, fn);
  else
    launch(map_kernel<1, Fn>, blocks_for(n, kMapThreads, kMostBlocks), kMapThreads, 0, stream, n, fn);
}

}  // namespace hstu::cuda
