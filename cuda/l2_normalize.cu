#include "norm.cuh"

namespace hstu::cuda {
namespace {

// <a, b> of a row, in float64: no finite float32 row overflows or underflows, and the work is far below the row's traffic.
template <int kCount, typename T>
__device__ __forceinline__ double row_dot(const T* a, const T* b, int64_t n, const RowTeam& team) {
  double sum = 0;
  for (int64_t j = team.lane * kCount; j < n; j += team.threads * kCount) {
    float left[kCount], right[kCount];
    load(left, a + j);
    load(right, b + j);
#pragma unroll
    for (int e = 0; e < kCount; ++e) sum += double(left[e]) * double(right[e]);
  }
  return row_sum(sum, team);
}

// y = x / max(|x|, eps). A team owns a row; a thread every threads-th vector of it.
template <typename T, int kCount>
__global__ void __launch_bounds__(kRowThreads) l2_normalize_kernel(T* y, const T* x, int64_t rows, int64_t n, double eps) {
  RowTeam team = row_team(n);
  int64_t row = int64_t(blockIdx.x) * team.teams + team.index;
  if (row >= rows) return;
  double norm = sqrt(row_dot<kCount>(x + row * n, x + row * n, n, team)), inverse = 1 / (norm < eps ? eps : norm);
  for (int64_t j = team.lane * kCount; j < n; j += team.threads * kCount) {
    float v[kCount];
    load(v, x + row * n + j);
#pragma unroll
    for (float& value : v) value = float(double(value) * inverse);
    store(y + row * n + j, v);
  }
}

// dx = (dy - x <x, dy> / |x|^2) / |x|, and dy / eps below eps. Owners as above.
template <typename T, int kCount>
__global__ void __launch_bounds__(kRowThreads)
    l2_normalize_backward_kernel(T* dx, const T* dy, const T* x, int64_t rows, int64_t n, double eps) {
  RowTeam team = row_team(n);
  int64_t row = int64_t(blockIdx.x) * team.teams + team.index;
  if (row >= rows) return;
  double norm = sqrt(row_dot<kCount>(x + row * n, x + row * n, n, team)), inverse = 1 / (norm < eps ? eps : norm);
  double along = row_dot<kCount>(x + row * n, dy + row * n, n, team);
  along = norm < eps ? 0 : along * inverse * inverse;
  for (int64_t j = team.lane * kCount; j < n; j += team.threads * kCount) {
    float v[kCount], gradient[kCount];
    load(v, x + row * n + j);
    load(gradient, dy + row * n + j);
#pragma unroll
    for (int e = 0; e < kCount; ++e) v[e] = float((double(gradient[e]) - double(v[e]) * along) * inverse);
    store(dx + row * n + j, v);
  }
}

}  // namespace

void l2_normalize(Tensor& y, const Tensor& x, double eps, Stream stream) {
  pick_dtype("l2_normalize", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = x.rows(), n = x.cols();
    pick_vector<T>(aligned(y.as<T>(), n) && aligned(x.as<T>(), n), [&](auto kCount) {
      launch(l2_normalize_kernel<T, kCount>, row_blocks(rows, n), dim3(kRowThreads), 0, stream, y.as<T>(), x.as<T>(), rows, n, eps);
    });
  });
}

void l2_normalize_backward(Tensor& dx, const Tensor& dy, const Tensor& x, double eps, Stream stream) {
  pick_dtype("l2_normalize_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = x.rows(), n = x.cols();
    pick_vector<T>(aligned(dx.as<T>(), n) && aligned(dy.as<T>(), n) && aligned(x.as<T>(), n), [&](auto kCount) {
      launch(l2_normalize_backward_kernel<T, kCount>, row_blocks(rows, n), dim3(kRowThreads), 0, stream, dx.as<T>(), dy.as<T>(), x.as<T>(),
             rows, n, eps);
    });
  });
}

}  // namespace hstu::cuda
