#include "tensor_batch.cuh"

namespace hstu::cuda {
namespace {

constexpr int kFinishThreads = 1024;

// Sum over a block in a fixed order, known to thread 0. In double, as all sums here: squares leave the range of float32.
__device__ __forceinline__ double sum_of_block(double x) {
  __shared__ double shared[32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  if (warp > 0) return 0;
  x = lane < warps ? shared[lane] : 0.0;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

template <typename T>
struct Squares {
  const T* x;
  double sum = 0;
  template <int kN>
  __device__ __forceinline__ void at(int64_t i) {
    Vector<T, kN> values = load<kN>(x + i);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      double value = double(to_float(values.at[j]));
      sum += value * value;
    }
  }
};

template <typename T>
struct Scale {
  T* x;
  float factor;
  template <int kN>
  __device__ __forceinline__ void at(int64_t i) const {
    Vector<T, kN> values = load<kN>(x + i);
#pragma unroll
    for (int j = 0; j < kN; ++j) values.at[j] = from_float<T>(to_float(values.at[j]) * factor);
    store(x + i, values);
  }
};

// A block adds the squares of one chunk of one tensor.
template <typename T>
__global__ void __launch_bounds__(kBatchThreads) sum_squares(double* sums, const __grid_constant__ TensorBatch<1> batch) {
  int64_t begin, end;
  int i = batch.find(begin, end);
  Squares<T> squares{static_cast<const T*>(batch.data[0][i])};
  for_chunk<16 / sizeof(T)>(begin, end, reinterpret_cast<uintptr_t>(squares.x) % 16 == 0, squares);
  double total = sum_of_block(squares.sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// One block adds the chunks' sums, each thread every 1024th, and says by what to scale: 1 where nothing is to change.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish(T* norm, float* factor, const double* sums, int64_t count, double max_norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum += sums[i];
  sum = sum_of_block(sum);
  if (threadIdx.x > 0) return;
  double total = sqrt(sum), scale = max_norm / (total + 1e-6);
  *norm = from_float<T>(float(total));
  *factor = isfinite(total) && scale < 1 ? float(scale) : 1.f;
}

template <typename T>
__global__ void __launch_bounds__(kBatchThreads) scale_chunks(const float* factor, const __grid_constant__ TensorBatch<1> batch) {
  if (*factor == 1.f) return;
  int64_t begin, end;
  int i = batch.find(begin, end);
  Scale<T> scale{static_cast<T*>(batch.data[0][i]), *factor};
  for_chunk<16 / sizeof(T)>(begin, end, reinterpret_cast<uintptr_t>(scale.x) % 16 == 0, scale);
}

}  // namespace

void global_norm_clip(Tensor& norm, TensorList grads, double max_norm, Stream stream) {
  pick_dtype("global_norm_clip", norm.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t chunks = chunks_of(grads);
    Scratch<double> sums(chunks, stream);
    Scratch<float> factor(1, stream);
    for_each_batch<1>({&grads}, [&](const TensorBatch<1>& batch, int blocks, int64_t before) {
      launch(sum_squares<T>, unsigned(blocks), kBatchThreads, 0, stream, sums + before, batch);
    });
    launch(finish<T>, 1, kFinishThreads, 0, stream, norm.as<T>(), factor.get(), sums.get(), chunks, max_norm);
    for_each_batch<1>({&grads}, [&](const TensorBatch<1>& batch, int blocks, int64_t) {
      launch(scale_chunks<T>, unsigned(blocks), kBatchThreads, 0, stream, factor.get(), batch);
    });
  });
}

}  // namespace hstu::cuda
