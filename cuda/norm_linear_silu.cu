#include "gemm.cuh"
#include "norm.cuh"

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

}  // namespace

// The norm is a pass of its own into scratch memory, in the operands' dtype, which the tensor cores would round it to anyway.
void norm_linear_silu(Tensor& u, Tensor& v, Tensor& q, Tensor& k, Tensor* z, const Tensor& x, const Tensor& w, const Tensor* bias,
                      const Tensor* norm_weight, const Tensor* norm_bias, double eps, bool silu_all, Stream stream) {
  pick_dtype("norm_linear_silu", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = x.rows(), d = x.cols(), columns = w.cols();
    int64_t hv = u.shape[1] * u.shape[2], hd = q.shape[1] * q.shape[2];
    Scratch<T> norm(rows * d, stream);  // [T, d]
    normalize_rows<T>(norm, x.as<T>(), data_or_null<T>(norm_weight), data_or_null<T>(norm_bias), rows, d, eps, stream);
    GemmOutput<T> output = columns_of(u.as<T>(), v.as<T>(), q.as<T>(), k.as<T>(), hv, hd, silu_all);
    output.bias = data_or_null<T>(bias);
    output.z = data_or_null<T>(z);
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
    activation_backward<T>(dz, gradient, z.as<T>(), rows, stream);
    normalize_rows<T>(norm, x.as<T>(), data_or_null<T>(norm_weight), data_or_null<T>(norm_bias), rows, d, eps, stream);
    weight_gradient<T>(dw.as<T>(), {norm, d}, {dz, columns}, d, columns, rows, stream);
    if (dbias) column_sums<T>(dbias->as<T>(), dz, rows, columns, stream);
    // dx holds the gradient at the norm's output until the norm's own backward replaces it.
    GemmOutput<T> output;
    output.parts[0] = {dx.as<T>(), 0, d};
    output.n = d;
    gemm<T>(output, {dz, columns}, {w.as<T>(), columns}, true, rows, d, columns, stream);
    PlainGradient<T> source{dx.as<T>(), d};
    norm_backward<T>(dx.as<T>(), data_or_null<T>(dnorm_weight), data_or_null<T>(dnorm_bias), source, aligned(source.dy, d), x.as<T>(),
                     data_or_null<T>(norm_weight), rows, d, eps, stream);
  });
}

}  // namespace hstu::cuda
