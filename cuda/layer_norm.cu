#include "norm.cuh"

namespace hstu::cuda {

void layer_norm(Tensor& y, const Tensor& x, const Tensor* weight, const Tensor* bias, double eps, Stream stream) {
  HSTU_CHECK(!weight == !bias, kInvalidArgument, "layer_norm: weight and bias go together");
  pick_dtype("layer_norm", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    normalize_rows<T>(y.as<T>(), x.as<T>(), data_or_null<T>(weight), data_or_null<T>(bias), x.rows(), x.cols(), eps, stream);
  });
}

void layer_norm_backward(Tensor& dx, Tensor* dweight, Tensor* dbias, const Tensor& dy, const Tensor& x, const Tensor* weight, double eps,
                         Stream stream) {
  HSTU_CHECK(!dweight == !dbias, kInvalidArgument, "layer_norm_backward: dweight and dbias go together");
  pick_dtype("layer_norm_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t n = x.cols();
    PlainGradient<T> source{dy.as<T>(), n};
    norm_backward<T>(dx.as<T>(), data_or_null<T>(dweight), data_or_null<T>(dbias), source, aligned(source.dy, n), x.as<T>(),
                     data_or_null<T>(weight), x.rows(), n, eps, stream);
  });
}

}  // namespace hstu::cuda
