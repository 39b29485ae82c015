// The relative bias in the backward of HSTU attention for Hopper: its tiles in shared memory, its addition to scores, the gradients of its tables.
#pragma once
#include "hstu_attention_bwd_sm90.cuh"

namespace hstu::cuda::attention {
namespace backward_sm90 {

template <typename T, int kDim>
struct SharedWithBias : Shared<T, kDim> {
  using S = Shape<kDim>;
  BiasTile<S::kQueries, S::kQueries + S::kKeys, 1, false> bias[S::kStages];
  int key_time[S::kKeys];
  TimeSpan key_span[8];
  TimeSums time_sums[8];
  float diagonal[2][8][S::kQueries + 16];  // a warp's sums of dS by query - key + 16
  float targets[2][S::kKeys];              // sums over target rows, by key
  int first[2];                            // key position of the first query of those sums
  float clamped[8], own[8];
};

// The bias of one tile, by a warp: the time table of the head, position entries by difference, times of queries.
template <typename T, int kDim>
__device__ __forceinline__ void stage_bias(SharedWithBias<T, kDim>& shared, const Call<T>& p, int stage, const Tile& tile, const Item& item) {
  using S = Shape<kDim>;
  auto& bias = shared.bias[stage];
  const Sequence& s = item.s;
  int lane = thread_index() % 32, first = tile.index * S::kQueries;
  if (p.positions) {
    int nearest = min(s.shift + first, s.history) - item.tile * S::kKeys - (S::kKeys - 1), row = p.pos_per_head ? item.head * p.positions : 0;
#pragma unroll 4
    for (int x = lane; x < S::kQueries + S::kKeys; x += 32) bias.pos[0][x] = p.unit * p.pos_w.at(row + min(abs(nearest + x), p.positions - 1));
  }
  if (p.last_bucket < 0) return;
#pragma unroll 1
  for (int x = lane; x <= kNearThresholds; x += 32) {
    bias.time[x] = x < kUntimed ? p.unit * p.time_w.at((p.time_per_head ? item.head * p.time_width : 0) + min(x, p.last_bucket)) : 0.f;
    if (x < kNearThresholds) bias.threshold[x] = uint32_t(min(kThresholds.at[x], int64_t(UINT32_MAX)));
  }
#pragma unroll 1
  for (int x = lane; x < S::kQueries; x += 32) {
    NearTime time{kNoMovingTime, kSomeUntimed};
    bool there = x < tile.rows;
    if (there && s.shift + first + x >= s.contextual) time = near_time(p.query_time[s.query + first + x], item.base);
    bias.near[0][x] = time.at;
    TimeSpan span = TimeSpan::of_warp(time, there);
    if (lane == 0) bias.spans[0][x / 32] = span;
  }
}

// One warp's side: 16 keys, rows of accumulators, against the queries of a tile, columns.
template <typename T, int kDim>
struct WarpBias {
  using S = Shape<kDim>;
  static constexpr int kQ = S::kQueries, kK = S::kKeys, kX = kQ / 8;
  TimeGradient time_gradient;
  float clamped = 0;

  static __device__ __forceinline__ int warp() { return int(thread_index() / 32) - 4; }
  static __device__ __forceinline__ int row0() { return warp() * 16 + int(thread_index() % 32 / 4); }
  static __device__ __forceinline__ int column0() { return int(thread_index() % 4 * 2); }

  // Times of the warp's keys.
  static __device__ __forceinline__ void stage_keys(SharedWithBias<T, kDim>& shared, const Call<T>& p, const Item& item) {
    int lane = thread_index() % 32, j = item.tile * kK + warp() * 16 + lane;
    NearTime time{kNoFixedTime, kSomeUntimed};
    bool there = p.last_bucket >= 0 && lane < 16 && j < item.s.history;
    if (there && j >= item.s.contextual) time = near_time(p.key_time[item.s.time + j], item.base);
    TimeSpan span = TimeSpan::of_warp(time, there);
    if (lane < 16) shared.key_time[warp() * 16 + lane] = time.at;
    if (lane == 0) shared.key_span[warp()] = span;
    __syncwarp();
  }

  // scores = factor scores + bias.
  static __device__ __forceinline__ void add(float (&scores)[kQ / 2], SharedWithBias<T, kDim>& shared, const Call<T>& p, const Item& item, int stage,
                                             float factor) {
    constexpr int kN = 4;  // groups of 8 columns at once
    auto& bias = shared.bias[stage];
    const Sequence& s = item.s;
    int i0 = s.shift + shared.tile[stage].index * kQ, j0 = item.tile * kK, row = row0(), column = column0();
    TimePath path{};
    float one = 0;
    if (p.last_bucket >= 0) {
      path = bias.path(0, shared.key_span[warp()], p.last_bucket);
      if (path.kind == TimePath::kOne) one = bias.time[path.low];
    }
    bool ahead_of_history = i0 + kQ > s.history, each = p.last_bucket >= 0 && path.kind != TimePath::kOne;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* corner = &bias.pos[0][column - row - 8 * half + kK - 1];
#pragma unroll
      for (int x0 = 0; x0 < kX; x0 += kN) {
        float v[kN][2];
        if (p.positions && ahead_of_history) {
          int most = max(s.history - i0, 0) - column;
#pragma unroll
          for (int x = 0; x < kN; ++x)
#pragma unroll
            for (int e = 0; e < 2; ++e) v[x][e] = corner[min(8 * (x0 + x) + e, most)] + one;
        } else {
#pragma unroll
          for (int x = 0; x < kN; ++x)
#pragma unroll
            for (int e = 0; e < 2; ++e) v[x][e] = (p.positions ? corner[8 * (x0 + x) + e] : 0.f) + one;
        }
        if (each)
          bias.template add_time<kN>(v, path, 0, shared.key_time[row + 8 * half], 8 * x0 + column,
                                     [&](int r) { return time_term(p, item.head, exact_bucket(p, s, i0 + r, j0 + row + 8 * half)); });
#pragma unroll
        for (int x = 0; x < kN; ++x)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = scores[4 * (x0 + x) + 2 * half + e];
            score = fmaf(factor, score, v[x][e]);
          }
        part(i0);
      }
    }
  }

  // Adds a tile's dS to the sums by time, and leaves its sums along diagonals in buffer `buffer`. dS of targets is spoiled.
  __device__ __forceinline__ void add_gradient(float (&ds)[kQ / 2], SharedWithBias<T, kDim>& shared, const Call<T>& p, const Gradients<T>& g, const Item& item,
                                               int stage, int buffer) {
    constexpr int kN = 8;
    auto& bias = shared.bias[stage];
    const Sequence& s = item.s;
    int i0 = s.shift + shared.tile[stage].index * kQ, j0 = item.tile * kK, row = row0(), column = column0();
#pragma unroll
    for (int x0 = 0; x0 < kX; x0 += kN) {
      float(&part_of)[kN][4] = reinterpret_cast<float(&)[kN][4]>(ds[4 * x0]);
      if (g.time_sums) {
        TimePath path = bias.path(0, shared.key_span[warp()], p.last_bucket);
        int key_time[2] = {shared.key_time[row], shared.key_time[row + 8]};
        time_gradient.add(shared.time_sums[warp()], bias, path, p.last_bucket, 0, key_time, 8 * x0 + column, part_of,
                          [&](int r, int half) { return exact_bucket(p, s, i0 + r, j0 + row + 8 * half); });
      }
      if (g.pos_sums) {
        if (i0 + kQ > s.history) {  // all targets stand at one position
          float sum[2] = {0, 0};
#pragma unroll
          for (int x = 0; x < kN; ++x)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (i0 + 8 * (x0 + x) + column + e % 2 >= s.history) sum[e / 2] += part_of[x][e], part_of[x][e] = 0;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            sum[half] += __shfl_xor_sync(kFullWarp, sum[half], 1);
            sum[half] += __shfl_xor_sync(kFullWarp, sum[half], 2);
            float& to = shared.targets[buffer][row + 8 * half];
            if (column == 0) to = sum[half] + (x0 ? to : 0.f);
          }
        }
        add_diagonals<kN>(shared.diagonal[buffer][warp()] + 8 * x0, part_of, x0 > 0);
      }
    }
    if (thread_index() == 128) shared.first[buffer] = i0;
  }

  // Sums along diagonals to the item's table, by all 256 threads, after a barrier. Warps' diagonals come together, two that are as far from
  // 0 too; then targets; what lies beyond the table is kept apart.
  __device__ __forceinline__ void add_diagonals_to(SharedWithBias<T, kDim>& shared, const Call<T>& p, const Item& item, int buffer) {
    int i0 = shared.first[buffer], j0 = item.tile * kK;
    float factor = 0.5f * item.unit, beyond = 0;
    auto sum_of = [&](int x) {  // x = query - key + kK - 1; warp w has it at x - (kK - 1) + 16 (w + 1)
      constexpr int kLength = kQ + 16;
      int first = max((kK - 2 - x) / 16, 0), at = x - (kK - 1) + 16 * (first + 1);
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kLength / 16; ++w)
        if (first + w < 8 && at + 16 * w < kLength) sum += shared.diagonal[buffer][first + w][at + 16 * w];
      return sum;
    };
#pragma unroll 1
    for (int x = int(thread_index()) - 128; x < kQ + kK - 1; x += 256) {
      float sum = sum_of(x);
      int distance = i0 - j0 + x - (kK - 1), opposite = x - 2 * distance;
      if (distance != 0 && opposite >= 0 && opposite < kQ + kK - 1) sum = distance > 0 ? sum + sum_of(opposite) : 0.f;
      if (abs(distance) >= p.positions - 1) beyond += sum;
      else if (sum != 0) atomicAdd(item.pos_sums + abs(distance), factor * sum);
    }
    if (i0 + kQ > item.s.history) {
      meet(1, 256);  // one thread at a time adds to an entry
      int key = int(thread_index()) - 128, distance = item.s.history - (j0 + key);
      if (key < kK && distance > 0) {
        if (distance >= p.positions - 1) beyond += shared.targets[buffer][key];
        else atomicAdd(item.pos_sums + distance, factor * shared.targets[buffer][key]);
      }
    }
    clamped += beyond;
  }

  // The end of an item, by all 256 threads: `own` is a lane's sum over targets' own groups.
  __device__ __forceinline__ void finish(SharedWithBias<T, kDim>& shared, const Call<T>& p, const Gradients<T>& g, const Item& item, float own) {
    if (g.time_sums) time_gradient.flush(shared.time_sums[warp()]);
    own = warp_sum(own);
    float beyond = warp_sum(clamped), factor = 0.5f * item.unit;
    if (thread_index() % 32 == 0) shared.own[warp()] = own, shared.clamped[warp()] = beyond;
    clamped = 0;
    meet(1, 256);
    int thread = int(thread_index()) - 128;
    if (g.pos_sums && thread == 0) {
      float owns = 0, beyonds = 0;
      for (int w = 0; w < 8; ++w) owns += shared.own[w], beyonds += shared.clamped[w];
      atomicAdd(item.pos_sums, factor * owns), atomicAdd(item.pos_sums + p.positions - 1, factor * beyonds);
    }
    if (g.time_sums && thread <= p.last_bucket) {
      float sum = 0;
      for (int w = 0; w < 8; ++w) sum += shared.time_sums[w].sum[thread], shared.time_sums[w].sum[thread] = 0;
      item.time_sums[thread] += factor * sum;
    }
    meet(1, 256);
  }
};

}  // namespace backward_sm90
}  // namespace hstu::cuda::attention
