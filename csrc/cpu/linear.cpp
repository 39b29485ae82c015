#include "../dispatch.h"
#include "../math.h"
#include "../ops.h"
#include "gemm.h"
#include "vector_math.h"

namespace hstu::cpu {
namespace {

// y = activation(y + bias) + residual on one row, z = the value before the activation.
template <typename T>
HSTU_CLONES void finish_row(T* y, T* z, const T* bias, const T* residual, int64_t n, Activation activation) {
  if (bias)
    for (int64_t j = 0; j < n; ++j) y[j] += bias[j];
  if (z)
    for (int64_t j = 0; j < n; ++j) z[j] = y[j];
  if (activation == Activation::kSilu)
    for (int64_t j = 0; j < n; ++j) y[j] = y[j] * vsigmoid(y[j]);
  else if (activation == Activation::kRelu)
    for (int64_t j = 0; j < n; ++j) y[j] = y[j] > T(0) ? y[j] : T(0);
  else if (activation == Activation::kGelu)
    for (int64_t j = 0; j < n; ++j) y[j] = gelu(y[j]);
  if (residual)
    for (int64_t j = 0; j < n; ++j) y[j] += residual[j];
}
template void finish_row<float>(float*, float*, const float*, const float*, int64_t, Activation);
template void finish_row<double>(double*, double*, const double*, const double*, int64_t, Activation);

template <typename T>
HSTU_CLONES void activation_backward(T* dz, const T* dy, const T* z, int64_t n, Activation activation) {
  if (activation == Activation::kSilu)
    for (int64_t j = 0; j < n; ++j) {
      T s = vsigmoid(z[j]);
      dz[j] = dy[j] * (s * (T(1) + z[j] * (T(1) - s)));
    }
  else if (activation == Activation::kRelu)
    for (int64_t j = 0; j < n; ++j) dz[j] = z[j] > T(0) ? dy[j] : T(0);
  else
    for (int64_t j = 0; j < n; ++j) dz[j] = dy[j] * gelu_derivative(z[j]);
}
template void activation_backward<float>(float*, const float*, const float*, int64_t, Activation);
template void activation_backward<double>(double*, const double*, const double*, int64_t, Activation);

}  // namespace

void linear(Tensor& y, Tensor* z, const Tensor& x, const Tensor& w, const Tensor* bias, const Tensor* residual,
            Activation activation, Stream) {
  pick_float("linear", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = x.rows(), in = x.cols(), out = w.cols();
    T* result = y.as<T>();
    T* before = data_or_null<T>(z);
    const T* added = data_or_null<T>(residual);
    gemm<T>(result, out, {x.as<T>(), in, 1}, {w.as<T>(), out, 1}, rows, out, in, [&](int64_t row0, int64_t count) {
      for (int64_t i = row0; i < row0 + count; ++i)
        finish_row<T>(result + i * out, before ? before + i * out : nullptr, data_or_null<T>(bias),
                      added ? added + i * out : nullptr, out, activation);
    });
  });
}

void linear_backward(Tensor* dx, Tensor* dw, Tensor* dbias, const Tensor& dy, const Tensor& x, const Tensor& w,
                     const Tensor* z, Activation activation, Stream) {
  pick_float("linear_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = x.rows(), in = x.cols(), out = w.cols();
    bool plain = activation == Activation::kNone;
    HSTU_CHECK(plain || z, kInvalidArgument, "linear_backward: z is wanted for an activation");
    Scratch<T> scratch(plain ? 0 : rows * out);
    const T* dz = plain ? dy.as<T>() : scratch.get();
    if (!plain)
      parallel_blocks(rows * out, 1 << 14, [&](int64_t begin, int64_t end) {
        activation_backward<T>(scratch + begin, dy.as<T>() + begin, z->as<T>() + begin, end - begin, activation);
      });
    if (dx) gemm<T>(dx->as<T>(), in, {dz, out, 1}, {w.as<T>(), 1, out}, rows, in, out, [](int64_t, int64_t) {});
    if (dw) weight_gradient<T>(dw->as<T>(), x.as<T>(), in, dz, out, in, out, rows);
    if (dbias) column_sums<T>(dbias->as<T>(), dz, out, rows, out);
  });
}

}  // namespace hstu::cpu
