// HSTU attention, backward, for Hopper (sm_90a): shared memory, the warps that load, tell what is seen and add to dQ.
// See docs/hstu_attention.md.
#pragma once
#include "hstu_attention_bwd.cuh"
#include "sm90/bulk.cuh"
#include "sm90/wgmma.cuh"

namespace hstu::cuda::attention {
namespace backward_sm90 {

using namespace sm90;

// Up to D 128 two warpgroups own 64 keys each of a tile of 128, and one more loads, brings the bias (hstu_attention_bwd_bias_sm90.cuh) and
// adds to dQ. D 256: hstu_attention_bwd_wide_sm90.cuh.
template <int kDim, bool kBias = false>
struct Shape {
  static constexpr int kKeys = kDim <= 128 ? 128 : 64, kQueries = kDim <= 64 ? 128 : 64, kStages = 2;
  static constexpr int kAhead = kBias ? 4 : kStages;  // tiles that are known before they are done
  static constexpr int kThreads = kDim <= 128 ? 384 : 512;
  static constexpr int kLoading = 40, kComputing = 232;  // registers a thread
  // Deterministic: the computing warps write dQ where no more is added to it.
  static constexpr bool kFinishes = kDim <= 128;
  static constexpr int kPart = kQueries * kDim / 2;  // floats of a tile of dQ that one warpgroup makes
};

// Head dims of 129 to 256.
template <typename T>
void run_wide(const Call<T>& p, Gradients<T> g, int64_t rows, int64_t keys, int64_t longest, Stream stream);

// Of how many tiles of keys a launch may have sums of their own.
template <typename T>
int table_copies(const Call<T>& p, const Gradients<T>& g, int queries, bool positions, bool times);
// Gradients of the tables from the tiles of dS (of `queries` queries) of a launch, but for what targets' own groups add; those of launches
// before are added to. hstu_attention_bwd_tables_sm90.cu.
template <typename T>
void table_gradients(const Call<T>& p, Gradients<T> g, int queries, Tensor* dpos_w, Tensor* dtime_w, Stream stream);

struct Item {
  Sequence s;
  int head, tile, place;           // tile -1: no more; place: with a bias, of its first tile of dS
  bool any;                        // whether some query sees a key of the tile
  int parity;                      // of K and V
  float unit, inverse_unit;        // of scales, and so of dV
  float ds_unit, inverse_ds_unit;  // of dS besides: silu keeps it doubled
};
struct Tile {
  float* sums;  // of dQ; beyond D 128 null: no more
  int* turns;
  int item, index, turn, rows;  // turn: tiles of keys before this one that these queries see
  int before, offset;           // with a bias: its queries before the targets; its positions in shared memory
  bool first, all, last;        // first: of its item, with a bias
  bool finishes;  // no tile of keys after this one adds to these queries, none of which is a target: the computing warps write dQ
  int finished;   // how many before it do: the phase of sums_full
};

template <typename T, int kDim, bool kBias>
struct Shared {
  using S = Shape<kDim, kBias>;
  alignas(1024) T k[S::kKeys * kDim];
  alignas(1024) T v[S::kKeys * kDim];
  alignas(1024) T q[S::kStages][S::kQueries * kDim];
  alignas(1024) T dout[S::kStages][S::kQueries * kDim];
  alignas(1024) T ds[S::kStages][S::kQueries * S::kKeys];  // [64 keys a chunk][query][key], swizzled
  alignas(128) float dq[2][S::kPart];                      // [warpgroup][four accumulators][thread]
  uint32_t seen[S::kStages][S::kKeys / 32][S::kQueries];
  float scale[S::kStages][S::kQueries], delta[S::kStages][kBias ? 1 : S::kQueries];  // softmax: lse log2(e); delta in units of 2^14 dS
  Barrier k_full, k_empty, v_full, v_empty, told[S::kAhead], q_full[S::kStages], q_empty[S::kStages], dout_full[S::kStages],
      dout_empty[S::kStages];
  Barrier dq_full[2], dq_empty[2], sums_full[2], item_full[2], item_empty[2];
  Barrier tile_empty[S::kAhead];  // with a bias; else a tile's is that of its stage of Q
  Tile tile[S::kAhead];
  Item item[2];
};

// Code of what is not so stands elsewhere: instructions are fetched in rows.
__device__ __forceinline__ bool likely(bool x) { return __builtin_expect(x, true); }

constexpr float kLog2E = 1.4426950408889634f;
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// threadIdx.x, read anew: it and what follows from it need no register between uses.
__device__ __forceinline__ uint32_t thread_index() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// Shared memory, read here and not before.
__device__ __forceinline__ int read(const int* from) {
  int x;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(shared_address(from)));
  return x;
}

// Rows from `valid` on belong to others: they may be anything, and 0 times NaN is NaN. By `threads` threads.
template <typename T, int kDim, int kRows>
__device__ __forceinline__ void clear_tail(T* tile, int valid, int thread = threadIdx.x - 128, int threads = 256) {
#pragma unroll 1
  for (int x = max(valid, 0) * (kDim / 8) + thread; x < kRows * (kDim / 8); x += threads)
    *reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(tile) + swizzled<T, kDim>(kRows, x / (kDim / 8), x % (kDim / 8) * 8)) =
        uint4{0, 0, 0, 0};
}

// <a, b> in float32 by the four lanes of a quad, as quad_dot, for rows of 16-byte pieces, of which `kSteps` times four are asked for at
// once.
template <int kSteps = 1, typename T>
__device__ __forceinline__ float dot(const T* a, const T* b, int n, bool active) {
  float sum = 0;
  if (active)
#pragma unroll 1
    for (int first = thread_index() % 4 * 8; first < n; first += 32 * kSteps) {
      uint4 left[kSteps] = {}, right[kSteps] = {};
#pragma unroll
      for (int x = 0; x < kSteps; ++x)
        if (int d = first + 32 * x; d < n)
          left[x] = *reinterpret_cast<const uint4*>(a + d), right[x] = *reinterpret_cast<const uint4*>(b + d);
#pragma unroll
      for (int e = 0; e < 8 * kSteps; ++e)
        sum = fmaf(to_float(reinterpret_cast<const T*>(left)[e]), to_float(reinterpret_cast<const T*>(right)[e]), sum);
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
// Two rows of accumulators, `step` elements apart, those of them that come before `rows`, by eights: in a loop, for where code is short.
template <typename T, int kCount>
__device__ __forceinline__ void store_rows(T* row, int64_t step, float (&c)[kCount], float factor, int dim, int rows) {
#pragma unroll 1
  for (int first = 0; first < 2 * kCount; first += 32) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
#pragma unroll
      for (int y = 0; y < 4; ++y) words[y] = pack_pair<T>(factor * c[4 * y + 2 * half], factor * c[4 * y + 2 * half + 1]);
      transpose_quad(words);
      int d = first + 8 * (thread_index() % 4);
      if (8 * half < rows && d < dim) *reinterpret_cast<uint4*>(row + half * step + d) = uint4{words[0], words[1], words[2], words[3]};
    }
#pragma unroll
    for (int x = 0; x + 16 < kCount; ++x) c[x] = c[x + 16];
  }
}
// The row of two, columns first + 8 x + e, += factor * x.
template <typename T, int kCount>
__device__ __forceinline__ void add_to_row(float (&c)[kCount], int half, float factor, const T* x, int first, int dim) {
#pragma unroll
  for (int y = 0; y < kCount / 4; ++y)
    if (int d = first + 8 * y; d < dim) {
      uint32_t word = *reinterpret_cast<const uint32_t*>(x + d);
#pragma unroll
      for (int e = 0; e < 2; ++e)
        c[4 * y + 2 * half + e] = fmaf(factor, to_float(reinterpret_cast<const T*>(&word)[e]), c[4 * y + 2 * half + e]);
    }
}

// Sums of dQ: tiles of queries of a sequence begin where no other's end.
template <typename S, typename T>
__device__ __forceinline__ float* sums_of(const Call<T>& p, const Gradients<T>& g, const Sequence& s, int tile, int head) {
  return g.dq_sums + ((s.query / S::kQueries + s.index + tile) * p.heads + head) * 2 * S::kPart;
}

// Whether a tile of queries sees tile n of keys; how many tiles before n it sees, or behind n.
template <typename S>
__device__ __forceinline__ bool sees(const QueryTile& queries, int n, int& turn, bool behind = false) {
  KeyTiles keys = KeyTiles::of(queries.any, S::kKeys);
  bool before = keys.gap >= 0 && n < keys.gap;
  int gap = keys.gap < 0 ? 0 : keys.resume - keys.gap;
  turn = behind ? keys.last - 1 - n - (before ? gap : 0) : n - (before ? 0 : gap);
  return n < keys.last && (before || keys.gap < 0 || n >= keys.resume);
}

// The first tile of queries from m on that sees the item's keys, -1: none.
template <typename S, typename T>
__device__ __forceinline__ int next_seen(const Call<T>& p, const Gradients<T>& g, const Item& item, int m) {
  int turn, tiles = item.tile * S::kKeys < item.s.history ? (item.s.queries + S::kQueries - 1) / S::kQueries : 0;
  for (; m < tiles; ++m)
    if (sees<S>(g.query_tiles[int64_t(item.s.index) * g.most_query_tiles + m], item.tile, turn)) return m;
  return -1;
}
template <typename S, typename T>
__device__ __forceinline__ int first_seen(const Call<T>& p, const Gradients<T>& g, const Item& item) {
  return next_seen<S>(p, g, item, first_tile_of_queries(p, item.s, item.tile * S::kKeys, S::kQueries));
}
// Where a tile of dS stands, in such tiles.
template <typename T>
__device__ __forceinline__ int64_t place_of_ds(const Call<T>& p, const Sequence& s, int place, int key_tile, int keys, int tile,
                                               int queries, int head) {
  return int64_t(place + tile - first_tile_of_queries(p, s, key_tile * keys, queries)) * p.heads + head;
}
// Tile m of queries; returns the next one.
template <typename S, typename T>
__device__ __forceinline__ int tell_tile(const Call<T>& p, const Gradients<T>& g, const Item& item, uint32_t turn, int m, bool last_first,
                                         Tile& tile) {
  const QueryTile& queries = g.query_tiles[int64_t(item.s.index) * g.most_query_tiles + m];
  sees<S>(queries, item.tile, tile.turn, last_first);
  int behind;
  sees<S>(queries, item.tile, behind, !last_first);
  tile.finishes =
      S::kFinishes && g.deterministic && behind == 0 && item.s.shift + min((m + 1) * S::kQueries, item.s.queries) <= item.s.history;
  tile.item = turn % 2, tile.index = m, tile.rows = item.s.queries - m * S::kQueries;
  tile.all = queries.all.all(item.tile * S::kKeys, (item.tile + 1) * S::kKeys) && tile.rows >= S::kQueries;
  tile.sums = sums_of<S>(p, g, item.s, m, item.head);
  tile.turns = g.turns + (int64_t(item.s.index) * p.heads + item.head) * g.most_query_tiles + m;
  m = next_seen<S>(p, g, item, m + 1);
  tile.last = m < 0;
  return m;
}

// The next item, or a last one of tile -1, to shared memory, for this thread; returns its ticket, -1: there is none, and all know.
template <typename S, bool kBias, typename T, typename Memory>
__device__ __forceinline__ int draw_item(Memory& shared, const Call<T>& p, const Gradients<T>& g, uint32_t turn, bool softmax,
                                         bool last_first) {
  uint32_t ticket = atomicAdd(g.ticket, 1);
  Item &item = shared.item[turn % 2], &before = shared.item[turn % 2 ^ 1];
  shared.item_empty[turn % 2].wait(turn / 2 & 1 ^ 1);
  // With a bias a launch may have a part of the tiles, and the last one none.
  int first_tile = kBias ? g.ds_bounds[g.launch] : 0, tiles = kBias ? g.ds_bounds[g.launch + 1] - first_tile : *g.tiles;
  if (ticket >= uint32_t(tiles * p.heads)) {
    item.tile = -1, shared.item_full[turn % 2].arrive();
    return -1;
  }
  int2 where = g.key_tiles[first_tile + ticket / uint32_t(p.heads)];
  if constexpr (kBias) item.place = g.ds_first[first_tile + ticket / uint32_t(p.heads)];
  item.head = int(ticket % uint32_t(p.heads)), item.tile = where.y;
  __threadfence_block();  // this thread is short of registers
  item.s = sequence_of(p, where.x);
  __threadfence_block();
  if (!last_first) item.tile = (item.s.length - 1) / S::kKeys - item.tile;  // the longest first
  __threadfence_block();
  Units units = g.units_of(p, where.x, softmax);
  item.unit = units.weight, item.inverse_unit = 1 / item.unit;
  item.ds_unit = (softmax ? 1.f : 0.5f) * units.gradient, item.inverse_ds_unit = 1 / item.ds_unit;
  item.parity = turn > 0 ? before.parity ^ int(before.any) : 0;
  return int(ticket);
}
// The same, and whether some query sees its keys; all know.
template <typename T, int kDim, bool kBias, typename Memory>
__device__ __forceinline__ int next_item(Memory& shared, const Call<T>& p, const Gradients<T>& g, uint32_t turn, bool softmax,
                                         bool last_first) {
  using S = Shape<kDim, kBias>;
  int ticket = draw_item<S, kBias>(shared, p, g, turn, softmax, last_first);
  if (ticket < 0) return ticket;
  Item& item = shared.item[turn % 2];
  item.any = first_seen<S>(p, g, item) >= 0;
  shared.item_full[turn % 2].arrive();
  return ticket;
}

// One thread loads an item's keys and values, when those of the item before are read no more.
template <typename T, int kDim, int kKeys, typename Memory>
__device__ __forceinline__ void load_keys(Memory& shared, const CUtensorMap& k_map, const CUtensorMap& v_map, const Item& item) {
  shared.v_empty.wait(item.parity ^ 1);
  shared.v_full.expect(kKeys * kDim * int(sizeof(T)));
  load_tile<T, kDim, kKeys>(shared.v, v_map, item.head, item.s.key + item.tile * kKeys, shared.v_full);
  shared.k_empty.wait(item.parity ^ 1);
  shared.k_full.expect(kKeys * kDim * int(sizeof(T)));
  load_tile<T, kDim, kKeys>(shared.k, k_map, item.head, item.s.key + item.tile * kKeys, shared.k_full);
}

// The thread that loads: tells the others which items and tiles come.
template <typename T, int kDim, bool kBias = false, typename Memory>
__device__ __forceinline__ void produce(Memory& shared, const CUtensorMap& q_map, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                        const CUtensorMap& dout_map, const Call<T>& p, const Gradients<T>& g, bool softmax,
                                        bool last_first) {
  using S = Shape<kDim, kBias>;
  constexpr int kQ = S::kQueries, kK = S::kKeys, kTileBytes = kQ * kDim * int(sizeof(T));
  uint32_t count = 0;
  int finished = 0;
  for (uint32_t turn = 0;; ++turn) {
    int ticket = next_item<T, kDim, kBias>(shared, p, g, turn, softmax, last_first);
    Item& item = shared.item[turn % 2];
    if (ticket < 0) {
      shared.q_empty[count % 2].wait(count / 2 & 1 ^ 1);
      shared.tile[count % 2].item = -1, shared.told[count % 2].arrive();
      return;
    }
    int m = first_seen<S>(p, g, item);
    for (bool first = true; m >= 0; first = false, ++count) {
      int stage = count % 2;
      shared.q_empty[stage].wait(count / 2 & 1 ^ 1);
      shared.q_full[stage].expect(kTileBytes);
      load_tile<T, kDim, kQ>(shared.q[stage], q_map, item.head, item.s.query + m * kQ, shared.q_full[stage]);
      shared.dout_empty[stage].wait(count / 2 & 1 ^ 1);
      shared.dout_full[stage].expect(kTileBytes);
      load_tile<T, kDim, kQ>(shared.dout[stage], dout_map, item.head, item.s.query + m * kQ, shared.dout_full[stage]);
      m = tell_tile<S>(p, g, item, turn, m, last_first, shared.tile[stage]);
      shared.tile[stage].finished = finished, finished += shared.tile[stage].finishes;
      shared.told[stage].arrive();
      if (first) load_keys<T, kDim, kK>(shared, k_map, v_map, item);
    }
  }
}

// A warp tells which keys of a tile its queries see, and their scales.
template <typename T, int kDim, bool kBias>
__device__ __forceinline__ void tell_seen(Shared<T, kDim, kBias>& shared, const Call<T>& p, const Gradients<T>& g, int stage,
                                          const Tile& tile, const Item& item, bool softmax) {
  using S = Shape<kDim, kBias>;
  auto below = [](int n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; };
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
      if (p.scales && !softmax)
        shared.scale[stage][r] = there ? p.scales[item.s.query + tile.index * S::kQueries + r] * item.inverse_unit : 1.f;
    }
  if (softmax) {
    const int64_t first = (item.s.query + tile.index * S::kQueries) * p.heads + item.head;
#pragma unroll 1
    for (int r = thread_index() % 32; r < S::kQueries; r += 32) {
      float lse = r < tile.rows ? g.lse[first + r * p.heads] : 0.f, delta = r < tile.rows ? g.delta[first + r * p.heads] : 0.f;
      shared.scale[stage][r] = lse == -INFINITY ? 0.f : lse * kLog2E;  // a row that sees nothing
      shared.delta[stage][r] = delta * item.inverse_ds_unit * 0x1p-14f;
    }
  }
}
template <typename T, int kDim, bool kBias>
__device__ __forceinline__ void tell(Shared<T, kDim, kBias>& shared, const Call<T>& p, const Gradients<T>& g) {
  for (uint32_t count = 0;; ++count) {
    int stage = count % 2;
    shared.told[stage].wait(count / 2 & 1);
    const Tile& tile = shared.tile[stage];
    if (tile.item < 0) return;
    tell_seen<T, kDim, kBias>(shared, p, g, stage, tile, shared.item[tile.item], !kBias && g.lse);
    __syncwarp();
    shared.q_full[stage].arrive_for_warp(thread_index() % 32);
  }
}

// A thread that adds a warpgroup's parts of dQ to their sums, the first one stores. It knows a tile before it is done, and brings the sums
// to which the computing warps add the last part.
template <typename T, int kDim, bool kBias>
__device__ __forceinline__ void add_parts(Shared<T, kDim, kBias>& shared, int slot, bool deterministic) {
  using S = Shape<kDim, kBias>;
  constexpr int kBytes = sizeof(shared.dq[0]);
  int shift = 16 * slot;
  for (uint32_t count = 0;; ++count) {
    shared.told[count % S::kAhead].wait(count / S::kAhead & 1);
    Tile out = shared.tile[count % S::kAhead];
    if (out.item < 0) return;
    if constexpr (kBias)
      shared.tile_empty[count % S::kAhead].arrive();
    else
      shared.q_empty[count % 2].arrive();
    out.sums += slot * S::kPart;
    if (deterministic) {
      for (int done = 0; done < out.turn; done = done >> shift & 0xffff)
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(out.turns) : "memory");
    }
    if (out.finishes && out.turn > 0) {
      shared.sums_full[slot].expect(kBytes);
      asm volatile("fence.proxy.async;" ::: "memory");
      load_bulk(shared_address(shared.dq[slot]), out.sums, kBytes, shared.sums_full[slot]);
    } else if (out.finishes) {
      shared.sums_full[slot].arrive();
    }
    shared.dq_full[slot].wait(count & 1);
    if (out.finishes) {
      shared.dq_empty[slot].arrive();
      continue;
    }
    if (deterministic && out.turn == 0)
      store_bulk(out.sums, shared_address(shared.dq[slot]), kBytes);
    else
      add_bulk(out.sums, shared_address(shared.dq[slot]), kBytes);
    bulk_commit();
    bulk_wait_read();
    shared.dq_empty[slot].arrive();
    if (deterministic) {
      bulk_wait();
      asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(out.turns), "r"(1 << shift) : "memory");
    }
  }
}

// A branch that is never taken. Instructions stay on their side of it: with fewer of them interleaved fewer registers are needed.
__device__ __forceinline__ void part(uint32_t x) { asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %0, 0xffffffff;\n@p trap;\n}" ::"r"(x)); }

// What c holds is needed no more: else a product that does not add to c would keep it.
template <int kCount>
__device__ __forceinline__ void forget(float (&c)[kCount]) {
#pragma unroll
  for (int x = 0; x < kCount; ++x) asm volatile("" : "=f"(c[x]));
}

// `descriptor` of what stands `bytes` further on.
__device__ __forceinline__ uint64_t moved(uint64_t descriptor, int bytes) {
  return (descriptor & 0xffffffff00000000) | uint32_t(uint32_t(descriptor) + uint32_t(bytes) / 16);
}

}  // namespace backward_sm90
}  // namespace hstu::cuda::attention
