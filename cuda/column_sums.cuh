// Sums down the columns of a matrix: fixed blocks of rows into float32 partial sums, then the partial sums in a fixed order. How rows
// are cut into blocks depends on their number alone, so the bits are the same run to run and on every device.
#pragma once
#include <algorithm>

#include "common.cuh"

namespace hstu::cuda {

constexpr int kSumColumns = 32, kSumLanes = 8;

// A block owns kSumColumns columns, a warp of it every kSumLanes-th row: 128 bytes of a row a load, eight loads in flight.
// out[column] = lane 0 + lane 1 + ..., each lane's rows in ascending order. blockIdx.y takes rows of its own and writes out row
// blockIdx.y.
template <typename T, typename Out>
__global__ void __launch_bounds__(kSumColumns * kSumLanes)
    column_sums_kernel(Out* out, const T* x, int64_t stride, int64_t rows, int64_t rows_per_block, int64_t cols) {
  __shared__ float sums[kSumLanes][kSumColumns];
  int64_t column = int64_t(blockIdx.x) * kSumColumns + threadIdx.x;
  int64_t begin = int64_t(blockIdx.y) * rows_per_block, end = min(begin + rows_per_block, rows);
  float sum = 0.f;
  if (column < cols) {
#pragma unroll 4
    for (int64_t row = begin + threadIdx.y; row < end; row += kSumLanes) sum += to_float(x[row * stride + column]);
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= cols) return;
  float total = 0.f;
  for (int lane = 0; lane < kSumLanes; ++lane) total += sums[lane][threadIdx.x];
  out[int64_t(blockIdx.y) * cols + column] = from_float<Out>(total);
}

// out[j] = sum over p of partial[p * stride + j], in a fixed order.
template <typename T>
void add_partials(T* out, const float* partial, int64_t stride, int64_t count, int64_t n, Stream stream) {
  launch(column_sums_kernel<float, T>, dim3(unsigned(ceil_div(n, kSumColumns))), dim3(kSumColumns, kSumLanes), 0, stream, out, partial,
         stride, count, count, n);
}

// out[j] = sum over rows of x[rows, cols].
template <typename T>
void column_sums(T* out, const T* x, int64_t rows, int64_t cols, Stream stream) {
  int64_t rows_per_block = std::max<int64_t>(64, ceil_div(rows, 512));
  int64_t blocks = std::max<int64_t>(1, ceil_div(rows, rows_per_block));
  Scratch<float> partial(blocks * cols, stream);
  launch(column_sums_kernel<T, float>, dim3(unsigned(ceil_div(cols, kSumColumns)), unsigned(blocks)), dim3(kSumColumns, kSumLanes), 0,
         stream, partial.get(), x, cols, rows, rows_per_block, cols);
  add_partials<T>(out, partial, cols, blocks, cols, stream);
}

}  // namespace hstu::cuda
