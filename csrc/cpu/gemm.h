// Matrix product of the CPU backend, float32 and float64. Every element of C is one FMA chain over k in ascending order, whatever the
// tile, the tail or the number of threads, so a row's bits do not depend on its neighbours.
#pragma once
#include <cstdint>

#include "scratch.h"
#include "threads.h"

namespace hstu::cpu {

// Element (i, j) stands at data[i * row + j * col]: transposes are strides.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row, col;
};

// B is packed into panels of this many columns, [K][kPanel], the last one zero-filled.
template <typename T>
constexpr int kPanel = 128 / sizeof(T);

template <typename T>
int64_t packed_size(int64_t k, int64_t n) {
  return (n + kPanel<T> - 1) / kPanel<T> * kPanel<T> * k;
}

template <typename T>
void pack(T* packed, Matrix<T> b, int64_t k, int64_t n);

// C[m, n] = A[m, k] packed_b (+ C), on the calling thread. c has row stride ldc.
template <typename T>
void multiply(T* c, int64_t ldc, Matrix<T> a, const T* packed_b, int64_t m, int64_t n, int64_t k, bool accumulate);

constexpr int64_t kRowBlock = 96;  // rows of C a task takes

// C = A B with all threads; `finish(row0, rows)` runs on each block of rows as it is done, while it is in cache.
template <typename T, typename Finish>
void gemm(T* c, int64_t ldc, Matrix<T> a, Matrix<T> b, int64_t m, int64_t n, int64_t k, Finish&& finish) {
  Scratch<T> packed(packed_size<T>(k, n));
  int64_t panels = (n + kPanel<T> - 1) / kPanel<T>;
  parallel_blocks(panels, 4, [&](int64_t begin, int64_t end) {
    int64_t column = begin * kPanel<T>, columns = end * kPanel<T> < n ? end * kPanel<T> - column : n - column;
    pack<T>(packed + column * k, Matrix<T>{b.data + column * b.col, b.row, b.col}, k, columns);
  });
  parallel_blocks(m, kRowBlock, [&](int64_t begin, int64_t end) {
    multiply<T>(c + begin * ldc, ldc, Matrix<T>{a.data + begin * a.row, a.row, a.col}, packed, end - begin, n, k, false);
    finish(begin, end - begin);
  });
}

// C[m, n] = A^T B summed over `k` rows (a weight gradient): A is [k, m], B is [k, n], both row-major with strides lda, ldb. The only
// split over k: blocks of kSplit rows in fixed places, added in order.
template <typename T>
void weight_gradient(T* c, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t m, int64_t n, int64_t k);

// out[j] = sum over rows of x[rows, cols], in the same fixed blocks.
template <typename T>
void column_sums(T* out, const T* x, int64_t ldx, int64_t rows, int64_t cols);

}  // namespace hstu::cpu
