#include "group_by.cuh"
#include "score_keys.cuh"

namespace hstu::cuda {
namespace {

// A block owns a query: it counts the items at or above the target, which counts itself. Counts are integers, so their order is free.
__global__ void __launch_bounds__(256)
    count_above(int64_t* rank, const uint32_t* keys, const int64_t* target_ids, int64_t first_id, int64_t items) {
  __shared__ unsigned long long total;
  __shared__ int nan;
  const uint32_t* row = keys + int64_t(blockIdx.x) * items;
  int64_t target = target_ids[blockIdx.x] - first_id;
  if (threadIdx.x == 0) total = 0, nan = target < 0 || target >= items;
  __syncthreads();
  if (!nan) {  // the same for all threads
    uint32_t limit = row[target];
    unsigned long long above = 0;
    bool found = false;
    for (int64_t i = threadIdx.x; i < items; i += blockDim.x) {
      uint32_t key = row[i];
      above += key >= limit;
      found |= key == kNanKey;
    }
    __syncthreads();  // all have read `nan`
    atomicAdd(&total, above);
    if (found) nan = 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) rank[blockIdx.x] = nan ? 0 : int64_t(total);
}

}  // namespace

void target_rank(Tensor& rank, const Tensor& query, const Tensor& table, const Tensor& target_ids, const Tensor* exclude_ids,
                 const Tensor* exclude_offsets, int first_id, Stream stream) {
  pick_dtype("target_rank", query.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t batch = query.rows(), items = std::max<int64_t>(0, table.rows() - first_id);
    int64_t at_once = queries_at_once(batch, items * sizeof(uint32_t));
    check_ids("target_rank", "target_ids", target_ids.as<int64_t>(), batch, first_id, table.rows() - 1, stream);
    Scratch<uint32_t> keys(at_once * items, stream);
    for (int64_t first = 0; first < batch; first += at_once) {
      int64_t count = std::min(at_once, batch - first);
      score_keys<T>(keys, query, first, count, table, &target_ids, exclude_ids, exclude_offsets, first_id, stream);
      launch(count_above, unsigned(count), 256, 0, stream, rank.as<int64_t>() + first, keys.get(), target_ids.as<int64_t>() + first,
             int64_t(first_id), items);
    }
  });
}

}  // namespace hstu::cuda
