// Losses of elements [M, K] that are averaged task by task; Loss gives value(z, y) and its derivative (math.h). Sums are made in double and
// in a fixed order.
#pragma once
#include "map.cuh"

namespace hstu::cuda {

constexpr int kLossThreads = 256;        // also the most tasks
constexpr int64_t kLossRows = 1024;      // rows of a block

struct WeightedSum {
  double loss, weight;
};

// A block sums kLossRows rows. Neighbouring threads take neighbouring elements; a thread stays with one task, thread k < K adds up those
// of task k. sums [blocks, K].
template <typename Loss, typename T>
__global__ void __launch_bounds__(kLossThreads)
    sum_losses(WeightedSum* sums, const T* logits, const float* labels, const float* weights, int64_t rows, int tasks) {
  __shared__ WeightedSum shared[kLossThreads];
  const int lanes = kLossThreads / tasks, lane = threadIdx.x / tasks, task = threadIdx.x % tasks;
  int64_t begin = int64_t(blockIdx.x) * kLossRows, end = min(begin + kLossRows, rows);
  WeightedSum sum = {0, 0};
  if (lane < lanes) {
#pragma unroll 4
    for (int64_t row = begin + lane; row < end; row += lanes) {
      int64_t i = row * tasks + task;
      float weight = weights ? weights[i] : 1.f;
      if (weight == 0.f) continue;
      sum.loss += double(weight) * double(Loss::value(to_float(logits[i]), labels[i]));
      sum.weight += double(weight);
    }
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= tasks) return;
  for (int other = 1; other < lanes; ++other) {
    sum.loss += shared[other * tasks + task].loss;
    sum.weight += shared[other * tasks + task].weight;
  }
  sums[int64_t(blockIdx.x) * tasks + task] = sum;
}

// A warp owns a task and adds the blocks' sums, each lane every 32nd.
template <typename = void>
__global__ void __launch_bounds__(32) finish_losses(float* loss, float* weight_sum, const WeightedSum* sums, int64_t blocks, int tasks) {
  WeightedSum total = {0, 0};
  for (int64_t block = threadIdx.x; block < blocks; block += 32) {
    WeightedSum sum = sums[block * tasks + blockIdx.x];
    total.loss += sum.loss;
    total.weight += sum.weight;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    total.loss += __shfl_xor_sync(kFullWarp, total.loss, distance);
    total.weight += __shfl_xor_sync(kFullWarp, total.weight, distance);
  }
  if (threadIdx.x > 0) return;
  loss[blockIdx.x] = total.weight == 0 ? 0.f : float(total.loss / total.weight);
  weight_sum[blockIdx.x] = float(total.weight);
}

template <typename Loss, typename T>
struct LossGradient {
  T* dlogits;
  const T* logits;
  const float *dloss, *weight_sum, *labels, *weights;
  int64_t tasks;
  template <int kN>
  __device__ void at(int64_t i) const {
    int64_t task = i % tasks;
    float weight = weights ? weights[i] : 1.f, total = weight_sum[task];
    bool counts = weight != 0.f && total != 0.f;
    float gradient = counts ? dloss[task] / total * weight * Loss::derivative(to_float(logits[i]), labels[i]) : 0.f;
    dlogits[i] = from_float<T>(gradient);
  }
};

template <typename Loss>
void pointwise_loss(const char* op, Tensor& loss, Tensor& weight_sum, const Tensor& logits, const Tensor& labels, const Tensor* weights,
                    Stream stream) {
  pick_dtype(op, logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t tasks = loss.size(), rows = tasks == 0 ? 0 : logits.size() / tasks, blocks = ceil_div(rows, kLossRows);
    HSTU_CHECK(tasks <= kLossThreads, kInvalidArgument, op, ": at most ", kLossThreads, " tasks on CUDA, got ", tasks);
    Scratch<WeightedSum> sums(blocks * tasks, stream);
    launch(sum_losses<Loss, T>, unsigned(blocks), kLossThreads, 0, stream, sums.get(), logits.as<T>(), labels.as<float>(),
           data_or_null<float>(weights), rows, int(tasks));
    launch(finish_losses<>, unsigned(tasks), 32, 0, stream, loss.as<float>(), weight_sum.as<float>(), sums.get(), blocks, int(tasks));
  });
}

template <typename Loss>
void pointwise_loss_backward(const char* op, Tensor& dlogits, const Tensor& dloss, const Tensor& weight_sum, const Tensor& logits,
                             const Tensor& labels, const Tensor* weights, Stream stream) {
  pick_dtype(op, logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    LossGradient<Loss, T> fn{dlogits.as<T>(),         logits.as<T>(),    dloss.as<float>(),
                             weight_sum.as<float>(), labels.as<float>(), data_or_null<float>(weights), dloss.size()};
    map<1>(logits.size(), true, fn, stream);
  });
}

}  // namespace hstu::cuda
