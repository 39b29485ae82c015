#include "../dispatch.h"
#include "../ops.h"
#include "norm.h"

namespace hstu::cpu {

void layer_norm(Tensor& y, const Tensor& x, const Tensor* weight, const Tensor* bias, double eps, Stream) {
  HSTU_CHECK(!weight == !bias, kInvalidArgument, "layer_norm: weight and bias go together");
  pick_float("layer_norm", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t n = x.cols();
    parallel_blocks(x.rows(), kNormRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = x.as<T>() + i * n;
        normalize_row<T>(y.as<T>() + i * n, row, row_statistics<T>(row, n, eps), data_or_null<T>(weight), data_or_null<T>(bias),
                         n);
      }
    });
  });
}

void layer_norm_backward(Tensor& dx, Tensor* dweight, Tensor* dbias, const Tensor& dy, const Tensor& x, const Tensor* weight,
                         double eps, Stream) {
  HSTU_CHECK(!dweight == !dbias, kInvalidArgument, "layer_norm_backward: dweight and dbias go together");
  pick_float("layer_norm_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t n = x.cols();
    auto body = [&](int64_t begin, int64_t end, T* dweight_sum, T* dbias_sum) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = x.as<T>() + i * n;
        norm_row_backward<T>(dx.as<T>() + i * n, dweight_sum, dbias_sum, dy.as<T>() + i * n, row, row_statistics<T>(row, n, eps),
                             data_or_null<T>(weight), n);
      }
    };
    norm_backward_blocks<T>(data_or_null<T>(dweight), data_or_null<T>(dbias), x.rows(), n, kNormRows, body);
  });
}

}  // namespace hstu::cpu
