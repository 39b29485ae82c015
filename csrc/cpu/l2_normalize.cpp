#include <cmath>

#include "../dispatch.h"
#include "../ops.h"
#include "threads.h"
#include "vector_math.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kRows = 128;  // rows a task takes
constexpr int kLanes = 16;      // partial sums of a row

// Sum of a b over a row in float64, so that no finite float32 row overflows or underflows; fixed lanes, then a tree. The last group
// of lanes ends at n and overlaps the one before, whose elements it leaves out.
template <typename T>
HSTU_VECTOR_INLINE double dot(const T* a, const T* b, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += double(a[i + l]) * double(b[i + l]);
  if (i == 0) {
    for (int l = 0; l < int(n); ++l) lanes[l] = double(a[l]) * double(b[l]);
  } else if (i < n) {
    const T *tail_a = a + n - kLanes, *tail_b = b + n - kLanes;
    int known = kLanes - int(n - i);
    for (int l = 0; l < kLanes; ++l) lanes[l] += l < known ? 0 : double(tail_a[l]) * double(tail_b[l]);
  }
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

template <typename T>
HSTU_CLONES void normalize(T* y, const T* x, double eps, int64_t n) {
  double norm = std::sqrt(dot(x, x, n)), inverse = 1 / (norm < eps ? eps : norm);
  for (int64_t i = 0; i < n; ++i) y[i] = T(double(x[i]) * inverse);
}
template void normalize<float>(float*, const float*, double, int64_t);
template void normalize<double>(double*, const double*, double, int64_t);

// dx = (dy - x <x, dy> / |x|^2) / |x|, and dy / eps below eps.
template <typename T>
HSTU_CLONES void normalize_backward(T* dx, const T* dy, const T* x, double eps, int64_t n) {
  double norm = std::sqrt(dot(x, x, n)), inverse = 1 / (norm < eps ? eps : norm);
  double along = norm < eps ? 0 : dot(x, dy, n) * inverse * inverse;
  for (int64_t i = 0; i < n; ++i) dx[i] = T((double(dy[i]) - double(x[i]) * along) * inverse);
}
template void normalize_backward<float>(float*, const float*, const float*, double, int64_t);
template void normalize_backward<double>(double*, const double*, const double*, double, int64_t);

}  // namespace

void l2_normalize(Tensor& y, const Tensor& x, double eps, Stream) {
  pick_float("l2_normalize", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t n = x.cols();
    parallel_blocks(x.rows(), kRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) normalize<T>(y.as<T>() + i * n, x.as<T>() + i * n, eps, n);
    });
  });
}

void l2_normalize_backward(Tensor& dx, const Tensor& dy, const Tensor& x, double eps, Stream) {
  pick_float("l2_normalize_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t n = x.cols();
    parallel_blocks(x.rows(), kRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        normalize_backward<T>(dx.as<T>() + i * n, dy.as<T>() + i * n, x.as<T>() + i * n, eps, n);
    });
  });
}

}  // namespace hstu::cpu
