// HSTU attention, forward, for Hopper: sm_90a. See docs/hstu_attention.md for a drawing.
#pragma once
#include "hstu_attention.cuh"
#include "hstu_attention_bias.cuh"
#include "sm90/wgmma.cuh"

namespace hstu::cuda::attention {
namespace forward_sm90 {

using namespace sm90;

#ifndef TILE64
#define TILE64 128
#endif
#ifndef STAGES64
#define STAGES64 2
#endif
#ifndef PINGPONG
#define PINGPONG 1
#endif

#ifndef PREG2
#define PREG2 56
#define CREG2 224
#endif
#ifndef PREG3
#define PREG3 32
#define CREG3 160
#endif
#ifndef GROUPS64
#define GROUPS64 3
#endif
#ifndef TILEB
#define TILEB 128
#endif
#ifndef GROUPSB
#define GROUPSB 2
#define STAGESB 2
#endif
#ifndef BIASSTAGES
#define BIASSTAGES 2
#endif
template <int kDim, Mode kMode>
constexpr int kGroups = kMode == Mode::kSilu ? (kDim <= 64 ? GROUPS64 : 2) : GROUPSB;  // warpgroups that compute; one more loads
template <int kDim, Mode kMode>
constexpr int kRows = 64 * kGroups<kDim, kMode>;
template <int kDim, Mode kMode>
constexpr int kTile = kMode == Mode::kSiluBias ? TILEB : kDim <= 64 ? TILE64 : kDim <= 128 ? 128 : 64;  // keys
template <int kDim, Mode kMode>
constexpr int kStages = kMode == Mode::kSiluBias ? STAGESB : kDim <= 64 ? STAGES64 : 2;
enum NamedBarrier { kTurn = 1, kGroup = 4, kStagers = 7 };  // the first two: of one warpgroup each

// One head of up to kRows rows of one sequence.
struct Work {
  Sequence s;
  int head, first, rows;  // rows = 0: there is no more
  KeyTiles tiles;
};

// What the bias needs of an item's rows and of a tile of keys, brought by three warps of the loading warpgroup.
template <int kRowsOfBlock, int kKeys, int kRing>
struct BiasStages {
  uint32_t threshold[kNearThresholds];
  float time[2][kNearThresholds + 1];  // of the item's head; 0 from kUntimed on
  int row_near[2][kRowsOfBlock];
  TimeSpan row_span[kRowsOfBlock / 16];
  float pos[kRing][kRowsOfBlock + kKeys];  // by query row - key + kKeys - 1
  alignas(8) int near[kRing][kKeys];
  TimeSpan span[kKeys / 32];
  alignas(16) int path[kRing][kRowsOfBlock / 16][kKeys / 32];  // of 16 rows by 32 keys: kind, high, low, a byte each
  Barrier full[kRing], empty[kRing];

  // Not limited to the table.
  __device__ __forceinline__ int near_bucket(uint32_t d) const {
    int guess = bucket_guess(fmaxf(__uint2float_rz(d), 1.f));
    return guess + int(d >= threshold[guess]);
  }
};

template <typename T, int kDim, Mode kMode>
struct Shared {
  static constexpr int kRowsOfBlock = kRows<kDim, kMode>, kRing = kStages<kDim, kMode>, kWarps = 4 * kGroups<kDim, kMode>;
  struct None {};
  alignas(1024) T q[kRowsOfBlock * kDim];
  alignas(1024) T k[kRing][kTile<kDim, kMode> * kDim];
  alignas(1024) T v[kRing][kTile<kDim, kMode> * kDim];
  Barrier q_full, q_empty, k_full[kRing], k_empty[kRing], v_full[kRing], v_empty[kRing], work_full[2], work_empty[2];
  Work work[2];
  VisibleKeys seen[kRowsOfBlock], some[kWarps / 4], every[kWarps];  // of a row; what some row of a warpgroup, every row of a warp sees
  std::conditional_t<kMode == Mode::kSiluBias, BiasStages<kRowsOfBlock, kTile<kDim, kMode>, BIASSTAGES>, None> bias;
};

// The tiles that some row of first .. first + rows - 1 sees, by a warp.
template <typename T>
__device__ __forceinline__ VisibleKeys union_of(const Call<T>& p, const Sequence& s, int first, int rows) {
  VisibleKeys some{0, INT_MAX, 0, 0};
  for (int r = threadIdx.x % 32; r < rows; r += 32) {
    VisibleKeys keys = visible_keys(p, s, s.shift + first + r);
    some.prefix = max(some.prefix, keys.prefix);
    if (keys.begin < keys.end) some.begin = min(some.begin, keys.begin), some.end = max(some.end, keys.end);
  }
  return {__reduce_max_sync(kFullWarp, some.prefix), __reduce_min_sync(kFullWarp, some.begin), __reduce_max_sync(kFullWarp, some.end), 0};
}
__device__ __forceinline__ KeyTiles tiles_of(VisibleKeys some, int size) {
  KeyTiles tiles{(some.prefix + size - 1) / size, some.end > 0 ? some.begin / size : 0, (some.end + size - 1) / size};
  if (tiles.gap >= tiles.resume) tiles.gap = -1;
  return tiles;
}

template <typename T, int kDim>
__device__ __forceinline__ uint32_t swizzled(int rows, int row, int d) {  // byte of element (row, d) of a tile of `rows` rows
  constexpr int kBytes = kRowBytes<T, kDim>;
  int byte = d * int(sizeof(T)), chunk = byte / kBytes, unit = byte % kBytes / 16;
  int swizzle = kBytes == 128 ? row & 7 : row >> 1 & 3;
  return (chunk * rows + row) * kBytes + (unit ^ swizzle) * 16 + byte % 16;
}

template <typename T, int kDim, int kRowsOfTile>
__device__ __forceinline__ void load(T* tile, const CUtensorMap& map, int head, int64_t row, Barrier& full) {
  constexpr int kBytes = kRowBytes<T, kDim>, kColumns = kBytes / int(sizeof(T));
  full.expect(kRowsOfTile * kDim * int(sizeof(T)));
#pragma unroll
  for (int d = 0; d < kDim; d += kColumns)
    load_box(shared_address(tile) + d / kColumns * kRowsOfTile * kBytes, map, d, head, int(row), full);
}

__device__ __forceinline__ uint32_t near_apart(int a, int b) { return a > b ? uint32_t(a) - uint32_t(b) : uint32_t(b) - uint32_t(a); }

// The bias of row i and a key of its own group.
template <typename T>
__device__ __forceinline__ float own_bias(const Call<T>& p, const Sequence& s, int head, int64_t query_row, int j) {
  float bias = p.positions ? p.unit * p.pos_w.at(p.pos_per_head ? int64_t(head) * p.positions : 0) : 0.f;
  return p.last_bucket < 0 ? bias : bias + time_term(p, head, bucket_of(p.query_time[query_row], p.key_time[s.time + j], p.last_bucket));
}

// Three warps bring the times and the position entries of an item's rows and of its tiles.
template <typename T, int kDim, Mode kMode>
__device__ __forceinline__ void stage_bias(Shared<T, kDim, kMode>& shared, const Call<T>& p) {
  constexpr int kRowsOfBlock = kRows<kDim, kMode>, kKeys = kTile<kDim, kMode>, kThreads = 96;
  auto& bias = shared.bias;
  int thread = int(threadIdx.x) - 32, lane = thread % 32, warp = thread / 32;
  float up = 1 / p.alpha;
  for (int x = thread; x < kNearThresholds; x += kThreads) bias.threshold[x] = uint32_t(min(kThresholds.at[x], int64_t(UINT32_MAX)));
  Ring<2> turn;
  Ring<BIASSTAGES> ring;
  for (;; turn.next()) {
    shared.work_full[turn.stage].wait(turn.parity);
    const Work work = shared.work[turn.stage];
    if (work.rows <= 0) return;
    const Sequence& s = work.s;
    int i0 = s.shift + work.first;
    int64_t base = first_time(p, s);
    for (int x = thread; x <= kNearThresholds; x += kThreads)
      bias.time[turn.stage][x] =
          p.last_bucket >= 0 && x < kUntimed ? p.unit * p.time_w.at((p.time_per_head ? work.head * p.time_width : 0) + min(x, p.last_bucket)) : 0.f;
    for (int r0 = 32 * warp; r0 < kRowsOfBlock; r0 += kThreads) {
      int r = r0 + lane;
      bool there = p.last_bucket >= 0 && r < work.rows;
      NearTime time{kNoFixedTime, kSomeUntimed};
      if (there && i0 + r >= s.contextual) time = near_time(p.query_time[s.query + work.first + r], base);
      bias.row_near[turn.stage][r] = time.at;
      TimeSpan low = TimeSpan::of_warp(time, there && lane < 16), high = TimeSpan::of_warp(time, there && lane >= 16);
      if (lane % 16 == 0) bias.row_span[r / 16] = lane ? high : low;
    }
    for (int n = work.tiles.from(0); n < work.tiles.last; n = work.tiles.from(n + 1), ring.next()) {
      int j0 = n * kKeys, nearest = min(i0, s.history) - j0 - (kKeys - 1);
      float pos[(kRowsOfBlock + kKeys + kThreads - 1) / kThreads];
      NearTime time[(kKeys + kThreads - 1) / kThreads];
#pragma unroll
      for (int y = 0; y < (kRowsOfBlock + kKeys + kThreads - 1) / kThreads; ++y)
        pos[y] = p.positions ? up * p.pos_w.at((p.pos_per_head ? int64_t(work.head) * p.positions : 0) +
                                                   min(abs(nearest + thread + y * kThreads), p.positions - 1))
                             : 0.f;
#pragma unroll
      for (int y = 0; y < (kKeys + kThreads - 1) / kThreads; ++y) {
        int c = thread + y * kThreads, j = j0 + c;
        time[y] = {kNoMovingTime, kSomeUntimed};
        if (p.last_bucket >= 0 && c < kKeys && j >= s.contextual && j < s.history) time[y] = near_time(p.key_time[s.time + j], base);
      }
      bias.empty[ring.stage].wait(ring.parity ^ 1);
#pragma unroll
      for (int y = 0; y < (kRowsOfBlock + kKeys + kThreads - 1) / kThreads; ++y)
        if (int x = thread + y * kThreads; x < kRowsOfBlock + kKeys) bias.pos[ring.stage][x] = pos[y];
#pragma unroll
      for (int y = 0; y < (kKeys + kThreads - 1) / kThreads; ++y) {
        int c = thread + y * kThreads;
        if (c - lane >= kKeys) continue;
        bias.near[ring.stage][c] = time[y].at;
        TimeSpan span = TimeSpan::of_warp(time[y], p.last_bucket >= 0 && j0 + c < s.history);
        if (lane == 0) bias.span[c / 32] = span;
      }
      meet(kStagers, kThreads);
      for (int x = thread; x < kRowsOfBlock / 16 * (kKeys / 32); x += kThreads) {
        TimeSpan rows = bias.row_span[x / (kKeys / 32)], keys = bias.span[x % (kKeys / 32)];
        int kinds = rows.kinds | keys.kinds, low = 0, high = 0, kind = TimePath::kOne;
        if (p.last_bucket >= 0) {
          high = p.last_bucket, kind = kinds & kSomeFar ? TimePath::kFar : TimePath::kMany;
          if (!kinds && rows.least <= rows.most && keys.least <= keys.most) {
            low = min(bias.near_bucket(max(max(rows.least - keys.most, keys.least - rows.most), 0)), p.last_bucket);
            high = min(bias.near_bucket(max(rows.most - keys.least, keys.most - rows.least)), p.last_bucket);
            kind = low == high ? TimePath::kOne : keys.most <= rows.least && high - low <= kFewBuckets ? TimePath::kFew : TimePath::kMany;
          }
        }
        bias.path[ring.stage][x / (kKeys / 32)][x % (kKeys / 32)] = kind << 16 | high << 8 | low;
      }
      meet(kStagers, kThreads);
      if (lane == 0) bias.full[ring.stage].arrive();
    }
    if (lane == 0) shared.work_empty[turn.stage].arrive();
  }
}

template <typename T, int kDim, Mode kMode>
__global__ void __launch_bounds__(128 * (kGroups<kDim, kMode> + 1), 1)
    hstu_attention_sm90_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                               const __grid_constant__ CUtensorMap v_map, const Call<T> p, T* out, int tiles, int items, int* ticket) {
  constexpr int kRowsOfBlock = kRows<kDim, kMode>, kKeys = kTile<kDim, kMode>, kRing = kStages<kDim, kMode>, kCount = kGroups<kDim, kMode>;
  constexpr int kBytes = kRowBytes<T, kDim>, kColumns = kBytes / int(sizeof(T));
  constexpr bool kBias = kMode == Mode::kSiluBias;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<T, kDim, kMode>*>(memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4 - 1;

  if (threadIdx.x == 0) {
    prefetch(q_map), prefetch(k_map), prefetch(v_map);
    shared.q_full.init(1), shared.q_empty.init(4 * kCount);
    for (int x = 0; x < kRing; ++x) shared.k_full[x].init(1), shared.v_full[x].init(1), shared.k_empty[x].init(4 * kCount), shared.v_empty[x].init(4 * kCount);
    for (int x = 0; x < 2; ++x) shared.work_full[x].init(1), shared.work_empty[x].init(4 * kCount + (kBias ? 3 : 0));
    if constexpr (kBias)
      for (int x = 0; x < BIASSTAGES; ++x) shared.bias.full[x].init(3), shared.bias.empty[x].init(4 * kCount);
    fence_barriers();
  }
  __syncthreads();

  Ring<2> turn;
  Ring<kRing> ring;
  if (group < 0) {
    give_registers<kCount == 2 ? PREG2 : PREG3>();
    if (warp > 0) {
      if constexpr (kBias) stage_bias(shared, p);
      return;
    }
    int item = int(blockIdx.x), q_parity = 1;
    for (;;) {
      int next = 0;
      if (lane == 0) next = atomicAdd(ticket, 1) + int(gridDim.x);
      Work work{};
      if (item < items) {
        int tile = tiles - 1 - item % tiles;
        work.head = item / tiles % p.heads, work.s = sequence_of(p, item / tiles / p.heads), work.first = tile * kRowsOfBlock;
        work.rows = min(kRowsOfBlock, work.s.queries - work.first);
        if (work.rows > 0) work.tiles = tiles_of(union_of(p, work.s, work.first, work.rows), kKeys);
      }
      if (item >= items || work.rows > 0) {
        shared.work_empty[turn.stage].wait(turn.parity ^ 1);
        if (item >= items) work.rows = 0;
        if (lane == 0) shared.work[turn.stage] = work, shared.work_full[turn.stage].arrive();
        turn.next();
        if (item >= items) return;
        if (lane == 0) {
          int first = work.tiles.from(0);
          for (int n = first; n < work.tiles.last || n == first; n = work.tiles.from(n + 1)) {
            int64_t row = work.s.key + n * kKeys;
            if (n < work.tiles.last) {
              shared.k_empty[ring.stage].wait(ring.parity ^ 1);
              load<T, kDim, kKeys>(shared.k[ring.stage], k_map, work.head, row, shared.k_full[ring.stage]);
            }
            if (n == first) {
              shared.q_empty.wait(q_parity);
              load<T, kDim, kRowsOfBlock>(shared.q, q_map, work.head, work.s.query + work.first, shared.q_full);
              if (n >= work.tiles.last) break;
            }
            shared.v_empty[ring.stage].wait(ring.parity ^ 1);
            load<T, kDim, kKeys>(shared.v[ring.stage], v_map, work.head, row, shared.v_full[ring.stage]);
            ring.next();
          }
        }
        q_parity ^= 1;
        ring.stage = __shfl_sync(kFullWarp, ring.stage, 0), ring.parity = __shfl_sync(kFullWarp, ring.parity, 0);
      }
      item = __shfl_sync(kFullWarp, next, 0);
    }
  }

  take_registers<kCount == 2 ? CREG2 : CREG3>();
  int row0 = 16 * (warp - 4) + lane / 4, column0 = lane % 4 * 2;
  Ring<BIASSTAGES> bias_ring;
  int q_parity = 0;
  uint64_t q_rows = by_rows<kBytes>(shared_address(shared.q) + 64 * group * kBytes);
  if (PINGPONG && !kBias && group == 0) announce(kTurn, 256);
  auto my_turn = [&] {
    if (PINGPONG && !kBias) meet(kTurn + group, 256);
  };
  auto your_turn = [&] {
    if (PINGPONG && !kBias) announce(kTurn + (group + 1) % kCount, 256);
  };
  auto release = [&](Barrier& barrier) {
    if (lane == 0) barrier.arrive();
  };
  for (;; turn.next()) {
    shared.work_full[turn.stage].wait(turn.parity);
    const Work& work = shared.work[turn.stage];
    const Sequence& s = work.s;
    if (work.rows <= 0) return;
    VisibleKeys& some = shared.some[group];
    VisibleKeys& every = shared.every[warp - 4];
    {
      int rows = work.rows, i0 = s.shift + work.first;
      VisibleKeys any = union_of(p, s, work.first + 64 * group, min(64, rows - 64 * group)), all{INT_MAX, 0, INT_MAX, 0};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int r = row0 + 8 * half;
        VisibleKeys keys{0, 0, 0, i0 + r + 1};
        if (r < rows) keys = visible_keys(p, s, i0 + r);
        if (lane % 4 == 0) shared.seen[r] = keys;
        all = {min(all.prefix, keys.prefix), max(all.begin, keys.begin), min(all.end, keys.end), 0};
      }
      all = {__reduce_min_sync(kFullWarp, all.prefix), __reduce_max_sync(kFullWarp, all.begin), __reduce_min_sync(kFullWarp, all.end), 0};
      if (lane == 0) every = all;
      if (warp % 4 == 0 && lane == 0) some = any;
      meet(kGroup + group, 128);
    }

    float sums[kDim / 2], w[kKeys / 2];
    uint32_t weights[kKeys / 4];
#pragma unroll
    for (int x = 0; x < kDim / 2; ++x) sums[x] = 0.f;

    auto scores = [&](int stage) {
      uint64_t k_rows = by_rows<kBytes>(shared_address(shared.k[stage]));
#pragma unroll
      for (int d = 0; d < kDim; d += 16)
        wgmma<T, false>(w, q_rows + (d / kColumns * kRowsOfBlock * kBytes + d % kColumns * 2) / 16,
                        k_rows + (d / kColumns * kKeys * kBytes + d % kColumns * 2) / 16, kBias || d > 0);
    };
    auto add_values = [&](int stage) {
      uint64_t v_columns = by_columns<kBytes>(shared_address(shared.v[stage]), kKeys * kBytes);
#pragma unroll
      for (int x = 0; x < kKeys; x += 16) wgmma<T, true>(sums, weights + x / 4, v_columns + x * kBytes / 16, true);
    };
    // Scores begin as the position's bias / alpha, and the product is added to them.
    auto begin = [&](int j0) {
      if constexpr (kBias) {
        shared.bias.full[bias_ring.stage].wait(bias_ring.parity);
        int i0 = s.shift + work.first;
        const float* corner = &shared.bias.pos[bias_ring.stage][kKeys - 1 - column0];
        int last = max(s.history - i0, 0);
        const float *low = corner + min(row0, last), *high = corner + min(row0 + 8, last);
#pragma unroll
        for (int x = 0; x < kKeys / 8; ++x)
#pragma unroll
          for (int e = 0; e < 2; ++e) w[4 * x + e] = low[-8 * x - e], w[4 * x + 2 + e] = high[-8 * x - e];
      }
    };
    // v[16] = factor v + the time's bias, of 32 keys from column c0 on.
    [[maybe_unused]] auto add_time = [&](float* v, int code, int j0, int c0) {
      if constexpr (kBias) {
      auto& bias = shared.bias;
      const float* time = bias.time[turn.stage];
      int low = code & 255, high = code >> 8 & 255, kind = code >> 16;
      const int* near = &bias.near[bias_ring.stage][c0 + column0];
      int fixed[2] = {bias.row_near[turn.stage][row0], bias.row_near[turn.stage][row0 + 8]};
      float factor = p.unit * p.alpha, first = time[low];
      if (kind == TimePath::kOne) {
#pragma unroll
        for (int x = 0; x < 16; ++x) v[x] = fmaf(factor, v[x], first);
      } else if (kind == TimePath::kMany) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          int2 at = *reinterpret_cast<const int2*>(near + 8 * x);
#pragma unroll
          for (int y = 0; y < 4; ++y) v[4 * x + y] = fmaf(factor, v[4 * x + y], time[bias.near_bucket(near_apart(fixed[y / 2], y % 2 ? at.y : at.x))]);
        }
      } else if (kind == TimePath::kFew && high == low + 1) {
        int least = int(bias.threshold[low]), until[2] = {fixed[0] - least, fixed[1] - least};
        float second = time[high];
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          int2 at = *reinterpret_cast<const int2*>(near + 8 * x);
#pragma unroll
          for (int y = 0; y < 4; ++y) v[4 * x + y] = fmaf(factor, v[4 * x + y], (y % 2 ? at.y : at.x) <= until[y / 2] ? second : first);
        }
      } else {
        float term[16];
#pragma unroll
        for (int x = 0; x < 16; ++x) term[x] = first;
        if (kind == TimePath::kFew) {
#pragma unroll 1
          for (int bucket = low + 1; bucket <= high; ++bucket) {
            int least = int(bias.threshold[bucket - 1]), until[2] = {fixed[0] - least, fixed[1] - least};
            float value = time[bucket];
#pragma unroll
            for (int x = 0; x < 4; ++x) {
              int2 at = *reinterpret_cast<const int2*>(near + 8 * x);
#pragma unroll
              for (int y = 0; y < 4; ++y)
                if ((y % 2 ? at.y : at.x) <= until[y / 2]) term[4 * x + y] = value;
            }
          }
        } else {
          int i = s.shift + work.first + row0;
#pragma unroll 1
          for (int y = 0; y < 16; ++y) {
            float value = time_term(p, work.head, exact_bucket(p, s, i + y / 2 % 2 * 8, j0 + c0 + column0 + y / 4 * 8 + y % 2));
#pragma unroll
            for (int x = 0; x < 16; ++x) term[x] = x == y ? value : term[x];
          }
        }
#pragma unroll
        for (int x = 0; x < 16; ++x) v[x] = fmaf(factor, v[x], term[x]);
      }
      }
    };
    auto weigh = [&](int j0) {
      if constexpr (kBias) {
        int path[kKeys / 32];
#pragma unroll
        for (int c = 0; c < kKeys / 32; ++c) path[c] = shared.bias.path[bias_ring.stage][warp - 4][c];
#pragma unroll
        for (int c = 0; c < kKeys / 32; ++c) {
          add_time(w + 16 * c, path[c], j0, 32 * c);
#pragma unroll
          for (int x = 0; x < 16; ++x) w[16 * c + x] = weight_of<T>(w[16 * c + x]);
        }
        __syncwarp();
        release(shared.bias.empty[bias_ring.stage]);
        bias_ring.next();
      } else {
        float factor = p.unit * p.alpha;
#pragma unroll
        for (int x = 0; x < kKeys / 2; ++x) w[x] = weight_of<T>(factor * w[x]);
      }
      if (every.all(j0, j0 + kKeys)) return;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        VisibleKeys keys = shared.seen[row0 + 8 * half];
#pragma unroll
        for (int c0 = 0; c0 < kKeys; c0 += 64) {
          uint64_t seen = keys.bits(j0 + c0) >> column0;
#pragma unroll
          for (int x = 0; x < 8; ++x)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (!(uint32_t(x < 4 ? seen : seen >> 32) >> (8 * x % 32 + e) & 1)) w[c0 / 2 + 4 * x + 2 * half + e] = 0.f;
        }
      }
    };
    auto round = [&] {
#pragma unroll
      for (int x = 0; x < kKeys / 4; ++x) weights[x] = pack_pair<T>(w[2 * x], w[2 * x + 1]);
    };
    // Values behind the last key belong to others: they may be anything, and 0 times NaN is NaN.
    auto clear_tail = [&](int stage, int valid) {
      if (valid >= kKeys) return;
      unsigned char* tile = reinterpret_cast<unsigned char*>(shared.v[stage]);
      for (int x = valid * (kDim / 8) + threadIdx.x % 128; x < kKeys * (kDim / 8); x += 128)
        *reinterpret_cast<uint4*>(tile + swizzled<T, kDim>(kKeys, x / (kDim / 8), x % (kDim / 8) * 8)) = uint4{0, 0, 0, 0};
      fence_async();
      meet(kGroup + group, 128);
    };
    auto sees = [&](int n) { return some.any(n * kKeys, (n + 1) * kKeys); };
    // The next tile that this warpgroup sees; others are given back.
    auto seek = [&](int n) {
      for (; n < work.tiles.last && !sees(n); n = work.tiles.from(n + 1)) {
        shared.k_full[ring.stage].wait(ring.parity), shared.v_full[ring.stage].wait(ring.parity);
        __syncwarp();
        release(shared.k_empty[ring.stage]), release(shared.v_empty[ring.stage]);
        ring.next();
        if constexpr (kBias) {
          shared.bias.full[bias_ring.stage].wait(bias_ring.parity);
          __syncwarp();
          release(shared.bias.empty[bias_ring.stage]);
          bias_ring.next();
        }
        my_turn(), your_turn();
      }
      return n;
    };

    shared.q_full.wait(q_parity);
    // Runs of tiles that this warpgroup sees: the scores of a tile and the values of the one before it are multiplied at the same time.
    for (int n = seek(work.tiles.from(0)); n < work.tiles.last; n = seek(n)) {
      if constexpr (kBias) {
        for (bool first = true;; first = false) {
          begin(n * kKeys);
          shared.k_full[ring.stage].wait(ring.parity);
          wgmma_fence();
          scores(ring.stage);
          wgmma_commit();
          wgmma_wait<1>(sums);
          if (!first) release(shared.v_empty[ring.stage == 0 ? kRing - 1 : ring.stage - 1]);
          wgmma_wait<0>(w);
          release(shared.k_empty[ring.stage]);
          weigh(n * kKeys);
          round();
          shared.v_full[ring.stage].wait(ring.parity);
          clear_tail(ring.stage, s.history - n * kKeys);
          wgmma_fence();
          add_values(ring.stage);
          wgmma_commit();
          ring.next();
          n = work.tiles.from(n + 1);
          if (n >= work.tiles.last || !sees(n)) break;
        }
        wgmma_wait<0>(sums);
        release(shared.v_empty[ring.stage == 0 ? kRing - 1 : ring.stage - 1]);
      } else {
        shared.k_full[ring.stage].wait(ring.parity);
        my_turn();
        wgmma_fence();
        scores(ring.stage);
        wgmma_commit();
        your_turn();
        wgmma_wait<0>(w);
        release(shared.k_empty[ring.stage]);
        weigh(n * kKeys);
        round();
        Ring<kRing> now;
        for (;;) {
          now = ring;
          ring.next();
          shared.v_full[now.stage].wait(now.parity);
          clear_tail(now.stage, s.history - n * kKeys);
          n = work.tiles.from(n + 1);
          if (n >= work.tiles.last || !sees(n)) break;
          shared.k_full[ring.stage].wait(ring.parity);
          my_turn();
          wgmma_fence();
          scores(ring.stage);
          wgmma_commit();
          add_values(now.stage);
          wgmma_commit();
          your_turn();
          wgmma_wait<1>(w);
          release(shared.k_empty[ring.stage]);
          weigh(n * kKeys);
          wgmma_wait<0>(sums);
          release(shared.v_empty[now.stage]);
          round();
        }
        wgmma_fence();
        add_values(now.stage);
        wgmma_commit();
        wgmma_wait<0>(sums);
        release(shared.v_empty[now.stage]);
      }
    }

    // Targets' own groups, in float32, a quad a row.
    int64_t query = s.query + work.first;
    int head = work.head, rows = work.rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int r = row0 + 8 * half, i = s.shift + work.first + r, own = shared.seen[r].own, count = r < rows ? i + 1 - own : 0;
#pragma unroll 1
      for (int x = 0, longest = __reduce_max_sync(kFullWarp, count); x < longest; ++x) {
        bool active = x < count;
        int j = active ? own + x : 0;
        int64_t key = s.key + j;
        float score = p.unit * p.alpha *
                      quad_dot(p.q + ((query + (active ? r : 0)) * p.heads + head) * p.key_dim, p.k + (key * p.heads + head) * p.key_dim, p.key_dim, active);
        if (!active) continue;
        if constexpr (kBias) score += own_bias(p, s, head, query + r, j);
        float weight = weight_of<T>(score);
        const T* value = p.v + (key * p.heads + head) * p.value_dim;
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d)
          if (8 * d < p.value_dim)
#pragma unroll
            for (int e = 0; e < 2; ++e) sums[4 * d + 2 * half + e] = fmaf(weight, to_float(value[8 * d + column0 + e]), sums[4 * d + 2 * half + e]);
      }
    }
    // Rows leave through this warpgroup's part of the query tile.
    meet(kGroup + group, 128);
    unsigned char* tile = reinterpret_cast<unsigned char*>(shared.q);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int r = row0 + 8 * half;
      float scale = p.scales ? (r < rows ? p.scales[query + r] : 0.f) : p.scale;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
        *reinterpret_cast<uint32_t*>(tile + swizzled<T, kDim>(kRowsOfBlock, r, 8 * d + column0)) =
            pack_pair<T>(scale * sums[4 * d + 2 * half], scale * sums[4 * d + 2 * half + 1]);
    }
    __syncwarp();
    for (int x = lane; x < 16 * (kDim / 8); x += 32) {
      int r = 16 * (warp - 4) + x / (kDim / 8), d = x % (kDim / 8) * 8;
      if (r < rows && d < p.value_dim)
        *reinterpret_cast<uint4*>(out + ((query + r) * p.heads + head) * p.value_dim + d) =
            *reinterpret_cast<const uint4*>(tile + swizzled<T, kDim>(kRowsOfBlock, r, d));
    }
    __syncwarp();
    fence_async();
    release(shared.q_empty), release(shared.work_empty[turn.stage]);
    q_parity ^= 1;
  }
}

template <typename T, int kDim, Mode kMode>
void run(const Call<T>& p, T* out, int64_t longest, int64_t query_rows, int64_t key_rows, Stream stream) {
  int64_t tiles = ceil_div(longest, kRows<kDim, kMode>), items = tiles * p.heads * p.sequences;
  HSTU_CHECK(items <= INT_MAX / 2, kInvalidArgument, "hstu_attention: ", p.sequences, " sequences of ", longest, " rows are too many for one call");
  CUtensorMap q_map = tensor_map<T, kDim>(p.q, query_rows, p.heads, p.key_dim, kRows<kDim, kMode>);
  CUtensorMap k_map = tensor_map<T, kDim>(p.k, key_rows, p.heads, p.key_dim, kTile<kDim, kMode>);
  CUtensorMap v_map = tensor_map<T, kDim>(p.v, key_rows, p.heads, p.value_dim, kTile<kDim, kMode>);
  Scratch<int> ticket(1, stream);
  ticket.zero();
  launch(hstu_attention_sm90_kernel<T, kDim, kMode>, dim3(unsigned(std::min<int64_t>(items, 132))), dim3(128 * (kGroups<kDim, kMode> + 1)),
         sizeof(Shared<T, kDim, kMode>), stream, q_map, k_map, v_map, p, out, int(tiles), int(items), ticket.get());
}

}  // namespace forward_sm90
}  // namespace hstu::cuda::attention
