// Layer norm of one row, shared by the ops that contain one. A row's sums run over a fixed number of lanes that are then added as
// a tree, so its bits depend on the row alone.
#pragma once
#include <cstdint>

#include "gemm.h"

namespace hstu::cpu {

template <typename T>
struct RowStatistics {
  T mean, rstd;  // rstd = 1 / sqrt(var + eps), var the mean of the squared distances from the mean
};

template <typename T>
RowStatistics<T> row_statistics(const T* x, int64_t n, double eps);

// y = (x - mean) rstd weight + bias; weight and bias [n], both or neither. y may be x.
template <typename T>
void normalize_row(T* y, const T* x, RowStatistics<T> statistics, const T* weight, const T* bias, int64_t n);

// With g = dy weight and xhat = (x - mean) rstd:  dx = rstd (g - mean(g) - xhat mean(g xhat)), added to dx where `accumulate`.
// dweight += dy xhat and dbias += dy where they are given (both or neither; weight may be null either way). dx may be dy.
template <typename T>
void norm_row_backward(T* dx, T* dweight, T* dbias, const T* dy, const T* x, RowStatistics<T> statistics, const T* weight,
                       int64_t n, bool accumulate = false);

// body(begin, end, dweight_sum, dbias_sum) over blocks of `grain` rows with all threads, for norm_row_backward: the sums are the
// block's own, zeroed; null where dweight and dbias are. They are added up in order of the blocks.
template <typename T, typename Body>
void norm_backward_blocks(T* dweight, T* dbias, int64_t rows, int64_t n, int64_t grain, Body&& body) {
  Scratch<T> partial(dweight ? (rows + grain - 1) / grain * 2 * n : 0, true);
  parallel_blocks(rows, grain, [&](int64_t begin, int64_t end) {
    T* sums = dweight ? partial + begin / grain * 2 * n : nullptr;
    body(begin, end, sums, sums ? sums + n : nullptr);
  });
  if (!dweight) return;
  column_sums<T>(dweight, partial, 2 * n, (rows + grain - 1) / grain, n);
  column_sums<T>(dbias, partial + n, 2 * n, (rows + grain - 1) / grain, n);
}

constexpr int64_t kNormRows = 128;  // rows a task of a row-wise op takes

}  // namespace hstu::cpu
