#include <algorithm>
#include <atomic>

#include "../dispatch.h"
#include "../math.h"
#include "group_by.h"
#include "philox.h"
#include "softmax.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

constexpr double kCollision = -5e4;  // logit of a negative that is the positive

// Random words to ids, in place.
HSTU_CLONES void words_to_ids(int32_t* ids, int64_t count, int64_t low, int64_t range) {
  for (int64_t j = 0; j < count; ++j) ids[j] = int32_t(random_id(uint32_t(ids[j]), low, range));
}

// Where the negatives of a position come from: a draw, or ids [T, R].
class Negatives {
 public:
  Negatives(const Tensor* given, int64_t count, int64_t first, int64_t items, int64_t seed, int64_t offset,
            const Tensor* base)
      : given_(data_or_null<int64_t>(given)), count_(count), first_(first), items_(items), seed_(seed),
        offset_{uint64_t(offset), data_or_null<int64_t>(base)} {}

  // A given id outside the items is replaced and remembered: check() throws once all threads are back.
  void fill(int32_t* ids, int64_t t) {
    if (!given_) {
      philox_words(reinterpret_cast<uint32_t*>(ids), t * count_, count_, uint64_t(seed_), offset_);
      return words_to_ids(ids, count_, first_, items_ - first_);
    }
    for (int64_t j = t * count_; j < (t + 1) * count_; ++j, ++ids) {
      bool inside = given_[j] >= first_ && given_[j] < items_;
      *ids = int32_t(inside ? given_[j] : first_);
      if (inside) continue;
      int64_t seen = bad_.load();
      while (j < seen && !bad_.compare_exchange_weak(seen, j)) {
      }
    }
  }
  void check(const char* op) const {
    int64_t j = bad_.load();
    HSTU_CHECK(j == INT64_MAX, kInvalidArgument, op, ": negative_ids[", j / count_, ", ", j % count_, "] = ", given_[j],
               " is outside ", first_, "..", items_ - 1);
  }

 private:
  const int64_t* given_;
  const int64_t count_, first_, items_, seed_;
  const DrawOffset offset_;
  std::atomic<int64_t> bad_{INT64_MAX};
};

// Negatives that all positions share.
void shared_ids(int32_t* ids, const char* op, const Tensor& given, int64_t first, int64_t items) {
  const int64_t* values = given.as<int64_t>();
  check_ids(op, "negative_ids", values, given.size(), first, items - 1);
  std::copy(values, values + given.size(), ids);
}

constexpr int64_t kRows = 64;  // positions a task takes

}  // namespace

// Negatives of its own: a task draws the ids of a block of positions, row by row, and takes dot products with the
// items' rows; the logits never leave the cache. Shared negatives are a small matrix of candidates and go through the
// matrix product.
void sampled_softmax_loss(Tensor& loss, Tensor& lse, const Tensor& query, const Tensor& table, const Tensor& positive_ids,
                          const Tensor* weights, const Tensor* negative_ids, int num_negatives, int first_id,
                          bool normalize_items, double temperature, double eps, int64_t seed, int64_t offset, const Tensor* base, Stream) {
  constexpr char kOp[] = "sampled_softmax_loss";
  pick_float(kOp, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t items = table.rows(), each = num_negatives;
    LossRows<T> batch(kOp, query, positive_ids, weights, first_id, items);
    PaddedRows<T> rows(table.as<T>(), items, table.cols(), nullptr, normalize_items, eps);
    Scratch<double> losses(batch.count);
    Scratch<T> row_lse(batch.count);
    T scale = T(1 / temperature);
    if (negative_ids && negative_ids->rank == 1) {
      Scratch<int32_t> ids(each);
      shared_ids(ids, kOp, *negative_ids, first_id, items);
      PaddedRows<T> chosen(rows.data(), each, rows.width, ids, false, 0);
      Candidates<T>(ids, chosen.data(), each, rows, scale, T(kCollision)).forward(batch, losses, row_lse);
    } else {
      Negatives negatives(negative_ids, each, first_id, items, seed, offset, base);
      parallel_blocks(batch.count, kRows, [&](int64_t begin, int64_t end) {
        Scratch<int32_t> ids(each);
        Scratch<T> s(each);
        for (int64_t i = begin; i < end; ++i) {
          T positive;
          dots<T>(&positive, batch.query.row(i), rows.data(), rows.width, batch.positive + i, 1);
          negatives.fill(ids, batch.position[i]);
          dots<T>(s, batch.query.row(i), rows.data(), rows.width, ids, each);
          RowSum<T> row{positive * scale, positive * scale, 0};
          row.absorb(s, each, ids, batch.positive[i], scale, T(kCollision));
          row.finish(row_lse[i], losses[i]);
        }
      });
      negatives.check(kOp);
    }
    batch.finish(loss, lse, losses, row_lse);
  });
}

// The first pass writes dquery and, for each (position, item) pair, the coefficient that the item's gradient gets; the
// pairs are then grouped by item, and a task sums those of a block of items in order of position.
void sampled_softmax_loss_backward(Tensor& dquery, Tensor& dtable, const Tensor& dloss, const Tensor& lse, const Tensor& query,
                                   const Tensor& table, const Tensor& positive_ids, const Tensor* weights,
                                   const Tensor* negative_ids, int num_negatives, int first_id, bool normalize_items,
                                   double temperature, double eps, int64_t seed, int64_t offset, const Tensor* base, Stream) {
  constexpr char kOp[] = "sampled_softmax_loss_backward";
  pick_float(kOp, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t items = table.rows(), d = table.cols(), each = num_negatives;
    LossRows<T> batch(kOp, query, positive_ids, weights, first_id, items);
    PaddedRows<T> rows(table.as<T>(), items, d, nullptr, normalize_items, eps);
    T scale = T(1 / temperature);
    double gain = batch.gradient_scale(dloss, temperature);
    batch.clear_others(dquery.as<T>());
    if (negative_ids && negative_ids->rank == 1) {
      Scratch<int32_t> ids(each);
      shared_ids(ids, kOp, *negative_ids, first_id, items);
      PaddedRows<T> chosen(rows.data(), each, rows.width, ids, false, 0);
      Scratch<T> dchosen(each * rows.width);
      Scratch<Term<T>> positives(batch.count), uses(each);
      Candidates<T> candidates(ids, chosen.data(), each, rows, scale, T(kCollision));
      candidates.backward(dquery.as<T>(), dchosen, positives, batch, lse.as<T>(), gain);
      for (int64_t r = 0; r < each; ++r) uses[r] = {ids[r], T(1)};
      GroupedTerms<T> by_item(positives, batch.count, 1, items), shared_by_item(uses, each, 1, items);
      return table_gradient<T>(dtable.as<T>(), rows, items, eps, by_item, batch.query.data(), &shared_by_item, dchosen);
    }
    int64_t pairs = each + 1;
    HSTU_CHECK(batch.count <= INT32_MAX / pairs, kInvalidArgument, kOp, ": at most 2^31 - 1 pairs of position and item, got ",
               batch.count, " x ", pairs);
    Scratch<Term<T>> terms(batch.count * pairs);
    Negatives negatives(negative_ids, each, first_id, items, seed, offset, base);
    parallel_blocks(batch.count, kRows, [&](int64_t begin, int64_t end) {
      Scratch<int32_t> ids(each);
      Scratch<T> s(each), dq(rows.width);
      for (int64_t i = begin; i < end; ++i) {
        Term<T>* row = terms + i * pairs;
        T weight = T(gain * double(batch.weight[i]));
        negatives.fill(ids, batch.position[i]);
        dots<T>(s, batch.query.row(i), rows.data(), rows.width, ids, each);
        T row_lse = lse.as<T>()[batch.position[i]];
        T sum = softmax_gradient<T>(s, each, ids, batch.positive[i], scale, T(kCollision), row_lse, weight);
        row[0] = {batch.positive[i], -weight * sum};  // 1 - p of the positive is the sum of the others: no cancellation
        for (int64_t j = 0; j < each; ++j) row[j + 1] = {ids[j], s[j]};
        std::fill(dq.get(), dq + rows.width, T(0));
        add_terms<T>(dq, rows.data(), rows.width, row, pairs);
        std::memcpy(dquery.as<T>() + batch.position[i] * d, dq, d * sizeof(T));
      }
    });
    negatives.check(kOp);
    GroupedTerms<T> by_item(terms, batch.count, pairs, items);
    table_gradient<T>(dtable.as<T>(), rows, items, eps, by_item, batch.query.data(), nullptr, nullptr);
  });
}

}  // namespace hstu::cpu
