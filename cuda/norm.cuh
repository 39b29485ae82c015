// Layer norm over rows, shared by the ops that contain one. A row belongs to a warp up to kWarpWidth columns and to a block beyond;
// its sums depend on the row alone. Statistics are those of the CPU: mean, then the mean of squared distances from it, in float32. A
// row is read again for each pass and not kept (but by norm_backward_once_kernel): 32 rows of a warp's width fit L1, and registers stay
// free for the pass at hand.
#pragma once
#include <algorithm>

#include "column_sums.cuh"
#include "row_vector.cuh"

namespace hstu::cuda {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32, kWarpWidth = 1024;

// The threads that share a row: `threads` of them (32 or kRowThreads), this one being `lane`.
struct RowTeam {
  int lane, threads;
  // Rows that the block's teams take side by side, and which of them this team takes.
  int teams, index;
};
__device__ __forceinline__ RowTeam row_team(int64_t n) {
  if (n <= kWarpWidth) return {int(threadIdx.x) % 32, 32, kRowWarps, int(threadIdx.x) / 32};
  return {int(threadIdx.x), kRowThreads, 1, 0};
}
inline dim3 row_blocks(int64_t rows, int64_t n) { return dim3(unsigned(n <= kWarpWidth ? ceil_div(rows, kRowWarps) : rows)); }

// Sum over the team, known to all of it: a tree over the lanes, then the warps in order. Every thread of the team calls it.
template <typename A>
__device__ __forceinline__ A row_sum(A x, const RowTeam& team) {
  __shared__ A warps[kRowWarps];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullWarp, x, lane);
  if (team.threads == 32) return x;
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  A sum = 0;
#pragma unroll
  for (int warp = 0; warp < kRowWarps; ++warp) sum += warps[warp];
  return sum;
}

struct RowStatistics {
  float mean, rstd;  // rstd = 1 / sqrt(var + eps)
};

template <int kCount, typename T>
__device__ __forceinline__ RowStatistics row_statistics(const T* x, int64_t n, float eps, const RowTeam& team) {
  float v[kCount], sum = 0.f, squares = 0.f;
  for (int64_t j = team.lane * kCount; j < n; j += team.threads * kCount) {
    load(v, x + j);
#pragma unroll
    for (int e = 0; e < kCount; ++e) sum += v[e];
  }
  float mean = row_sum(sum, team) / float(n);
  for (int64_t j = team.lane * kCount; j < n; j += team.threads * kCount) {
    load(v, x + j);
#pragma unroll
    for (int e = 0; e < kCount; ++e) squares += (v[e] - mean) * (v[e] - mean);
  }
  return {mean, 1.f / sqrtf(row_sum(squares, team) / float(n) + eps)};
}

// v = v weight + bias at column j; nothing where they are null.
template <int kCount, typename T>
__device__ __forceinline__ void scale_and_shift(float (&v)[kCount], const T* weight, const T* bias, int64_t j) {
  if (!weight) return;
  float w[kCount], b[kCount];
  load(w, weight + j);
  load(b, bias + j);
#pragma unroll
  for (int e = 0; e < kCount; ++e) v[e] = v[e] * w[e] + b[e];
}

// y = (x - mean) rstd weight + bias. A team owns a row; a thread every threads-th vector of it.
template <typename T, int kCount>
__global__ void __launch_bounds__(kRowThreads)
    normalize_rows_kernel(T* y, const T* x, const T* weight, const T* bias, int64_t rows, int64_t n, float eps) {
  RowTeam team = row_team(n);
  int64_t row = int64_t(blockIdx.x) * team.teams + team.index;
  if (row >= rows) return;
  RowStatistics statistics = row_statistics<kCount>(x + row * n, n, eps, team);
  for (int64_t j = team.lane * kCount; j < n; j += team.threads * kCount) {
    float v[kCount];
    load(v, x + row * n + j);
#pragma unroll
    for (float& value : v) value = (value - statistics.mean) * statistics.rstd;
    scale_and_shift(v, weight, bias, j);
    store(y + row * n + j, v);
  }
}

// weight and bias [n]: both or neither.
template <typename T>
void normalize_rows(T* y, const T* x, const T* weight, const T* bias, int64_t rows, int64_t n, double eps, Stream stream) {
  pick_vector<T>(aligned(y, n) && aligned(x, n) && aligned(weight, n) && aligned(bias, n), [&](auto kCount) {
    launch(normalize_rows_kernel<T, kCount>, row_blocks(rows, n), dim3(kRowThreads), 0, stream, y, x, weight, bias, rows, n, float(eps));
  });
}

// Asks for a row of n elements to be in L2 soon.
template <typename T>
__device__ __forceinline__ void prefetch_row(const T* row, int64_t n, const RowTeam& team) {
  constexpr int kSector = 32 / sizeof(T);
  for (int64_t j = team.lane * kSector; j < n; j += team.threads * kSector) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + j));
}

// The gradient at the output of a layer norm, where it is simply dy. What norm_backward asks of a Source:
// gradient<kFirst>(dnorm, past, row, j, x, xhat) gives dnorm, the gradient at the norm's output (after weight and bias), and past, what
// reaches x by another way, for kCount columns from j on. It is called twice for each element, first with kFirst.
// prefetch(row, team), where there is one, asks for what a row will read. Where `past` is 0 and dnorm rows of a matrix [rows, n], the
// source may give that, dnorms(), and what else is to be done for an element, once(row, j, xhat): then gradient() is not called.
template <typename T>
struct PlainGradient {
  const T* dy;
  int64_t n;
  __host__ __device__ const T* dnorms() const { return dy; }
  template <int kCount>
  __device__ __forceinline__ void once(int64_t, int64_t, const float (&)[kCount]) const {}
  __device__ __forceinline__ void prefetch(int64_t row, const RowTeam& team) const { prefetch_row(dy + row * n, n, team); }
  template <bool kFirst, int kCount>
  __device__ __forceinline__ void gradient(float (&dnorm)[kCount], float (&past)[kCount], int64_t row, int64_t j, const float (&)[kCount],
                                           const float (&)[kCount]) const {
    load(dnorm, dy + row * n + j);
#pragma unroll
    for (float& value : past) value = 0.f;
  }
};

// With xhat = (x - mean) rstd and g = dnorm weight:  dx = past + rstd (g - mean(g) - xhat mean(g xhat)). dx may be the source's dy: a
// thread reads what it then writes. A block owns rows_per_block rows, a team every teams-th of them. partial [blocks, 2, n] (or null)
// gets the block's sums of dnorm xhat and of dnorm: a team adds them up in shared memory, [teams, 2, n], where each element has one
// thread; rows too wide for that belong to the whole block, which adds to its rows of `partial` in the same way.
template <typename T, int kCount, typename Source>
__global__ void __launch_bounds__(kRowThreads, 2)
    norm_backward_kernel(T* dx, float* partial, const __grid_constant__ Source source, const T* x, const T* weight, int64_t rows,
                         int64_t rows_per_block, int64_t n, float eps) {
  extern __shared__ __align__(16) float norm_shared[];
  RowTeam team = row_team(n);
  float* block_sums = partial ? partial + int64_t(blockIdx.x) * 2 * n : nullptr;
  float* sums = partial && team.teams > 1 ? norm_shared + team.index * 2 * n : block_sums;
  if (sums) {
    for (int64_t j = team.lane; j < 2 * n; j += team.threads) sums[j] = 0.f;
    __syncthreads();
  }
  int64_t end = min(int64_t(blockIdx.x + 1) * rows_per_block, rows);
  for (int64_t row = int64_t(blockIdx.x) * rows_per_block + team.index; row < end; row += team.teams) {
    if (int64_t next = row + team.teams; next < end) {
      prefetch_row(x + next * n, n, team);
      if constexpr (requires { source.prefetch(next, team); }) source.prefetch(next, team);
    }
    RowStatistics statistics = row_statistics<kCount>(x + row * n, n, eps, team);
    float xs[kCount], xhat[kCount], dnorm[kCount], past[kCount], w[kCount];
    float sum = 0.f, along = 0.f;
    auto visit = [&](int64_t j, auto kFirst) {
      load(xs, x + row * n + j);
#pragma unroll
      for (int e = 0; e < kCount; ++e) xhat[e] = (xs[e] - statistics.mean) * statistics.rstd, w[e] = 1.f;
      if (weight) load(w, weight + j);
      source.template gradient<kFirst.value>(dnorm, past, row, j, xs, xhat);
    };
    for (int64_t j = team.lane * kCount; j < n; j += team.threads * kCount) {
      visit(j, std::true_type{});
#pragma unroll
      for (int e = 0; e < kCount; ++e) sum += dnorm[e] * w[e], along += dnorm[e] * w[e] * xhat[e];
      if (sums) {
        float total[kCount];
        load(total, sums + j);
#pragma unroll
        for (int e = 0; e < kCount; ++e) total[e] += dnorm[e] * xhat[e];
        store(sums + j, total);
        load(total, sums + n + j);
#pragma unroll
        for (int e = 0; e < kCount; ++e) total[e] += dnorm[e];
        store(sums + n + j, total);
      }
    }
    sum = row_sum(sum, team) / float(n);
    along = row_sum(along, team) / float(n);
    for (int64_t j = team.lane * kCount; j < n; j += team.threads * kCount) {
      visit(j, std::false_type{});
#pragma unroll
      for (int e = 0; e < kCount; ++e) past[e] += statistics.rstd * (dnorm[e] * w[e] - sum - xhat[e] * along);
      store(dx + row * n + j, past);
    }
  }
  if (!partial || team.teams == 1) return;
  __syncthreads();
  for (int64_t j = threadIdx.x; j < 2 * n; j += kRowThreads) {
    float total = 0.f;
    for (int i = 0; i < team.teams; ++i) total += norm_shared[i * 2 * n + j];
    block_sums[j] = total;
  }
}

// The same for rows of at most 32 kPieces vectors where the source gives dnorm as a matrix: a lane reads a row once, and ahead.
template <typename T, int kPieces, typename Source>
__global__ void __launch_bounds__(kRowThreads, 3)
    norm_backward_once_kernel(T* dx, float* partial, const __grid_constant__ Source source, const T* x, const T* weight, int rows,
                              int rows_per_block, int n, float eps) {
  constexpr int kCount = kVector<T>;
  extern __shared__ __align__(16) float norm_shared[];
  RowTeam team = row_team(n);
  float* sums = norm_shared + team.index * 2 * n;
  if (partial)
    for (int j = team.lane; j < 2 * n; j += 32) sums[j] = 0.f;
  __syncwarp();
  auto column = [&](int p) { return (team.lane + 32 * p) * kCount; };
  uint4 x_bits[kPieces], dy_bits[kPieces];
  auto read = [&](int row) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      x_bits[p] = dy_bits[p] = uint4{0, 0, 0, 0};
      if (column(p) >= n) continue;
      x_bits[p] = *reinterpret_cast<const uint4*>(x + int64_t(row) * n + column(p));
      dy_bits[p] = *reinterpret_cast<const uint4*>(source.dnorms() + int64_t(row) * n + column(p));
    }
  };
  auto widen = [](float(&to)[kPieces][kCount], const uint4(&bits)[kPieces]) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) load(to[p], reinterpret_cast<const T*>(&bits[p]));
  };
  int row = blockIdx.x * rows_per_block + team.index, end = min(int(blockIdx.x + 1) * rows_per_block, rows);
  if (row < end) read(row);
  for (; row < end; row += team.teams) {
    float v[kPieces][kCount], dnorm[kPieces][kCount], w[kCount], total = 0.f, squares = 0.f, sum = 0.f, along = 0.f;
    auto weigh = [&](int j) {
#pragma unroll
      for (float& value : w) value = 1.f;
      if (weight) load(w, weight + j);
    };
    widen(v, x_bits), widen(dnorm, dy_bits);
    if (row + team.teams < end) read(row + team.teams);
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
#pragma unroll
      for (float value : v[p]) total += value;
    float mean = row_sum(total, team) / float(n);
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
#pragma unroll
      for (float& value : v[p]) {
        value -= mean;
        if (column(p) < n) squares += value * value;
      }
    float rstd = 1.f / sqrtf(row_sum(squares, team) / float(n) + eps);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      int j = column(p);
#pragma unroll
      for (float& value : v[p]) value *= rstd;
      if (j >= n) continue;
      source.once(row, j, v[p]);
      if (partial) {
        float own[kCount];
        load(own, sums + j);
#pragma unroll
        for (int e = 0; e < kCount; ++e) own[e] += dnorm[p][e] * v[p][e];
        store(sums + j, own);
        load(own, sums + n + j);
#pragma unroll
        for (int e = 0; e < kCount; ++e) own[e] += dnorm[p][e];
        store(sums + n + j, own);
      }
      weigh(j);
#pragma unroll
      for (int e = 0; e < kCount; ++e) sum += dnorm[p][e] * w[e], along += dnorm[p][e] * w[e] * v[p][e];
    }
    sum = row_sum(sum, team) / float(n);
    along = row_sum(along, team) / float(n);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (column(p) >= n) continue;
      weigh(column(p));
      float past[kCount] = {};
#pragma unroll
      for (int e = 0; e < kCount; ++e) past[e] += rstd * (dnorm[p][e] * w[e] - sum - v[p][e] * along);
      store(dx + int64_t(row) * n + column(p), past);
    }
  }
  if (!partial) return;
  __syncthreads();
  for (int j = threadIdx.x; j < 2 * n; j += kRowThreads) {
    float total = 0.f;
    for (int i = 0; i < team.teams; ++i) total += norm_shared[i * 2 * n + j];
    partial[int64_t(blockIdx.x) * 2 * n + j] = total;
  }
}

// dweight and dbias [n]: both or neither; weight may be null either way. `wide`: everything the source reads and writes is aligned.
template <typename T, typename Source>
void norm_backward(T* dx, T* dweight, T* dbias, const Source& source, bool wide, const T* x, const T* weight, int64_t rows, int64_t n,
                   double eps, Stream stream) {
  int64_t rows_per_block = std::max<int64_t>(2 * kRowWarps, ceil_div(rows, 1024));
  int64_t blocks = ceil_div(rows, rows_per_block);
  Scratch<float> partial(dweight ? blocks * 2 * n : 0, stream);
  size_t shared = dweight && n <= kWarpWidth ? size_t(kRowWarps) * 2 * n * sizeof(float) : 0;
  pick_vector<T>(wide && aligned(dx, n) && aligned(x, n) && aligned(weight, n), [&](auto kCount) {
    if constexpr (sizeof(T) == 2 && kCount > 1 && requires { source.dnorms(); })
      if (n <= 64 * kCount && rows <= INT_MAX / 2)
        return launch(n <= 32 * kCount ? norm_backward_once_kernel<T, 1, Source> : norm_backward_once_kernel<T, 2, Source>,
                      dim3(unsigned(blocks)), dim3(kRowThreads), shared, stream, dx, partial.get(), source, x, weight, int(rows),
                      int(rows_per_block), int(n), float(eps));
    launch(norm_backward_kernel<T, kCount, Source>, dim3(unsigned(blocks)), dim3(kRowThreads), shared, stream, dx, partial.get(), source, x,
           weight, rows, rows_per_block, n, float(eps));
  });
  if (!dweight) return;
  add_partials<T>(dweight, partial, 2 * n, blocks, n, stream);
  add_partials<T>(dbias, partial + n, 2 * n, blocks, n, stream);
}

}  // namespace hstu::cuda
