#include "softmax.h"

#include <algorithm>
#include <cmath>

#include "../check.h"
#include "gemm.h"
#include "vector_math.h"

namespace hstu::cpu {
namespace {

// Sums and maxima go by fixed lanes: a loop over one scalar would not vectorise without reordering.
constexpr int kWide = 16;

template <typename T>
HSTU_VECTOR_INLINE T lane_sum(const T* x, int64_t n) {
  T sum[kWide] = {};
  int64_t j = 0;
  for (; j + kWide <= n; j += kWide)
    for (int lane = 0; lane < kWide; ++lane) sum[lane] += x[j + lane];
  for (int lane = 0; j < n; ++j, ++lane) sum[lane] += x[j];
  for (int half = kWide / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  return sum[0];
}

template <typename T>
HSTU_VECTOR_INLINE T lane_max(const T* x, int64_t n, T start) {
  T best[kWide];
  int64_t j = 0;
  for (int lane = 0; lane < kWide; ++lane) best[lane] = start;
  for (; j + kWide <= n; j += kWide)
    for (int lane = 0; lane < kWide; ++lane) best[lane] = x[j + lane] > best[lane] ? x[j + lane] : best[lane];
  for (int lane = 0; j < n; ++j, ++lane) best[lane] = x[j] > best[lane] ? x[j] : best[lane];
  for (int half = kWide / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) best[lane] = best[lane + half] > best[lane] ? best[lane + half] : best[lane];
  return best[0];
}

template <typename T>
HSTU_CLONES void absorb_kernel(RowSum<T>& row, T* s, int64_t n, const int32_t* ids, int32_t id, T scale, T collision) {
  for (int64_t j = 0; j < n; ++j) {
    T logit = s[j] * scale;
    s[j] = ids[j] == id ? collision : logit;
  }
  T maximum = lane_max(s, n, row.maximum);
  if (maximum > row.maximum) {
    row.negatives *= vexp(row.maximum - maximum);
    row.maximum = maximum;
  }
  for (int64_t j = 0; j < n; ++j) s[j] = vexp(s[j] - maximum);
  row.negatives += lane_sum(s, n);
}
template void absorb_kernel<float>(RowSum<float>&, float*, int64_t, const int32_t*, int32_t, float, float);
template void absorb_kernel<double>(RowSum<double>&, double*, int64_t, const int32_t*, int32_t, double, double);

template <typename T>
HSTU_CLONES T gradient_kernel(T* s, int64_t n, const int32_t* ids, int32_t id, T scale, T collision, T lse, T gain) {
  for (int64_t j = 0; j < n; ++j) {
    T logit = s[j] * scale;
    s[j] = vexp((ids[j] == id ? collision : logit) - lse);
  }
  T sum = lane_sum(s, n);
  for (int64_t j = 0; j < n; ++j) {
    T gradient = s[j] * gain;
    s[j] = ids[j] == id ? T(0) : gradient;
  }
  return sum;
}
template float gradient_kernel<float>(float*, int64_t, const int32_t*, int32_t, float, float, float, float);
template double gradient_kernel<double>(double*, int64_t, const int32_t*, int32_t, double, double, double, double);

// Through y = x / max(norm, eps), given y and dy: dx = (dy - y <y, dy>) / norm, and dy / eps below eps.
template <typename T>
HSTU_CLONES void normalize_backward(T* dx, const T* dy, const T* y, int64_t d, T projection, T divisor) {
  for (int64_t j = 0; j < d; ++j) dx[j] = (dy[j] - y[j] * projection) / divisor;
}
template void normalize_backward<float>(float*, const float*, const float*, int64_t, float, float);
template void normalize_backward<double>(double*, const double*, const double*, int64_t, double, double);

template <typename T>
HSTU_CLONES void add_into(T* sum, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}
template void add_into<float>(float*, const float*, int64_t);
template void add_into<double>(double*, const double*, int64_t);

constexpr int64_t kChunk = 256;  // candidates whose products with a block of rows are in cache together
// Not a power of two: the columns of the block are read, too.
template <typename T>
constexpr int64_t kStride = kChunk + 64 / sizeof(T);

}  // namespace

template <typename T>
LossRows<T>::LossRows(const char* op, const Tensor& query, const Tensor& positive_ids, const Tensor* weights, int first_id,
                      int64_t items)
    : total(query.rows()),
      position(total),
      positive(total),
      weight(total),
      count(collect(op, positive_ids, weights, first_id, items)),
      query(query.as<T>(), count, query.cols(), count < total ? position.get() : nullptr, false, 0) {}

template <typename T>
int64_t LossRows<T>::collect(const char* op, const Tensor& positive_ids, const Tensor* weights, int first_id, int64_t items) {
  constexpr int64_t kLimit = INT32_MAX;
  HSTU_CHECK(total <= kLimit && items <= kLimit, kInvalidArgument, op, ": at most 2^31 - 1 rows and items, got ", total,
             " rows and ", items, " items");
  const int64_t* ids = positive_ids.as<int64_t>();
  const T* given = data_or_null<T>(weights);
  int64_t rows = 0;
  for (int64_t t = 0; t < total; ++t) {
    T w = given ? given[t] : T(1);
    if (w == T(0)) continue;
    HSTU_CHECK(ids[t] >= first_id && ids[t] < items, kInvalidArgument, op, ": positive_ids[", t, "] = ", ids[t],
               " is outside ", first_id, "..", items - 1);
    position[rows] = int32_t(t);
    positive[rows] = int32_t(ids[t]);
    weight[rows++] = w;
    weight_sum += double(w);
  }
  return rows;
}

template <typename T>
void LossRows<T>::finish(Tensor& loss, Tensor& lse, const double* losses, const T* row_lse) const {
  T* out = lse.as<T>();
  double sum = 0;
  std::fill(out, out + total, T(0));
  for (int64_t i = 0; i < count; ++i) {
    sum += double(weight[i]) * losses[i];
    out[position[i]] = row_lse[i];
  }
  *loss.as<T>() = weight_sum == 0 ? T(0) : T(sum / weight_sum);
}

template <typename T>
void LossRows<T>::clear_others(T* dquery) const {
  if (count < total) std::fill(dquery, dquery + total * query.d, T(0));
}

template <typename T>
double LossRows<T>::gradient_scale(const Tensor& dloss, double temperature) const {
  return weight_sum == 0 ? 0 : double(*dloss.as<T>()) / (weight_sum * temperature);
}

template <typename T>
void RowSum<T>::absorb(T* s, int64_t n, const int32_t* ids, int32_t id, T scale, T collision) {
  absorb_kernel<T>(*this, s, n, ids, id, scale, collision);
}

template <typename T>
void RowSum<T>::finish(T& lse, double& loss) const {
  double above = double(maximum) - double(positive);
  double log_sum = above > 0 ? std::log(std::exp(-above) + double(negatives)) : std::log1p(double(negatives));
  lse = T(double(maximum) + log_sum);
  loss = above + log_sum;
}

template <typename T>
T softmax_gradient(T* s, int64_t n, const int32_t* ids, int32_t id, T scale, T collision, T lse, T gain) {
  return gradient_kernel<T>(s, n, ids, id, scale, collision, lse, gain);
}

template <typename T>
Candidates<T>::Candidates(const int32_t* ids, const T* rows, int64_t count, const PaddedRows<T>& items, T scale, T collision)
    : ids(ids), rows(rows), count(count), items(items), scale(scale), collision(collision), by_column(packed_size<T>(items.d, count)) {
  int64_t d = items.d, width = items.width;
  parallel_blocks(count, kChunk, [&](int64_t begin, int64_t end) {
    pack<T>(by_column + begin * d, Matrix<T>{rows + begin * width, 1, width}, d, end - begin);
  });
}

// A task owns a block of rows and meets the candidates chunk by chunk.
template <typename T>
void Candidates<T>::forward(const LossRows<T>& batch, double* losses, T* lse) const {
  int64_t d = items.d, width = items.width;
  parallel_blocks(batch.count, kRowBlock, [&](int64_t begin, int64_t end) {
    Scratch<T> s(kRowBlock * kStride<T>);
    Scratch<RowSum<T>> sums(kRowBlock);
    for (int64_t i = begin; i < end; ++i) {
      T positive;
      dots<T>(&positive, batch.query.row(i), items.data(), width, batch.positive + i, 1);
      sums[i - begin] = {positive * scale, positive * scale, 0};
    }
    for (int64_t c = 0; c < count; c += kChunk) {
      int64_t n = std::min(kChunk, count - c);
      Matrix<T> rows{batch.query.row(begin), width, 1};
      multiply<T>(s, kStride<T>, rows, by_column + c * d, end - begin, n, d, false);
      for (int64_t i = begin; i < end; ++i)
        sums[i - begin].absorb(s + (i - begin) * kStride<T>, n, ids + c, batch.positive[i], scale, collision);
    }
    for (int64_t i = begin; i < end; ++i) sums[i - begin].finish(lse[i], losses[i]);
  });
}

// A task owns a run of row blocks and a partial drows of its own; the partials are added in order. Within it the chunks
// come first, so that a chunk's two packings and its gradient stay in cache while the rows go by. The number of runs
// depends on the shapes alone.
template <typename T>
void Candidates<T>::backward(T* dquery, T* drows, Term<T>* positives, const LossRows<T>& batch, const T* lse, double gain) const {
  constexpr int64_t kMaxRuns = 32, kMaxPartials = int64_t(1) << 25;
  int64_t d = items.d, width = items.width, blocks = (batch.count + kRowBlock - 1) / kRowBlock;
  int64_t limit = std::clamp<int64_t>(kMaxPartials / std::max<int64_t>(1, count * width), 1, kMaxRuns);
  int64_t grain = std::max<int64_t>(1, (blocks + limit - 1) / limit) * kRowBlock;
  int64_t runs = (batch.count + grain - 1) / grain;
  Scratch<T> by_row(packed_size<T>(count + kChunk, width)), partial(runs * count * width);
  int64_t chunk_size = packed_size<T>(kChunk, width), block_size = packed_size<T>(kRowBlock, width);
  parallel_blocks(count, kChunk, [&](int64_t begin, int64_t end) {
    pack<T>(by_row + begin / kChunk * chunk_size, Matrix<T>{rows + begin * width, width, 1}, end - begin, width);
  });
  parallel_blocks(batch.count, grain, [&](int64_t begin, int64_t end) {
    int64_t run_rows = end - begin, run_blocks = (run_rows + kRowBlock - 1) / kRowBlock;
    T* gradients = partial + begin / grain * count * width;
    Scratch<T> s(kRowBlock * kStride<T>), queries(run_blocks * block_size);
    Scratch<T> dq(run_rows * width, true), sums(run_rows, true);
    for (int64_t row = 0; row < run_rows; row += kRowBlock)
      pack<T>(queries + row / kRowBlock * block_size, Matrix<T>{batch.query.row(begin + row), width, 1},
              std::min(kRowBlock, run_rows - row), width);
    for (int64_t c = 0; c < count; c += kChunk) {
      int64_t n = std::min(kChunk, count - c);
      for (int64_t row = 0; row < run_rows; row += kRowBlock) {
        int64_t m = std::min(kRowBlock, run_rows - row), first = begin + row;
        multiply<T>(s, kStride<T>, Matrix<T>{batch.query.row(first), width, 1}, by_column + c * d, m, n, d, false);
        for (int64_t i = 0; i < m; ++i)
          sums[row + i] +=
              softmax_gradient<T>(s + i * kStride<T>, n, ids + c, batch.positive[first + i], scale, collision,
                                  lse[batch.position[first + i]], T(gain * double(batch.weight[first + i])));
        const T* chunk = by_row + c / kChunk * chunk_size;
        const T* block = queries + row / kRowBlock * block_size;
        multiply<T>(dq + row * width, width, Matrix<T>{s, kStride<T>, 1}, chunk, m, width, n, true);
        multiply<T>(gradients + c * width, width, Matrix<T>{s, 1, kStride<T>}, block, n, width, m, row > 0);
      }
    }
    for (int64_t i = 0; i < run_rows; ++i) {
      int64_t source = begin + i;
      Term<T> term{batch.positive[source], -T(gain * double(batch.weight[source]) * double(sums[i]))};
      add_terms<T>(dq + i * width, items.data(), width, &term, 1);
      std::memcpy(dquery + batch.position[source] * d, dq + i * width, d * sizeof(T));
      positives[source] = term;
    }
  });
  parallel_blocks(count * width, 4096, [&](int64_t begin, int64_t end) {
    std::fill(drows + begin, drows + end, T(0));
    for (int64_t run = 0; run < runs; ++run) add_into<T>(drows + begin, partial + run * count * width + begin, end - begin);
  });
}

// A task owns a block of items.
template <typename T>
void table_gradient(T* dtable, const PaddedRows<T>& items, int64_t count, double eps, const GroupedTerms<T>& a,
                    const T* a_rows, const GroupedTerms<T>* b, const T* b_rows) {
  int64_t d = items.d;
  parallel_blocks(count, 32, [&](int64_t begin, int64_t end) {
    Scratch<T> sum(items.width);
    const int32_t first = 0;
    for (int64_t i = begin; i < end; ++i) {
      T* out = dtable + i * d;
      if (a.count(i) == 0 && !(b && b->count(i) > 0)) {
        std::fill(out, out + d, T(0));
        continue;
      }
      std::fill(sum.get(), sum + items.width, T(0));
      add_terms<T>(sum, a_rows, items.width, a.group(i), a.count(i));
      if (b) add_terms<T>(sum, b_rows, items.width, b->group(i), b->count(i));
      if (!items.norms()) {
        std::memcpy(out, sum, d * sizeof(T));
        continue;
      }
      T projection = 0, norm = items.norms()[i];
      if (norm > T(eps)) dots<T>(&projection, items.row(i), sum, items.width, &first, 1);
      normalize_backward<T>(out, sum, items.row(i), d, projection, std::max(norm, T(eps)));
    }
  });
}

#define HSTU_INSTANTIATE(T)                                                                                            \
  template struct LossRows<T>;                                                                                         \
  template struct RowSum<T>;                                                                                           \
  template struct Candidates<T>;                                                                                       \
  template T softmax_gradient<T>(T*, int64_t, const int32_t*, int32_t, T, T, T, T);                                    \
  template void table_gradient<T>(T*, const PaddedRows<T>&, int64_t, double, const GroupedTerms<T>&, const T*,         \
                                  const GroupedTerms<T>*, const T*);
HSTU_INSTANTIATE(float)
HSTU_INSTANTIATE(double)

}  // namespace hstu::cpu
