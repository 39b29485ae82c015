#include "../dispatch.h"
#include "../ops.h"
#include "norm.h"
#include "vector_math.h"

namespace hstu::cpu {
namespace {

// y = x sigmoid(y), y holding the normalised row.
template <typename T>
HSTU_CLONES void gate(T* y, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * vsigmoid(y[i]);
}
template void gate<float>(float*, const float*, int64_t);
template void gate<double>(double*, const double*, int64_t);

// z comes in as the normalised row and leaves as its gradient; dx gets the part that flows past the norm.
template <typename T>
HSTU_CLONES void gate_backward(T* dx, T* z, const T* dy, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    T s = vsigmoid(z[i]);
    dx[i] = dy[i] * s;
    z[i] = dy[i] * x[i] * (s * (T(1) - s));
  }
}
template void gate_backward<float>(float*, float*, const float*, const float*, int64_t);
template void gate_backward<double>(double*, double*, const double*, const double*, int64_t);

}  // namespace

void swish_layer_norm(Tensor& y, const Tensor& x, const Tensor* weight, const Tensor* bias, double eps, Stream) {
  HSTU_CHECK(!weight == !bias, kInvalidArgument, "swish_layer_norm: weight and bias go together");
  pick_float("swish_layer_norm", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t n = x.cols();
    parallel_blocks(x.rows(), kNormRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = x.as<T>() + i * n;
        T* result = y.as<T>() + i * n;
        normalize_row<T>(result, row, row_statistics<T>(row, n, eps), data_or_null<T>(weight), data_or_null<T>(bias), n);
        gate<T>(result, row, n);
      }
    });
  });
}

void swish_layer_norm_backward(Tensor& dx, Tensor* dweight, Tensor* dbias, const Tensor& dy, const Tensor& x, const Tensor* weight,
                               const Tensor* bias, double eps, Stream) {
  HSTU_CHECK(!weight == !bias, kInvalidArgument, "swish_layer_norm_backward: weight and bias go together");
  HSTU_CHECK(!dweight == !dbias, kInvalidArgument, "swish_layer_norm_backward: dweight and dbias go together");
  pick_float("swish_layer_norm_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t n = x.cols();
    auto body = [&](int64_t begin, int64_t end, T* dweight_sum, T* dbias_sum) {
      Scratch<T> z(n);
      for (int64_t i = begin; i < end; ++i) {
        const T* row = x.as<T>() + i * n;
        auto statistics = row_statistics<T>(row, n, eps);
        normalize_row<T>(z, row, statistics, data_or_null<T>(weight), data_or_null<T>(bias), n);
        gate_backward<T>(dx.as<T>() + i * n, z, dy.as<T>() + i * n, row, n);
        norm_row_backward<T>(dx.as<T>() + i * n, dweight_sum, dbias_sum, z, row, statistics, data_or_null<T>(weight), n, true);
      }
    };
    norm_backward_blocks<T>(data_or_null<T>(dweight), data_or_null<T>(dbias), x.rows(), n, kNormRows, body);
  });
}

}  // namespace hstu::cpu
