// HSTU attention, backward, for Hopper: sm_90a. See docs/hstu_attention_sm90_bwd.md for a drawing.
#pragma once
#include "hstu_attention_bwd.cuh"
#include "sm90/bulk.cuh"
#include "sm90/wgmma.cuh"

namespace hstu::cuda::attention {
namespace backward_sm90 {

using namespace sm90;

#ifndef PRODUCER_REGISTERS
#define PRODUCER_REGISTERS 24
#define CONSUMER_REGISTERS 240
#endif

// Two warpgroups own 64 keys each of a tile of 128; one more loads, and adds to dQ.
template <int kDim>
struct Shape {
  static constexpr int kKeys = 128, kQueries = kDim <= 64 ? 128 : 64, kStages = 2, kThreads = 384;
  static constexpr int kPart = kQueries * kDim / 2;  // floats of a tile of dQ that one warpgroup makes
};

struct Item {
  Sequence s;
  int head, tile;  // tile -1: no more
  bool any;        // whether some query sees a key of the tile
  int parity;      // of K and V
  float unit, inverse_unit;
};
struct Tile {
  float* sums;  // of dQ; null: no more
  int* turns;
  int item, index, turn, rows;  // turn: tiles of keys behind this one that these queries see
  bool all, last;
};

template <typename T, int kDim>
struct Shared {
  using S = Shape<kDim>;
  alignas(1024) T k[S::kKeys * kDim];
  alignas(1024) T v[S::kKeys * kDim];
  alignas(1024) T q[S::kStages][S::kQueries * kDim];
  alignas(1024) T dout[S::kStages][S::kQueries * kDim];
  alignas(1024) T ds[2][S::kQueries * S::kKeys];  // [64 keys a chunk][query][key], swizzled
  alignas(128) float dq[2][S::kPart];             // a warpgroup's accumulators, [four of them][thread]
  uint32_t seen[S::kStages][S::kKeys / 32][S::kQueries];
  float scale[S::kStages][S::kQueries];
  Barrier k_full, k_empty, v_full, v_empty, told[S::kStages], q_full[S::kStages], q_empty[S::kStages], dout_full[S::kStages], dout_empty[S::kStages];
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

template <typename T, int kDim>
__device__ __forceinline__ uint32_t swizzled(int rows, int row, int d) {  // byte of element (row, d) of a tile of `rows` rows
  constexpr int kBytes = kRowBytes<T, kDim>;
  int byte = d * int(sizeof(T)), chunk = byte / kBytes, unit = byte % kBytes / 16;
  int swizzle = kBytes == 128 ? row & 7 : row >> 1 & 3;
  return (chunk * rows + row) * kBytes + (unit ^ swizzle) * 16 + byte % 16;
}

template <typename T, int kDim, int kRows>
__device__ __forceinline__ void load(T* tile, const CUtensorMap& map, int head, int64_t row, Barrier& full) {
  constexpr int kBytes = kRowBytes<T, kDim>, kColumns = kBytes / int(sizeof(T));
#pragma unroll
  for (int d = 0; d < kDim; d += kColumns) load_box(shared_address(tile) + d / kColumns * kRows * kBytes, map, d, head, int(row), full);
}

// Rows from `valid` on belong to others: they may be anything, and 0 times NaN is NaN. By all 256 threads.
template <typename T, int kDim, int kRows>
__device__ __forceinline__ void clear_tail(T* tile, int valid) {
  for (int x = valid * (kDim / 8) + threadIdx.x - 128; x < kRows * (kDim / 8); x += 256)
    *reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(tile) + swizzled<T, kDim>(kRows, x / (kDim / 8), x % (kDim / 8) * 8)) = uint4{0, 0, 0, 0};
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
      for (int e = 0; e < 8; ++e) sum = fmaf(to_float(reinterpret_cast<const T*>(&left)[e]), to_float(reinterpret_cast<const T*>(&right)[e]), sum);
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
template <typename T, int kDim>
__device__ __forceinline__ float* sums_of(const Call<T>& p, const Gradients<T>& g, const Sequence& s, int tile, int head) {
  using S = Shape<kDim>;
  return g.dq_sums + ((s.query / S::kQueries + s.index + tile) * p.heads + head) * 2 * S::kPart;
}

// Whether a tile of queries sees tile n of keys; how many tiles behind n it sees.
template <int kDim>
__device__ __forceinline__ bool sees(const QueryTile& queries, int n, int& turn) {
  KeyTiles keys = queries.tiles(Shape<kDim>::kKeys);
  bool before = keys.gap >= 0 && n < keys.gap;
  turn = keys.last - 1 - n - (before ? keys.resume - keys.gap : 0);
  return n < keys.last && (before || keys.gap < 0 || n >= keys.resume);
}

// The thread that loads: tells the others which items and tiles come.
template <typename T, int kDim>
__device__ __forceinline__ void produce(Shared<T, kDim>& shared, const CUtensorMap& q_map, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                        const CUtensorMap& dout_map, const Call<T>& p, const Gradients<T>& g) {
  using S = Shape<kDim>;
  constexpr int kQ = S::kQueries, kK = S::kKeys, kTileBytes = kQ * kDim * int(sizeof(T));
  uint32_t kv_count = 0, count = 0;
  for (uint32_t turn = 0;; ++turn) {
    uint32_t ticket = atomicAdd(g.ticket, 1);
    Item& item = shared.item[turn % 2];
    shared.item_empty[turn % 2].wait(turn / 2 & 1 ^ 1);
    if (ticket >= uint32_t(*g.tiles * p.heads)) {
      item.tile = -1, shared.item_full[turn % 2].arrive();
      shared.q_empty[count % 2].wait(count / 2 & 1 ^ 1);
      shared.tile[count % 2].item = -1, shared.told[count % 2].arrive();
      return;
    }
    int2 where = g.key_tiles[ticket / uint32_t(p.heads)];
    item.head = int(ticket % uint32_t(p.heads)), item.tile = where.y;
    item.s = sequence_of(p, where.x);
    __threadfence_block();  // this thread is short of registers
    item.unit = g.unit_of(p, where.x, false), item.inverse_unit = 1 / item.unit, item.parity = kv_count & 1;
    auto next_seen = [&](int m) {  // the first tile of queries from m on that sees the item's keys, -1: none
      int turn, tiles = item.tile * kK < item.s.history ? (item.s.queries + kQ - 1) / kQ : 0;
      for (; m < tiles; ++m)
        if (sees<kDim>(g.query_tiles[int64_t(item.s.index) * g.most_query_tiles + m], item.tile, turn)) return m;
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
      load<T, kDim, kQ>(shared.q[stage], q_map, item.head, item.s.query + m * kQ, shared.q_full[stage]);
      if (first) {
        shared.v_empty.wait(kv_count & 1 ^ 1);
        shared.v_full.expect(kK * kDim * int(sizeof(T)));
        load<T, kDim, kK>(shared.v, v_map, item.head, item.s.key + item.tile * kK, shared.v_full);
      }
      shared.dout_empty[stage].wait(count / 2 & 1 ^ 1);
      shared.dout_full[stage].expect(kTileBytes);
      load<T, kDim, kQ>(shared.dout[stage], dout_map, item.head, item.s.query + m * kQ, shared.dout_full[stage]);
      if (first) {
        shared.k_empty.wait(kv_count & 1 ^ 1);
        shared.k_full.expect(kK * kDim * int(sizeof(T)));
        load<T, kDim, kK>(shared.k, k_map, item.head, item.s.key + item.tile * kK, shared.k_full);
        ++kv_count;
      }
      Tile& tile = shared.tile[stage];
      const QueryTile& queries = g.query_tiles[int64_t(item.s.index) * g.most_query_tiles + m];
      sees<kDim>(queries, item.tile, tile.turn);
      tile.item = turn % 2, tile.index = m, tile.rows = item.s.queries - m * kQ;
      tile.all = queries.all.all(item.tile * kK, (item.tile + 1) * kK) && tile.rows >= kQ;
      tile.sums = sums_of<T, kDim>(p, g, item.s, m, item.head);
      tile.turns = g.turns + (int64_t(item.s.index) * p.heads + item.head) * g.most_query_tiles + m;
      m = next_seen(m + 1);
      tile.last = m < 0;
      shared.told[stage].arrive();
    }
  }
}

// The warp that tells which keys of a tile its queries see, and their scales.
template <typename T, int kDim>
__device__ __forceinline__ void mask(Shared<T, kDim>& shared, const Call<T>& p) {
  using S = Shape<kDim>;
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
template <typename T, int kDim>
__device__ __forceinline__ void add_parts(Shared<T, kDim>& shared, int group, bool deterministic) {
  constexpr int kBytes = Shape<kDim>::kPart * 4;
  for (int parity = 0;; parity ^= 1) {
    shared.dq_full[group].wait(parity);
    Tile out = shared.out[group];
    if (!out.sums) return;
    out.sums += group * Shape<kDim>::kPart;
    if (deterministic) {
      for (int done = 0; done < out.turn; done = done >> 16 * group & 0xffff)
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(out.turns) : "memory");
      asm volatile("fence.proxy.async;" ::: "memory");
    }
    if (deterministic && out.turn == 0) store_bulk(out.sums, shared_address(shared.dq[group]), kBytes);
    else add_bulk(out.sums, shared_address(shared.dq[group]), kBytes);
    bulk_commit();
    bulk_wait_read();
    shared.dq_empty[group].arrive();
    if (deterministic) {
      bulk_wait();
      asm volatile("fence.proxy.async;" ::: "memory");
      __threadfence();
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

// Scores and dP are made transposed, rows are keys, so that P^T and dS^T are operands from registers. Scores s / 2 in registers: with
// th = tanh(s / 2), P = s / 2 (1 + th) and 2 dsilu = 1 + v, v = th + P (1 - th), which waits for dP in float16. dS is kept doubled.
template <typename T, int kDim, Mode kMode>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 1)
    hstu_attention_backward_sm90_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                        const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dout_map,
                                        const __grid_constant__ Call<T> p, const __grid_constant__ Gradients<T> g, float factor) {
  using S = Shape<kDim>;
  constexpr int kQ = S::kQueries, kK = S::kKeys, kBytes = kRowBytes<T, kDim>, kColumns = kBytes / int(sizeof(T));
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<T, kDim>*>(memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4 - 1;

  if (threadIdx.x == 0) {
    prefetch(q_map), prefetch(k_map), prefetch(v_map), prefetch(dout_map);
    shared.k_full.init(1), shared.k_empty.init(8), shared.v_full.init(1), shared.v_empty.init(8);
    for (int x = 0; x < S::kStages; ++x) shared.told[x].init(1), shared.q_full[x].init(2), shared.q_empty[x].init(8), shared.dout_full[x].init(1), shared.dout_empty[x].init(8);
    for (int x = 0; x < 2; ++x) shared.dq_full[x].init(4), shared.dq_empty[x].init(1), shared.item_full[x].init(1), shared.item_empty[x].init(8);
    fence_barriers();
  }
  __syncthreads();

  if (group < 0) {
    give_registers<PRODUCER_REGISTERS>();
    if (warp == 3) mask(shared, p);
    else if (lane > 0) return;
    else if (warp == 0) produce(shared, q_map, k_map, v_map, dout_map, p, g);
    else add_parts(shared, warp - 1, g.deterministic);
    return;
  }

  take_registers<CONSUMER_REGISTERS>();
  group = __shfl_sync(kFullWarp, group, 0), warp = __shfl_sync(kFullWarp, warp, 0) % 4;
  uint64_t k_rows = by_rows<kBytes>(shared_address(shared.k) + 64 * group * kBytes), v_rows = by_rows<kBytes>(shared_address(shared.v) + 64 * group * kBytes);
  auto release = [&](Barrier& barrier) {
    if (lane == 0) barrier.arrive();
  };
  uint32_t count = 0;  // tiles of queries so far
  for (uint32_t turn = 0;; ++turn) {
    shared.item_full[turn % 2].wait(turn / 2 & 1);
    const Item& item = shared.item[turn % 2];
    if (item.tile < 0) break;
    float dk[kDim / 2], dv[kDim / 2];
#pragma unroll
    for (int x = 0; x < kDim / 2; ++x) dk[x] = dv[x] = 0.f;

    if (item.any) {
      if (int valid = item.s.history - item.tile * kK; valid < kK) {
        shared.k_full.wait(item.parity), shared.v_full.wait(item.parity);
        clear_tail<T, kDim, kK>(shared.k, valid), clear_tail<T, kDim, kK>(shared.v, valid);
        fence_async();
        meet(1, 256);
      }
      float scores[kQ / 2], gradient[kQ / 2], dq[S::kPart / 128];
      uint32_t weights[kQ / 4], slopes[kQ / 4], ds[kQ / 4];
      auto multiply = [&](float(&c)[kQ / 2], uint64_t keys, const T* tile) {
        uint64_t queries = by_rows<kBytes>(shared_address(tile));
#pragma unroll
        for (int d = 0; d < kDim; d += 16)
          wgmma<T, false>(c, moved(keys, d / kColumns * kK * kBytes + d % kColumns * 2), moved(queries, d / kColumns * kQ * kBytes + d % kColumns * 2), d > 0);
        wgmma_commit();
      };
      auto accumulate = [&](float(&c)[kDim / 2], const uint32_t* a, const T* tile) {
        uint64_t queries = by_columns<kBytes>(shared_address(tile), kQ * kBytes);
#pragma unroll
        for (int x = 0; x < kQ; x += 16) wgmma<T, true>(c, a + x / 4, moved(queries, x * kBytes), true);
        wgmma_commit();
      };
      auto multiply_scores = [&] {
        shared.q_full[count % 2].wait(count / 2 & 1);
        wgmma_fence();
        multiply(scores, k_rows, shared.q[count % 2]);
      };
      auto multiply_gradient = [&] {
        int stage = count % 2;
        shared.dout_full[stage].wait(count / 2 & 1);
        if (int rows = shared.tile[stage].rows; rows < kQ) {
          clear_tail<T, kDim, kQ>(shared.q[stage], rows), clear_tail<T, kDim, kQ>(shared.dout[stage], rows);
          fence_async();
          meet(1, 256);
        }
        wgmma_fence();
        multiply(gradient, v_rows, shared.dout[stage]);
      };
      // Hidden pairs get a score where P and dsilu are 0 in float32.
      auto hide = [&] {
        uint32_t thread = thread_index(), key = thread / 4 % 8 + thread / 32 % 2 * 16;
        const uint32_t* seen = &shared.seen[count % 2][thread / 64 - 2][thread % 4 * 2];
#pragma unroll
        for (int x = 0; x < kQ / 8; ++x) {
          uint2 bits = *reinterpret_cast<const uint2*>(seen + 8 * x);
#pragma unroll
          for (int e = 0; e < 4; ++e) scores[4 * x + e] = (e % 2 ? bits.y : bits.x) >> (key + e / 2 * 8) & 1 ? factor * scores[4 * x + e] : -128.f;
        }
      };
      auto weigh_tile = [&](float factor, auto scaled) {
#pragma unroll
        for (int x = 0; x < kQ / 8; ++x) {
          if (x == 8) part(count);
          float weight[4], slope[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float t = factor * scores[4 * x + e], th = tanh_approx(t);
            weight[e] = fmaf(t, th, t);
            slope[e] = fmaf(weight[e], 1.f - th, th);
          }
          slopes[2 * x] = pack_pair<__half>(slope[0], slope[1]), slopes[2 * x + 1] = pack_pair<__half>(slope[2], slope[3]);
          if (scaled) {
            float2 scale = *reinterpret_cast<const float2*>(&shared.scale[count % 2][8 * x + thread_index() % 4 * 2]);
            weight[0] *= scale.x, weight[1] *= scale.y, weight[2] *= scale.x, weight[3] *= scale.y;
          }
          weights[2 * x] = pack_pair<T>(weight[0], weight[1]), weights[2 * x + 1] = pack_pair<T>(weight[2], weight[3]);
        }
      };
      auto weigh = [&] {
        bool all = shared.tile[count % 2].all;
        if (!all) hide();
        if (p.scales) weigh_tile(all ? factor : 1.f, std::true_type{});
        else weigh_tile(all ? factor : 1.f, std::false_type{});
      };
      auto differentiate_tile = [&](auto scaled) {
#pragma unroll
        for (int x = 0; x < kQ / 8; ++x) {
          float value[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float2 slope = __half22float2(*reinterpret_cast<const __half2*>(&slopes[2 * x + half]));
            const float* from = &gradient[4 * x + 2 * half];
            value[2 * half] = fmaf(from[0], slope.x, from[0]), value[2 * half + 1] = fmaf(from[1], slope.y, from[1]);
          }
          if (scaled) {
            float2 scale = *reinterpret_cast<const float2*>(&shared.scale[count % 2][8 * x + thread_index() % 4 * 2]);
            value[0] *= scale.x, value[1] *= scale.y, value[2] *= scale.x, value[3] *= scale.y;
          }
          ds[2 * x] = pack_pair<T>(value[0], value[1]), ds[2 * x + 1] = pack_pair<T>(value[2], value[3]);
        }
      };
      auto differentiate = [&] {
        if (p.scales) differentiate_tile(std::true_type{});
        else differentiate_tile(std::false_type{});
        uint32_t thread = thread_index(), row = thread / 16 % 2 * 8 + thread % 8, unit = thread / 32 % 4 * 2 + thread / 8 % 2;
        uint32_t to = shared_address(shared.ds[count % 2]) + (group * kQ + row) * 128 + (unit ^ row % 8) * 16;
#pragma unroll
        for (int x = 0; x < kQ / 8; x += 2) store_matrices_transposed(to + x * 1024, ds + 2 * x);
        fence_async();
      };
      auto multiply_ds = [&] {
        constexpr bool kByColumns = kQ == 64;  // the warpgroups share dQ by columns, else by rows
        uint64_t a = by_rows<128>(shared_address(shared.ds[count % 2]) + (kByColumns ? 0 : 64 * group * 128));
        uint64_t b = by_columns<kBytes>(shared_address(shared.k) + (kByColumns ? group * kK * kBytes : 0), kK * kBytes);
#pragma unroll
        for (int x = 0; x < kK; x += 16) wgmma<T, true>(dq, moved(a, x / 64 * kQ * 128 + x % 64 * 2), moved(b, x * kBytes), x > 0);
        wgmma_commit();
      };
      auto leave = [&] {  // dQ of a tile is added by another warp
        shared.dq_empty[group].wait(count & 1 ^ 1);
        uint32_t thread = thread_index() % 128;
#pragma unroll
        for (int x = 0; x < S::kPart / 512; ++x)
          *reinterpret_cast<float4*>(&shared.dq[group][(x * 128 + thread) * 4]) = float4{dq[4 * x], dq[4 * x + 1], dq[4 * x + 2], dq[4 * x + 3]};
        if (thread == 0) shared.out[group] = shared.tile[count % 2];
        fence_async();
        __syncwarp();
        release(shared.dq_full[group]);
      };

      shared.k_full.wait(item.parity);
      multiply_scores();
      shared.v_full.wait(item.parity);
      multiply_gradient();
      wgmma_wait<1>(scores);
      weigh();
      wgmma_wait<0>(gradient);
      for (;;) {
        int stage = count % 2;
        if (shared.tile[stage].last) release(shared.v_empty);
        wgmma_fence();
        accumulate(dv, weights, shared.dout[stage]);
        differentiate();
        meet(1, 256);  // dS of all keys is there; that of the tile before is read no more
        wgmma_fence();
        multiply_ds();
        accumulate(dk, ds, shared.q[stage]);
        wgmma_wait<1>(dq);
        release(shared.dout_empty[stage]);
        leave();
        bool last = shared.tile[stage].last;
        wgmma_wait<0>(dk);
        release(shared.q_empty[stage]);
        if (last) break;
        ++count;
        multiply_scores();
        multiply_gradient();
        wgmma_wait<1>(scores);
        weigh();
        wgmma_wait<0>(gradient);
      }
      wgmma_wait<0>(dv);
      release(shared.k_empty);
      ++count;
    }

    // Targets' own groups, in float32, a quad a key. Then out.
    const Sequence& s = item.s;
    int j0 = item.tile * kK, head = item.head, row0 = int(thread_index() - 128) / 32 * 16 + thread_index() % 32 / 4, column0 = thread_index() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int j = j0 + row0 + 8 * half, own = 0, from = max(j, s.shift);
      if (j >= s.history && j < s.length) {
        int64_t end = int64_t(j) - (j - s.history) % p.group + p.group;
        own = max(int(min(end, int64_t(s.length))) - from, 0);
      }
#pragma unroll 1
      for (int x = 0, longest = __reduce_max_sync(kFullWarp, own); x < longest; ++x) {
        bool active = x < own;
        int64_t row = s.query + (active ? from + x - s.shift : 0);
        const T *query = row_of(p.q, p, row, head, p.key_dim), *dout = row_of(g.dout, p, row, head, p.value_dim);
        float score = factor * dot(query, row_of(p.k, p, s.key + j, head, p.key_dim), p.key_dim, active);
        float dweight = dot(dout, row_of(p.v, p, s.key + j, head, p.value_dim), p.value_dim, active);
        if (!active) continue;
        Pair pair = pair_of<T, false>(score, dweight, true, 1.f, 0.f, 0.f);
        float scale = p.scales ? p.scales[row] * item.inverse_unit : 1.f;
        add_to_row(dv, half, scale * pair.weight, dout, column0, p.value_dim);
        add_to_row(dk, half, 2 * scale * pair.ds, query, column0, p.key_dim);
      }
      int64_t at = (s.key + j) * p.heads + head;
      store_row(g.dk + at * p.key_dim, dk, half, 0.5f * p.alpha * item.unit, 0, p.key_dim, j < s.length);
      store_row(g.dv + at * p.value_dim, dv, half, item.unit, 0, p.value_dim, j < s.length);
    }
    __syncwarp();
    release(shared.item_empty[turn % 2]);
  }
  shared.dq_empty[group].wait(count & 1 ^ 1);
  if (threadIdx.x % 128 == 0) shared.out[group].sums = nullptr;
  __syncwarp();
  release(shared.dq_full[group]);
}

// dQ from its sums, and targets' own groups: a block a tile of queries of one head.
template <typename T, int kDim>
__global__ void __launch_bounds__(256) finish_sm90_kernel(const Call<T> p, const Gradients<T> g) {
  using S = Shape<kDim>;
  constexpr int kCount = S::kPart / 128;
  constexpr bool kByColumns = S::kQueries == 64;
  int b = int(blockIdx.x) / g.most_query_tiles, tile = int(blockIdx.x) % g.most_query_tiles, first = tile * S::kQueries, head = blockIdx.y;
  Sequence s = sequence_of(p, b);
  int rows = s.queries - first, group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  if (rows <= 0) return;
  bool some = !g.deterministic || g.query_tiles[blockIdx.x].tiles(S::kKeys).last > 0;
  float unit = g.unit_of(p, b, false), c[kCount];
  const float* sums = sums_of<T, kDim>(p, g, s, tile, head) + group * S::kPart;
#pragma unroll
  for (int x = 0; x < kCount / 4; ++x) {
    float4 four = some ? *reinterpret_cast<const float4*>(sums + (x * 128 + thread) * 4) : float4{0, 0, 0, 0};
    c[4 * x] = four.x, c[4 * x + 1] = four.y, c[4 * x + 2] = four.z, c[4 * x + 3] = four.w;
  }
  int column = kByColumns ? 64 * group : 0, row0 = (kByColumns ? 0 : 64 * group) + thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int r = row0 + 8 * half, i = s.shift + first + r, count = 0;
    if (r < rows && i >= s.history) count = (i - s.history) % p.group + 1;
    int64_t row = s.query + first + (r < rows ? r : 0), at = row * p.heads + head;
    float scale = p.scales ? p.scales[row] / unit : 1.f;
#pragma unroll 1
    for (int x = 0, longest = __reduce_max_sync(kFullWarp, count); x < longest; ++x) {
      bool active = x < count;
      int64_t j = s.key + (active ? i - count + 1 + x : 0);
      const T *key = row_of(p.k, p, j, head, p.key_dim), *value = row_of(p.v, p, j, head, p.value_dim);
      float score = p.unit * p.alpha * dot(p.q + at * p.key_dim, key, p.key_dim, active);
      float dweight = dot(g.dout + at * p.value_dim, value, p.value_dim, active);
      if (active) add_to_row(c, half, 2 * scale * pair_of<T, false>(score, dweight, true, 1.f, 0.f, 0.f).ds, key, column + lane % 4 * 2, p.key_dim);
    }
    store_row(g.dq + at * p.key_dim, c, half, 0.5f * p.alpha * unit, column, p.key_dim, r < rows);
  }
}

template <typename T, int kDim, Mode kMode>
void run(const Call<T>& p, Gradients<T> g, Tensor*, Tensor*, int64_t rows, int64_t keys, int64_t longest, Stream stream) {
  using S = Shape<kDim>;
  int64_t tiles = ceil_div(longest, S::kQueries), query_tiles = tiles * p.sequences;
  int64_t key_tiles = std::min<int64_t>(ceil_div(int64_t(p.max_seq_len), S::kKeys) * p.sequences, keys / S::kKeys + p.sequences);
  HSTU_CHECK(query_tiles <= INT_MAX - 4 && key_tiles * p.heads <= INT_MAX / 2, kInvalidArgument, "hstu_attention_backward: ", p.sequences, " sequences of ",
             p.max_seq_len, " rows are too many for one call");
  Scratch<float> dq_sums((rows / S::kQueries + p.sequences) * p.heads * 2 * S::kPart, stream);
  Scratch<QueryTile> seen(query_tiles, stream);
  Scratch<int> turns(query_tiles * p.heads + 2, stream);
  Scratch<int2> key_list(key_tiles, stream);
  Scratch<unsigned> largest(p.scales ? p.sequences : 0, stream);
  if (p.scales && p.sequences > 0) largest.zero();
  if (!g.deterministic && rows > 0) dq_sums.zero();
  g.dq_sums = dq_sums, g.query_tiles = seen, g.turns = turns + 2, g.tiles = turns, g.ticket = turns + 1, g.key_tiles = key_list;
  g.largest = largest, g.most_query_tiles = int(tiles);
  for (g.group = 32; g.group > 1 && g.group * int64_t(p.max_seq_len) > (1 << 14);) g.group /= 2;
  CUtensorMap q_map = tensor_map<T, kDim>(p.q, rows, p.heads, p.key_dim, S::kQueries), k_map = tensor_map<T, kDim>(p.k, keys, p.heads, p.key_dim, S::kKeys);
  CUtensorMap v_map = tensor_map<T, kDim>(p.v, keys, p.heads, p.value_dim, S::kKeys);
  CUtensorMap dout_map = tensor_map<T, kDim>(g.dout, rows, p.heads, p.value_dim, S::kQueries);
  launch(prepare_kernel<T, S::kQueries, S::kKeys>, dim3(unsigned(ceil_div(query_tiles, 4) + 1)), dim3(128), 0, stream, p, g);
  launch(hstu_attention_backward_sm90_kernel<T, kDim, kMode>, dim3(unsigned(std::min<int64_t>(132, key_tiles * p.heads))), dim3(S::kThreads),
         sizeof(Shared<T, kDim>), stream, q_map, k_map, v_map, dout_map, p, g, p.unit * p.alpha);
  launch(finish_sm90_kernel<T, kDim>, dim3(unsigned(query_tiles), unsigned(p.heads)), dim3(256), 0, stream, p, g);
}

}  // namespace backward_sm90
}  // namespace hstu::cuda::attention
