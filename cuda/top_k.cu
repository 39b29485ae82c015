#include "score_keys.cuh"

namespace hstu::cuda {
namespace {

constexpr int kThreads = 512, kDigit = 11, kBins = 1 << kDigit;
constexpr int64_t kSharedList = 4096;  // longest list that is sorted in shared memory

// An item with its score as one number that is larger for a better item: NaN as -infinity, then the smaller id. All differ, so the best
// are the same in whatever order they are found.
__device__ __forceinline__ uint64_t ranked(uint32_t key, int64_t id) {
  if (key == kNanKey) key = 0x007fffffu;
  return uint64_t(key) << 32 | uint32_t(~uint32_t(id));
}

// Inclusive sum over the threads up to this one. `shared` holds kThreads / 32 counts.
__device__ __forceinline__ uint32_t inclusive_sum(uint32_t x, uint32_t* shared) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    uint32_t below = __shfl_up_sync(kFullWarp, x, step);
    if (lane >= step) x += below;
  }
  __syncthreads();
  if (lane == 31) shared[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x += shared[w];
  return x;
}

// Descending, in place; `size` is a power of two.
__device__ void sort_list(uint64_t* list, int64_t size) {
  for (int64_t run = 2; run <= size; run *= 2)
    for (int64_t stride = run / 2; stride > 0; stride /= 2) {
      for (int64_t pair = threadIdx.x; pair < size / 2; pair += kThreads) {
        int64_t i = 2 * pair - (pair & (stride - 1)), j = i + stride;
        uint64_t a = list[i], b = list[j];
        if ((a < b) == ((i & run) == 0)) list[i] = b, list[j] = a;
      }
      __syncthreads();
    }
}

// Items of a query as numbers: from their keys, or from lists that select_parts wrote. 0: none there.
struct Keys {
  const uint32_t* keys;  // [queries, count]
  int64_t count, first_id;
  __device__ __forceinline__ uint64_t at(int64_t query, int64_t i) const {
    uint32_t key = keys[query * count + i];
    return key == kExcludedKey ? 0 : ranked(key, first_id + i);
  }
};
struct Lists {
  const uint64_t* lists;  // [queries, count]
  int64_t count;
  __device__ __forceinline__ uint64_t at(int64_t query, int64_t i) const { return lists[query * count + i]; }
};

// Puts the best numbers of begin .. end - 1 in `list`, in no order, and returns how many: `best`, or all where they are no more. A radix
// search from the top digit down finds the number at or above which they lie. It ends at the first digit that settles it: most often the
// second, the third where scores are close, later where they are equal. All threads of the block call it once.
template <typename Numbers>
__device__ int64_t collect_best(uint64_t* list, const Numbers& numbers, int64_t query, int64_t begin, int64_t end, int64_t best) {
  __shared__ uint32_t bins[kBins], sums[kThreads / 32], found_bin, found_above, found_inside, taken;
  uint64_t limit = 0, prefix = 0;
  uint32_t need = uint32_t(best);
  for (int high = 64; high > 0;) {
    int low = max(high - kDigit, 0);
    uint32_t mask = (1u << (high - low)) - 1;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) bins[bin] = 0;
    if (threadIdx.x == 0) found_inside = 0;
    __syncthreads();
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      uint64_t number = numbers.at(query, i);
      if (number != 0 && (high == 64 || number >> high == prefix)) atomicAdd(&bins[uint32_t(number >> low) & mask], 1u);
    }
    __syncthreads();
    constexpr int kOwn = kBins / kThreads;
    int top = kBins - 1 - int(threadIdx.x) * kOwn;  // bins in descending order, so that sums count from the best
    uint32_t mine = 0;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) mine += bins[top - n];
    uint32_t above = inclusive_sum(mine, sums) - mine;
    if (above < need && need <= above + mine)
      for (int bin = top; bin > top - kOwn; above += bins[bin], --bin)
        if (above < need && need <= above + bins[bin]) found_bin = uint32_t(bin), found_above = above, found_inside = bins[bin];
    __syncthreads();
    uint32_t inside = found_inside;
    if (inside == 0) break;  // no more than wanted: all of them
    prefix = prefix << (high - low) | found_bin;
    limit = prefix << low;
    need -= found_above;
    high = low;
    __syncthreads();  // all have read what was found
    if (inside == need) break;
  }
  if (threadIdx.x == 0) taken = 0;
  __syncthreads();
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    uint64_t number = numbers.at(query, i);
    if (number != 0 && number >= limit) list[atomicAdd(&taken, 1u)] = number;
  }
  __syncthreads();
  return taken;
}

// A block owns a query (grid x) and one of gridDim.y ranges of its items: few queries still occupy the device. lists [query, range, best].
template <typename Numbers>
__global__ void __launch_bounds__(kThreads) select_parts(uint64_t* lists, Numbers numbers, int64_t best) {
  const int64_t query = blockIdx.x, parts = gridDim.y, part = blockIdx.y;
  uint64_t* list = lists + (query * parts + part) * best;
  int64_t count = collect_best(list, numbers, query, numbers.count * part / parts, numbers.count * (part + 1) / parts, best);
  for (int64_t i = count + threadIdx.x; i < best; i += kThreads) list[i] = 0;
}

// A block owns a query: the best of its numbers, sorted and written. Lists of up to kSharedList lie in shared memory (dynamic), longer
// ones in `lists`, `capacity` each, a power of two.
template <typename T, typename Numbers>
__global__ void __launch_bounds__(kThreads) select(T* scores, int64_t* ids, int64_t k, Numbers numbers, int64_t best, uint64_t* lists,
                                                   int64_t capacity) {
  extern __shared__ uint64_t shared_list[];
  const int64_t query = blockIdx.x;
  uint64_t* list = lists ? lists + query * capacity : shared_list;
  int64_t count = collect_best(list, numbers, query, 0, numbers.count, best);
  for (int64_t i = count + threadIdx.x; i < capacity; i += kThreads) list[i] = 0;
  __syncthreads();
  sort_list(list, capacity);
  for (int64_t i = threadIdx.x; i < k; i += kThreads) {
    scores[query * k + i] = from_float<T>(i < count ? score_of_key(uint32_t(list[i] >> 32)) : -INFINITY);
    ids[query * k + i] = i < count ? int64_t(uint32_t(~uint32_t(list[i]))) : -1;
  }
}

}  // namespace

void top_k(Tensor& scores, Tensor& ids, const Tensor& query, const Tensor& table, const Tensor* exclude_ids,
           const Tensor* exclude_offsets, int first_id, Stream stream) {
  pick_dtype("top_k", scores.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kBlocks = 256, kLeastItems = 4096;  // blocks wanted, and the items that make one worth it
    int64_t batch = query.rows(), k = scores.cols(), items = std::max<int64_t>(0, table.rows() - first_id);
    HSTU_CHECK(table.rows() <= INT32_MAX, kInvalidArgument, "top_k: at most 2^31 - 1 items on CUDA, got ", table.rows());
    int64_t best = std::min(items, k), capacity = 1;
    while (capacity < best) capacity *= 2;
    bool in_shared = capacity <= kSharedList;
    int64_t at_once = queries_at_once(batch, items * sizeof(uint32_t) + (in_shared ? 0 : capacity * sizeof(uint64_t)));
    int64_t parts = std::clamp<int64_t>(items / std::max(kLeastItems, 8 * best), 1, kBlocks / std::clamp<int64_t>(at_once, 1, kBlocks));
    Scratch<uint32_t> keys(at_once * items, stream);
    Scratch<uint64_t> lists(in_shared ? 0 : at_once * capacity, stream), part_lists(parts > 1 ? at_once * parts * best : 0, stream);
    for (int64_t first = 0; first < batch; first += at_once) {
      int64_t count = std::min(at_once, batch - first);
      score_keys<T>(keys, query, first, count, table, nullptr, exclude_ids, exclude_offsets, first_id, stream);
      auto write = [&](auto numbers) {
        launch(select<T, decltype(numbers)>, unsigned(count), kThreads, in_shared ? capacity * sizeof(uint64_t) : 0, stream,
               scores.as<T>() + first * k, ids.as<int64_t>() + first * k, k, numbers, best, lists.get(), capacity);
      };
      Keys numbers{keys, items, first_id};
      if (parts == 1) {
        write(numbers);
      } else {
        launch(select_parts<Keys>, dim3(unsigned(count), unsigned(parts)), kThreads, 0, stream, part_lists.get(), numbers, best);
        write(Lists{part_lists, parts * best});
      }
    }
  });
}

}  // namespace hstu::cuda
