#include "norm.h"

#include <cmath>

#include "vector_math.h"

namespace hstu::cpu {
namespace {

#define HSTU_LAMBDA_INLINE __attribute__((always_inline))

template <typename T>
constexpr int kLanes = 128 / sizeof(T);

template <typename T>
HSTU_VECTOR_INLINE T sum_of_lanes(T* lanes) {
#pragma GCC unroll 8
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Calls add(lane, element, counts) for every element of a row of n, by whole groups of lanes. The last group ends at n and overlaps the
// one before, whose elements do not count (no partial vector passes through memory); a row shorter than the lanes is one short group.
template <typename T, typename Add>
HSTU_VECTOR_INLINE void for_lanes(int64_t n, Add add) {
  constexpr int kWidth = kLanes<T>;
  if (n < kWidth) {
    for (int l = 0; l < int(n); ++l) add(l, int64_t(l), true);
    return;
  }
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    for (int l = 0; l < kWidth; ++l) add(l, i + l, true);
  if (i == n) return;
  int known = kWidth - int(n - i);
  for (int l = 0; l < kWidth; ++l) add(l, n - kWidth + l, l >= known);
}

template <typename T>
HSTU_CLONES RowStatistics<T> statistics_of(const T* x, int64_t n, T eps) {
  T sum[kLanes<T>] = {}, squares[kLanes<T>] = {};
  for_lanes<T>(n, [&](int l, int64_t i, bool counts) HSTU_LAMBDA_INLINE { sum[l] += counts ? x[i] : T(0); });
  T mean = sum_of_lanes(sum) / T(n);
  for_lanes<T>(n, [&](int l, int64_t i, bool counts) HSTU_LAMBDA_INLINE {
    T distance = counts ? x[i] - mean : T(0);
    squares[l] += distance * distance;
  });
  return {mean, T(1) / std::sqrt(sum_of_lanes(squares) / T(n) + eps)};
}

template <typename T>
HSTU_CLONES void normalize(T* y, const T* x, T mean, T rstd, const T* weight, const T* bias, int64_t n) {
  if (weight)
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
  else
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd;
}

template <typename T, bool kWeighted, bool kAccumulate>
HSTU_VECTOR_INLINE void gradient_row(T* dx, const T* dy, const T* x, T mean, T rstd, const T* weight, T mean_g, T mean_gx,
                                     int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T g = kWeighted ? dy[i] * weight[i] : dy[i];
    T d = rstd * (g - mean_g - (x[i] - mean) * rstd * mean_gx);
    dx[i] = kAccumulate ? dx[i] + d : d;
  }
}

template <typename T, bool kWeighted, bool kAccumulate>
HSTU_CLONES void backward(T* dx, T* dweight, T* dbias, const T* dy, const T* x, T mean, T rstd, const T* weight, int64_t n) {
  T plain[kLanes<T>] = {}, scaled[kLanes<T>] = {};
  for_lanes<T>(n, [&](int l, int64_t i, bool counts) HSTU_LAMBDA_INLINE {
    T g = kWeighted ? dy[i] * weight[i] : dy[i];
    plain[l] += counts ? g : T(0);
    scaled[l] += counts ? g * ((x[i] - mean) * rstd) : T(0);
  });
  if (dweight)
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      dweight[i] += dy[i] * ((x[i] - mean) * rstd);
      dbias[i] += dy[i];
    }
  T mean_g = sum_of_lanes(plain) / T(n), mean_gx = sum_of_lanes(scaled) / T(n);
  gradient_row<T, kWeighted, kAccumulate>(dx, dy, x, mean, rstd, weight, mean_g, mean_gx, n);
}

}  // namespace

template <typename T>
RowStatistics<T> row_statistics(const T* x, int64_t n, double eps) {
  return statistics_of<T>(x, n, T(eps));
}

template <typename T>
void normalize_row(T* y, const T* x, RowStatistics<T> s, const T* weight, const T* bias, int64_t n) {
  normalize<T>(y, x, s.mean, s.rstd, weight, bias, n);
}

template <typename T>
void norm_row_backward(T* dx, T* dweight, T* dbias, const T* dy, const T* x, RowStatistics<T> s, const T* weight, int64_t n,
                       bool accumulate) {
  auto* run = weight ? (accumulate ? backward<T, true, true> : backward<T, true, false>)
                     : (accumulate ? backward<T, false, true> : backward<T, false, false>);
  run(dx, dweight, dbias, dy, x, s.mean, s.rstd, weight, n);
}

#define HSTU_INSTANTIATE(T)                                                                                          \
  template RowStatistics<T> row_statistics<T>(const T*, int64_t, double);                                           \
  template void normalize_row<T>(T*, const T*, RowStatistics<T>, const T*, const T*, int64_t);                       \
  template void norm_row_backward<T>(T*, T*, T*, const T*, const T*, RowStatistics<T>, const T*, int64_t, bool);
HSTU_INSTANTIATE(float)
HSTU_INSTANTIATE(double)

}  // namespace hstu::cpu
