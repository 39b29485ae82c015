#include "norm.cuh"

namespace hstu::cuda {
namespace {

// y = x sigmoid(LN(x)). A team owns a row; a thread every threads-th vector of it.
template <typename T, int kCount>
__global__ void __launch_bounds__(kRowThreads)
    swish_layer_norm_kernel(T* y, const T* x, const T* weight, const T* bias, int64_t rows, int64_t n, float eps) {
  RowTeam team = row_team(n);
  int64_t row = int64_t(blockIdx.x) * team.teams + team.index;
  if (row >= rows) return;
  RowStatistics statistics = row_statistics<kCount>(x + row * n, n, eps, team);
  for (int64_t j = team.lane * kCount; j < n; j += team.threads * kCount) {
    float xs[kCount], v[kCount];
    load(xs, x + row * n + j);
#pragma unroll
    for (int e = 0; e < kCount; ++e) v[e] = (xs[e] - statistics.mean) * statistics.rstd;
    scale_and_shift(v, weight, bias, j);
#pragma unroll
    for (int e = 0; e < kCount; ++e) v[e] = xs[e] * sigmoid(v[e]);
    store(y + row * n + j, v);
  }
}

// y = x s, s = sigmoid(z):  the norm's output z gets dy x s (1 - s), and dy s goes past it.
template <typename T>
struct SwishGradient {
  const T *dy, *weight, *bias;
  int64_t n;
  template <bool kFirst, int kCount>
  __device__ __forceinline__ void gradient(float (&dnorm)[kCount], float (&past)[kCount], int64_t row, int64_t j, const float (&x)[kCount],
                                           const float (&xhat)[kCount]) const {
    float z[kCount];
    load(dnorm, dy + row * n + j);
#pragma unroll
    for (int e = 0; e < kCount; ++e) z[e] = xhat[e];
    scale_and_shift(z, weight, bias, j);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      float s = sigmoid(z[e]);
      past[e] = dnorm[e] * s;
      dnorm[e] *= x[e] * (s * (1.f - s));
    }
  }
};

}  // namespace

void swish_layer_norm(Tensor& y, const Tensor& x, const Tensor* weight, const Tensor* bias, double eps, Stream stream) {
  HSTU_CHECK(!weight == !bias, kInvalidArgument, "swish_layer_norm: weight and bias go together");
  pick_dtype("swish_layer_norm", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = x.rows(), n = x.cols();
    T *to = y.as<T>(), *from = x.as<T>(), *scale = data_or_null<T>(weight), *shift = data_or_null<T>(bias);
    pick_vector<T>(aligned(to, n) && aligned(from, n) && aligned(scale, n) && aligned(shift, n), [&](auto kCount) {
      launch(swish_layer_norm_kernel<T, kCount>, row_blocks(rows, n), dim3(kRowThreads), 0, stream, to, from, scale, shift, rows, n,
             float(eps));
    });
  });
}

void swish_layer_norm_backward(Tensor& dx, Tensor* dweight, Tensor* dbias, const Tensor& dy, const Tensor& x, const Tensor* weight,
                               const Tensor* bias, double eps, Stream stream) {
  HSTU_CHECK(!weight == !bias, kInvalidArgument, "swish_layer_norm_backward: weight and bias go together");
  HSTU_CHECK(!dweight == !dbias, kInvalidArgument, "swish_layer_norm_backward: dweight and dbias go together");
  pick_dtype("swish_layer_norm_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t n = x.cols();
    SwishGradient<T> source{dy.as<T>(), data_or_null<T>(weight), data_or_null<T>(bias), n};
    norm_backward<T>(dx.as<T>(), data_or_null<T>(dweight), data_or_null<T>(dbias), source, aligned(source.dy, n) && aligned(source.bias, n),
                     x.as<T>(), source.weight, x.rows(), n, eps, stream);
  });
}

}  // namespace hstu::cuda
