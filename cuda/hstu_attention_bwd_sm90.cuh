// HSTU attention, backward, for Hopper (sm_90a): shared memory, the warps that load, tell what is seen and add to dQ. See docs/hstu_attention.md.
#pragma once
#include "hstu_attention_bwd.cuh"
#include "sm90/bulk.cuh"
#include "sm90/wgmma.cuh"

namespace hstu::cuda::attention {
namespace backward_sm90 {

using namespace sm90;

// Two warpgroups own 64 keys each of a tile of 128; one more loads, and adds to dQ; with a bias a fourth one has to do with the tables.
template <int kDim, bool kBias = false>
struct Shape {
  static constexpr int kKeys = 128, kQueries = kDim <= 64 && !kBias ? 128 : 64, kStages = 2, kThreads = kBias ? 512 : 384;
  static constexpr int kTables = kDim <= 64 ? 104 : 40, kComputing = kBias ? (488 - kTables) / 2 : 240;  // registers a thread
  static constexpr int kPart = kQueries * kDim / 2;  // floats of a tile of dQ that one warpgroup makes
};

struct Item {
  Sequence s;
  int head, tile;  // tile -1: no more
  bool any;        // whether some query sees a key of the tile
  int parity;      // of K and V
  int copy;        // of the tables' sums
  float unit, inverse_unit;
};
struct Tile {
  float* sums;  // of dQ; null: no more
  int* turns;
  int item, index, turn, rows;  // turn: tiles of keys before this one that these queries see
  bool all, last;
};

template <typename T, int kDim, bool kBias>
struct Shared {
  using S = Shape<kDim, kBias>;
  alignas(1024) T k[S::kKeys * kDim];
  alignas(1024) T v[S::kKeys * kDim];
  alignas(1024) T q[S::kStages][S::kQueries * kDim];
  alignas(1024) T dout[S::kStages][S::kQueries * kDim];
  alignas(1024) T ds[2][S::kQueries * S::kKeys];  // [64 keys a chunk][query][key], swizzled
  alignas(128) float dq[2][S::kPart];             // a warpgroup's accumulators, [four of them][thread]
  uint32_t seen[S::kStages][S::kKeys / 32][S::kQueries];
  float scale[S::kStages][S::kQueries];
  Barrier k_full, k_empty, v_full, v_empty, told[S::kStages], q_full[S::kStages], q_empty[S::kStages], dout_full[S::kStages],
      dout_empty[S::kStages];
  Barrier dq_full[2], dq_empty[2], item_full[2], item_empty[2];
  Tile tile[S::kStages], out[2];
  Item item[2];
};

// threadIdx.x, read anew: it and what follows from it need no register between uses.
__device__ __forceinline__ uint32_t thread_index() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// Rows from `valid` on belong to others: they may be anything, and 0 times NaN is NaN. By all 256 threads.
template <typename T, int kDim, int kRows>
__device__ __forceinline__ void clear_tail(T* tile, int valid) {
  for (int x = valid * (kDim / 8) + threadIdx.x - 128; x < kRows * (kDim / 8); x += 256)
    *reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(tile) + swizzled<T, kDim>(kRows, x / (kDim / 8), x % (kDim / 8) * 8)) =
        uint4{0, 0, 0, 0};
}

// <a, b> in float32 by the four lanes of a quad, as quad_dot, for rows of 16-byte pieces.
template <typename T>
__device__ __forceinline__ float dot(const T* a, const T* b, int n, bool active) {
  float sum = 0;
  if (active)
#pragma unroll 1
    for (int d = thread_index() % 4 * 8; d < n; d += 32) {
      uint4 left = *reinterpret_cast<const uint4*>(a + d), right = *reinterpret_cast<const uint4*>(b + d);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        sum = fmaf(to_float(reinterpret_cast<const T*>(&left)[e]), to_float(reinterpret_cast<const T*>(&right)[e]), sum);
    }
  sum += __shfl_xor_sync(kFullWarp, sum, 1);
  return sum + __shfl_xor_sync(kFullWarp, sum, 2);
}

// A row of two rows of accumulators, times `factor`, to memory: a lane 8 columns.
template <typename T, int kCount>
__device__ __forceinline__ void store_row(T* row, const float (&c)[kCount], int half, float factor, int first, int dim, bool there) {
#pragma unroll
  for (int x = 0; x < kCount / 4; x += 4) {
    uint32_t words[4];
#pragma unroll
    for (int y = 0; y < 4; ++y) words[y] = pack_pair<T>(factor * c[4 * (x + y) + 2 * half], factor * c[4 * (x + y) + 2 * half + 1]);
    transpose_quad(words);
    int d = first + 8 * (x + thread_index() % 4);
    if (there && d < dim) *reinterpret_cast<uint4*>(row + d) = uint4{words[0], words[1], words[2], words[3]};
  }
}
// The row of two, columns first + 8 x + e, += factor * x.
template <typename T, int kCount>
__device__ __forceinline__ void add_to_row(float (&c)[kCount], int half, float factor, const T* x, int first, int dim) {
#pragma unroll
  for (int y = 0; y < kCount / 4; ++y)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (int d = first + 8 * y + e; d < dim) c[4 * y + 2 * half + e] = fmaf(factor, to_float(x[d]), c[4 * y + 2 * half + e]);
}

// Sums of dQ: tiles of queries of a sequence begin where no other's end.
template <typename S, typename T>
__device__ __forceinline__ float* sums_of(const Call<T>& p, const Gradients<T>& g, const Sequence& s, int tile, int head) {
  return g.dq_sums + ((s.query / S::kQueries + s.index + tile) * p.heads + head) * 2 * S::kPart;
}

// Whether a tile of queries sees tile n of keys; how many tiles before n it sees.
template <typename S>
__device__ __forceinline__ bool sees(const QueryTile& queries, int n, int& turn) {
  KeyTiles keys = KeyTiles::of(queries.any, S::kKeys);
  bool before = keys.gap >= 0 && n < keys.gap;
  turn = n - (before || keys.gap < 0 ? 0 : keys.resume - keys.gap);
  return n < keys.last && (before || keys.gap < 0 || n >= keys.resume);
}

// The thread that loads: tells the others which items and tiles come.
template <typename T, int kDim, bool kBias>
__device__ __forceinline__ void produce(Shared<T, kDim, kBias>& shared, const CUtensorMap& q_map, const CUtensorMap& k_map,
                                        const CUtensorMap& v_map, const CUtensorMap& dout_map, const Call<T>& p, const Gradients<T>& g) {
  using S = Shape<kDim, kBias>;
  constexpr int kQ = S::kQueries, kK = S::kKeys, kTileBytes = kQ * kDim * int(sizeof(T));
  uint32_t count = 0;
  for (uint32_t turn = 0;; ++turn) {
    uint32_t ticket = atomicAdd(g.ticket, 1);
    Item &item = shared.item[turn % 2], &before = shared.item[turn % 2 ^ 1];
    shared.item_empty[turn % 2].wait(turn / 2 & 1 ^ 1);
    if (int(ticket) >= min(*g.tiles - g.first_tile, g.copies) * p.heads) {
      item.tile = -1, shared.item_full[turn % 2].arrive();
      shared.q_empty[count % 2].wait(count / 2 & 1 ^ 1);
      shared.tile[count % 2].item = -1, shared.told[count % 2].arrive();
      return;
    }
    int2 where = g.key_tiles[g.first_tile + ticket / uint32_t(p.heads)];
    item.head = int(ticket % uint32_t(p.heads)), item.copy = int(ticket / uint32_t(p.heads)), item.tile = where.y;
    __threadfence_block();  // this thread is short of registers
    item.s = sequence_of(p, where.x);
    __threadfence_block();
    item.tile = (item.s.length - 1) / kK - item.tile;  // first to last: the longest first
    item.unit = g.units_of(p, where.x, false).weight, item.inverse_unit = 1 / item.unit,
    item.parity = turn > 0 ? before.parity ^ int(before.any) : 0;
    auto next_seen = [&](int m) {  // the first tile of queries from m on that sees the item's keys, -1: none
      int turn, tiles = item.tile * kK < item.s.history ? (item.s.queries + kQ - 1) / kQ : 0;
      for (; m < tiles; ++m)
        if (sees<S>(g.query_tiles[int64_t(item.s.index) * g.most_query_tiles + m], item.tile, turn)) return m;
      return -1;
    };
    // Without rows that look ahead no query before the first key sees any.
    int m = next_seen(p.causal && !p.contextual_full ? max(item.tile * kK - item.s.shift, 0) / kQ : 0);
    item.any = m >= 0, shared.item_full[turn % 2].arrive();
    if (m < 0) continue;
    for (bool first = true; m >= 0; first = false, ++count) {
      int stage = count % 2;
      shared.q_empty[stage].wait(count / 2 & 1 ^ 1);
      shared.q_full[stage].expect(kTileBytes);
      load_tile<T, kDim, kQ>(shared.q[stage], q_map, item.head, item.s.query + m * kQ, shared.q_full[stage]);
      if (first) {
        shared.v_empty.wait(item.parity ^ 1);
        shared.v_full.expect(kK * kDim * int(sizeof(T)));
        load_tile<T, kDim, kK>(shared.v, v_map, item.head, item.s.key + item.tile * kK, shared.v_full);
      }
      shared.dout_empty[stage].wait(count / 2 & 1 ^ 1);
      shared.dout_full[stage].expect(kTileBytes);
      load_tile<T, kDim, kQ>(shared.dout[stage], dout_map, item.head, item.s.query + m * kQ, shared.dout_full[stage]);
      if (first) {
        shared.k_empty.wait(item.parity ^ 1);
        shared.k_full.expect(kK * kDim * int(sizeof(T)));
        load_tile<T, kDim, kK>(shared.k, k_map, item.head, item.s.key + item.tile * kK, shared.k_full);
      }
      Tile& tile = shared.tile[stage];
      const QueryTile& queries = g.query_tiles[int64_t(item.s.index) * g.most_query_tiles + m];
      sees<S>(queries, item.tile, tile.turn);
      tile.item = turn % 2, tile.index = m, tile.rows = item.s.queries - m * kQ;
      tile.all = queries.all.all(item.tile * kK, (item.tile + 1) * kK) && tile.rows >= kQ;
      tile.sums = sums_of<S>(p, g, item.s, m, item.head);
      tile.turns = g.turns + (int64_t(item.s.index) * p.heads + item.head) * g.most_query_tiles + m;
      m = next_seen(m + 1);
      tile.last = m < 0;
      shared.told[stage].arrive();
    }
  }
}

// The warp that tells which keys of a tile its queries see, and their scales. `more`(stage, tile, item) does what else a tile needs.
template <typename T, int kDim, bool kBias>
__device__ __forceinline__ void tell(Shared<T, kDim, kBias>& shared, const Call<T>& p) {
  using S = Shape<kDim, kBias>;
  auto below = [](int n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; };
  for (uint32_t count = 0;; ++count) {
    int stage = count % 2;
    shared.told[stage].wait(count / 2 & 1);
    const Tile& tile = shared.tile[stage];
    if (tile.item < 0) return;
    const Item& item = shared.item[tile.item];
    if (!tile.all || p.scales)
#pragma unroll 1
      for (int r = thread_index() % 32; r < S::kQueries; r += 32) {
        bool there = r < tile.rows;
        VisibleKeys keys{0, 0, 0, 0};
        if (there) keys = visible_keys(p, item.s, item.s.shift + tile.index * S::kQueries + r);
#pragma unroll
        for (int x = 0; x < S::kKeys / 32; ++x) {
          int j = item.tile * S::kKeys + 32 * x;
          shared.seen[stage][x][r] = below(keys.prefix - j) | (below(keys.end - j) & ~below(keys.begin - j));
        }
        if (p.scales) shared.scale[stage][r] = there ? p.scales[item.s.query + tile.index * S::kQueries + r] * item.inverse_unit : 1.f;
      }
    __syncwarp();
    if (thread_index() % 32 == 0) shared.q_full[stage].arrive();
  }
}

// A thread that adds one warpgroup's parts of dQ to their sums.
template <typename T, int kDim, bool kBias>
__device__ __forceinline__ void add_parts(Shared<T, kDim, kBias>& shared, int group, bool deterministic) {
  constexpr int kPart = Shape<kDim, kBias>::kPart, kBytes = kPart * 4;
  for (int parity = 0;; parity ^= 1) {
    shared.dq_full[group].wait(parity);
    Tile out = shared.out[group];
    if (!out.sums) return;
    out.sums += group * kPart;
    if (deterministic) {
      for (int done = 0; done < out.turn; done = done >> 16 * group & 0xffff)
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(out.turns) : "memory");
    }
    if (deterministic && out.turn == 0)
      store_bulk(out.sums, shared_address(shared.dq[group]), kBytes);
    else
      add_bulk(out.sums, shared_address(shared.dq[group]), kBytes);
    bulk_commit();
    bulk_wait_read();
    shared.dq_empty[group].arrive();
    if (deterministic) {
      bulk_wait();
      asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(out.turns), "r"(1 << 16 * group) : "memory");
    }
  }
}

// A branch that is never taken. Instructions stay on their side of it: with fewer of them interleaved fewer registers are needed.
__device__ __forceinline__ void part(uint32_t x) { asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %0, 0xffffffff;\n@p trap;\n}" ::"r"(x)); }

// `descriptor` of what stands `bytes` further on.
__device__ __forceinline__ uint64_t moved(uint64_t descriptor, int bytes) {
  return (descriptor & 0xffffffff00000000) | uint32_t(uint32_t(descriptor) + uint32_t(bytes) / 16);
}

}  // namespace backward_sm90
}  // namespace hstu::cuda::attention
