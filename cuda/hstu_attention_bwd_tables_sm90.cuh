// HSTU attention, backward with a bias, for Hopper (sm_90a): sums of dS for the gradients of the tables. See docs/hstu_attention.md.
#pragma once
#include "hstu_attention_bwd_bias_sm90.cuh"

namespace hstu::cuda::attention {
namespace backward_sm90 {

constexpr int kTablesBarrier = 2, kPositionsBarrier = 3;  // of all warps that sum: at an item's end, in a tile

__device__ __forceinline__ void add_to(float* to, float x) { asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory"); }

// A tile's sums of dS over the keys before each block of 8, by query: a warp's blocks of 8 queries.
template <typename T, int kDim>
__device__ __forceinline__ void sum_before(SharedWithBias<T, kDim>& shared, int stage, int warp) {
  using W = SharedWithBias<T, kDim>;
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
    *reinterpret_cast<float2*>(&shared.before[g][8 * block + 2 * t]) = float2{sum[0][0], sum[0][1]};
    *reinterpret_cast<float2*>(&shared.before[g + 8][8 * block + 2 * t]) = float2{sum[0][2] + sum[2][2], sum[0][3] + sum[2][3]};
  }
}

// Where keys are sorted, those at least so much earlier than a query are the first ones: their sums tell those of buckets. A warp's share.
template <typename T, int kDim>
__device__ __forceinline__ void sum_runs(SharedWithBias<T, kDim>& shared, int stage, int ahead, int warp, const TableTile& tile) {
  using W = SharedWithBias<T, kDim>;
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
      float part[2] = {shared.before[at][query], 0.f};
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
template <typename T, int kDim>
__device__ __forceinline__ void sum_pieces(SharedWithBias<T, kDim>& shared, int stage, int ahead, int warp, const TableTile& tile,
                                          const Call<T>& p) {
  using S = Shape<kDim, true>;
  using W = SharedWithBias<T, kDim>;
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
      const float4* cells = shared.cells[tile.slot];
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
          const float4& cell = cells[cell_of(query_near[x / 4 * 16 + 4 * y], x % 2 ? at.y : at.x, apart)];
          uint32_t rows = __float_as_uint(cell.w);
          to[x] = row + (apart >= __float_as_uint(cell.x) ? rows >> 16 : rows & 0xffff);
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
      const TableItem& item = shared.item_of[tile.slot];
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

// dS of a tile along diagonals of blocks; target rows, which all stand at one position, by key. Returns a lane's part of all but these.
template <typename T, int kDim>
__device__ __forceinline__ float sum_diagonals(SharedWithBias<T, kDim>& shared, int stage, int warp, int first, const TableItem& item) {
  using S = Shape<kDim, true>;
  using W = SharedWithBias<T, kDim>;
  constexpr int kQ = S::kQueries, kK = S::kKeys, kDiagonals = (kQ + kK) / 8 - 1;
  int lane = thread_index() % 32, thread = 32 * warp + lane, g = lane / 4, t = lane % 4;
  int before = item.s.history - item.s.shift - first;  // queries before the targets
  // Blocks of 8 x 8 on diagonal d = key block - query block + 7: up to eight and zeros, four a product with two unit matrices, whose rows
  // 0 .. 7 and 8 .. 15 are sums of two.
  constexpr bool kTight = S::kDsStep < S::kDsBytes;
  uint32_t unit = pack_pair<T>(2 * t == g ? 1.f : 0.f, 2 * t + 1 == g ? 1.f : 0.f), ds = shared_address(shared.ds(stage));
  uint32_t from[2] = {}, step[2], words[2][4];
  float all = 0;
  int d = warp;
  auto load = [&](int y) {
    uint32_t at = from[y];
    if (kTight && uint32_t(d - lane / 8 - 4 * y) >= kK / 8) at = shared_address(shared.zero);
    load_matrices(words[y], at);
  };
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    bool there = kQ - 8 - 8 * (lane / 8 + 4 * y) + lane % 8 < before;
    from[y] = there ? ds + d * kKeyBlock + y * 512 + lane * 16 : shared_address(shared.zero);
    step[y] = there ? W::kWarps * kKeyBlock : 0;
    load(y);
  }
#pragma unroll 1
  for (; d < kDiagonals;) {
    float sum[2][4] = {};
    float2* to = reinterpret_cast<float2*>(&shared.blocks[g][8 * d + 8 + 2 * t]);
    d += W::kWarps;
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      mma_m16n8k16<T>(sum[y], words[y], unit, unit);
      from[y] += step[y];
      if (kTight || d < kDiagonals) load(y);  // what follows the last stage is not dS
    }
    float2 two{(sum[0][0] + sum[1][0]) + (sum[0][2] + sum[1][2]), (sum[0][1] + sum[1][1]) + (sum[0][3] + sum[1][3])};
    *to = two, all += two.x + two.y;
  }
  if (before < kQ)
    for (int key = thread; key < kK; key += W::kThreads) {
      float sum = 0;
      for (int r = max(before, 0); r < kQ; ++r)
        sum += to_float(shared.ds(stage)[diagonal_block(r / 8, key / 8) / 2 + r % 8 * 8 + key % 8]);
      shared.targets[key] = sum;
    }
  return all;
}
// These sums, added to the item's. `clamped`: what lies beyond the table.
template <typename T, int kDim>
__device__ __forceinline__ void add_positions(SharedWithBias<T, kDim>& shared, int warp, int first, const TableItem& item, int positions,
                                             float& clamped) {
  using S = Shape<kDim, true>;
  using W = SharedWithBias<T, kDim>;
  constexpr int kQ = S::kQueries, kK = S::kKeys;
  int thread = 32 * warp + thread_index() % 32, i0 = item.s.shift + first, j0 = item.tile * kK, before = item.s.history - i0;
  auto diagonal = [&](int x) {  // key - query + kQ - 1 = x
    float part[4];
#pragma unroll
    for (int y = 0; y < 4; ++y) part[y] = shared.blocks[y][x + y + 1] + shared.blocks[y + 4][x + y + 5];
    return (part[0] + part[1]) + (part[2] + part[3]);
  };
  // Two diagonals that are as far from 0 come together; then targets.
#pragma unroll 1
  for (int x = thread; x < kQ + kK - 1; x += W::kThreads) {
    int distance = i0 - j0 + kQ - 1 - x, opposite = x + 2 * distance;
    float sum = diagonal(x);
    if (distance != 0 && opposite >= 0 && opposite < kQ + kK - 1) sum = distance > 0 ? sum + diagonal(opposite) : 0.f;
    if (abs(distance) >= positions - 1)
      clamped += sum;
    else if (sum != 0)
      add_to(item.pos_sums + abs(distance), item.unit * sum);
  }
  meet(kPositionsBarrier, W::kThreads);  // one thread at a time adds to an entry
  if (before >= kQ) return;
  for (int key = thread; key < kK; key += W::kThreads) {
    int distance = item.s.history - (j0 + key);
    if (distance <= 0) continue;
    if (distance >= positions - 1)
      clamped += shared.targets[key];
    else
      add_to(item.pos_sums + distance, item.unit * shared.targets[key]);
  }
  meet(kPositionsBarrier, W::kThreads);
}

// The sums of an item by time bucket, and those beyond the position table, to memory.
template <typename T, int kDim>
__device__ __forceinline__ void finish_item(SharedWithBias<T, kDim>& shared, int warp, int slot,
                                            const Call<T>& p, int positions, float& clamped) {
  using W = SharedWithBias<T, kDim>;
  const TableItem& item = shared.item_of[slot];
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

// A warp that sums dS.
template <typename T, int kDim>
__device__ __forceinline__ void sum_tables(SharedWithBias<T, kDim>& shared, const Call<T>& p, int positions) {
  using W = SharedWithBias<T, kDim>;
  float clamped = 0;
  for (uint32_t count = 0;; ++count) {
    constexpr int kAhead = Shape<kDim, true>::kAhead, kStages = Shape<kDim, true>::kDsStages;
    int stage = count % kStages, ahead = count % kAhead, warp = int(thread_index() / 32) - 12;
    shared.bias_full[ahead].wait(count / kAhead & 1);
    const TableTile& tile = shared.tile_of[ahead];
    if (tile.first < 0) return;
    const TableItem& item = shared.item_of[tile.slot];
    shared.ds_full[stage].wait(count / kStages & 1);
    bool several = item.time_sums && tile.bucket < 0, runs = several && tile.high >= 0;
    if (several) sum_pieces<T, kDim>(shared, stage, ahead, warp, tile, p);
    if (runs) sum_before<T, kDim>(shared, stage, warp);
    if (item.pos_sums) {
      float all = sum_diagonals<T, kDim>(shared, stage, warp, tile.first, item);
      if (item.time_sums && !several) {
        all = warp_sum(all);
        if (thread_index() % 32 == 0) shared.far[warp][tile.bucket] += all;
      }
    }
    if (runs || item.pos_sums) meet(kPositionsBarrier, W::kThreads);
    if (runs) sum_runs<T, kDim>(shared, stage, ahead, warp, tile);
    __syncwarp();
    shared.ds_empty[stage].arrive_for_warp(thread_index() % 32);  // dS is read no more
    if (item.pos_sums)
      add_positions<T, kDim>(shared, warp, tile.first, item, positions, clamped);
    else if (runs)
      meet(kPositionsBarrier, W::kThreads);
    if (tile.last) {
      finish_item<T, kDim>(shared, warp, tile.slot, p, positions, clamped);
      shared.slot_empty[tile.slot].arrive_for_warp(thread_index() % 32);
    }
    __syncwarp();
    shared.bias_empty[ahead].arrive_for_warp(thread_index() % 32);
  }
}

// Before the block's first barrier: all warps read or write them.
template <typename T, int kDim>
__device__ __forceinline__ void begin_tables(SharedWithBias<T, kDim>& shared, int thread, int threads) {
  auto clear = [&](auto& x) {
    for (int at = thread; at < int(sizeof(x) / 4); at += threads) reinterpret_cast<uint32_t*>(&x)[at] = 0;
  };
  clear(shared.counts), clear(shared.far), clear(shared.blocks), clear(shared.zero), clear(shared.ds_data);
  for (int x = thread; x < kNearThresholds; x += threads) shared.threshold[x] = uint32_t(min(kThresholds.at[x], int64_t(UINT32_MAX)));
}

// The warpgroup of the tables: warps that sum, and where these are three one that brings the bias.
template <typename T, int kDim>
__device__ __forceinline__ void keep_tables(SharedWithBias<T, kDim>& shared, const Call<T>& p, const Gradients<T>& g,
                                            const PositionTable& positions) {
  [[maybe_unused]] int warp = __shfl_sync(kFullWarp, int(threadIdx.x % 128 / 32), 0);
  if constexpr (!SharedWithBias<T, kDim>::kPlans)
    if (warp == 3) return stage_bias<T, kDim>(shared, p, g, positions);
  sum_tables<T, kDim>(shared, p, positions.count);
}

}  // namespace backward_sm90
}  // namespace hstu::cuda::attention
