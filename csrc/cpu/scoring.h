// Scores of queries against the rows of an item table, a block at a time: what the ops share that look at every score once. Items are
// the rows of the product and queries its columns, so the table is read where it stands, nothing of it is packed, and what is kept a
// query (a threshold, a count) lies along the vector lanes. A score is one FMA chain over the dims wherever it stands in a block.
#pragma once
#include <algorithm>

#include "gemm.h"
#include "jagged.h"

namespace hstu::cpu {

template <typename T>
constexpr int64_t kQueryBlock = 4 * kPanel<T>;  // most queries of a task, and the stride of a block of scores
constexpr int64_t kItemBlock = 256;             // items of a block: scores and rows stay in the second-level cache

// Up to kQueryBlock rows of `query`, packed, with room for one block of scores.
template <typename T>
class Scorer {
 public:
  Scorer(const T* query, int64_t queries, int64_t dims)
      : queries_(queries), dims_(dims), packed_(packed_size<T>(dims, queries)), scores_(kItemBlock * kQueryBlock<T>, true) {
    pack<T>(packed_, Matrix<T>{query, 1, dims}, dims, queries);
  }

  // body(first, count, scores) over all of items [begin, end): item first + i scores scores[i kQueryBlock + q] with query q.
  template <typename Body>
  void score_items(const T* table, int64_t begin, int64_t end, Body&& body) {
    for (int64_t first = begin; first < end; first += kItemBlock) {
      int64_t count = std::min(kItemBlock, end - first);
      multiply<T>(scores_, kQueryBlock<T>, Matrix<T>{table + first * dims_, dims_, 1}, packed_, count, queries_, dims_, false);
      body(first, count, static_cast<const T*>(scores_));
    }
  }

  // out[q] = the score of query q with the item ids[q].
  void score_pairs(T* out, const T* table, const int64_t* ids) {
    constexpr int64_t kWidth = kPanel<T>;
    Scratch<T> rows(kWidth * dims_);
    for (int64_t q = 0; q < queries_; q += kWidth) {
      int64_t count = std::min(kWidth, queries_ - q);
      for (int64_t i = 0; i < count; ++i) std::memcpy(rows + i * dims_, table + ids[q + i] * dims_, dims_ * sizeof(T));
      multiply<T>(scores_, kWidth, Matrix<T>{rows, dims_, 1}, packed_ + q * dims_, count, count, dims_, false);
      for (int64_t i = 0; i < count; ++i) out[q + i] = scores_[i * kWidth + i];
    }
  }

 private:
  int64_t queries_, dims_;
  Scratch<T> packed_, scores_;
};

// The excluded ids of each query in ascending order.
class Exclusions {
 public:
  Exclusions(const char* op, const Tensor* ids, const Tensor* offsets) : sorted_(ids ? ids->size() : 0) {
    if (!ids) return;
    offsets_ = check_offsets(op, "exclude_offsets", *offsets, ids->size());
    parallel_blocks(offsets->size() - 1, 64, [&](int64_t begin, int64_t end) {
      std::copy(ids->as<int64_t>() + offsets_[begin], ids->as<int64_t>() + offsets_[end], sorted_ + offsets_[begin]);
      for (int64_t b = begin; b < end; ++b)
        if (!std::is_sorted(this->begin(b), this->end(b))) std::sort(sorted_ + offsets_[b], sorted_ + offsets_[b + 1]);
    });
  }
  const int64_t* begin(int64_t query) const { return offsets_ ? sorted_ + offsets_[query] : nullptr; }
  const int64_t* end(int64_t query) const { return offsets_ ? sorted_ + offsets_[query + 1] : nullptr; }
  // The first excluded id of a query that is at or above `id`.
  const int64_t* from(int64_t query, int64_t id) const { return std::lower_bound(begin(query), end(query), id); }

 private:
  Scratch<int64_t> sorted_;
  const int64_t* offsets_ = nullptr;
};

// How a call is cut into tasks: blocks of queries by ranges of items, `least` items or more in each. Few queries get smaller blocks
// and several ranges, so that they still occupy many threads. A score does not depend on it.
template <typename T>
struct ScoreTasks {
  static constexpr int64_t kWanted = 32;
  int64_t batch, first_id, items, queries, blocks, splits;

  ScoreTasks(int64_t batch, int64_t first_id, int64_t rows, int64_t least)
      : batch(batch), first_id(first_id), items(std::max<int64_t>(0, rows - first_id)),
        queries(batch < kWanted * kQueryBlock<T> ? 32 : kQueryBlock<T>), blocks((batch + queries - 1) / queries),
        splits(std::clamp<int64_t>(items / least, 1, blocks < kWanted ? kWanted / std::max<int64_t>(1, blocks) : 1)) {}

  // body(first query, queries, split, first item, end of the items) for every task.
  template <typename Body>
  void run(Body&& body) const {
    parallel_for(blocks * splits, [&](int64_t task) {
      int64_t split = task % splits, first = task / splits * queries;
      body(first, std::min(queries, batch - first), split, first_id + items * split / splits, first_id + items * (split + 1) / splits);
    });
  }
};

}  // namespace hstu::cpu
