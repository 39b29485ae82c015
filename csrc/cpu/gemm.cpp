#include "gemm.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace hstu::cpu {
namespace {

#define HSTU_FORCE_INLINE inline __attribute__((always_inline))

template <typename T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes), aligned(sizeof(T))));
};

// kRows x (kVectors vectors of kBytes) of C in registers; one broadcast of A meets kVectors of B a step.
template <typename T, int kBytes, int kRows, int kVectors>
HSTU_FORCE_INLINE void micro_kernel(T* c, int64_t ldc, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t k, bool accumulate) {
  using Vector = typename VectorOf<T, kBytes>::type;
  constexpr int kLanes = kBytes / sizeof(T);
  Vector sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = accumulate ? *reinterpret_cast<const Vector*>(c + i * ldc + j * kLanes) : Vector{};
  for (int64_t p = 0; p < k; ++p, b += kPanel<T>, a += a_col) {
    Vector right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = *reinterpret_cast<const Vector*>(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      T left = a[i * a_row];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) *reinterpret_cast<Vector*>(c + i * ldc + j * kLanes) = sum[i][j];
}

// One panel of C: full tiles of kRows, then ever smaller ones; each element's chain is the same in all of them.
template <typename T, int kBytes, int kRows, int kVectors>
HSTU_FORCE_INLINE void panel_rows(T* c, int64_t ldc, Matrix<T> a, const T* b, int64_t m, int64_t k, bool accumulate) {
  constexpr int kWidth = kVectors * kBytes / int(sizeof(T));
  int64_t i = 0;
#define HSTU_ROWS(rows)                                                                                                      \
  for (; i + rows <= m; i += rows)                                                                                           \
    for (int column = 0; column < kPanel<T>; column += kWidth)                                                               \
      micro_kernel<T, kBytes, rows, kVectors>(c + i * ldc + column, ldc, a.data + i * a.row, a.row, a.col, b + column, k, accumulate);
  HSTU_ROWS(kRows)
  if constexpr (kRows > 8) HSTU_ROWS(8)
  if constexpr (kRows > 4) HSTU_ROWS(4)
  HSTU_ROWS(2)
  HSTU_ROWS(1)
#undef HSTU_ROWS
}

template <typename T>
using PanelKernel = void (*)(T*, int64_t, Matrix<T>, const T*, int64_t, int64_t, bool);

// Register budget: 32 zmm take 12 x 2 accumulators; 16 ymm or xmm take 6 x 2.
#define HSTU_PANEL(T, suffix)                                                                                                             \
  __attribute__((target("arch=x86-64-v4"))) void panel_avx512_##suffix(T* c, int64_t ldc, Matrix<T> a, const T* b, int64_t m, int64_t k,   \
                                                                       bool add) {                                                        \
    panel_rows<T, 64, 12, 2>(c, ldc, a, b, m, k, add);                                                                                     \
  }                                                                                                                                       \
  __attribute__((target("arch=x86-64-v3"))) void panel_avx2_##suffix(T* c, int64_t ldc, Matrix<T> a, const T* b, int64_t m, int64_t k,     \
                                                                     bool add) {                                                          \
    panel_rows<T, 32, 6, 2>(c, ldc, a, b, m, k, add);                                                                                      \
  }                                                                                                                                       \
  void panel_sse2_##suffix(T* c, int64_t ldc, Matrix<T> a, const T* b, int64_t m, int64_t k, bool add) {                                   \
    panel_rows<T, 16, 4, 2>(c, ldc, a, b, m, k, add);                                                                                      \
  }                                                                                                                                       \
  PanelKernel<T> choose(T) {                                                                                                              \
    if (__builtin_cpu_supports("x86-64-v4")) return panel_avx512_##suffix;                                                                \
    if (__builtin_cpu_supports("x86-64-v3")) return panel_avx2_##suffix;                                                                  \
    return panel_sse2_##suffix;                                                                                                           \
  }
HSTU_PANEL(float, f32)
HSTU_PANEL(double, f64)
#undef HSTU_PANEL

constexpr int64_t kDepth = 1024;   // rows of a B panel that stay in the second-level cache
constexpr int64_t kSplit = 2048;   // rows of one partial sum of a weight gradient

template <typename T>
HSTU_CLONES void add_into(T* sum, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}
template void add_into<float>(float*, const float*, int64_t);
template void add_into<double>(double*, const double*, int64_t);

// Swaps the off-diagonal s x s blocks of each 2s x 2s block; for s = 1, 2, 4 in turn this transposes.
template <int s, typename Vector, typename Mask, int... lane>
HSTU_FORCE_INLINE void swap_blocks(Vector* row, std::integer_sequence<int, lane...>) {
  constexpr int kLanes = sizeof...(lane);
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) {
    if (i & s) continue;
    Vector a = row[i], b = row[i + s];
    row[i] = __builtin_shuffle(a, b, Mask{(lane & s ? kLanes + lane - s : lane)...});
    row[i + s] = __builtin_shuffle(a, b, Mask{(lane & s ? kLanes + lane : lane + s)...});
  }
}

// to[p][j] = from[j][p] for p < k and a whole panel of j: the pack of a transposed matrix, in square blocks of 32-byte rows.
template <typename T>
HSTU_CLONES void transpose_panel(T* to, const T* from, int64_t ld, int64_t k) {
  using Vector = typename VectorOf<T, 32>::type;
  using Mask = typename VectorOf<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>, 32>::type;
  constexpr int kLanes = 32 / sizeof(T);
  for (int64_t j = 0; j < kPanel<T>; j += kLanes) {
    int64_t p = 0;
    for (; p + kLanes <= k; p += kLanes) {
      Vector row[kLanes];
      for (int i = 0; i < kLanes; ++i) row[i] = *reinterpret_cast<const Vector*>(from + (j + i) * ld + p);
      swap_blocks<1, Vector, Mask>(row, std::make_integer_sequence<int, kLanes>{});
      swap_blocks<2, Vector, Mask>(row, std::make_integer_sequence<int, kLanes>{});
      if constexpr (kLanes == 8) swap_blocks<4, Vector, Mask>(row, std::make_integer_sequence<int, kLanes>{});
      for (int i = 0; i < kLanes; ++i) *reinterpret_cast<Vector*>(to + (p + i) * kPanel<T> + j) = row[i];
    }
    for (; p < k; ++p)
      for (int i = 0; i < kLanes; ++i) to[p * kPanel<T> + j + i] = from[(j + i) * ld + p];
  }
}
template void transpose_panel<float>(float*, const float*, int64_t, int64_t);
template void transpose_panel<double>(double*, const double*, int64_t, int64_t);

}  // namespace

template <typename T>
void pack(T* packed, Matrix<T> b, int64_t k, int64_t n) {
  constexpr int kWidth = kPanel<T>;
  for (int64_t column = 0; column < n; column += kWidth) {
    int64_t width = std::min<int64_t>(kWidth, n - column);
    const T* source = b.data + column * b.col;
    if (b.col == 1 && width == kWidth) {
      for (int64_t p = 0; p < k; ++p) std::memcpy(packed + p * kWidth, source + p * b.row, kWidth * sizeof(T));
    } else if (b.row == 1 && width == kWidth) {
      transpose_panel<T>(packed, source, b.col, k);
    } else if (b.col == 1) {
      for (int64_t p = 0; p < k; ++p) {
        std::memcpy(packed + p * kWidth, source + p * b.row, width * sizeof(T));
        std::memset(packed + p * kWidth + width, 0, (kWidth - width) * sizeof(T));
      }
    } else {
      for (int64_t j = 0; j < width; ++j)
        for (int64_t p = 0; p < k; ++p) packed[p * kWidth + j] = source[p * b.row + j * b.col];
      for (int64_t j = width; j < kWidth; ++j)
        for (int64_t p = 0; p < k; ++p) packed[p * kWidth + j] = T(0);
    }
    packed += kWidth * k;
  }
}

template <typename T>
void multiply(T* c, int64_t ldc, Matrix<T> a, const T* packed_b, int64_t m, int64_t n, int64_t k, bool accumulate) {
  static const PanelKernel<T> kernel = choose(T{});
  constexpr int kWidth = kPanel<T>;
  if (k == 0) {
    if (!accumulate)
      for (int64_t i = 0; i < m; ++i) std::memset(c + i * ldc, 0, n * sizeof(T));
    return;
  }
  alignas(64) T edge[kRowBlock * kWidth];
  for (int64_t depth = 0; depth < k; depth += kDepth) {
    int64_t steps = std::min(kDepth, k - depth);
    bool add = accumulate || depth > 0;
    Matrix<T> left{a.data + depth * a.col, a.row, a.col};
    for (int64_t column = 0; column < n; column += kWidth) {
      const T* panel = packed_b + column * k + depth * kWidth;
      int64_t width = std::min<int64_t>(kWidth, n - column);
      if (width == kWidth) {
        kernel(c + column, ldc, left, panel, m, steps, add);
        continue;
      }
      for (int64_t row = 0; row < m; row += kRowBlock) {  // a narrow panel goes through a full-width buffer
        int64_t rows = std::min(kRowBlock, m - row);
        T* target = c + row * ldc + column;
        if (add)
          for (int64_t i = 0; i < rows; ++i) std::memcpy(edge + i * kWidth, target + i * ldc, width * sizeof(T));
        kernel(edge, kWidth, Matrix<T>{left.data + row * a.row, a.row, a.col}, panel, rows, steps, add);
        for (int64_t i = 0; i < rows; ++i) std::memcpy(target + i * ldc, edge + i * kWidth, width * sizeof(T));
      }
    }
  }
}

template <typename T>
void weight_gradient(T* c, const T* a, int64_t lda, const T* b, int64_t ldb, int64_t m, int64_t n, int64_t k) {
  int64_t splits = std::max<int64_t>(1, (k + kSplit - 1) / kSplit);
  Scratch<T> partial(splits * m * n);
  parallel_for(splits, [&](int64_t split) {
    int64_t begin = split * kSplit, rows = std::min(kSplit, k - begin);
    Scratch<T> packed(packed_size<T>(rows, n));
    pack<T>(packed, Matrix<T>{b + begin * ldb, ldb, 1}, rows, n);
    multiply<T>(partial + split * m * n, n, Matrix<T>{a + begin * lda, 1, lda}, packed, m, n, rows, false);
  });
  parallel_blocks(m * n, 4096, [&](int64_t begin, int64_t end) {
    std::memcpy(c + begin, partial + begin, (end - begin) * sizeof(T));
    for (int64_t split = 1; split < splits; ++split) add_into<T>(c + begin, partial + split * m * n + begin, end - begin);
  });
}

template <typename T>
void column_sums(T* out, const T* x, int64_t ldx, int64_t rows, int64_t cols) {
  int64_t splits = std::max<int64_t>(1, (rows + kSplit - 1) / kSplit);
  Scratch<T> partial(splits * cols, true);
  parallel_for(splits, [&](int64_t split) {
    int64_t end = std::min(rows, (split + 1) * kSplit);
    for (int64_t i = split * kSplit; i < end; ++i) add_into<T>(partial + split * cols, x + i * ldx, cols);
  });
  std::memcpy(out, partial, cols * sizeof(T));
  for (int64_t split = 1; split < splits; ++split) add_into<T>(out, partial + split * cols, cols);
}

#define HSTU_INSTANTIATE(T)                                                                                     \
  template void pack<T>(T*, Matrix<T>, int64_t, int64_t);                                                       \
  template void multiply<T>(T*, int64_t, Matrix<T>, const T*, int64_t, int64_t, int64_t, bool);                 \
  template void weight_gradient<T>(T*, const T*, int64_t, const T*, int64_t, int64_t, int64_t, int64_t);        \
  template void column_sums<T>(T*, const T*, int64_t, int64_t, int64_t);
HSTU_INSTANTIATE(float)
HSTU_INSTANTIATE(double)

}  // namespace hstu::cpu
