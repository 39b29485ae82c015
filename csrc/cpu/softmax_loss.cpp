#include <limits>
#include <numeric>

#include "../dispatch.h"
#include "softmax.h"

namespace hstu::cpu {
namespace {

// Every item is a candidate of every row; the positive, which is summed on its own, counts nothing as one.
template <typename T>
constexpr T kExcluded = -std::numeric_limits<T>::infinity();

}  // namespace

void softmax_loss(Tensor& loss, Tensor& lse, const Tensor& query, const Tensor& table, const Tensor& positive_ids,
                  const Tensor* weights, int first_id, bool normalize_items, double temperature, double eps, Stream) {
  constexpr char kOp[] = "softmax_loss";
  pick_float(kOp, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t count = table.rows() - first_id;
    LossRows<T> batch(kOp, query, positive_ids, weights, first_id, table.rows());
    PaddedRows<T> rows(table.as<T>(), table.rows(), table.cols(), nullptr, normalize_items, eps);
    Scratch<int32_t> ids(count);
    Scratch<double> losses(batch.count);
    Scratch<T> row_lse(batch.count);
    std::iota(ids.get(), ids + count, int32_t(first_id));
    Candidates<T>(ids, rows.row(first_id), count, rows, T(1 / temperature), kExcluded<T>).forward(batch, losses, row_lse);
    batch.finish(loss, lse, losses, row_lse);
  });
}

void softmax_loss_backward(Tensor& dquery, Tensor& dtable, const Tensor& dloss, const Tensor& lse, const Tensor& query,
                           const Tensor& table, const Tensor& positive_ids, const Tensor* weights, int first_id,
                           bool normalize_items, double temperature, double eps, Stream) {
  constexpr char kOp[] = "softmax_loss_backward";
  pick_float(kOp, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t items = table.rows(), count = items - first_id;
    LossRows<T> batch(kOp, query, positive_ids, weights, first_id, items);
    PaddedRows<T> rows(table.as<T>(), items, table.cols(), nullptr, normalize_items, eps);
    Scratch<int32_t> ids(count);
    Scratch<T> drows(count * rows.width);
    Scratch<Term<T>> positives(batch.count), all(count);
    std::iota(ids.get(), ids + count, int32_t(first_id));
    Candidates<T> candidates(ids, rows.row(first_id), count, rows, T(1 / temperature), kExcluded<T>);
    batch.clear_others(dquery.as<T>());
    candidates.backward(dquery.as<T>(), drows, positives, batch, lse.as<T>(), batch.gradient_scale(dloss, temperature));
    for (int64_t c = 0; c < count; ++c) all[c] = {ids[c], T(1)};
    GroupedTerms<T> by_item(positives, batch.count, 1, items), candidate_of(all, count, 1, items);
    table_gradient<T>(dtable.as<T>(), rows, items, eps, by_item, batch.query.data(), &candidate_of, drows);
  });
}

}  // namespace hstu::cpu
