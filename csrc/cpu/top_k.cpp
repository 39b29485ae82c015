#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "../dispatch.h"
#include "../ops.h"
#include "scoring.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kLeastItems = 4096;

// An item with its score as one unsigned number that is larger for a better item: the score's bits in numeric order (-0 as 0, NaN as
// -infinity) over the complement of the id. The order is total, so the best k are the same in whatever order they are found.
template <typename T>
struct Ranked;
template <>
struct Ranked<float> {
  using Bits = uint32_t;
  using Key = uint64_t;
};
template <>
struct Ranked<double> {
  using Bits = uint64_t;
  using Key = unsigned __int128;
};
template <typename T>
using Key = typename Ranked<T>::Key;

template <typename T>
Key<T> key_of(T score, uint32_t id) {
  using Bits = typename Ranked<T>::Bits;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(T) - 1);
  Bits bits = std::bit_cast<Bits>(std::isnan(score) ? -std::numeric_limits<T>::infinity() : score + T(0));
  return Key<T>(bits & kSign ? ~bits : bits | kSign) << 32 | uint32_t(~id);
}

template <typename T>
T score_of(Key<T> key) {
  using Bits = typename Ranked<T>::Bits;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(T) - 1);
  Bits bits = Bits(key >> 32);
  return std::bit_cast<T>(bits & kSign ? bits & ~kSign : ~bits);
}

// Puts the best `k` first and returns how many there are.
template <typename T>
int64_t prune(Key<T>* keys, int64_t size, int64_t k) {
  if (size <= k) return size;
  std::nth_element(keys, keys + k - 1, keys + size, std::greater<>());
  return k;
}

// masks[i][q / 32], bit q % 32: item i may enter query q's list. A NaN limit lets everything in, a NaN score is always let in.
template <typename T>
HSTU_CLONES void find_entrants(uint32_t* masks, const T* scores, const T* limits, int64_t items, int64_t words) {
  for (int64_t i = 0; i < items; ++i)
    for (int64_t word = 0; word < words; ++word) {
      const T* score = scores + i * kQueryBlock<T> + word * 32;
      const T* limit = limits + word * 32;
      uint32_t mask = 0;
      for (uint32_t q = 0; q < 32; ++q) mask |= score[q] <= limit[q] ? 0u : 1u << q;
      masks[i * words + word] = mask;
    }
}
template void find_entrants<float>(uint32_t*, const float*, const float*, int64_t, int64_t);
template void find_entrants<double>(uint32_t*, const double*, const double*, int64_t, int64_t);

// One task: items [begin, end) for a block of queries; lists[q], `capacity` > k long, ends with up to k keys of query q's best items in
// no order, sizes[q] of them. A list takes what is above its limit and is pruned when it is full, which costs a constant an entrant.
// Items come in ascending order, so an equal score never enters later, and one cursor a query walks its excluded ids.
template <typename T>
void search(Key<T>* lists, int64_t* sizes, int64_t k, int64_t capacity, Scorer<T>& scorer, const T* table, int64_t begin,
            int64_t end, const Exclusions& excluded, int64_t first_query, int64_t queries) {
  const int64_t words = (queries + 31) / 32;
  uint32_t masks[kItemBlock * kQueryBlock<T> / 32];
  alignas(64) T limits[kQueryBlock<T>];
  const int64_t* cursors[kQueryBlock<T>];
  std::fill(limits, limits + kQueryBlock<T>, std::numeric_limits<T>::infinity());
  std::fill(limits, limits + queries, std::numeric_limits<T>::quiet_NaN());
  for (int64_t q = 0; q < queries; ++q) cursors[q] = excluded.from(first_query + q, begin), sizes[q] = 0;
  scorer.score_items(table, begin, end, [&](int64_t first, int64_t count, const T* scores) {
    find_entrants<T>(masks, scores, limits, count, words);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t word = 0; word < words; ++word)
        for (uint32_t mask = masks[i * words + word]; mask; mask &= mask - 1) {
          int64_t q = word * 32 + std::countr_zero(mask), id = first + i;
          T score = scores[i * kQueryBlock<T> + q];
          if (score <= limits[q]) continue;  // the limit has risen since the masks were made
          const int64_t* stop = excluded.end(first_query + q);
          while (cursors[q] != stop && *cursors[q] < id) ++cursors[q];
          if (cursors[q] != stop && *cursors[q] == id) continue;
          Key<T>* list = lists + q * capacity;
          list[sizes[q]++] = key_of(score, uint32_t(id));
          if (sizes[q] < capacity) continue;
          sizes[q] = prune<T>(list, capacity, k);
          limits[q] = score_of<T>(list[k - 1]);
        }
  });
  for (int64_t q = 0; q < queries; ++q) sizes[q] = prune<T>(lists + q * capacity, sizes[q], k);
}

// The best k of a list as the op's result, best first; places that no item takes get id -1 and -infinity.
template <typename T>
void write(T* scores, int64_t* ids, Key<T>* keys, int64_t size, int64_t k) {
  size = prune<T>(keys, size, k);
  std::sort(keys, keys + size, std::greater<>());
  for (int64_t i = 0; i < size; ++i) scores[i] = score_of<T>(keys[i]), ids[i] = uint32_t(~keys[i]);
  std::fill(scores + size, scores + k, -std::numeric_limits<T>::infinity());
  std::fill(ids + size, ids + k, int64_t(-1));
}

}  // namespace

void top_k(Tensor& scores, Tensor& ids, const Tensor& query, const Tensor& table, const Tensor* exclude_ids,
           const Tensor* exclude_offsets, int first_id, Stream) {
  pick_float("top_k", scores.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t batch = query.rows(), dims = query.cols(), k = scores.cols();
    HSTU_CHECK(table.rows() <= int64_t(1) << 32, kInvalidArgument, "top_k: at most 2^32 items, got ", table.rows());
    int64_t best = std::clamp<int64_t>(table.rows() - first_id, 0, k), capacity = best + std::max<int64_t>(best, 64);
    ScoreTasks<T> tasks(batch, first_id, table.rows(), std::max(kLeastItems, 8 * best));
    int64_t splits = tasks.splits, parts = splits > 1 ? batch * splits : 0;
    Exclusions excluded("top_k", exclude_ids, exclude_offsets);
    Scratch<Key<T>> part_lists(parts * best);
    Scratch<int64_t> part_sizes(parts);
    tasks.run([&](int64_t first, int64_t queries, int64_t split, int64_t begin, int64_t end) {
      Scorer<T> scorer(query.as<T>() + first * dims, queries, dims);
      Scratch<Key<T>> lists(queries * capacity);
      int64_t sizes[kQueryBlock<T>];
      search<T>(lists, sizes, best, capacity, scorer, table.as<T>(), begin, end, excluded, first, queries);
      for (int64_t q = 0; q < queries; ++q) {
        Key<T>* list = lists + q * capacity;
        int64_t part = (first + q) * splits + split;
        if (splits == 1)
          write<T>(scores.as<T>() + part * k, ids.as<int64_t>() + part * k, list, sizes[q], k);
        else
          std::copy(list, list + sizes[q], part_lists + part * best), part_sizes[part] = sizes[q];
      }
    });
    if (splits > 1)
      parallel_blocks(batch, 8, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          Key<T>*list = part_lists + b * splits * best, *last = list;
          for (int64_t part = b * splits; part < (b + 1) * splits; ++part)
            last = std::copy(part_lists + part * best, part_lists + part * best + part_sizes[part], last);
          write<T>(scores.as<T>() + b * k, ids.as<int64_t>() + b * k, list, last - list, k);
        }
      });
  });
}

}  // namespace hstu::cpu
