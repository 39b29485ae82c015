#include "norm.cuh"
#include "norm_linear_silu.cuh"

namespace hstu::cuda {
namespace {

// Columns u, v, q, k of z, SiLU on all four or on u alone.
template <typename T>
GemmOutput<T> columns_of(T* u, T* v, T* q, T* k, int64_t hv, int64_t hd, bool silu_all) {
  GemmOutput<T> output;
  output.parts[0] = {u, 0, hv, true};
  output.parts[1] = {v, hv, hv, silu_all};
  output.parts[2] = {q, 2 * hv, hd, silu_all};
  output.parts[3] = {k, 2 * hv + hd, hd, silu_all};
  output.activation = Activation::kSilu;
  output.n = 2 * hv + 2 * hd;
  return output;
}

// The gradient dy at the norm's output; on its first visit an element also leaves the norm, which is made again for dw.
template <typename T>
struct NormGradient {
  PlainGradient<T> plain;
  const T *weight, *bias;
  T* norm;
  __host__ __device__ const T* dnorms() const { return plain.dy; }
  template <int kCount>
  __device__ __forceinline__ void once(int64_t row, int64_t j, const float (&xhat)[kCount]) const {
    float a[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) a[e] = xhat[e];
    scale_and_shift(a, weight, bias, j);
    store(norm + row * plain.n + j, a);
  }
  __device__ __forceinline__ void prefetch(int64_t row, const RowTeam& team) const { plain.prefetch(row, team); }
  template <bool kFirst, int kCount>
  __device__ __forceinline__ void gradient(float (&dnorm)[kCount], float (&past)[kCount], int64_t row, int64_t j, const float (&x)[kCount],
                                           const float (&xhat)[kCount]) const {
    plain.template gradient<kFirst>(dnorm, past, row, j, x, xhat);
    if constexpr (kFirst) once(row, j, xhat);
  }
};

}  // namespace

// The norm is a pass of its own into scratch memory, in the operands' dtype, which the tensor cores would round it to anyway.
void norm_linear_silu(Tensor& u, Tensor& v, Tensor& q, Tensor& k, Tensor* z, const Tensor& x, const Tensor& w, const Tensor* bias,
                      const Tensor* norm_weight, const Tensor* norm_bias, double eps, bool silu_all, Stream stream) {
  pick_dtype("norm_linear_silu", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = x.rows(), d = x.cols(), columns = w.cols();
    int64_t hv = u.shape[1] * u.shape[2], hd = q.shape[1] * q.shape[2];
    const T *weight = data_or_null<T>(norm_weight), *shift = data_or_null<T>(norm_bias);
    GemmOutput<T> output = columns_of(u.as<T>(), v.as<T>(), q.as<T>(), k.as<T>(), hv, hd, silu_all);
    output.bias = data_or_null<T>(bias);
    output.z = data_or_null<T>(z);
    Scratch<T> norm(rows * d, stream);  // [T, d]
    normalize_rows<T>(norm, x.as<T>(), weight, shift, rows, d, eps, stream);
    gemm<T>(output, {norm, d}, {w.as<T>(), columns}, false, rows, columns, d, stream);
  });
}

void norm_linear_silu_backward(Tensor& dx, Tensor& dw, Tensor* dbias, Tensor* dnorm_weight, Tensor* dnorm_bias, const Tensor& du,
                               const Tensor& dv, const Tensor& dq, const Tensor& dk, const Tensor& x, const Tensor& w,
                               const Tensor* norm_weight, const Tensor* norm_bias, const Tensor& z, double eps, bool silu_all,
                               Stream stream) {
  pick_dtype("norm_linear_silu_backward", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = x.rows(), d = x.cols(), columns = w.cols();
    int64_t hv = du.shape[1] * du.shape[2], hd = dq.shape[1] * dq.shape[2];
    Scratch<T> dz(rows * columns, stream), norm(rows * d, stream);
    GemmOutput<const T> gradient = columns_of<const T>(du.as<T>(), dv.as<T>(), dq.as<T>(), dk.as<T>(), hv, hd, silu_all);
    // dx holds the gradient at the norm's output until the norm's own backward replaces it.
    bool made = false;
    if constexpr (sizeof(T) == 2) made = activation_product_on_hopper<T>(dx.as<T>(), dz, gradient, z.as<T>(), w.as<T>(), rows, d, stream);
    if (!made) {
      activation_backward<T>(dz, gradient, z.as<T>(), rows, stream);
      GemmOutput<T> output;
      output.parts[0] = {dx.as<T>(), 0, d};
      output.n = d;
      gemm<T>(output, {dz, columns}, {w.as<T>(), columns}, true, rows, d, columns, stream);
    }
    if (dbias) column_sums<T>(dbias->as<T>(), dz, rows, columns, stream);
    const T *weight = data_or_null<T>(norm_weight), *shift = data_or_null<T>(norm_bias);
    NormGradient<T> source{{dx.as<T>(), d}, weight, shift, norm};
    bool wide = aligned(dx.as<T>(), d) && aligned(weight, d) && aligned(shift, d);
    norm_backward<T>(dx.as<T>(), data_or_null<T>(dnorm_weight), data_or_null<T>(dnorm_bias), source, wide, x.as<T>(), weight, rows, d, eps,
                     stream);
    weight_gradient<T>(dw.as<T>(), {norm, d}, {dz, columns}, d, columns, rows, stream);
  });
}

}  // namespace hstu::cuda
