// Which tiles of rows there are in a jagged batch, and who takes which: blocks that stay begin with the item of their own index and draw
// others by tickets, so that nobody waits for the longest sequence. Items go by sequence, head, and tile from the last one (which sees most
// keys) to the first: blocks that run at the same time read the same keys from the L2 cache. Where a block takes a few items only, the last
// tiles of all sequences come first, for otherwise the longest item of the last sequence is what all wait for. A block's first item is
// then known without the plan, which takes a few microseconds.
#pragma once
#include "hstu_attention.cuh"
#include "sm90/dependent.cuh"

namespace hstu::cuda::attention {

constexpr int kFewSequences = 31;

// A tile of rows of a sequence: its number, or -1 where the sequence's items go by head and tile.
struct alignas(16) RowTile {
  int sequence, tile;
  int before, count;  // tiles of the sequences before, and of this one
};

struct Plan {
  RowTile* order;  // or null: a warp counts for itself, see own_starts
  int *tiles, *ticket;
  int sorted, sequences, heads;  // from sequence `sorted` on the last tiles of all come first
  int early;                     // so many tiles of rows are begun with, whatever the plan will be, and are not in it

  // Few sequences, and an item a block at most: no kernel before. Lane b has starts[b].
  template <typename T>
  __device__ __forceinline__ int own_starts(const Call<T>& p, int rows) const {
    if (order) return 0;
    int lane = threadIdx.x % 32, tiles = lane < sequences ? (sequence_of(p, lane).queries + rows - 1) / rows : 0, sum = tiles;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      int before = __shfl_up_sync(kFullWarp, sum, d);
      if (lane >= d) sum += before;
    }
    return sum - tiles;
  }
  __device__ __forceinline__ int items(int own) const {
    return (order ? *tiles : __shfl_sync(kFullWarp, own, sequences)) * heads;
  }
  __device__ __forceinline__ int draw() const {
    if (!order) return INT_MAX;
    int drawn = threadIdx.x % 32 == 0 ? atomicAdd(ticket, 1) : 0;
    return __shfl_sync(kFullWarp, drawn, 0) + (early ? 0 : int(gridDim.x));
  }
  // The early tiles are the last ones of the first sequences, of all of them before a second one of any: how many of a sequence's.
  __device__ __forceinline__ int early_of(int b, int tiles) const {
    return early ? min(early / sequences + int(b < early % sequences), tiles) : 0;
  }
  struct Item {
    int sequence, head, tile;
  };
  // What a block begins with, if `early`. The tile is counted from behind the last one: there may be fewer.
  __device__ __forceinline__ Item first() const {
    int x = int(blockIdx.x) / heads;
    return {x % sequences, int(blockIdx.x) % heads, -1 - x / sequences};
  }
  // By a warp.
  __device__ __forceinline__ Item item(int x, int own) const {
    RowTile at;
    if (order) {
      at = order[x / heads];
    } else {
      int low = __popc(__ballot_sync(kFullWarp, int(threadIdx.x % 32) < sequences && own <= x / heads)) - 1;
      int before = __shfl_sync(kFullWarp, own, low);
      at = {low, -1, before, __shfl_sync(kFullWarp, own, low + 1) - before};
    }
    int rest = x - at.before * heads;
    if (at.tile >= 0) return {at.sequence, x % heads, at.tile};
    return {at.sequence, rest / at.count, at.count - 1 - rest % at.count};
  }
};

constexpr int kFewItems = 12, kLastItems = 6;  // items a block: so many are all put in order, or else the last ones
constexpr int kLevels = 1024;                  // tiles of a sequence that are put in order
inline int first_sorted(int sequences, int64_t items, int blocks) {
  return items <= kFewItems * blocks ? 0 : sequences - int(std::min<int64_t>(sequences, kLastItems * blocks * int64_t(sequences) / items));
}

// starts [B + 1] is for itself, where there are more than kLevels sequences; also zeroes the ticket. One block. The kernel that the plan is
// for begins at the same time.
template <typename T>
__global__ void __launch_bounds__(kLevels) plan_kernel(const Call<T> p, int* starts, const Plan plan, int rows) {
  __shared__ int sums[32], level[kLevels], few_starts[kLevels + 1];
  sm90::let_next_begin();
  if (p.sequences <= kLevels) starts = few_starts;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, total = 0;
  // The sum over this thread and those before it, and over all.
  auto sum_up = [&](int x, int& all) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      int before = __shfl_up_sync(kFullWarp, x, d);
      if (lane >= d) x += before;
    }
    if (lane == 31) sums[warp] = x;
    __syncthreads();
    int sum = sums[lane];
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      int before = __shfl_up_sync(kFullWarp, sum, d);
      if (lane >= d) sum += before;
    }
    int before = __shfl_sync(kFullWarp, sum, max(warp - 1, 0));
    all = __shfl_sync(kFullWarp, sum, 31);
    __syncthreads();
    return x + (warp > 0 ? before : 0);
  };
  if (threadIdx.x == 0) *plan.ticket = 0, starts[0] = 0;
  level[threadIdx.x] = 0;
  __syncthreads();
  for (int b0 = 0; b0 < p.sequences; b0 += kLevels) {
    int b = b0 + threadIdx.x, all;
    int tiles = b < p.sequences ? (sequence_of(p, b).queries + rows - 1) / rows : 0;
    tiles -= plan.early_of(b, tiles);
    if (b >= plan.sorted && tiles > 0) atomicAdd(&level[kLevels - tiles], 1);
    int sum = sum_up(tiles, all);
    if (b < p.sequences) starts[b + 1] = total + sum;
    total += all;
  }
  if (threadIdx.x == 0) *plan.tiles = total;
  int all, here = sum_up(level[threadIdx.x], all), place = sum_up(here, all) - here;  // of tile kLevels - 1 - threadIdx.x
  level[threadIdx.x] = starts[plan.sorted] + place;
  __syncthreads();
  for (int b = warp; b < p.sequences; b += kLevels / 32) {
    int before = starts[b], count = starts[b + 1] - before;
    for (int tile = lane; tile < count; tile += 32)
      if (b < plan.sorted) plan.order[before + tile] = {b, -1, before, count};
      else plan.order[atomicAdd(&level[kLevels - 1 - tile], 1)] = {b, tile, before, count};
  }
}

}  // namespace hstu::cuda::attention
