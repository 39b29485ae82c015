#include "pairs.h"

#include <algorithm>
#include <cmath>

#include "threads.h"
#include "vector_math.h"

namespace hstu::cpu {
namespace {

// 32 bytes in every clone: on AVX-512 hosts two of them a cycle keep up with the loads, and d = 50 wastes 6 lanes
// instead of 14.
template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
};

template <typename T>
HSTU_VECTOR_INLINE typename VectorOf<T>::type load(const T* x) {
  return *reinterpret_cast<const typename VectorOf<T>::type*>(x);
}

// Stores the vector as four sums.
HSTU_VECTOR_INLINE void store_four(double* out, const VectorOf<double>::type& v) {
  *reinterpret_cast<VectorOf<double>::type*>(out) = v;
}
HSTU_VECTOR_INLINE void store_four(float* out, const VectorOf<float>::type& v) {
  typedef float Half __attribute__((vector_size(16), aligned(4), may_alias));
  Half half[2];
  std::memcpy(half, &v, sizeof half);
  *reinterpret_cast<Half*>(out) = half[0] + half[1];
}

constexpr int kDots = 64;  // dot products whose four partial sums wait on the stack

template <typename T, int kRows>
HSTU_VECTOR_INLINE void partial_dots(T* partial, const T* query, const T* rows, int64_t width, const int32_t* ids) {
  typename VectorOf<T>::type sum[kRows] = {};
  const T* row[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) row[i] = rows + ids[i] * width;
  for (int64_t j = 0; j < width; j += kLanes<T>) {
    auto q = load(query + j);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) sum[i] += q * load(row[i] + j);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) store_four(partial + 4 * i, sum[i]);
}

template <typename T>
HSTU_CLONES void dots_kernel(T* out, const T* query, const T* rows, int64_t width, const int32_t* ids, int64_t count) {
  alignas(64) T partial[4 * kDots];
  for (int64_t first = 0; first < count; first += kDots) {
    int64_t n = std::min<int64_t>(kDots, count - first), i = 0;
    for (; i + 4 <= n; i += 4) partial_dots<T, 4>(partial + 4 * i, query, rows, width, ids + first + i);
    for (; i < n; ++i) partial_dots<T, 1>(partial + 4 * i, query, rows, width, ids + first + i);
    for (i = 0; i < n; ++i)
      out[first + i] = (partial[4 * i] + partial[4 * i + 1]) + (partial[4 * i + 2] + partial[4 * i + 3]);
  }
}
template void dots_kernel<float>(float*, const float*, const float*, int64_t, const int32_t*, int64_t);
template void dots_kernel<double>(double*, const double*, const double*, int64_t, const int32_t*, int64_t);

// kVectors vectors of the sum in registers while all terms go by.
template <typename T, int kVectors>
HSTU_VECTOR_INLINE void add_columns(T* sum, const T* rows, int64_t width, const Term<T>* terms, int64_t count) {
  typename VectorOf<T>::type total[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) total[v] = load(sum + v * kLanes<T>);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows + terms[i].row * width;
    T weight = terms[i].weight;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) total[v] += weight * load(row + v * kLanes<T>);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) *reinterpret_cast<typename VectorOf<T>::type*>(sum + v * kLanes<T>) = total[v];
}

template <typename T>
HSTU_CLONES void add_terms_kernel(T* sum, const T* rows, int64_t width, const Term<T>* terms, int64_t count) {
  int64_t j = 0;
  for (; j + 8 * kLanes<T> <= width; j += 8 * kLanes<T>) add_columns<T, 8>(sum + j, rows + j, width, terms, count);
  sum += j, rows += j;
  switch ((width - j) / kLanes<T>) {
    case 1: return add_columns<T, 1>(sum, rows, width, terms, count);
    case 2: return add_columns<T, 2>(sum, rows, width, terms, count);
    case 3: return add_columns<T, 3>(sum, rows, width, terms, count);
    case 4: return add_columns<T, 4>(sum, rows, width, terms, count);
    case 5: return add_columns<T, 5>(sum, rows, width, terms, count);
    case 6: return add_columns<T, 6>(sum, rows, width, terms, count);
    case 7: return add_columns<T, 7>(sum, rows, width, terms, count);
  }
}
template void add_terms_kernel<float>(float*, const float*, int64_t, const Term<float>*, int64_t);
template void add_terms_kernel<double>(double*, const double*, int64_t, const Term<double>*, int64_t);

// Divides a padded row by max(norm, eps) and returns its norm.
template <typename T>
HSTU_CLONES T normalize_row(T* row, int64_t width, T eps) {
  typename VectorOf<T>::type squares = {};
  for (int64_t j = 0; j < width; j += kLanes<T>) squares += load(row + j) * load(row + j);
  T four[4];
  store_four(four, squares);
  T norm = std::sqrt((four[0] + four[1]) + (four[2] + four[3])), divisor = norm < eps ? eps : norm;
  for (int64_t j = 0; j < width; ++j) row[j] /= divisor;
  return norm;
}
template float normalize_row<float>(float*, int64_t, float);
template double normalize_row<double>(double*, int64_t, double);

}  // namespace

template <typename T>
PaddedRows<T>::PaddedRows(const T* x, int64_t count, int64_t d, const int32_t* pick, bool normalize, double eps)
    : d(d),
      width((d + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
      copied_(pick || normalize || d != width),
      normalized_(normalize),
      rows_(copied_ ? count * width : 0),
      norms_(normalize ? count : 0),
      data_(copied_ ? rows_.get() : x) {
  if (!copied_) return;
  parallel_blocks(count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* row = rows_ + i * width;
      std::memcpy(row, x + (pick ? pick[i] : i) * d, d * sizeof(T));
      std::fill(row + d, row + width, T(0));
      if (normalize) norms_[i] = normalize_row<T>(row, width, T(eps));
    }
  });
}

template <typename T>
void dots(T* out, const T* query, const T* rows, int64_t width, const int32_t* ids, int64_t count) {
  dots_kernel<T>(out, query, rows, width, ids, count);
}

template <typename T>
void add_terms(T* sum, const T* rows, int64_t width, const Term<T>* terms, int64_t count) {
  add_terms_kernel<T>(sum, rows, width, terms, count);
}

// A stable counting sort in blocks of sources: each block counts its groups, the counts become places (by group, then
// by block), and each block puts its terms there. As many blocks as keep the counts no larger than the terms.
template <typename T>
GroupedTerms<T>::GroupedTerms(const Term<T>* terms, int64_t sources, int64_t each, int64_t groups)
    : terms_(sources * each), begin_(groups + 1) {
  constexpr int64_t kMaxBlocks = 64;
  int64_t wanted = std::clamp<int64_t>(sources * each / std::max<int64_t>(1, groups), 1, kMaxBlocks);
  int64_t grain = std::max<int64_t>(1, (sources + wanted - 1) / wanted), blocks = (sources + grain - 1) / grain;
  Scratch<int32_t> places(blocks * groups);
  parallel_blocks(sources, grain, [&](int64_t begin, int64_t end) {
    int32_t* counts = places + begin / grain * groups;
    std::fill(counts, counts + groups, 0);
    for (int64_t i = begin * each; i < end * each; ++i) ++counts[terms[i].row];
  });
  parallel_blocks(groups, 1024, [&](int64_t begin, int64_t end) {
    std::fill(begin_ + begin + 1, begin_ + end + 1, 0);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t g = begin; g < end; ++g) begin_[g + 1] += places[block * groups + g];
  });
  begin_[0] = 0;
  for (int64_t g = 0; g < groups; ++g) begin_[g + 1] += begin_[g];
  parallel_blocks(groups, 1024, [&](int64_t begin, int64_t end) {
    Scratch<int32_t> next(end - begin);
    std::copy(begin_ + begin, begin_ + end, next.get());
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t g = begin; g < end; ++g) {
        int32_t count = places[block * groups + g];
        places[block * groups + g] = next[g - begin];
        next[g - begin] += count;
      }
  });
  parallel_blocks(sources, grain, [&](int64_t begin, int64_t end) {
    int32_t* next = places + begin / grain * groups;
    for (int64_t source = begin; source < end; ++source)
      for (const Term<T>*term = terms + source * each, *last = term + each; term < last; ++term)
        terms_[next[term->row]++] = {int32_t(source), term->weight};
  });
}

#define HSTU_INSTANTIATE(T)                                                                  \
  template class PaddedRows<T>;                                                              \
  template class GroupedTerms<T>;                                                            \
  template void dots<T>(T*, const T*, const T*, int64_t, const int32_t*, int64_t);           \
  template void add_terms<T>(T*, const T*, int64_t, const Term<T>*, int64_t);
HSTU_INSTANTIATE(float)
HSTU_INSTANTIATE(double)

}  // namespace hstu::cpu
