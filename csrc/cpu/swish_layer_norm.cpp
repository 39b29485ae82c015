#include <algorithm>

#include "../dispatch.h"
#include "../ops.h"
#include "norm.h"
#include "vector_math.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kElements = 2048;  // normalised before they are gated: short rows share a call

int64_t rows_together(int64_t n) { return std::max<int64_t>(1, kElements / std::max<int64_t>(n, 1)); }

// y = x sigmoid(y), y holding the normalised rows.
template <typename T>
HSTU_CLONES void gate(T* y, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * vsigmoid(y[i]);
}
template void gate<float>(float*, const float*, int64_t);
template void gate<double>(double*, const double*, int64_t);

// z comes in as the normalised rows and leaves as its gradient; dx gets the part that flows past the norm.
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
      for (int64_t first = begin, count; first < end; first += count) {
        count = std::min(rows_together(n), end - first);
        for (int64_t i = first; i < first + count; ++i) {
          const T* row = x.as<T>() + i * n;
          normalize_row<T>(y.as<T>() + i * n, row, row_statistics<T>(row, n, eps), data_or_null<T>(weight), data_or_null<T>(bias),
                           n);
        }
        gate<T>(y.as<T>() + first * n, x.as<T>() + first * n, count * n);
      }
    });
  });
}

void swish_layer_norm_backward(Tensor& dx, Tensor* dweight, Tensor* dbias, const Tensor& dy, const Tensor& x,
                               const Tensor* weight, const Tensor* bias, double eps, Stream) {
  HSTU_CHECK(!weight == !bias, kInvalidArgument, "swish_layer_norm_backward: weight and bias go together");
  HSTU_CHECK(!dweight == !dbias, kInvalidArgument, "swish_layer_norm_backward: dweight and dbias go together");
  pick_float("swish_layer_norm_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t n = x.cols();
    auto body = [&](int64_t begin, int64_t end, T* dweight_sum, T* dbias_sum) {
      int64_t together = rows_together(n);
      Scratch<T> z(together * n);
      Scratch<RowStatistics<T>> statistics(together);
      for (int64_t first = begin, count; first < end; first += count) {
        count = std::min(together, end - first);
        const T* rows = x.as<T>() + first * n;
        for (int64_t i = 0; i < count; ++i) {
          statistics[i] = row_statistics<T>(rows + i * n, n, eps);
          normalize_row<T>(z + i * n, rows + i * n, statistics[i], data_or_null<T>(weight), data_or_null<T>(bias), n);
        }
        T* drows = dx.as<T>() + first * n;
        gate_backward<T>(drows, z, dy.as<T>() + first * n, rows, count * n);
        for (int64_t i = 0; i < count; ++i)
          norm_row_backward<T>(drows + i * n, dweight_sum, dbias_sum, z + i * n, rows + i * n, statistics[i],
                               data_or_null<T>(weight), n, true);
      }
    };
    norm_backward_blocks<T>(data_or_null<T>(dweight), data_or_null<T>(dbias), x.rows(), n, kNormRows, body);
  });
}

}  // namespace hstu::cpu
