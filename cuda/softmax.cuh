// What the softmax losses share on the device: the rows that count, the items' norms, the log-sum-exp of a row, the loss, and the way
// back through the normalisation.
#pragma once
#include <algorithm>

#include "common.cuh"

namespace hstu::cuda {

// Number of rows whose weight is not 0, and the sum of the weights.
struct LossTotals {
  int64_t count;
  double weight_sum;
};

// Sum over a block of kThreads in a fixed order, known to thread 0. `shared` holds kThreads numbers.
template <int kThreads>
__device__ double block_sum_double(double x, double* shared) {
  shared[threadIdx.x] = x;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  return shared[0];
}

constexpr int kCollectThreads = 1024;

// One block. Row i of the packed rows stands for position positions[i]: positions whose weight is not 0, ascending. All that follows
// sees packed rows alone, so that rows of weight 0 change no bit. Each thread takes 4 positions a round.
template <typename = void>
__global__ void __launch_bounds__(kCollectThreads)
    collect_rows(int32_t* positions, LossTotals* totals, const float* weights, int64_t rows) {
  __shared__ double sums[kCollectThreads];
  __shared__ int32_t warps[kCollectThreads / 32];
  constexpr int kEach = 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t count = 0;
  for (int64_t first = 0; first < rows; first += kCollectThreads * kEach) {
    int64_t begin = first + int64_t(threadIdx.x) * kEach;
    bool counts[kEach];
    int32_t mine = 0;
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      counts[n] = begin + n < rows && (!weights || weights[begin + n] != 0.f);
      mine += counts[n];
    }
    int32_t sum = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      int32_t below = __shfl_up_sync(kFullWarp, sum, step);
      if (lane >= step) sum += below;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    int64_t at = count + sum - mine;
    for (int w = 0; w < kCollectThreads / 32; ++w) {
      if (w < warp) at += warps[w];
      count += warps[w];
    }
#pragma unroll
    for (int n = 0; n < kEach; ++n)
      if (counts[n]) positions[at++] = int32_t(begin + n);
  }
  __syncthreads();  // positions are read by other threads than wrote them
  double weight = 0;
  for (int64_t i = threadIdx.x; i < count; i += kCollectThreads) weight += weights ? double(weights[positions[i]]) : 1.0;
  weight = block_sum_double<kCollectThreads>(weight, sums);
  if (threadIdx.x == 0) *totals = {count, weight};
}

// The packed rows of a call.
struct LossRows {
  LossRows(const char* op, const Tensor& query, const Tensor& table, const Tensor* weights, Stream stream)
      : total(query.rows()), weights(data_or_null<float>(weights)), positions(total, stream), totals(1, stream) {
    constexpr int64_t kLimit = INT32_MAX;
    HSTU_CHECK(total <= kLimit && table.rows() <= kLimit, kInvalidArgument, op, ": at most 2^31 - 1 rows and items, got ", total,
               " rows and ", table.rows(), " items");
    launch(collect_rows<>, 1, kCollectThreads, 0, stream, positions.get(), totals.get(), this->weights, total);
  }
  const int64_t total;
  const float* weights;
  Scratch<int32_t> positions;
  Scratch<LossTotals> totals;
};

__device__ __forceinline__ float weight_of(const float* weights, int64_t position) { return weights ? weights[position] : 1.f; }

// dloss / (sum of the weights * temperature); 0 where the sum is 0.
__device__ __forceinline__ float gradient_scale(const float* dloss, const LossTotals* totals, float temperature) {
  return totals->weight_sum == 0 ? 0.f : float(double(*dloss) / (totals->weight_sum * double(temperature)));
}

// One block: loss = sum of weight * losses / sum of weights, losses [packed rows].
template <typename = void>
__global__ void __launch_bounds__(kCollectThreads) finish_loss(float* loss, const float* losses, const int32_t* positions,
                                                               const float* weights, const LossTotals* totals) {
  __shared__ double sums[kCollectThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < totals->count; i += kCollectThreads)
    sum += double(weight_of(weights, positions[i])) * double(losses[i]);
  sum = block_sum_double<kCollectThreads>(sum, sums);
  if (threadIdx.x == 0) *loss = totals->weight_sum == 0 ? 0.f : float(sum / totals->weight_sum);
}

// Log-sum-exp online: the positive first, then the others that absorb() is shown. Lanes each keep one and are merged in a fixed order.
struct RowSum {
  float maximum, others;  // begins as {positive, 0}; others: sum of exp(logit - maximum)

  __device__ __forceinline__ void absorb(float logit) {
    if (logit > maximum) {
      others *= expf(maximum - logit);
      maximum = logit;
    }
    others += expf(logit - maximum);
  }
  __device__ __forceinline__ void rescale(float to) {
    others *= expf(maximum - to);
    maximum = to;
  }
  // lse - positive; it keeps its precision where the positive outweighs everything.
  __device__ __forceinline__ float loss(float positive) const {
    float above = maximum - positive;
    return above > 0 ? above + logf(expf(-above) + others) : above + log1pf(others);
  }
  __device__ __forceinline__ float lse(float positive) const {
    float above = maximum - positive;
    return maximum + (above > 0 ? logf(expf(-above) + others) : log1pf(others));
  }
};

// factors[i] = 1 / max(|row i|, eps): items are scored as they stand in the table and their scores multiplied, so that no normalised
// copy of the table is made and nothing of it is rounded. A warp owns a row.
template <typename T>
__global__ void __launch_bounds__(256) norm_factors(float* factors, const T* table, int64_t items, int64_t dims, float eps) {
  int64_t i = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
  if (i >= items) return;
  const T* row = table + i * dims;
  float sum = 0.f;
  for (int64_t c = threadIdx.x % 32; c < dims; c += 32) sum = fmaf(to_float(row[c]), to_float(row[c]), sum);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) factors[i] = 1.f / fmaxf(sqrtf(sum), eps);
}

// Factors of all items; null where they count as they are.
template <typename T>
struct NormFactors {
  NormFactors(const Tensor& table, bool normalize_items, double eps, Stream stream) : factors(normalize_items ? table.rows() : 0, stream) {
    if (normalize_items)
      launch(norm_factors<T>, unsigned(ceil_div(table.rows(), 8)), 256, 0, stream, factors.get(), table.as<T>(), table.rows(), table.cols(),
             float(eps));
  }
  Scratch<float> factors;  // [I]
};

__device__ __forceinline__ float factor_of(const float* factors, int64_t item) { return factors ? factors[item] : 1.f; }

// Where the partial gradients of an item's row lie: `count` rows, `stride` apart, to be added in order.
struct PartialRows {
  float* first;
  int64_t stride, count;
};

// dtable's row of an item, given partial sums of the gradient of its (normalised) row, less the factor gradient_scale; items without any
// get 0. Through y = x / max(|x|, eps): dx = (dy - y <y, dy>) / |x|, and dy / eps below eps. A warp owns a row and adds its partials up in
// the first of them.
template <typename T, typename Partials>
__global__ void __launch_bounds__(256)
    finish_table(T* dtable, Partials partials, const T* table, int64_t items, int64_t dims, const float* dloss, const LossTotals* totals,
                 float temperature, bool normalize, float eps) {
  int64_t i = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
  if (i >= items) return;
  const int lane = threadIdx.x % 32;
  PartialRows parts = partials(i);
  T* out = dtable + i * dims;
  if (parts.count == 0) {
    for (int64_t c = lane; c < dims; c += 32) out[c] = from_float<T>(0.f);
    return;
  }
  const T* row = table + i * dims;
  float projection = 0.f, squares = 0.f;
  for (int64_t c = lane; c < dims; c += 32) {
    float sum = parts.first[c], x = to_float(row[c]);
#pragma unroll 4
    for (int64_t n = 1; n < parts.count; ++n) sum += parts.first[n * parts.stride + c];
    parts.first[c] = sum;
    projection = fmaf(sum, x, projection);
    squares = fmaf(x, x, squares);
  }
  float factor = gradient_scale(dloss, totals, temperature), along = 0.f;
  if (normalize) {
    float norm = sqrtf(warp_sum(squares));
    projection = warp_sum(projection);
    if (norm > eps) along = projection / norm / norm;
    factor /= fmaxf(norm, eps);
  }
  for (int64_t c = lane; c < dims; c += 32) out[c] = from_float<T>((parts.first[c] - to_float(row[c]) * along) * factor);
}

}  // namespace hstu::cuda
