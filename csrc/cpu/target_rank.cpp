#include <cmath>

#include "../dispatch.h"
#include "../ops.h"
#include "scoring.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kLeastItems = 1024;

// above[q] += items that score at or above targets[q], nans[q] += scores that are NaN.
template <typename T>
HSTU_CLONES void count_items(int64_t* above, int64_t* nans, const T* scores, const T* targets, int64_t items, int64_t queries) {
  constexpr int kLanes = kPanel<T> / 2;
  using Count = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as a score, so that comparisons add up in place
  for (int64_t q = 0; q < queries; q += kLanes) {
    Count at_or_above[kLanes] = {}, not_a_number[kLanes] = {};
    for (int64_t i = 0; i < items; ++i)
      for (int lane = 0; lane < kLanes; ++lane) {
        T score = scores[i * kQueryBlock<T> + q + lane];
        at_or_above[lane] += score >= targets[q + lane] ? 1 : 0;
        not_a_number[lane] += score != score ? 1 : 0;
      }
    for (int lane = 0; lane < kLanes; ++lane) above[q + lane] += at_or_above[lane], nans[q + lane] += not_a_number[lane];
  }
}
template void count_items<float>(int64_t*, int64_t*, const float*, const float*, int64_t, int64_t);
template void count_items<double>(int64_t*, int64_t*, const double*, const double*, int64_t, int64_t);

}  // namespace

void target_rank(Tensor& rank, const Tensor& query, const Tensor& table, const Tensor& target_ids, const Tensor* exclude_ids,
                 const Tensor* exclude_offsets, int first_id, Stream) {
  pick_float("target_rank", query.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t batch = query.rows(), dims = query.cols();
    const int64_t* target = target_ids.as<int64_t>();
    for (int64_t b = 0; b < batch; ++b)
      HSTU_CHECK(target[b] >= first_id && target[b] < table.rows(), kInvalidArgument, "target_rank: target_ids[", b, "] = ",
                 target[b], " is outside ", first_id, "..", table.rows() - 1);
    Exclusions excluded("target_rank", exclude_ids, exclude_offsets);
    ScoreTasks<T> tasks(batch, first_id, table.rows(), kLeastItems);
    Scratch<int64_t> counts(tasks.splits * batch), nans(tasks.splits * batch);
    tasks.run([&](int64_t first, int64_t count, int64_t split, int64_t begin, int64_t end) {
      Scorer<T> scorer(query.as<T>() + first * dims, count, dims);
      alignas(64) T targets[kQueryBlock<T>] = {};
      scorer.score_pairs(targets, table.as<T>(), target + first);
      int64_t above[kQueryBlock<T>] = {}, unordered[kQueryBlock<T>] = {};
      const int64_t* cursors[kQueryBlock<T>];
      for (int64_t q = 0; q < count; ++q) cursors[q] = excluded.from(first + q, begin);
      scorer.score_items(table.as<T>(), begin, end, [&](int64_t item, int64_t rows, const T* scores) {
        count_items<T>(above, unordered, scores, targets, rows, count);
        for (int64_t q = 0; q < count; ++q) {  // take back what was counted of excluded items, once for each
          const int64_t* stop = excluded.end(first + q);
          for (int64_t last = -1; cursors[q] != stop && *cursors[q] < item + rows; last = *cursors[q]++) {
            int64_t id = *cursors[q];
            if (id == last || id == target[first + q]) continue;
            T score = scores[(id - item) * kQueryBlock<T> + q];
            above[q] -= score >= targets[q];
            unordered[q] -= std::isnan(score);
          }
        }
      });
      for (int64_t q = 0; q < count; ++q) {
        counts[split * batch + first + q] = above[q];
        nans[split * batch + first + q] = unordered[q];
      }
    });
    for (int64_t b = 0; b < batch; ++b) {
      int64_t above = 0, unordered = 0;
      for (int64_t split = 0; split < tasks.splits; ++split) above += counts[split * batch + b], unordered += nans[split * batch + b];
      rank.as<int64_t>()[b] = unordered ? 0 : above;  // the target counts itself: that is the 1 of the rank
    }
  });
}

}  // namespace hstu::cpu
