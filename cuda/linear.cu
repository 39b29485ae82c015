#include "gemm_kernel.cuh"

namespace hstu::cuda {

// The products of all dense ops are compiled here, once.
#define HSTU_INSTANTIATE(T)                                                                                             \
  template void gemm<T>(const GemmOutput<T>&, Matrix<T>, Matrix<T>, bool, int64_t, int64_t, int64_t, Stream);           \
  template void weight_gradient<T>(T*, Matrix<T>, Matrix<T>, int64_t, int64_t, int64_t, Stream);
HSTU_INSTANTIATE(float)
HSTU_INSTANTIATE(__nv_bfloat16)
HSTU_INSTANTIATE(__half)
#undef HSTU_INSTANTIATE

void linear(Tensor& y, Tensor* z, const Tensor& x, const Tensor& w, const Tensor* bias, const Tensor* residual, Activation activation,
            Stream stream) {
  pick_dtype("linear", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = x.rows(), in = x.cols(), out = w.cols();
    GemmOutput<T> output;
    output.parts[0] = {y.as<T>(), 0, out};
    output.bias = data_or_null<T>(bias);
    output.residual = data_or_null<T>(residual);
    output.z = data_or_null<T>(z);
    output.activation = activation;
    output.n = out;
    gemm<T>(output, {x.as<T>(), in}, {w.as<T>(), out}, false, rows, out, in, stream);
  });
}

void linear_backward(Tensor* dx, Tensor* dw, Tensor* dbias, const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor* z,
                     Activation activation, Stream stream) {
  pick_dtype("linear_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = x.rows(), in = x.cols(), out = w.cols();
    bool plain = activation == Activation::kNone;
    HSTU_CHECK(plain || z, kInvalidArgument, "linear_backward: z is wanted for an activation");
    Scratch<T> scratch(plain ? 0 : rows * out, stream);
    const T* dz = plain ? dy.as<T>() : scratch.get();  // [rows, out]
    if (!plain) {
      GemmOutput<const T> gradient;
      gradient.parts[0] = {dy.as<T>(), 0, out};
      gradient.activation = activation;
      gradient.n = out;
      activation_backward<T>(scratch, gradient, z->as<T>(), rows, stream);
    }
    if (dx) {
      GemmOutput<T> output;
      output.parts[0] = {dx->as<T>(), 0, in};
      output.n = in;
      gemm<T>(output, {dz, out}, {w.as<T>(), out}, true, rows, in, out, stream);
    }
    if (dw) weight_gradient<T>(dw->as<T>(), {x.as<T>(), in}, {dz, out}, in, out, rows, stream);
    if (dbias) column_sums<T>(dbias->as<T>(), dz, rows, out, stream);
  });
}

}  // namespace hstu::cuda
