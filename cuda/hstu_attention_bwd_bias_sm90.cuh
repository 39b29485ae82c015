// HSTU attention, backward with a bias, for Hopper (sm_90a): the warpgroup that brings the bias of a tile and sums dS for the gradients of
// the tables. See docs/hstu_attention.md.
#pragma once
#include "hstu_attention_bias.cuh"
#include "hstu_attention_bwd_sm90.cuh"

namespace hstu::cuda::attention {
namespace backward_sm90 {

constexpr int kTablesBarrier = 2, kPositionsBarrier = 3;  // of all warps that sum, of those that sum positions

// What follows from an item, and from a tile of queries, and is needed after their slots have been given away.
struct TableItem {
  Sequence s;
  int head, tile;
  float unit;    // of dS as it is kept
  int64_t base;  // of near times
  float *pos_sums, *time_sums;
};
struct TableTile {
  int first, slot;  // its first query, -1: no more; its item's
  bool last;
};

// One warp brings the bias of a tile, three sum dS. dS by time bucket: a lane adds to its own column, in the order of its program; the
// last row is for pairs without a time.
template <typename T, int kDim>
struct SharedWithBias : Shared<T, kDim, true> {
  using S = Shape<kDim, true>;
  static constexpr int kQ = S::kQueries, kK = S::kKeys, kWarps = 3, kThreads = 32 * kWarps;
  static constexpr int kTimeWarps = kDim <= 64 ? 3 : 2, kFirst = kDim <= 64 ? 0 : 2;  // positions: warps from kFirst on
  static constexpr int kPositionThreads = 32 * (kWarps - kFirst), kPitch = kQ + kK + 8;
  uint32_t threshold[kNearThresholds];
  float time[2][kNearThresholds + 1];  // of an item's head, 0 from kUntimed on
  int key_near[2][kK];
  TimeSpan key_span[kK / 16];
  float pos[2][kQ + kK];  // / alpha, by query - key + kK - 1
  alignas(8) int query_near[2][kQ];
  int path[2][kK / 16][kQ / 32];  // of 16 keys by 32 queries: kind, high, low, a byte each
  float sums[kTimeWarps][kUntimed + 1][32], far[kTimeWarps][kTimeThresholds + 1];
  alignas(16) float blocks[8][kPitch];  // sums of blocks of 8 keys by 8 queries on one diagonal, one after the other from column 8 on
  alignas(16) uint32_t zero[4];
  float targets[kK];  // sums of dS over target rows, by key
  float clamped[kWarps];
  int copy[2];  // of the tables' sums, an item's
  TableItem item_of[2];
  TableTile tile_of[2];
  Barrier bias_full[2], ds_full[2], ds_empty[2];

  __device__ __forceinline__ void init() {
    for (int x = 0; x < 2; ++x) bias_full[x].init(0, 1), ds_full[x].init(0, 8), ds_empty[x].init(0, kWarps);
  }
  static __device__ __forceinline__ uint32_t apart(int a, int b) { return a > b ? uint32_t(a) - uint32_t(b) : uint32_t(b) - uint32_t(a); }
  // Not limited to the table.
  __device__ __forceinline__ int near_bucket(uint32_t d) const {
    int guess = bucket_guess(fmaxf(__uint2float_rz(d), 1.f));
    return guess + int(d >= threshold[guess]);
  }
  __device__ __forceinline__ int path_of(TimeSpan keys, TimeSpan queries, int last) const {
    auto coded = [](TimeKind kind, int low, int high) { return int(kind) << 16 | high << 8 | low; };
    if (last < 0) return coded(TimeKind::kOne, 0, 0);
    int kinds = queries.kinds | keys.kinds;
    if (kinds || queries.least > queries.most || keys.least > keys.most)
      return coded(kinds & kSomeFar ? TimeKind::kFar : TimeKind::kMany, 0, last);
    int low = min(near_bucket(max(max(queries.least - keys.most, keys.least - queries.most), 0)), last);
    int high = min(near_bucket(max(queries.most - keys.least, keys.most - queries.least)), last);
    bool two = keys.most <= queries.least && high == low + 1;
    return coded(low == high ? TimeKind::kOne : two ? TimeKind::kTwo : TimeKind::kMany, low, high);
  }
};
template <typename T, int kDim, bool kBias>
using SharedOf = std::conditional_t<kBias, SharedWithBias<T, kDim>, Shared<T, kDim, false>>;

__device__ __forceinline__ void add_to(float* to, float x) { asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory"); }

// An item's times and time table, before its first tile.
template <typename T, int kDim>
__device__ __forceinline__ void stage_item(SharedWithBias<T, kDim>& shared, int at, const Call<T>& p, const Gradients<T>& g,
                                           int positions) {
  const Item& item = shared.item[at];
  int lane = thread_index() % 32, slot = item.parity;
  const Sequence& s = item.s;
  int64_t base = first_time(p, s), row = p.time_per_head ? item.head * p.time_width : 0;
#pragma unroll
  for (int r = lane; r < Shape<kDim, true>::kKeys; r += 32) {
    int j = item.tile * Shape<kDim, true>::kKeys + r;
    bool there = p.last_bucket >= 0 && j < s.history;
    NearTime time{kNoFixedTime, kSomeUntimed};
    if (there && j >= s.contextual) time = near_time(p.key_time[s.time + j], base);
    shared.key_near[slot][r] = time.at;
    TimeSpan low = TimeSpan::of_warp(time, there && lane < 16), high = TimeSpan::of_warp(time, there && lane >= 16);
    if (lane % 16 == 0) shared.key_span[r / 16] = lane ? high : low;
  }
  for (int x = lane; x <= kNearThresholds; x += 32)
    shared.time[slot][x] = p.last_bucket >= 0 && x < kUntimed ? p.unit * p.time_w.at(row + min(x, p.last_bucket)) : 0.f;
  if (lane == 0) {
    int64_t copy = int64_t(item.head) * g.copies + shared.copy[at];
    shared.item_of[slot] = {s,
                            item.head,
                            item.tile,
                            item.unit * item.ds_unit,
                            base,
                            g.pos_sums ? g.pos_sums + copy * positions : nullptr,
                            g.time_sums ? g.time_sums + copy * (p.last_bucket + 1) : nullptr};
  }
  __syncwarp();
}

// The warp that brings the bias: of a tile the positions, the times of its queries, how the time's term is found. `positions`: entries of a
// row of pos_sums.
template <typename T, int kDim>
__device__ __forceinline__ void stage_bias(SharedWithBias<T, kDim>& shared, const Call<T>& p, const Gradients<T>& g, int positions) {
  using S = Shape<kDim, true>;
  constexpr int kCount = (S::kQueries + S::kKeys) / 32;
  float up = 1 / p.alpha;
  bool begins = true;
  for (uint32_t count = 0;; ++count) {
    int stage = count % 2, lane = thread_index() % 32;
    shared.told[stage].wait(count / 2 & 1);
    const Tile& tile = shared.tile[stage];
    if (tile.item < 0) {
      shared.ds_empty[stage].wait(count / 2 & 1 ^ 1);
      if (lane == 0) shared.tile_of[stage].first = -1;
      shared.bias_full[stage].arrive_for_warp(lane);
      return;
    }
    const Item& item = shared.item[tile.item];
    const Sequence& s = item.s;
    int first = tile.index * S::kQueries, i0 = s.shift + first, slot = item.parity;
    int nearest = min(i0, s.history) - item.tile * S::kKeys - (S::kKeys - 1);
    int64_t row = p.pos_per_head ? int64_t(item.head) * p.positions : 0;
    uint32_t entries[kCount];
#pragma unroll
    for (int x = 0; x < kCount; ++x) entries[x] = p.positions ? p.pos_w.bits(row + min(abs(nearest + lane + 32 * x), p.positions - 1)) : 0;
    shared.ds_empty[stage].wait(count / 2 & 1 ^ 1);
    if (begins) stage_item<T, kDim>(shared, tile.item, p, g, positions);
    begins = tile.last;
#pragma unroll
    for (int x = 0; x < kCount; ++x) shared.pos[stage][lane + 32 * x] = up * p.pos_w.value(entries[x]);
    TimeSpan spans[S::kQueries / 32];
#pragma unroll
    for (int x = 0; x < S::kQueries / 32; ++x) {
      int r = lane + 32 * x;
      bool there = p.last_bucket >= 0 && r < tile.rows;
      NearTime time{kNoMovingTime, kSomeUntimed};
      if (there && i0 + r >= s.contextual) time = near_time(p.query_time[s.query + first + r], shared.item_of[slot].base);
      shared.query_near[stage][r] = time.at;
      spans[x] = TimeSpan::of_warp(time, there);
    }
    static_assert(S::kQueries == 64 && S::kKeys == 128);
    if (lane < 16)
      shared.path[stage][lane / 2][lane % 2] = shared.path_of(shared.key_span[lane / 2], lane % 2 ? spans[1] : spans[0], p.last_bucket);
    if (lane == 0) shared.tile_of[stage] = {first, slot, tile.last};
    __syncwarp();
    shared.bias_full[stage].arrive_for_warp(lane);
  }
}

// Sums of dS of one bucket, while it lasts; in lanes 0 to 3.
struct TimeRun {
  float sum[4] = {};
  int bucket = 0;
  __device__ __forceinline__ void flush(float (*sums)[32]) {
    int lane = thread_index() % 32;
    if (lane < 4) sums[bucket][lane] += sum[0] + sum[1];
    sum[0] = sum[1] = 0;
  }
};

// dS of a tile by time bucket, pieces of 16 keys by 32 queries.
template <typename T, int kDim>
__device__ __forceinline__ void sum_times(SharedWithBias<T, kDim>& shared, int stage, int warp, const TableTile& tile, TimeRun& run,
                                          const Call<T>& p) {
  using S = Shape<kDim, true>;
  static_assert(std::is_same_v<T, __nv_bfloat16>);
  int lane = thread_index() % 32, quad = lane / 4, t = lane % 4;
  float(*sums)[32] = shared.sums[warp];
#pragma unroll 1
  for (int piece = warp; piece < S::kKeys / 16 * 2; piece += SharedWithBias<T, kDim>::kTimeWarps) {
    int keys = piece / 2, c0 = piece % 2 * 32, code = shared.path[stage][keys][piece % 2], low = code & 255, high = code >> 8 & 255;
    auto kind = TimeKind(code >> 16);
    // Words of blocks [query block][key block]: query `quad`, keys 2 t, 2 t + 1.
    uint32_t row = shared_address(shared.ds[stage]) + keys / 4 * S::kQueries * 128 + (c0 + lane / 16 * 8 + lane % 8) * 128;
    row += ((keys * 2 + lane / 8 % 2) % 8 ^ lane % 8) * 16;
    if (kind == TimeKind::kOne) {
      if (low != run.bucket) run.flush(sums), run.bucket = low;
      uint32_t ones = quad == 0 ? pack_pair<T>(1.f, 1.f) : 0, left[4] = {ones, 0, ones, 0}, ds[2][4];
      load_matrices(ds[0], row), load_matrices(ds[1], row + 16 * 128);
#pragma unroll
      for (int x = 0; x < 4; ++x) mma_m16n8k16<T>(run.sum, left, ds[x / 2][x % 2 * 2], ds[x / 2][x % 2 * 2 + 1]);
      continue;
    }
    int2 at[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) at[k] = *reinterpret_cast<const int2*>(&shared.key_near[tile.slot][16 * keys + 8 * k + 2 * t]);
    float below[2] = {}, above[2] = {};
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      uint32_t ds[4];
      load_matrices(ds, row + half * 16 * 128);
      const int* query_near = &shared.query_near[stage][c0 + 16 * half + quad];
      auto element = [&](int x, int e) { return __uint_as_float(e ? ds[x] & 0xffff0000 : ds[x] << 16); };
      if (kind == TimeKind::kTwo) {
        int least = int(shared.threshold[low]);
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          int time = query_near[x / 2 * 8] - least;  // rows that are not there may wrap; their dS is 0
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (time >= (e ? at[x % 2].y : at[x % 2].x))
              above[e] += element(x, e);
            else
              below[e] += element(x, e);
        }
        continue;
      }
      if (__all_sync(kFullWarp, ((ds[0] | ds[1] | ds[2] | ds[3]) & 0x7fff7fff) == 0)) continue;
      if (kind == TimeKind::kMany) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          int time = query_near[x / 2 * 8], bucket[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            bucket[e] = shared.near_bucket(shared.apart(time, e ? at[x % 2].y : at[x % 2].x));
            bucket[e] = bucket[e] < kUntimed ? min(bucket[e], p.last_bucket) : kUntimed;
          }
          float *left = &sums[bucket[0]][lane], *right = &sums[bucket[1]][lane], a = *left, b = *right;
          bool same = left == right;
          *left = a + (same ? element(x, 0) + element(x, 1) : element(x, 0));
          if (!same) *right = b + element(x, 1);
        }
      } else {
        const TableItem& item = shared.item_of[tile.slot];
#pragma unroll 1
        for (int y = 0; y < 8; ++y) {
          int i = item.s.shift + tile.first + c0 + 16 * half + y / 4 * 8 + quad;
          int j = item.tile * S::kKeys + 16 * keys + y / 2 % 2 * 8 + 2 * t + y % 2;
          float value = 0;
#pragma unroll
          for (int x = 0; x < 8; ++x) value += x == y ? element(x / 2, x % 2) : 0.f;
          add_by_bucket(shared.far[warp], exact_bucket(p, item.s, i, j), value);
        }
      }
    }
    if (kind == TimeKind::kTwo) sums[low][lane] += below[0] + below[1], sums[high][lane] += above[0] + above[1];
  }
}

// dS of a tile along diagonals, added to the item's sums. `clamped`: what lies beyond the table.
template <typename T, int kDim>
__device__ __forceinline__ void sum_positions(SharedWithBias<T, kDim>& shared, int stage, int warp, int first, const TableItem& item,
                                              int positions, float& clamped) {
  using S = Shape<kDim, true>;
  using W = SharedWithBias<T, kDim>;
  constexpr int kQ = S::kQueries, kK = S::kKeys;
  int lane = thread_index() % 32, thread = 32 * (warp - W::kFirst) + lane, g = lane / 4, t = lane % 4;
  int i0 = item.s.shift + first, j0 = item.tile * kK;
  int before = item.s.history - i0;  // queries before the targets, which all stand at one position
  // Blocks of 8 x 8 on diagonal d = query block - key block and, as there are 16 blocks of keys, on d - 16 beside it: eight together.
  // Their sums by mma with unit matrices, rows 0 .. 7 for d, 8 .. 15 for d - 16.
  uint32_t unit = pack_pair<T>(2 * t == g ? 1.f : 0.f, 2 * t + 1 == g ? 1.f : 0.f), ds = shared_address(shared.ds[stage]);
#pragma unroll 1
  for (int d = warp - W::kFirst; d < 16; d += W::kWarps - W::kFirst) {
    float sum[4] = {};
#pragma unroll
    for (int q0 = 0; q0 < kQ / 8; q0 += 4) {
      int block = q0 + lane / 8, query = 8 * block + lane % 8, key = block - d & 15;
      uint32_t words[4], at = ds + key / 8 * kQ * 128 + query * 128 + (key % 8 ^ lane % 8) * 16;
      load_matrices(words, query < before ? at : shared_address(shared.zero));
#pragma unroll
      for (int y = 0; y < 4; y += 2) {
        bool one = q0 + y >= d, two = q0 + y + 1 >= d;
        uint32_t left[4] = {one ? unit : 0, one ? 0 : unit, two ? unit : 0, two ? 0 : unit};
        mma_m16n8k16<T>(sum, left, words[y], words[y + 1]);
      }
    }
    if (d < 8) *reinterpret_cast<float2*>(&shared.blocks[g][8 * d + kK + 2 * t]) = float2{sum[0], sum[1]};
    if (d > 0) *reinterpret_cast<float2*>(&shared.blocks[g][8 * d + 2 * t]) = float2{sum[2], sum[3]};
  }
  if (before < kQ)
    for (int key = thread; key < kK; key += W::kPositionThreads) {
      float sum = 0;
      for (int r = max(before, 0); r < kQ; ++r)
        sum += to_float(shared.ds[stage][key / 64 * kQ * 64 + r * 64 + (key % 64 / 8 ^ r % 8) * 8 + key % 8]);
      shared.targets[key] = sum;
    }
  meet(kPositionsBarrier, W::kPositionThreads);
  auto diagonal = [&](int x) {  // query - key + kK - 1 = x
    float sum = 0;
#pragma unroll
    for (int y = 0; y < 8; ++y) sum += shared.blocks[y][x + y + 1];
    return sum;
  };
  // Two diagonals that are as far from 0 come together; then targets.
#pragma unroll 1
  for (int x = thread; x < kQ + kK - 1; x += W::kPositionThreads) {
    int distance = i0 - j0 + x - (kK - 1), opposite = x - 2 * distance;
    float sum = diagonal(x);
    if (distance != 0 && opposite >= 0 && opposite < kQ + kK - 1) sum = distance > 0 ? sum + diagonal(opposite) : 0.f;
    if (abs(distance) >= positions - 1)
      clamped += sum;
    else if (sum != 0)
      add_to(item.pos_sums + abs(distance), item.unit * sum);
  }
  meet(kPositionsBarrier, W::kPositionThreads);  // one thread at a time adds to an entry
  if (before >= kQ) return;
  for (int key = thread; key < kK; key += W::kPositionThreads) {
    int distance = item.s.history - (j0 + key);
    if (distance <= 0) continue;
    if (distance >= positions - 1)
      clamped += shared.targets[key];
    else
      add_to(item.pos_sums + distance, item.unit * shared.targets[key]);
  }
  meet(kPositionsBarrier, W::kPositionThreads);
}

// The sums of an item by time bucket, and those beyond the position table, to memory.
template <typename T, int kDim>
__device__ __forceinline__ void finish_item(SharedWithBias<T, kDim>& shared, int warp, const TableItem& item, TimeRun& run,
                                            const Call<T>& p, int positions, float& clamped) {
  using W = SharedWithBias<T, kDim>;
  int lane = thread_index() % 32;
  if (item.time_sums && warp < W::kTimeWarps) {
    run.flush(shared.sums[warp]);
    __syncwarp();
#pragma unroll 1
    for (int bucket = lane; bucket <= min(p.last_bucket, kUntimed - 1); bucket += 32) {
      float sum = 0;
#pragma unroll 8
      for (int x = 0; x < 32; ++x) {
        float& part = shared.sums[warp][bucket][(x + lane) % 32];
        sum += part, part = 0;
      }
      shared.far[warp][bucket] += sum;
    }
    __syncwarp();
  }
  float beyond = warp_sum(clamped);
  clamped = 0;
  if (lane == 0) shared.clamped[warp] = beyond;
  meet(kTablesBarrier, W::kThreads);
  if (item.time_sums)
#pragma unroll 1
    for (int bucket = 32 * warp + lane; bucket <= p.last_bucket; bucket += W::kThreads) {
      float sum = 0;
      for (int x = 0; x < W::kTimeWarps; ++x) sum += shared.far[x][bucket], shared.far[x][bucket] = 0;
      item.time_sums[bucket] = item.unit * sum;
    }
  if (item.pos_sums && warp == W::kFirst && lane == 0) {
    float sum = 0;
    for (int x = W::kFirst; x < W::kWarps; ++x) sum += shared.clamped[x];
    add_to(item.pos_sums + positions - 1, item.unit * sum);
  }
  meet(kTablesBarrier, W::kThreads);
}

// A warp that sums dS.
template <typename T, int kDim>
__device__ __forceinline__ void sum_tables(SharedWithBias<T, kDim>& shared, int warp, const Call<T>& p, int positions) {
  using W = SharedWithBias<T, kDim>;
  float clamped = 0;
  TimeRun run;
  for (uint32_t count = 0;; ++count) {
    int stage = count % 2;
    shared.bias_full[stage].wait(count / 2 & 1);
    TableTile tile = shared.tile_of[stage];
    if (tile.first < 0) return;
    const TableItem& item = shared.item_of[tile.slot];
    shared.ds_full[stage].wait(count / 2 & 1);
    if (item.time_sums && warp < W::kTimeWarps) sum_times<T, kDim>(shared, stage, warp, tile, run, p);
    if (item.pos_sums && warp >= W::kFirst) sum_positions<T, kDim>(shared, stage, warp, tile.first, item, positions, clamped);
    if (tile.last) finish_item<T, kDim>(shared, warp, item, run, p, positions, clamped);
    __syncwarp();
    shared.ds_empty[stage].arrive_for_warp(thread_index() % 32);
  }
}

// The warpgroup of the tables.
template <typename T, int kDim>
__device__ __forceinline__ void keep_tables(SharedWithBias<T, kDim>& shared, const Call<T>& p, const Gradients<T>& g, int positions) {
  int thread = threadIdx.x % 128, warp = __shfl_sync(kFullWarp, thread / 32, 0);
  auto clear = [&](auto& x) {
    for (int at = thread; at < int(sizeof(x) / 4); at += 128) reinterpret_cast<uint32_t*>(&x)[at] = 0;
  };
  clear(shared.sums), clear(shared.far), clear(shared.blocks), clear(shared.zero);
  for (int x = thread; x < kNearThresholds; x += 128) shared.threshold[x] = uint32_t(min(kThresholds.at[x], int64_t(UINT32_MAX)));
  meet(kTablesBarrier, 128);
  if (warp == SharedWithBias<T, kDim>::kWarps)
    stage_bias<T, kDim>(shared, p, g, positions);
  else
    sum_tables<T, kDim>(shared, warp, p, positions);
}

}  // namespace backward_sm90
}  // namespace hstu::cuda::attention
