// HSTU attention, backward with a bias, for Hopper (sm_90a): sums of dS for the gradients of the tables. See docs/hstu_attention.md.
#pragma once
#include "hstu_attention_bwd_bias_sm90.cuh"
#include "hstu_attention_bwd_dq_sm90.cuh"

namespace hstu::cuda::attention {
namespace backward_sm90 {

constexpr int kTablesBarrier = 2, kPositionsBarrier = 3;  // of all warps that sum: at an item's end, in a tile

// Where a block of 8 queries by 8 keys of dS stands by block diagonals, in bytes: blocks on one diagonal are neighbours.
constexpr int kKeyBlock = 1024, kQueryBlock = 1152;
__device__ __forceinline__ uint32_t diagonal_block(int queries, int keys) { return keys * kKeyBlock + (7 - queries) * kQueryBlock; }

// dS is added over the heads of a group (all, where both tables are shared by heads) and summed once for all of them. Five warpgroups: one
// that finds tiles and stages their times, two that bring dS, two that sum.
struct TableShape {
  static constexpr int kKeys = 128, kQueries = 64, kThreads = 640, kStaging = 2;
  static constexpr int kAhead = 4;  // tiles that are known before they are done
  static constexpr int kDsStages = 2, kDsBytes = (kKeys / 8 + kQueries / 8 - 1) * kQueries * 16;
};

struct CutItem {
  Sequence s;
  int head, heads, tile, place, end;  // place: of its first tile of dS; end: of its tiles of queries
  float unit;                         // of dS as it is kept
  int64_t base;                       // of near times
  float *pos_sums, *below_sums, *target_sums, *time_sums;  // by distance: from 0 on, below 0, of targets
  bool sorted;  // its keys are, by time
};
struct CutTile {
  int first, index, rows, slot;  // its first query, -1: no more; its item's slot
  int before, steps;             // queries before the targets; block diagonals of a warp that are whole after it
  bool last;
};
struct SumTile {
  int first, slot;
  unsigned pieces[8];  // of 16 keys by 32 queries, each by itself: each warp's
  int ends[2];         // keys before this one, for each half of the queries, are summed by runs of keys in one bucket
  int low, high;       // the buckets of those
  int bucket;          // of all its pairs, so that the sum over its positions will do; -1: there are several
  int steps;
  bool last;
};

template <typename T>
struct TableMemory {
  using S = TableShape;
  static constexpr int kQ = S::kQueries, kK = S::kKeys, kAhead = S::kAhead;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kCounts = 8;  // that sum; copies of counts
  static constexpr int kNothing = 255 << 8;                              // a path: no query sees a key
  alignas(1024) T ds_data[S::kDsStages][S::kDsBytes / sizeof(T)];
  uint32_t threshold[kNearThresholds];
  alignas(16) int key_near[2][kK];
  TimeSpan key_span[2][kK / 16];
  uint2 cells[kCells];  // a threshold; bytes of `counts` before the bucket below it and (upper half) before the other
  alignas(8) int query_near[kAhead][kQ];
  alignas(8) int path[kAhead][kK / 16][kQ / 32];  // of 16 keys by 32 queries: kind, high, low, a byte each
  alignas(16) int counts[kWarps][kUntimed + 1][kCounts];  // the last row is for pairs without a time
  float far[kWarps][kTimeThresholds + 1];                 // by time bucket
  alignas(16) float before[2][kK / 8][kQ + 8];  // of each query, the sum of dS over the keys before a block of 8
  float square[kWarps][72];
  alignas(16) uint32_t zero[4];
  float clamped[kWarps];
  CutItem item_of[2];
  CutTile tile[kAhead];
  SumTile tile_of[kAhead];
  Barrier told[kAhead], tile_empty[kAhead], staged[kAhead], ds_full[S::kDsStages], ds_empty[S::kDsStages], slot_empty[2];

  __device__ __forceinline__ T* ds(int stage) { return ds_data[stage]; }
  __device__ __forceinline__ void init() {
    for (int x = 0; x < kAhead; ++x) told[x].init(0, 1), staged[x].init(0, 1), tile_empty[x].init(0, S::kStaging + 8 + kWarps);
    for (int x = 0; x < S::kDsStages; ++x) ds_full[x].init(0, 8), ds_empty[x].init(0, kWarps);
    for (int x = 0; x < 2; ++x) slot_empty[x].init(0, S::kStaging + kWarps);
  }
  __device__ __forceinline__ int path_of(TimeSpan keys, TimeSpan queries, int last) const {
    auto coded = [](TimeKind kind, int low, int high) { return int(kind) << 16 | high << 8 | low; };
    if (last < 0) return coded(TimeKind::kOne, 0, 0);
    int kinds = queries.kinds | keys.kinds;
    if (kinds & kSomeFar) return coded(TimeKind::kFar, 0, last);
    if (queries.least > queries.most || keys.least > keys.most) return coded(TimeKind::kMany, 0, 0);
    auto [low, high] = buckets_between(threshold, keys, queries, last);
    if (kinds || keys.most > queries.least || high - low >= 4) return coded(TimeKind::kMany, low, high);
    return coded(low < high ? TimeKind::kFew : TimeKind::kOne, low, high);
  }
};

__device__ __forceinline__ void add_to(float* to, float x) { asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory"); }

// A tile's sums of dS over the keys before each block of 8, by query: a warp's blocks of 8 queries.
template <typename T, typename W>
__device__ __forceinline__ void sum_before(W& shared, int stage, int warp, auto& before) {
  int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  uint32_t ones = pack_pair<T>(1.f, 1.f), later[8];
#pragma unroll
  for (int x = 0; x < 8; ++x) later[x] = x < g ? ones : 0;
#pragma unroll 1
  for (int block = warp; block < W::kQ / 8; block += W::kWarps) {
    float sum[4][4] = {};
    uint32_t from = shared_address(shared.ds(stage)) + diagonal_block(block, lane / 8) + lane % 8 * 16;
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      uint32_t words[4];
      load_matrices(words, from + 4 * x * kKeyBlock);
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        int keys = 4 * x + 2 * y;  // blocks
        uint32_t first = later[keys % 8], second = later[keys % 8 + 1];
        mma_m16n8k16<T>(sum[x], {x < 2 ? first : 0, x < 2 ? ones : first, x < 2 ? second : 0, x < 2 ? ones : second}, words[2 * y],
                        words[2 * y + 1]);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[0][e] += sum[1][e], sum[2][e] += sum[3][e];
    *reinterpret_cast<float2*>(&before[g][8 * block + 2 * t]) = float2{sum[0][0], sum[0][1]};
    *reinterpret_cast<float2*>(&before[g + 8][8 * block + 2 * t]) = float2{sum[0][2] + sum[2][2], sum[0][3] + sum[2][3]};
  }
}

// Where keys are sorted, those at least so much earlier than a query are the first ones: their sums tell those of buckets. A warp's share.
template <typename T, typename W>
__device__ __forceinline__ void sum_runs(W& shared, int stage, int ahead, int warp, const auto& tile, const auto& before) {
  int lane = thread_index() % 32;
  const int* keys = shared.key_near[tile.slot];
  const unsigned char* ds = reinterpret_cast<const unsigned char*>(shared.ds(stage));
  int low = tile.low, high = tile.high, last = high + int(keys[0] == kUntimedKey);
#pragma unroll 1
  for (int bucket = low + W::kWarps - 1 - warp; bucket <= last; bucket += W::kWarps) {  // the last warp has the least to do besides
    int least = bucket == low ? 0 : int(shared.threshold[bucket - 1]);
    float sum = 0;
#pragma unroll
    for (int c = 0; c < W::kQ / 32; ++c) {
      int query = 32 * c + lane, time = shared.query_near[ahead][query], end = tile.ends[c] / 8, at = 0;
      int limit = bucket > high ? kUntimedKey : time - least;
#pragma unroll
      for (int step = 8; step > 0; step /= 2)
        if (keys[8 * (at + step)] <= limit) at += step;
      bool whole = at >= end;
      if (whole) at = end;
      float part[2] = {before[at][query], 0.f};
      uint4 words = *reinterpret_cast<const uint4*>(ds + diagonal_block(query / 8, at) + query % 8 * 16);
      const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
      if (whole) limit = INT_MIN;
#pragma unroll
      for (int x = 0; x < 8; x += 4) {
        int4 four = *reinterpret_cast<const int4*>(keys + 8 * at + x);
        part[0] += four.x <= limit ? __uint_as_float(pairs[x / 2] << 16) : 0.f;
        part[1] += four.y <= limit ? __uint_as_float(pairs[x / 2] & 0xffff0000) : 0.f;
        part[0] += four.z <= limit ? __uint_as_float(pairs[x / 2 + 1] << 16) : 0.f;
        part[1] += four.w <= limit ? __uint_as_float(pairs[x / 2 + 1] & 0xffff0000) : 0.f;
      }
      sum += time == kUntimedQuery ? 0.f : part[0] + part[1];
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      if (bucket <= high) shared.far[warp][bucket] += sum;
      if (bucket > low) shared.far[warp][bucket - 1] -= sum;
    }
  }
}

// dS by time bucket of a warp's pieces of 16 keys by 32 queries, each score by itself.
template <typename T, typename W>
__device__ __forceinline__ void sum_pieces(W& shared, int stage, int ahead, int warp, const auto& tile,
                                          const Call<T>& p) {
  using S = typename W::S;
  static_assert(std::is_same_v<T, __nv_bfloat16>);
  int lane = thread_index() % 32, quad = lane / 4, t = lane % 4;
  float* sums = shared.far[warp];
#pragma unroll 1
  for (unsigned left = shared.tile_of[ahead].pieces[warp]; left; left &= left - 1) {
    int piece = __ffs(left) - 1;
    int keys = piece / 2, c0 = piece % 2 * 32, code = shared.path[ahead][keys][piece % 2];
    int low = code & 255, high = code >> 8 & 255;
    auto kind = TimeKind(code >> 16);
    // Words of blocks [query block][key block]: query `quad`, keys 2 t, 2 t + 1.
    uint32_t ds[2][4], at = shared_address(shared.ds(stage)) + diagonal_block(c0 / 8 + lane / 16, 2 * keys + lane / 8 % 2) + lane % 8 * 16;
    load_matrices(ds[0], at), load_matrices(ds[1], at - 2 * kQueryBlock);
    auto element = [&](int half, int x, int e) { return __uint_as_float(e ? ds[half][x] & 0xffff0000 : ds[half][x] << 16); };
    const int *key_near = &shared.key_near[tile.slot][16 * keys + 2 * t], *query_near = &shared.query_near[ahead][c0 + quad];
    uint32_t most = 0;
#pragma unroll
    for (int x = 0; x < 8; ++x) most = __vmaxu2(most, ds[x / 4][x % 4] & 0x7fff7fff);
    most = __reduce_max_sync(kFullWarp, max(most & 0xffff, most >> 16));
    if (most == 0) continue;
    if (kind != TimeKind::kFar && most < 0x7f80) {
      // Whole numbers, in units of a power of two, may be added in any order.
      uint32_t exponent = min(274 - (most >> 7), 253u);
      float up = __uint_as_float(exponent << 23), down = __uint_as_float(254 - exponent << 23);
      uint32_t row = shared_address(&shared.counts[warp][0][lane % W::kCounts]);
      const uint2* cells = shared.cells;
      const int2 keys_at[2] = {*reinterpret_cast<const int2*>(key_near), *reinterpret_cast<const int2*>(key_near + 8)};
#pragma unroll 1
      for (int y = 0; y < 4; y += 2) {
        uint32_t words[2][2] = {{y ? ds[0][2] : ds[0][0], y ? ds[0][3] : ds[0][1]}, {y ? ds[1][2] : ds[1][0], y ? ds[1][3] : ds[1][1]}};
        uint32_t to[8];
        int whole[8];
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          constexpr float kWhole = 1.5f * (1 << 23);
          int2 at = keys_at[x / 2 % 2];
          uint32_t apart, word = words[x / 4][x / 2 % 2];
          const uint2 cell = cells[cell_of(query_near[x / 4 * 16 + 4 * y], x % 2 ? at.y : at.x, apart)];
          
          to[x] = row + (apart >= cell.x ? cell.y >> 16 : cell.y & 0xffff);
          whole[x] = __float_as_int(fmaf(__uint_as_float(x % 2 ? word & 0xffff0000 : word << 16), up, kWhole)) - __float_as_int(kWhole);
        }
#pragma unroll
        for (int x = 0; x < 8; ++x) asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(to[x]), "r"(whole[x]) : "memory");
      }
      __syncwarp();
#pragma unroll 1
      for (int bucket = low + lane; bucket <= min(high, kUntimed - 1); bucket += 32) {
        int all = 0;
#pragma unroll
        for (int x = 0; x < W::kCounts; ++x) all += shared.counts[warp][bucket][x], shared.counts[warp][bucket][x] = 0;
        sums[bucket] += down * float(all);
      }
      __syncwarp();
    } else if (kind != TimeKind::kFar) {
      for (int bucket = lane; bucket <= p.last_bucket; bucket += 32) sums[bucket] = __int_as_float(0x7fffffff);
      __syncwarp();
    } else {
      const auto& item = shared.item_of[tile.slot];
#pragma unroll 1
      for (int y = 0; y < 16; ++y) {
        int i = item.s.shift + tile.first + c0 + y / 8 * 16 + y / 4 % 2 * 8 + quad;
        int j = item.tile * S::kKeys + 16 * keys + y / 2 % 2 * 8 + 2 * t + y % 2;
        float value = 0;
#pragma unroll
        for (int x = 0; x < 16; ++x) value += x == y ? element(x / 8, x / 2 % 4, x % 2) : 0.f;
        add_by_bucket(sums, exact_bucket(p, item.s, i, j), value);
      }
    }
  }
}

// The sums of an item by time bucket, and those beyond the position table, to memory.
template <typename T, typename W>
__device__ __forceinline__ void finish_item(W& shared, int warp, int slot,
                                            const Call<T>& p, int positions, float& clamped) {
  const auto& item = shared.item_of[slot];
  int lane = thread_index() % 32;
  float beyond = warp_sum(clamped);
  clamped = 0;
  if (lane == 0) shared.clamped[warp] = beyond;
  meet(kTablesBarrier, W::kThreads);
  if (item.time_sums)
#pragma unroll 1
    for (int bucket = 32 * warp + lane; bucket <= p.last_bucket; bucket += W::kThreads) {
      float sum = 0;
      for (int x = 0; x < W::kWarps; ++x) sum += shared.far[x][bucket], shared.far[x][bucket] = 0;
      item.time_sums[bucket] = item.unit * sum;
    }
  if (item.pos_sums && warp == 0 && lane == 0) {
    float sum = 0;
    for (int x = 0; x < W::kWarps; ++x) sum += shared.clamped[x];
    add_to(item.pos_sums + positions - 1, item.unit * sum);
  }
  meet(kTablesBarrier, W::kThreads);
}

// Sums by position, kept from tile to tile of an item: a block diagonal (blocks of 8 keys by 8 queries, all as far apart) is whole after
// three tiles. Of its numbers, (query - key) / 8 from the item's first ones on, each eighth is this warp's: a tile has three of them.
struct Diagonals {
  float sum[3][4] = {};
  float clamped = 0;  // what lies beyond the table
};
// A tile's, added. Returns a lane's part of all of them.
template <typename T, typename W>
__device__ __forceinline__ float add_diagonals(W& shared, Diagonals& kept, int stage, int warp, int before) {
  int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  uint32_t unit = pack_pair<T>(2 * t == g ? 1.f : 0.f, 2 * t + 1 == g ? 1.f : 0.f), ds = shared_address(shared.ds(stage)) + lane * 16;
  uint32_t from[2], step[2];
  float all = 0;
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    bool there = W::kQ - 8 - 8 * (lane / 8 + 4 * y) + lane % 8 < before;
    from[y] = there ? ds + (7 - warp) * kKeyBlock + y * 512 : shared_address(shared.zero), step[y] = there ? 8 * kKeyBlock : 0;
  }
#pragma unroll
  for (int x = 2; x >= 0; --x) {
    float sum[2][4] = {};
    uint32_t words[4];
    if (x == 0 && warp == 0) break;  // beyond the tile
#pragma unroll
    for (int y = 0; y < 2; ++y) load_matrices(words, from[y]), mma_m16n8k16<T>(sum[y], words, unit, unit), from[y] += step[y];
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[0][e] += sum[1][e], kept.sum[x][e] += sum[0][e];
    all += (sum[0][0] + sum[0][1]) + (sum[0][2] + sum[0][3]);
  }
  return all;
}
// The first of a warp's three is whole: to memory. `distance`: of its query 0 from its key 0.
template <typename W>
__device__ __forceinline__ void flush_diagonal(W& shared, Diagonals& kept, int warp, int distance, const auto& item, int positions) {
  int lane = thread_index() % 32, g = lane / 4, t = lane % 4, apart = lane - 7;
  float* square = shared.square[warp];
  square[9 * g + 2 * t] = kept.sum[0][0] + kept.sum[0][2], square[9 * g + 2 * t + 1] = kept.sum[0][1] + kept.sum[0][3];
  __syncwarp();
  float part[2] = {};
#pragma unroll
  for (int y = 0; y < 8; ++y) {
    unsigned key = unsigned(y - apart);
    if (key < 8) part[y % 2] += square[9 * y + key];
  }
  __syncwarp();
  float sum = part[0] + part[1];
  distance += apart;
  if (abs(distance) >= positions - 1)
    kept.clamped += sum;
  else if (sum != 0)
    add_to((distance < 0 ? item.below_sums : item.pos_sums) + abs(distance), item.unit * sum);
#pragma unroll
  for (int e = 0; e < 4; ++e) kept.sum[0][e] = kept.sum[1][e], kept.sum[1][e] = kept.sum[2][e], kept.sum[2][e] = 0;
}
// Target rows, which all stand at one position, by key: a thread a key.
template <typename W>
__device__ __forceinline__ void add_targets(W& shared, Diagonals& kept, int stage, int thread, int before, const auto& item,
                                            int positions) {
  int distance = item.s.history - (item.tile * W::kK + thread);
  if (thread >= W::kK || distance <= 0) return;
  float sum = 0;
  for (int r = max(before, 0); r < W::kQ; ++r)
    sum += to_float(shared.ds(stage)[diagonal_block(r / 8, thread / 8) / 2 + r % 8 * 8 + thread % 8]);
  if (distance >= positions - 1)
    kept.clamped += sum;
  else
    add_to(item.target_sums + distance, item.unit * sum);
}

// A warp that sums dS, where its sums are kept from tile to tile.
template <typename T, typename W>
__device__ __forceinline__ void sum_tiles(W& shared, const Call<T>& p, int positions) {
  Diagonals kept;
  int runs_before = 0;
  for (uint32_t count = 0;; ++count) {
    constexpr int kAhead = W::S::kAhead, kStages = W::S::kDsStages;
    int stage = count % kStages, ahead = count % kAhead, warp = int(thread_index() / 32) - 12;
    shared.staged[ahead].wait(count / kAhead & 1);
    const auto& tile = shared.tile_of[ahead];
    if (tile.first < 0) return;
    const auto& item = shared.item_of[tile.slot];
    int before = item.s.history - item.s.shift - tile.first;
    shared.ds_full[stage].wait(count / kStages & 1);
    bool several = item.time_sums && tile.bucket < 0, runs = several && tile.high >= 0;
    if (runs) sum_before<T>(shared, stage, warp, shared.before[runs_before % 2]);
    if (item.pos_sums) {
      float all = add_diagonals<T>(shared, kept, stage, warp, before);
      if (item.time_sums && !several) {
        all = warp_sum(all);
        if (thread_index() % 32 == 0) shared.far[warp][tile.bucket] += all;
      }
      if (before < W::kQ && p.num_targets) add_targets(shared, kept, stage, 32 * warp + int(thread_index() % 32), before, item, positions);
    }
    if (several) sum_pieces<T>(shared, stage, ahead, warp, tile, p);
    if (runs) {
      meet(kPositionsBarrier, W::kThreads);
      sum_runs<T>(shared, stage, ahead, warp, tile, shared.before[runs_before++ % 2]);
    }
    __syncwarp();
    shared.ds_empty[stage].arrive_for_warp(thread_index() % 32);  // dS is read no more
    if (item.pos_sums) {
      int distance = item.s.shift + tile.first - 128 + 8 * warp - item.tile * W::kK;
#pragma unroll 1
      for (int x = 0; x < tile.steps; ++x, distance += 64) flush_diagonal(shared, kept, warp, distance, item, positions);
    }
    if (tile.last) {
      finish_item<T>(shared, warp, tile.slot, p, positions, kept.clamped);
      shared.slot_empty[tile.slot].arrive_for_warp(thread_index() % 32);
    }
    __syncwarp();
    shared.tile_empty[ahead].arrive_for_warp(thread_index() % 32);
  }
}

// By all threads of a block, before all else.
template <typename T>
__device__ __forceinline__ void begin_tables(TableMemory<T>& shared, int last_bucket) {
  constexpr int kThreads = TableShape::kThreads;
  int thread = threadIdx.x;
  auto clear = [&](auto& x) {
    for (int at = thread; at < int(sizeof(x) / 4); at += kThreads) reinterpret_cast<uint32_t*>(&x)[at] = 0;
  };
  stage_thresholds(shared.threshold, thread, kThreads);
  clear(shared.counts), clear(shared.far), clear(shared.zero), clear(shared.ds_data);
  __syncthreads();
  for (int x = thread; x < kCells; x += kThreads) {
    int bucket = min(int(kCellBuckets.at[x]), kNearThresholds - 1), next = bucket;
    uint32_t threshold = shared.threshold[bucket];
    while (next < kNearThresholds - 1 && shared.threshold[next] == threshold) ++next;
    if (threshold != ~0u) ++threshold;
    auto bytes = [&](int x) { return uint32_t(x < kUntimed ? min(x, last_bucket) : kUntimed) * uint32_t(sizeof(shared.counts[0][0])); };
    shared.cells[x] = uint2{threshold, bytes(bucket) | bytes(next) << 16};
  }
  __syncthreads();
}

}  // namespace backward_sm90
}  // namespace hstu::cuda::attention
