// Scores of a batch of queries with every item as integer keys in scratch memory, excluded items struck out: what the ranking ops read.
#pragma once
#include <algorithm>

#include "scoring.cuh"

namespace hstu::cuda {

// A key grows with its score (-0 as 0). Excluded items and NaN lie below every score: -infinity has key 0x007fffff.
constexpr uint32_t kExcludedKey = 0, kNanKey = 1;

__device__ __forceinline__ uint32_t key_of_score(float score) {
  if (score != score) return kNanKey;
  uint32_t bits = __float_as_uint(score + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float score_of_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A block owns one tile: 64 queries (grid y) by 128 items (grid x). keys [queries, items].
template <typename T>
__global__ void __launch_bounds__(ScoreTile<T>::kThreads) make_keys(uint32_t* keys, RowList<T> queries, RowList<T> items, bool wide) {
  using Tile = ScoreTile<T>;
  __shared__ typename Tile::Shared shared;
  int64_t query = int64_t(blockIdx.y) * kOwned, item = int64_t(blockIdx.x) * kMet;
  Tile tile;
  tile.multiply(shared, queries, query, items, item, wide);
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kCols; ++j) {
      int64_t q = query + Tile::row(i), n = item + Tile::col(j);
      if (q < queries.count && n < items.count) keys[q * items.count + n] = key_of_score(tile.at(i, j));
    }
}

// A block owns a query and strikes out its excluded items but `targets`. Ids that name no item are passed over.
template <typename T>
__global__ void strike_out(T* keys, const int64_t* exclude_ids, const int64_t* exclude_offsets, const int64_t* targets, int64_t first_id,
                           int64_t items) {
  int64_t query = blockIdx.x, target = targets ? targets[query] : -1;
  for (int64_t e = exclude_offsets[query] + threadIdx.x; e < exclude_offsets[query + 1]; e += blockDim.x) {
    int64_t id = exclude_ids[e];
    if (id >= first_id && id < first_id + items && id != target) keys[query * items + id - first_id] = kExcludedKey;
  }
}

// Queries whose keys are in scratch together: 32 MiB, which stays in the second-level cache of the larger devices; at least one query.
inline int64_t queries_at_once(int64_t batch, int64_t bytes_each) {
  int64_t count = std::clamp<int64_t>((int64_t(32) << 20) / std::max<int64_t>(1, bytes_each), 1, 65536);
  if (count > kOwned) count = count / kOwned * kOwned;
  return std::min(batch, count);
}

// keys [count, I - first_id] of queries first .. first + count - 1.
template <typename T>
void score_keys(uint32_t* keys, const Tensor& query, int64_t first, int64_t count, const Tensor& table, const Tensor* target_ids,
                const Tensor* exclude_ids, const Tensor* exclude_offsets, int64_t first_id, Stream stream) {
  int64_t dims = query.cols(), items = std::max<int64_t>(0, table.rows() - first_id);
  RowList<T> queries{query.as<T>() + first * dims, nullptr, count, dims}, rows{table.as<T>() + first_id * dims, nullptr, items, dims};
  bool wide = wide_rows<T>(dims, queries.data, rows.data);
  if (items == 0) return;
  launch(make_keys<T>, dim3(unsigned(ceil_div(items, kMet)), unsigned(ceil_div(count, kOwned))), ScoreTile<T>::kThreads, 0, stream, keys,
         queries, rows, wide);
  if (exclude_ids)
    launch(strike_out<uint32_t>, unsigned(count), 128, 0, stream, keys, exclude_ids->as<int64_t>(), exclude_offsets->as<int64_t>() + first,
           target_ids ? target_ids->as<int64_t>() + first : nullptr, first_id, items);
}

}  // namespace hstu::cuda
