#include "../dispatch.h"
#include "../ops.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

template <typename T>
HSTU_CLONES void multiply_rows(T* y, const T* a, const T* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = a[i] * b[i];
}
template void multiply_rows<float>(float*, const float*, const float*, int64_t);
template void multiply_rows<double>(double*, const double*, const double*, int64_t);

template <typename T>
HSTU_CLONES void multiply_rows_backward(T* da, T* db, const T* dy, const T* a, const T* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    da[i] = dy[i] * b[i];
    db[i] = dy[i] * a[i];
  }
}
template void multiply_rows_backward<float>(float*, float*, const float*, const float*, const float*, int64_t);
template void multiply_rows_backward<double>(double*, double*, const double*, const double*, const double*, int64_t);

}  // namespace

void mul(Tensor& y, const Tensor& a, const Tensor& b, Stream) {
  pick_float("mul", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_blocks(y.size(), 1 << 14, [&](int64_t begin, int64_t end) {
      multiply_rows<T>(y.as<T>() + begin, a.as<T>() + begin, b.as<T>() + begin, end - begin);
    });
  });
}

void mul_backward(Tensor& da, Tensor& db, const Tensor& dy, const Tensor& a, const Tensor& b, Stream) {
  pick_float("mul_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_blocks(dy.size(), 1 << 14, [&](int64_t begin, int64_t end) {
      multiply_rows_backward<T>(da.as<T>() + begin, db.as<T>() + begin, dy.as<T>() + begin, a.as<T>() + begin, b.as<T>() + begin,
                                end - begin);
    });
  });
}

}  // namespace hstu::cpu
