// The forward for Hopper, sm_90a: what its warps share, and what the loading warpgroup does. The kernel is in hstu_attention_sm90.cu, a
// drawing in docs/hstu_attention.md.
#pragma once
#include "hstu_attention_bias_sm90.cuh"
#include "hstu_attention_plan.cuh"

namespace hstu::cuda::attention {
namespace forward_sm90 {

using namespace sm90;

// Tile sizes were measured (docs/hstu_attention.md).
template <int kDim, Mode kMode>
struct Config {
  static constexpr bool kBias = kMode == Mode::kSiluBias;
  static constexpr int kGroups = kDim <= 64 || (kBias && kDim <= 128) ? 3 : 2;  // warpgroups that compute; one more loads
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kKeys = kBias || kDim > 128 ? 64 : 128;  // of a tile
  static constexpr int kRing = !kBias || kDim > 128 ? 2 : kDim > 64 ? 3 : 4;  // tiles of K and of V in shared memory
  static constexpr int kQueries = kDim <= 128 ? 2 : 1;          // tiles of Q
  static constexpr bool kAhead = kBias && kDim <= 64;           // scores of the next tile have registers of their own
  static constexpr bool kTurns = !kBias && kDim == 128;         // warpgroups start their products in turns
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kLoading = kGroups == 3 && !kBias ? 32 : 56;  // registers a thread
  static constexpr int kComputing = kGroups == 2 ? 224 : kBias ? 152 : 160;
};
enum NamedBarrier { kTurn = 1, kGroup = 4 };  // of one warpgroup each

template <typename T, int kDim, Mode kMode>
struct Shared {
  using C = Config<kDim, kMode>;
  struct None {};
  alignas(1024) T q[C::kQueries][C::kRows * kDim];
  alignas(1024) T k[C::kRing][C::kKeys * kDim];
  alignas(1024) T v[C::kRing][C::kKeys * kDim];
  Barrier q_full[C::kQueries], q_empty[C::kQueries], k_full[C::kRing], k_empty[C::kRing], v_full[C::kRing], v_empty[C::kRing],
      work_full[kSlots], work_empty[kSlots], loaded;  // loaded: all tiles of an item are on their way
  Work work[kSlots];
  VisibleKeys seen[kSlots][C::kRows];         // of a row
  VisibleKeys some[kSlots][C::kGroups];       // what some row of a warpgroup sees
  VisibleKeys every[kSlots][4 * C::kGroups];  // what every row of a warp sees
  std::conditional_t<C::kBias, BiasStages<T, C::kRows, C::kKeys, C::kRing>, None> bias;

  __device__ __forceinline__ void init() {
    constexpr int kWarps = 4 * C::kGroups;
    for (int x = 0; x < C::kQueries; ++x) q_full[x].init(1), q_empty[x].init(kWarps);
    for (int x = 0; x < C::kRing; ++x)
      k_full[x].init(C::kBias ? 2 : 1), v_full[x].init(1), k_empty[x].init(kWarps), v_empty[x].init(kWarps);
    for (int x = 0; x < kSlots; ++x) work_full[x].init(1), work_empty[x].init(kWarps + 1 + (C::kBias ? 2 : 0));
    loaded.init(1);
    fence_barriers();
  }
};

// Asked for anew each time.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// By a warp: what the rows of an item see, each by itself and together, and the tiles that the item needs.
template <typename Shared, typename T>
__device__ __forceinline__ void stage_masks(Shared& shared, int slot, const Call<T>& p, Work& work) {
  constexpr int kRows = Shared::C::kRows, size = Shared::C::kKeys;
  int lane = threadIdx.x % 32;
  VisibleKeys total{0, INT_MAX, 0, 0}, some = total;
#pragma unroll 1
  for (int r0 = 0; r0 < kRows; r0 += 32) {
    int r = r0 + lane, i = work.s.shift + work.first + r;
    VisibleKeys keys{0, 0, 0, i + 1};
    if (r < work.rows) keys = visible_keys(p, work.s, i);
    shared.seen[slot][r] = keys;
    bool empty = keys.begin >= keys.end;
    int first = empty ? INT_MAX : keys.begin, last = empty ? 0 : keys.end;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bool mine = lane / 16 == half;
      auto least = [&](int x) { return __reduce_min_sync(kFullWarp, mine ? x : INT_MAX); };
      auto most = [&](int x) { return __reduce_max_sync(kFullWarp, mine ? x : 0); };
      VisibleKeys every{least(keys.prefix), most(keys.begin), least(keys.end), 0}, any{most(keys.prefix), least(first), most(last), 0};
      if (lane == 0) shared.every[slot][r0 / 16 + half] = every;
      if constexpr (Shared::C::kBias)
        if (lane == 0) shared.bias.some[slot][r0 / 16 + half] = any;
      some = {max(some.prefix, any.prefix), min(some.begin, any.begin), max(some.end, any.end), 0};
    }
    if (r0 % 64 == 0) continue;
    if (lane == 0) shared.some[slot][r0 / 64] = some;
    total = {max(total.prefix, some.prefix), min(total.begin, some.begin), max(total.end, some.end), 0};
    some = {0, INT_MAX, 0, 0};
  }
  work.tiles = {(total.prefix + size - 1) / size, total.end > 0 ? total.begin / size : 0, (total.end + size - 1) / size};
  if (work.tiles.gap >= work.tiles.resume) work.tiles.gap = -1;
}

// A tile of one head from row `row` on, by the copy engine; one thread.
template <typename T, int kDim, int kTileRows>
__device__ __forceinline__ void load(T* tile, const CUtensorMap& map, int head, int64_t row, Barrier& full) {
  full.expect(kTileRows * kDim * int(sizeof(T)));
  load_tile<T, kDim, kTileRows>(tile, map, head, row, full);
}
// Where history stands in pages the copy engine brings boxes of kBox keys, each from one page or from the rows of k and v.
constexpr int kBox = 64;
struct PageMaps {
  CUtensorMap k, v;  // [pages 2 S, H, D] and [.., V]: a page's keys, then its values
};
// Whether all boxes of keys j0 .. j0 + keys - 1 stand in one page each, or in none. What lies behind the last key may be anything.
template <typename T>
__device__ __forceinline__ bool stands_in_boxes(const Call<T>& p, const Sequence& s, int j0, int keys) {
  int split = s.paged / kBox * kBox;  // of the box that begins here, some keys are in a page and some are not
  return p.page_size % kBox == 0 && (split == s.paged || s.history == s.paged || split < j0 || split >= j0 + keys);
}
// The same of keys j0 .. of which `valid` are there, row by row, by a warp, which waits for the copies.
template <typename T, int kDim, int kTileRows>
__device__ __forceinline__ void load_rows(T* tile, const Rows<T>& rows, int j0, int valid, int dim) {
  constexpr int kPieces = kDim / 8;
#pragma unroll 4
  for (int x = threadIdx.x % 32; x < kTileRows * kPieces; x += 32) {
    int r = x / kPieces, d = x % kPieces * 8;
    bool there = r < valid && d < dim;
    copy_async<16>(shared_address(tile) + swizzled<T, kDim>(kTileRows, r, d), there ? rows.at(j0 + r) + d : rows.pages, there ? 16 : 0);
  }
  copy_async_commit();
}

// Warp 1 of the loading warpgroup: draws items and finds what their rows see.
template <typename T, int kDim, Mode kMode>
__device__ __forceinline__ void draw_items(Shared<T, kDim, kMode>& shared, const Call<T>& p, const Plan& plan) {
  using C = Config<kDim, kMode>;
  int lane = threadIdx.x % 32, item = int(blockIdx.x), items = plan.items();
  if constexpr (C::kBias) {
    for (int x = lane; x < int(sizeof(NearBuckets) / 8); x += 32)
      reinterpret_cast<uint2*>(&shared.bias.buckets)[x] = reinterpret_cast<const uint2*>(&kNearBuckets)[x];
    __syncwarp();
  }
  int drawn = 0;
  for (Ring<kSlots> turn;; turn.next(), ++drawn) {
    Work work{};
    if (item < items) {
      Plan::Item found = plan.item(item);
      work.head = found.head, work.s = sequence_of(p, found.sequence);
      if constexpr (C::kBias) {  // the first tile of a sequence, which sees fewest keys, is the one that may not be full
        int last = work.s.queries - (work.s.queries - 1) / C::kRows * C::kRows + found.tile * C::kRows;
        work.first = max(last - C::kRows, 0), work.rows = last - work.first;
      } else {
        work.first = found.tile * C::kRows, work.rows = min(C::kRows, work.s.queries - work.first);
      }
    }
    shared.work_empty[turn.stage].wait(turn.parity ^ 1);
    if (work.rows > 0) {
      if constexpr (C::kBias) {
        RowTimes<T, C::kRows> times(p, work);
        stage_masks(shared, turn.stage, p, work);
        stage_rows(shared, turn.stage, p, work, times, p.time_per_head || drawn < kSlots);
      } else {
        stage_masks(shared, turn.stage, p, work);
      }
    }
    if (lane == 0) shared.work[turn.stage] = work;
    __syncwarp();
    if (lane == 0) shared.work_full[turn.stage].arrive();
    if (work.rows <= 0) return;
    if (plan.order) shared.loaded.wait(drawn & 1);  // of few items none is drawn long before
    item = plan.draw();
  }
}

// Warp 0 of the loading warpgroup: the tiles of Q, K and V.
template <typename T, int kDim, Mode kMode>
__device__ __forceinline__ void load_tiles(Shared<T, kDim, kMode>& shared, const CUtensorMap& q_map, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map, const Call<T>& p) {
  using C = Config<kDim, kMode>;
  int lane = threadIdx.x % 32;
  Ring<C::kRing> ring;
  Ring<C::kQueries> q_ring;
  for (Ring<kSlots> turn;; turn.next()) {
    shared.work_full[turn.stage].wait(turn.parity);
    const Work& work = shared.work[turn.stage];
    if (work.rows <= 0) return;
    auto bring = [&](T* tile, const CUtensorMap& map, int n, Barrier& full) {
      if (lane == 0) load<T, kDim, C::kKeys>(tile, map, work.head, work.s.key + n * C::kKeys, full);
    };
    bool q_to_come = true;
    auto bring_q = [&] {
      shared.q_empty[q_ring.stage].wait(q_ring.parity ^ 1);
      if (lane == 0)
        load<T, kDim, C::kRows>(shared.q[q_ring.stage], q_map, work.head, work.s.query + work.first, shared.q_full[q_ring.stage]);
      q_ring.next(), q_to_come = false;
    };
    if (C::kQueries > 1) bring_q();
    for (int n = work.tiles.from(0); n < work.tiles.last; n = work.tiles.from(n + 1)) {
      shared.k_empty[ring.stage].wait(ring.parity ^ 1);
      bring(shared.k[ring.stage], k_map, n, shared.k_full[ring.stage]);
      if (q_to_come) bring_q();
      shared.v_empty[ring.stage].wait(ring.parity ^ 1);
      bring(shared.v[ring.stage], v_map, n, shared.v_full[ring.stage]);
      ring.next();
    }
    if (q_to_come) bring_q();
    __syncwarp();
    if (lane == 0) shared.loaded.arrive(), shared.work_empty[turn.stage].arrive();
  }
}

// The same where history stands in pages. The copy engine brings boxes of kBox keys; a tile of which some box is partly in a page and
// partly in the rows of k and v comes row by row, by the warp.
template <typename T, int kDim, Mode kMode>
__device__ __forceinline__ void load_paged_tiles(Shared<T, kDim, kMode>& shared, const CUtensorMap& q_map, const CUtensorMap& k_map,
                                                 const CUtensorMap& v_map, const PageMaps& pages, const Call<T>& p) {
  using C = Config<kDim, kMode>;
  int lane = threadIdx.x % 32;
  Ring<C::kRing> ring;
  Ring<C::kQueries> q_ring;
  for (Ring<kSlots> turn;; turn.next()) {
    shared.work_full[turn.stage].wait(turn.parity);
    const Work& work = shared.work[turn.stage];
    if (work.rows <= 0) return;
    int window = -1, listed = 0;  // lane l has entry 32 window + l of the sequence's pages
    auto page_at = [&](int j) {
      int entry = j / p.page_size;
      if (entry / 32 != window) {
        window = entry / 32;
        listed = (32 * window + lane) * p.page_size < work.s.paged ? p.page_table[p.page_offsets[work.s.index] + 32 * window + lane] : 0;
      }
      return __shfl_sync(kFullWarp, listed, entry % 32);
    };
    auto bring = [&](T* tile, const CUtensorMap& map, const CUtensorMap& page_map, bool values, int n, Barrier& full) {
      int j0 = n * C::kKeys, valid = min(work.s.history - j0, C::kKeys);
      if (!stands_in_boxes(p, work.s, j0, C::kKeys)) {
        int dim = values ? p.value_dim : p.key_dim;
        load_rows<T, kDim, C::kKeys>(tile, rows_of(p, work.s, work.head, values ? p.v : p.k, dim, values), j0, valid, dim);
        copy_async_wait<0>();
        fence_async();
        __syncwarp();
        if (lane == 0) full.arrive();
        return;
      }
      if (lane == 0) full.expect((valid + kBox - 1) / kBox * (kBox * kDim * int(sizeof(T))));
#pragma unroll 1
      for (int r = 0; r < valid; r += kBox) {
        bool paged = j0 + r < work.s.paged;
        int row = paged ? (2 * page_at(j0 + r) + values) * p.page_size + (j0 + r) % p.page_size : int(work.s.key) + j0 + r - work.s.paged;
        if (lane == 0) load_tile_rows<T, kDim, C::kKeys>(tile, r, paged ? page_map : map, work.head, row, full);
      }
    };
    bool q_to_come = true;
    auto bring_q = [&] {
      shared.q_empty[q_ring.stage].wait(q_ring.parity ^ 1);
      if (lane == 0)
        load<T, kDim, C::kRows>(shared.q[q_ring.stage], q_map, work.head, work.s.query + work.first, shared.q_full[q_ring.stage]);
      q_ring.next(), q_to_come = false;
    };
    if (C::kQueries > 1) bring_q();
    for (int n = work.tiles.from(0); n < work.tiles.last; n = work.tiles.from(n + 1)) {
      shared.k_empty[ring.stage].wait(ring.parity ^ 1);
      bring(shared.k[ring.stage], k_map, pages.k, false, n, shared.k_full[ring.stage]);
      if (q_to_come) bring_q();
      shared.v_empty[ring.stage].wait(ring.parity ^ 1);
      bring(shared.v[ring.stage], v_map, pages.v, true, n, shared.v_full[ring.stage]);
      ring.next();
    }
    if (q_to_come) bring_q();
    __syncwarp();
    if (lane == 0) shared.loaded.arrive(), shared.work_empty[turn.stage].arrive();
  }
}

}  // namespace forward_sm90
}  // namespace hstu::cuda::attention
