// Which tiles of rows there are in a jagged batch, and who takes which: blocks that stay begin with the item of their own index and draw
// others by tickets, so that nobody waits for the longest sequence. Items go by sequence, head, and tile from the last one (which sees most
// keys) to the first: blocks that run at the same time read the same keys from the L2 cache. Where a block takes a few items only, the last
// tiles of all sequences come first, for otherwise the longest item of the last sequence is what all wait for.
#pragma once
#include "hstu_attention.cuh"

namespace hstu::cuda::attention {

constexpr int kFewSequences = 31;

struct Plan {
  const int* starts;  // [B + 1] tiles of the sequences before; null: a warp counts for itself, see own_starts
  int* ticket;
  int* order;  // tiles of sequences from `sorted` on, the last ones of their sequences first; or null
  int sorted, sequences, heads;

  // Few sequences, and an item a block at most: no kernel before. Lane b has starts[b].
  template <typename T>
  __device__ __forceinline__ int own_starts(const Call<T>& p, int rows) const {
    if (starts) return 0;
    int lane = threadIdx.x % 32, tiles = lane < sequences ? (sequence_of(p, lane).queries + rows - 1) / rows : 0, sum = tiles;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      int before = __shfl_up_sync(kFullWarp, sum, d);
      if (lane >= d) sum += before;
    }
    return sum - tiles;
  }
  __device__ __forceinline__ int items(int own) const {
    return (starts ? starts[sequences] : __shfl_sync(kFullWarp, own, sequences)) * heads;
  }
  __device__ __forceinline__ int draw() const {
    if (!starts) return INT_MAX;
    int drawn = threadIdx.x % 32 == 0 ? atomicAdd(ticket, 1) : 0;
    return __shfl_sync(kFullWarp, drawn, 0) + int(gridDim.x);
  }
  struct Item {
    int sequence, head, tile;
  };
  // By a warp: 32 sequences are looked at at a time.
  __device__ __forceinline__ Item item(int x, int own) const {
    int tile = x / heads, low = 0, from = sorted, count = sequences;  // starts[low] <= tile, and the sequence is one of `count`
    asm volatile("" : "+r"(from), "+r"(count));  // else what follows from them is kept in registers, which are short
    bool by_level = order && tile >= starts[from];
    if (by_level) tile = order[tile];
    if (!starts) low = __popc(__ballot_sync(kFullWarp, int(threadIdx.x % 32) < sequences && own <= tile)) - 1;
    else do {
      int step = (count + 31) / 32, at = min(low + (int(threadIdx.x % 32) + 1) * step, low + count);
      int beyond = __popc(__ballot_sync(kFullWarp, at < low + count && starts[at] <= tile));
      low += beyond * step, count = min(step, count - beyond * step);
    } while (count > 1);
    int first = starts ? starts[low] : __shfl_sync(kFullWarp, own, low);
    int tiles = (starts ? starts[low + 1] : __shfl_sync(kFullWarp, own, low + 1)) - first, rest = x - first * heads;
    if (by_level) return {low, x % heads, tile - first};
    return {low, rest / tiles, tiles - 1 - rest % tiles};
  }
};

constexpr int kFewItems = 12, kLastItems = 6;  // items a block: so many are all put in order, or else the last ones
constexpr int kLevels = 1024;                  // tiles of a sequence that are put in order
inline int first_sorted(int sequences, int64_t items, int blocks) {
  return items <= kFewItems * blocks ? 0 : sequences - int(std::min<int64_t>(sequences, kLastItems * blocks * int64_t(sequences) / items));
}

// starts [B + 1]; also zeroes the ticket. One block.
template <typename T>
__global__ void __launch_bounds__(kLevels) plan_kernel(const Call<T> p, int* starts, const Plan plan, int rows) {
  __shared__ int sums[32], level[kLevels];
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
    if (plan.order && b >= plan.sorted && tiles > 0) atomicAdd(&level[kLevels - tiles], 1);
    int sum = sum_up(tiles, all);
    if (b < p.sequences) starts[b + 1] = total + sum;
    total += all;
  }
  if (!plan.order) return;
  int all, here = sum_up(level[threadIdx.x], all), place = sum_up(here, all) - here;  // of tile kLevels - 1 - threadIdx.x
  level[threadIdx.x] = starts[plan.sorted] + place;
  __syncthreads();
  for (int b = plan.sorted + warp; b < p.sequences; b += kLevels / 32)
    for (int tile = starts[b] + lane; tile < starts[b + 1]; tile += 32)
      plan.order[atomicAdd(&level[kLevels - 1 - (tile - starts[b])], 1)] = tile;
}

}  // namespace hstu::cuda::attention
