// Running sums of integers on the device.
#pragma once
#include "common.cuh"

namespace hstu::cuda {

constexpr int kScanThreads = 256, kScanItems = 8, kScanChunk = kScanThreads * kScanItems;

// Sum of x over the threads before this one, and the block's total, known to all. `shared` holds kScanThreads / 32 + 1 values.
template <typename T>
__device__ __forceinline__ T scan_block(T x, T* shared, T& total) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T sum = x;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    T other = __shfl_up_sync(kFullWarp, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    T before = 0;
    for (int w = 0; w < kScanThreads / 32; ++w) {
      T own = shared[w];
      shared[w] = before;
      before += own;
    }
    shared[kScanThreads / 32] = before;
  }
  __syncthreads();
  total = shared[kScanThreads / 32];
  return shared[warp] + sum - x;
}

// A block adds up one chunk of kScanChunk values.
template <typename Out, typename In>
__global__ void __launch_bounds__(kScanThreads) sum_chunks(Out* totals, const In* in, int64_t n) {
  __shared__ Out shared[kScanThreads / 32 + 1];
  int64_t begin = int64_t(blockIdx.x) * kScanChunk;
  Out sum = 0, total;
  for (int i = 0; i < kScanItems; ++i) {
    int64_t at = begin + i * kScanThreads + threadIdx.x;
    if (at < n) sum += Out(in[at]);
  }
  scan_block(sum, shared, total);
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// A block writes the running sums of one chunk, a thread those of kScanItems neighbours; before[chunk] is what the chunk starts from.
template <typename Out, typename In>
__global__ void __launch_bounds__(kScanThreads) scan_chunks(Out* out, const In* in, int64_t n, const Out* before) {
  __shared__ Out shared[kScanThreads / 32 + 1];
  int64_t begin = int64_t(blockIdx.x) * kScanChunk + int64_t(threadIdx.x) * kScanItems;
  Out own[kScanItems], sum = 0, total;
#pragma unroll
  for (int i = 0; i < kScanItems; ++i) {
    own[i] = begin + i < n ? Out(in[begin + i]) : Out(0);
    sum += own[i];
  }
  Out running = scan_block(sum, shared, total) + (before ? before[blockIdx.x] : Out(0));
#pragma unroll
  for (int i = 0; i < kScanItems; ++i) {
    if (begin + i <= n) out[begin + i] = running;
    running += own[i];
  }
}

// out[i] = in[0] + .. + in[i - 1] for i in 0 .. n: n + 1 values. Three passes: sums of chunks, their running sums, all running sums.
template <typename Out, typename In>
void exclusive_scan(Out* out, const In* in, int64_t n, Stream stream) {
  int64_t chunks = n / kScanChunk + 1;  // of the n + 1 outputs
  if (chunks == 1) return launch(scan_chunks<Out, In>, 1, kScanThreads, 0, stream, out, in, n, static_cast<const Out*>(nullptr));
  Scratch<Out> totals(chunks, stream), before(chunks + 1, stream);
  launch(sum_chunks<Out, In>, unsigned(chunks), kScanThreads, 0, stream, totals.get(), in, n);
  exclusive_scan<Out, Out>(before, totals, chunks, stream);
  launch(scan_chunks<Out, In>, unsigned(chunks), kScanThreads, 0, stream, out, in, n, static_cast<const Out*>(before));
}

}  // namespace hstu::cuda
