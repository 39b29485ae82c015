// The forward for Hopper where items are few: their keys are dealt to blocks, too (docs/hstu_attention.md, "Split keys"). The costs of all
// items stand in a row, by head and tile of rows, and each block takes as long a range of it as the others, from its last item to its
// first. An item that goes on in the next range comes first, and its sums are left in memory; one that began in ranges before comes last,
// and what these left is added, in a fixed order, mostly without waiting. So all blocks are at an item's first key at the beginning and at
// its last one at the end: at any time they read the same keys, or nearly. The row is known on the device alone.
#pragma once
#include <random>

#include "hstu_attention_plan.cuh"

namespace hstu::cuda::attention {
namespace forward_sm90 {

constexpr int kMostTiles = 256;     // of rows, in a call whose keys are split
constexpr int kMostShares = 2;      // items a block in such a call: more of them are even enough
constexpr int kMostFragments = 16;  // of an item: they are added one after the other
constexpr int kAllTiles = 1 << 30;
constexpr uint64_t kMostKeys = 1 << 20;  // so that costs fit in an int

// Of an item's key tiles those from the begin'th to before the end'th.
struct Fragment {
  int begin = 0, end = kAllTiles;
  int others = 0;  // fragments of the item with earlier keys; -1 where another one has its last keys
  int from = 0;    // the first tile's number
};

// Leaves the fragment's tiles of an item's.
__device__ __forceinline__ void cut_out(KeyTiles& tiles, Fragment& part) {
  auto at = [&](int x) { return tiles.gap >= 0 && x >= tiles.gap ? x + tiles.resume - tiles.gap : x; };
  part.from = at(part.begin), tiles.last = min(tiles.last, at(part.end));
}
// Of the item in a slot.
template <typename Shared>
__device__ __forceinline__ int first_tile(const Shared& shared, int slot) {
  if constexpr (Shared::C::kSplits) return shared.fragment[slot].from;
  else return shared.work[slot].tiles.from(0);
}
template <typename Shared>
__device__ __forceinline__ int others_of(const Shared& shared, int slot) {
  if constexpr (Shared::C::kSplits) return shared.fragment[slot].others;
  else return 0;
}

// Whether sequences, if they are alike, leave no more rows of larger tiles empty, which read fewer keys, than of smaller ones.
inline bool fits_better(int64_t rows, int sequences, int large, int small) {
  int64_t each = ceil_div(rows, int64_t(sequences));
  return ceil_div(each, int64_t(large)) * large <= ceil_div(each, int64_t(small)) * small;
}

// Rows of a sequence that are an item's tile. With a bias the first tile, which sees fewest keys, is the one that may not be full.
struct TileRows {
  int first, count;
};
template <typename C>
__device__ __forceinline__ TileRows tile_rows(int queries, int tile) {
  if constexpr (C::kBias) {
    int end = queries - (queries - 1) / C::kRows * C::kRows + tile * C::kRows, first = max(end - C::kRows, 0);
    return {first, end - first};
  }
  return {tile * C::kRows, min(C::kRows, queries - tile * C::kRows)};
}

// Memory that fragments meet in, by range and warp. A mark says that sums are there; who has added them takes it away, so that it stands
// nowhere when a call begins: it is drawn at random, once a process.
struct Meeting {
  float4* sums;  // null: whole items
  uint64_t *marks, mark;
};
class MeetingMemory {
 public:
  MeetingMemory(int64_t blocks, int size, int strips, Stream stream) : sums_(blocks * size, stream), marks_(blocks * strips, stream) {}
  operator Meeting() const {
    static const uint64_t mark = uint64_t(std::random_device{}()) << 32 | std::random_device{}();
    return {sums_.get(), marks_.get(), mark};
  }

 private:
  Scratch<float4> sums_;
  Scratch<uint64_t> marks_;
};

struct Shares {
  int costs[kMostTiles + 1];        // what the tiles of rows before cost, in tiles of keys
  uint16_t starts[kMostTiles + 1];  // tiles of rows of the sequences before
  uint8_t sequence[kMostTiles];     // of a tile of rows
  int tiles, all;                   // how many tiles of rows there are, and what they cost, of a head
  int ranges, each, rest;           // a range is `each` long, and one more up to `rest`
  int least;                        // key tiles of a fragment
  int first, last;                  // this block's items;
  int begin, others, end;           // of the first one begin and others, of the last one the end

  // The last x with sums[x] <= value, of count + 1 sums from 0 on, of which the last one is larger.
  template <typename N>
  static __device__ __forceinline__ int last_at_most(const N* sums, int count, int value) {
    int low = 0;
    while (count > 1) {
      int half = count / 2;
      if (sums[low + half] <= value)
        low += half, count -= half;
      else
        count = half;
    }
    return low;
  }
  struct Place {
    int item, begin, end;
  };
  __device__ __forceinline__ Place at(int x) const {
    int head = x / all, tile = last_at_most(costs, tiles, x - head * all);
    return {head * tiles + tile, head * all + costs[tile], head * all + costs[tile + 1]};
  }
  // Where a range begins. An item is not cut close to its ends, nor within what it costs beside its keys.
  template <typename C>
  __device__ __forceinline__ int begin_of(int range, int total) const {
    int x = range * each + min(range, rest);
    if (range >= ranges || x >= total) return total;
    Place item = at(x);
    return x - item.begin < least + C::kItemCost ? item.begin : item.end - x < least ? item.end : x;
  }
  // This block's items, the last one is number 0.
  __device__ __forceinline__ int items() const { return last - first; }
  __device__ __forceinline__ Plan::Item item(int x) const {
    int at = last - 1 - x, head = at / tiles, tile = at - head * tiles, b = sequence[tile];
    return {b, head, tile - starts[b]};
  }
  __device__ __forceinline__ Fragment fragment(int x) const {
    Fragment part;
    if (x == last - 1 - first) part.begin = begin, part.others = others;
    if (x == 0 && end < kAllTiles) part.end = end, part.others = -1;
    return part;
  }

  // By a warp, before others look.
  template <typename C, typename T>
  __device__ void deal(const Call<T>& p) {
    int lane = threadIdx.x % 32, longest = 0;
    auto sum_up = [&](auto* sums, int count, int most, auto&& value) {
      int total = 0;
      if (lane == 0) sums[0] = 0;
#pragma unroll 1
      for (int x0 = 0; x0 < count; x0 += 32) {
        int x = x0 + lane, sum = x < count ? value(x) : 0;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
          int before = __shfl_up_sync(kFullWarp, sum, d);
          if (lane >= d) sum += before;
        }
        if (x < count) sums[x + 1] = min(total + sum, most);
        total += __shfl_sync(kFullWarp, sum, 31);
      }
      __syncwarp();
      return min(total, most);
    };
    int known = sum_up(starts, p.sequences, kMostTiles, [&](int b) { return (sequence_of(p, b).queries + C::kRows - 1) / C::kRows; });
    // By the keys that a tile's first and last row see. Where others see more, the last fragment is longer than it should be.
    int cost = sum_up(costs, known, INT_MAX, [&](int x) {
      int b = sequence[x] = last_at_most(starts, p.sequences, x);
      Sequence s = sequence_of(p, b);
      TileRows rows = tile_rows<C>(s.queries, x - starts[b]);
      VisibleKeys low = visible_keys(p, s, s.shift + rows.first), high = visible_keys(p, s, s.shift + rows.first + rows.count - 1);
      KeyTiles keys = KeyTiles::of({max(low.prefix, high.prefix), min(low.begin, high.begin), max(low.end, high.end), 0}, C::kKeys);
      int own = C::kItemCost + max(keys.last - (keys.gap < 0 ? 0 : keys.resume - keys.gap), 0);
      longest = max(longest, own);
      return own;
    });
    longest = __reduce_max_sync(kFullWarp, longest);
    int total = cost * p.heads, items = known * p.heads, least_range = max(C::kLeastRange, longest / kMostFragments);
    int count = max(min(int(gridDim.x), max(items, total / least_range)), 1), even = items > 0 ? count / items * items : 0;
    if (longest * known == cost && 20 * even >= 19 * count) count = even;  // a fragment a block, where few are left without
    if (lane == 0) {
      tiles = known, all = cost, ranges = count, each = total / count, rest = total % count;
      least = each < C::kLeastRange ? kAllTiles : C::kLeastFragment;  // so that no range is empty where items are cut
      first = last = begin = others = 0, end = kAllTiles;
    }
    __syncwarp();
    // Lane 0 looks at the end of this block's range, lane 1 at its begin, others at those before.
    int range = int(blockIdx.x) + 1 - lane, bound = range < 0 ? 0 : begin_of<C>(range, total);
    int low = __shfl_sync(kFullWarp, bound, 1), high = __shfl_sync(kFullWarp, bound, 0);
    if (low >= high) return;
    Place place = at(lane == 0 ? high - 1 : low);
    int start = __shfl_sync(kFullWarp, place.begin, 1), some = __popc(__ballot_sync(kFullWarp, lane > 0 && bound > start)), before = some;
    while (some >= 31) {
      range -= 31, bound = range < 0 ? 0 : begin_of<C>(range, total);
      some = __popc(__ballot_sync(kFullWarp, lane > 0 && bound > start)), before += some;
    }
    if (lane == 0) {
      last = place.item + 1;
      if (high < place.end) end = high - place.begin - C::kItemCost;
    } else if (lane == 1) {
      first = place.item, others = before;
      if (low > start) begin = low - start - C::kItemCost;
    }
  }
};

// Asked for anew, by a computing warp: else they stay in registers, which the loop over keys needs.
template <int kWarps>
__device__ __forceinline__ int place_of_warp() {
  int thread, block;
  asm volatile("mov.u32 %0, %%tid.x;\nmov.u32 %1, %%ctaid.x;" : "=r"(thread), "=r"(block));
  return block * kWarps + thread / 32 - 4;
}
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
// Adds the sums of an item's earlier fragments to those of its last one.
template <int kWarps, int kCount>
__device__ __forceinline__ void gather(float (&sums)[kCount], int others, const Meeting& meeting) {
  int lane = lane_id(), at = place_of_warp<kWarps>() - others * kWarps;
#pragma unroll 1
  for (; others > 0; --others, at += kWarps) {
    uint64_t seen;
    do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(meeting.marks + at) : "memory");
    while (seen != meeting.mark);
    __syncwarp();
    const float4* from = meeting.sums + int64_t(at) * (kCount * 8) + lane;
#pragma unroll
    for (int x = 0; x < kCount / 4; ++x) {
      float4 more = __ldcg(from + 32 * x);
      sums[4 * x] += more.x, sums[4 * x + 1] += more.y, sums[4 * x + 2] += more.z, sums[4 * x + 3] += more.w;
    }
    if (lane == 0) meeting.marks[at] = 0;
  }
}
// Leaves the sums of an earlier fragment.
template <int kWarps, int kCount>
__device__ __forceinline__ void leave(const float (&sums)[kCount], const Meeting& meeting) {
  int lane = lane_id(), at = place_of_warp<kWarps>();
  float4* to = meeting.sums + int64_t(at) * (kCount * 8) + lane;
#pragma unroll
  for (int x = 0; x < kCount / 4; ++x) __stcg(to + 32 * x, float4{sums[4 * x], sums[4 * x + 1], sums[4 * x + 2], sums[4 * x + 3]});
  __syncwarp();
  if (lane == 0) asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(meeting.marks + at), "l"(meeting.mark) : "memory");
}

}  // namespace forward_sm90
}  // namespace hstu::cuda::attention
