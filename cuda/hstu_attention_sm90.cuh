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

template <int kDim>
constexpr int kGroups = kDim <= 64 ? 3 : 2;  // warpgroups that compute; one more loads
template <int kDim>
constexpr int kRows = 64 * kGroups<kDim>;
template <int kDim>
constexpr int kTile = kDim <= 64 ? TILE64 : kDim <= 128 ? 128 : 64;  // keys
template <int kDim>
constexpr int kStages = kDim <= 64 ? STAGES64 : 2;
constexpr int kAnnounce = 1;  // first named barrier

struct Work {
  Sequence s;
  int head, first, rows;
  KeyTiles tiles;
};

template <typename T, int kDim>
struct Shared {
  alignas(1024) T q[kRows<kDim> * kDim];
  alignas(1024) T k[kStages<kDim>][kTile<kDim> * kDim];
  alignas(1024) T v[kStages<kDim>][kTile<kDim> * kDim];
  Barrier q_full, q_empty, k_full[kStages<kDim>], k_empty[kStages<kDim>], v_full[kStages<kDim>], v_empty[kStages<kDim>], work_full[2], work_empty[2];
  Work work[2];
  VisibleKeys seen[kRows<kDim>];
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

template <typename T, int kDim, Mode kMode>
__global__ void __launch_bounds__(128 * (kGroups<kDim> + 1), 1)
    hstu_attention_sm90_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                               const __grid_constant__ CUtensorMap v_map, const Call<T> p, T* out, int tiles, int items, int* ticket) {
  constexpr int kRowsOfBlock = kRows<kDim>, kKeysOfTile = kTile<kDim>, kRing = kStages<kDim>, kCount = kGroups<kDim>;
  constexpr int kBytes = kRowBytes<T, kDim>, kColumns = kBytes / int(sizeof(T));
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<T, kDim>*>(memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4 - 1;

  if (threadIdx.x == 0) {
    prefetch(q_map), prefetch(k_map), prefetch(v_map);
    shared.q_full.init(1), shared.q_empty.init(4 * kCount);
    for (int x = 0; x < kRing; ++x) shared.k_full[x].init(1), shared.v_full[x].init(1), shared.k_empty[x].init(4 * kCount), shared.v_empty[x].init(4 * kCount);
    for (int x = 0; x < 2; ++x) shared.work_full[x].init(1), shared.work_empty[x].init(4 * kCount);
    fence_barriers();
  }
  __syncthreads();

  Ring<2> turn;
  Ring<kRing> ring;
  int q_parity = 0;
  if (group < 0) {
    give_registers<kCount == 2 ? 40 : 32>();
    if (warp > 0) return;
    int item = int(blockIdx.x);
    for (;;) {
      int next = 0;
      if (lane == 0) next = atomicAdd(ticket, 1) + int(gridDim.x);
      Work work{};
      VisibleKeys some{};
      if (item < items) {
        int tile = tiles - 1 - item % tiles;
        work.head = item / tiles % p.heads, work.s = sequence_of(p, item / tiles / p.heads), work.first = tile * kRowsOfBlock;
        work.rows = min(kRowsOfBlock, work.s.queries - work.first);
        if (work.rows > 0) some = union_of(p, work.s, work.first, work.rows), work.tiles = tiles_of(some, kKeysOfTile);
      }
      if (item >= items || work.rows > 0) {
        shared.work_empty[turn.stage].wait(turn.parity ^ 1);
        if (lane == 0) shared.work[turn.stage] = work, shared.work_full[turn.stage].arrive();
        turn.next();
        if (item >= items) return;
        if (lane == 0) {
          bool q_to_come = true;
          auto load_q = [&] {
            shared.q_empty.wait(q_parity ^ 1);
            load<T, kDim, kRowsOfBlock>(shared.q, q_map, work.head, work.s.query + work.first, shared.q_full);
            q_parity ^= 1, q_to_come = false;
          };
          for (int n = work.tiles.from(0); n < work.tiles.last; n = work.tiles.from(n + 1)) {
            int64_t row = work.s.key + n * kKeysOfTile;
            shared.k_empty[ring.stage].wait(ring.parity ^ 1);
            load<T, kDim, kKeysOfTile>(shared.k[ring.stage], k_map, work.head, row, shared.k_full[ring.stage]);
            if (q_to_come) load_q();
            shared.v_empty[ring.stage].wait(ring.parity ^ 1);
            load<T, kDim, kKeysOfTile>(shared.v[ring.stage], v_map, work.head, row, shared.v_full[ring.stage]);
            ring.next();
          }
          if (q_to_come) load_q();
        }
        ring.stage = __shfl_sync(kFullWarp, ring.stage, 0), ring.parity = __shfl_sync(kFullWarp, ring.parity, 0);
      }
      item = __shfl_sync(kFullWarp, next, 0);
    }
  }

  take_registers<kCount == 2 ? 232 : 160>();
  warp %= 4;
  int row0 = 64 * group + 16 * warp + lane / 4, column0 = lane % 4 * 2;
  float factor = p.unit * p.alpha;
  uint32_t q_tile = shared_address(shared.q) + 64 * group * kBytes;
  if (PINGPONG && group == 0) announce(kAnnounce + 0, 256);
  for (;;) {
    shared.work_full[turn.stage].wait(turn.parity);
    const Work& slot = shared.work[turn.stage];
    Sequence s = slot.s;
    int head = slot.head, first = slot.first, rows = slot.rows;
    KeyTiles key_tiles = slot.tiles;
    __syncwarp();
    if (lane == 0) shared.work_empty[turn.stage].arrive();
    turn.next();
    if (rows <= 0) break;
    int i0 = s.shift + first;
    VisibleKeys some = union_of(p, s, first + 64 * group, min(64, rows - 64 * group)), every{INT_MAX, 0, INT_MAX, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int r = row0 + 8 * half;
      VisibleKeys keys{0, 0, 0, i0 + r + 1};
      if (r < rows) keys = visible_keys(p, s, i0 + r);
      if (lane % 4 == 0) shared.seen[r] = keys;
      every = {min(every.prefix, keys.prefix), max(every.begin, keys.begin), min(every.end, keys.end), 0};
    }
    every = {__reduce_min_sync(kFullWarp, every.prefix), __reduce_max_sync(kFullWarp, every.begin), __reduce_min_sync(kFullWarp, every.end), 0};
    __syncwarp();

    float sums[kDim / 2], w[kKeysOfTile / 2];
    uint32_t weights[kKeysOfTile / 4];
#pragma unroll
    for (int x = 0; x < kDim / 2; ++x) sums[x] = 0.f;

    auto scores = [&](int stage) {
      uint32_t k_tile = shared_address(shared.k[stage]);
#pragma unroll
      for (int d = 0; d < kDim; d += 16)
        wgmma<T, false>(w, by_rows<kBytes>(q_tile + d / kColumns * kRowsOfBlock * kBytes + d % kColumns * 2),
                        by_rows<kBytes>(k_tile + d / kColumns * kKeysOfTile * kBytes + d % kColumns * 2), d > 0);
    };
    auto add_values = [&](int stage) {
      uint32_t v_tile = shared_address(shared.v[stage]);
#pragma unroll
      for (int x = 0; x < kKeysOfTile; x += 16)
        wgmma<T, true>(sums, weights + x / 4, by_columns<kBytes>(v_tile + x * kBytes, kKeysOfTile * kBytes), true);
    };
    auto weigh = [&](int j0) {
      bool all = every.all(j0, j0 + kKeysOfTile);
#pragma unroll
      for (int x = 0; x < kKeysOfTile / 2; ++x) w[x] = weight_of<T>(factor * w[x]);
      if (all) return;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        VisibleKeys keys = shared.seen[row0 + 8 * half];
#pragma unroll
        for (int c0 = 0; c0 < kKeysOfTile; c0 += 64) {
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
      for (int x = 0; x < kKeysOfTile / 4; ++x) weights[x] = pack_pair<T>(w[2 * x], w[2 * x + 1]);
    };
    // Values behind the last key belong to others: they may be anything, and 0 times NaN is NaN.
    auto clear_tail = [&](int stage, int valid) {
      if (valid >= kKeysOfTile) return;
      for (int x = valid * (kDim / 8) + threadIdx.x % 128; x < kKeysOfTile * (kDim / 8); x += 128)
        *reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(shared.v[stage]) + swizzled<T, kDim>(kKeysOfTile, x / (kDim / 8), x % (kDim / 8) * 8)) =
            uint4{0, 0, 0, 0};
      fence_async();
      meet(kAnnounce + 4 + group, 128);
    };
    auto release = [&](Barrier& barrier) {
      if (lane == 0) barrier.arrive();
    };
    auto sees = [&](int n) { return some.any(n * kKeysOfTile, (n + 1) * kKeysOfTile); };
    // The next tile that this warpgroup sees; others are given back.
    auto seek = [&](int n) {
      for (; n < key_tiles.last && !sees(n); n = key_tiles.from(n + 1)) {
        shared.k_full[ring.stage].wait(ring.parity), shared.v_full[ring.stage].wait(ring.parity);
        __syncwarp();
        release(shared.k_empty[ring.stage]), release(shared.v_empty[ring.stage]);
        if (PINGPONG) meet(kAnnounce + group, 256), announce(kAnnounce + (group + 1) % kCount, 256);
        ring.next();
      }
      return n;
    };

    shared.q_full.wait(q_parity);
    q_parity ^= 1;
    // Runs of tiles that this warpgroup sees: the scores of a tile and the values of the one before it are multiplied at the same time.
    for (int n = seek(key_tiles.from(0)); n < key_tiles.last; n = seek(n)) {
      shared.k_full[ring.stage].wait(ring.parity);
      if (PINGPONG) meet(kAnnounce + group, 256);
      wgmma_fence();
      scores(ring.stage);
      wgmma_commit();
      if (PINGPONG) announce(kAnnounce + (group + 1) % kCount, 256);
      wgmma_wait<0>(w);
      release(shared.k_empty[ring.stage]);
      weigh(n * kKeysOfTile);
      round();
      Ring<kRing> now;
      for (;;) {
        now = ring;
        ring.next();
        shared.v_full[now.stage].wait(now.parity);
        clear_tail(now.stage, s.history - n * kKeysOfTile);
        n = key_tiles.from(n + 1);
        if (n >= key_tiles.last || !sees(n)) break;
        shared.k_full[ring.stage].wait(ring.parity);
        if (PINGPONG) meet(kAnnounce + group, 256);
        wgmma_fence();
        scores(ring.stage);
        wgmma_commit();
        add_values(now.stage);
        wgmma_commit();
        if (PINGPONG) announce(kAnnounce + (group + 1) % kCount, 256);
        wgmma_wait<1>(w);
        release(shared.k_empty[ring.stage]);
        weigh(n * kKeysOfTile);
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

    // Targets' own groups, in float32, a quad a row.
    int64_t query = s.query + first;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int r = row0 + 8 * half, i = i0 + r, own = shared.seen[r].own, count = r < rows ? i + 1 - own : 0;
#pragma unroll 1
      for (int x = 0, longest = __reduce_max_sync(kFullWarp, count); x < longest; ++x) {
        bool active = x < count;
        int64_t key = s.key + (active ? own + x : 0) - s.paged;
        float score = factor * quad_dot(p.q + ((query + (active ? r : 0)) * p.heads + head) * p.key_dim, p.k + (key * p.heads + head) * p.key_dim, p.key_dim, active);
        float weight = active ? weight_of<T>(score) : 0.f;
        const T* value = p.v + (key * p.heads + head) * p.value_dim;
        if (active)
#pragma unroll
          for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (8 * d + column0 + e < p.value_dim) sums[4 * d + 2 * half + e] = fmaf(weight, to_float(value[8 * d + column0 + e]), sums[4 * d + 2 * half + e]);
      }
    }
    // Rows leave through this warp's part of the query tile.
    meet(kAnnounce + 4 + group, 128);
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
      int r = 64 * group + 16 * warp + x / (kDim / 8), d = x % (kDim / 8) * 8;
      if (r < rows && d < p.value_dim)
        *reinterpret_cast<uint4*>(out + ((query + r) * p.heads + head) * p.value_dim + d) =
            *reinterpret_cast<const uint4*>(tile + swizzled<T, kDim>(kRowsOfBlock, r, d));
    }
    __syncwarp();
    fence_async();
    release(shared.q_empty);
  }
}

template <typename T, int kDim, Mode kMode>
void run(const Call<T>& p, T* out, int64_t longest, int64_t query_rows, int64_t key_rows, Stream stream) {
  int64_t tiles = ceil_div(longest, kRows<kDim>), items = tiles * p.heads * p.sequences;
  HSTU_CHECK(items <= INT_MAX / 2, kInvalidArgument, "hstu_attention: ", p.sequences, " sequences of ", longest, " rows are too many for one call");
  CUtensorMap q_map = tensor_map<T, kDim>(p.q, query_rows, p.heads, p.key_dim, kRows<kDim>);
  CUtensorMap k_map = tensor_map<T, kDim>(p.k, key_rows, p.heads, p.key_dim, kTile<kDim>);
  CUtensorMap v_map = tensor_map<T, kDim>(p.v, key_rows, p.heads, p.value_dim, kTile<kDim>);
  Scratch<int> ticket(1, stream);
  ticket.zero();
  launch(hstu_attention_sm90_kernel<T, kDim, kMode>, dim3(unsigned(std::min<int64_t>(items, 132))), dim3(128 * (kGroups<kDim> + 1)),
         sizeof(Shared<T, kDim>), stream, q_map, k_map, v_map, p, out, int(tiles), int(items), ticket.get());
}

}  // namespace forward_sm90
}  // namespace hstu::cuda::attention
