// The forward for Hopper, sm_90a: what its warps share, and what the loading warpgroup does. The kernel is in hstu_attention_sm90.cu, a
// drawing in docs/hstu_attention.md.
#pragma once
#include "hstu_attention_bias_sm90.cuh"

namespace hstu::cuda::attention {
namespace forward_sm90 {

using namespace sm90;

// Tile sizes were measured (docs/hstu_attention.md). kFew: for calls that have few items: with a bias fewer rows each, without one more.
template <int kDim, Mode kMode, bool kFew = false>
struct Config {
  static constexpr bool kBias = kMode == Mode::kSiluBias;
  static constexpr int kGroups = kFew ? (kBias ? 2 : 3) : kDim <= 64 || (kBias && kDim <= 128) ? 3 : 2;  // and one loads
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kKeys = kBias || kFew || kDim > 128 ? 64 : 128;  // of a tile
  static constexpr int kRing = !(kBias || kFew) || kDim > 128 ? 2 : kDim > 64 ? 3 : 6;  // tiles of K and of V in shared memory
  static constexpr int kQueries = kDim <= 128 ? 2 : 1;          // tiles of Q
  static constexpr bool kAhead = kBias && (kDim <= 64 || (kDim <= 128 && kFew));  // scores of the next tile have registers of their own
  static constexpr bool kTurns = !kBias && kDim == 128;         // warpgroups start their products in turns
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr bool kSplits = kMode != Mode::kSoftmax && kDim <= 128;  // keys, where items are few and the caller allows it
  static constexpr int kItemCost = 128 / kKeys, kLeastFragment = 256 / kKeys, kLeastRange = 640 / kKeys;
  static_assert(kLeastRange >= kItemCost + 2 * kLeastFragment - 1);
  static constexpr int kLoading = kBias || kDim == 128 ? 56 : kDim > 128 ? 40 : 32;  // registers a thread
  static constexpr int kComputing = kDim > 128 && !kBias ? 232 : kGroups == 2 ? 224 : kBias || kFew ? 152 : 160;
};

template <typename T, int kDim, Mode kMode, bool kFew = false>
struct Shared {
  using C = Config<kDim, kMode, kFew>;
  struct None {};
  alignas(1024) T q[C::kQueries][C::kRows * kDim];
  alignas(1024) T k[C::kRing][C::kKeys * kDim];
  alignas(1024) T v[C::kRing][C::kKeys * kDim];
  Barrier q_full[C::kQueries], q_empty[C::kQueries], k_full[C::kRing], k_empty[C::kRing], v_full[C::kRing], v_empty[C::kRing],
      work_known[kSlots], work_full[kSlots], work_empty[kSlots], ending;  // known: what tiles it needs, full: what its rows see
  Work work[kSlots];
  Rows<T> keys[kSlots], values[kSlots];       // of an item's head: registers are short
  VisibleKeys seen[kSlots][C::kRows];         // of a row
  VisibleKeys some[kSlots][C::kGroups];       // what some row of a warpgroup sees
  VisibleKeys every[kSlots][4 * C::kGroups];  // what every row of a warp sees
  std::conditional_t<C::kSplits, Shares, None> shares;
  std::conditional_t<C::kSplits, Fragment, None> fragment[kSlots];
  std::conditional_t<C::kBias, BiasStages<C::kRows, C::kKeys, C::kRing>, None> bias;

  __device__ __forceinline__ void init(int loaders) {  // warps that bring tiles
    constexpr int kWarps = 4 * C::kGroups;
    for (int x = 0; x < C::kQueries; ++x) q_full[x].init(1, 0), q_empty[x].init(0, kWarps);
    for (int x = 0; x < C::kRing; ++x)
      k_full[x].init(0, C::kBias ? 2 : 1), v_full[x].init(0, 1), k_empty[x].init(0, kWarps), v_empty[x].init(0, kWarps);
    for (int x = 0; x < kSlots; ++x) work_known[x].init(0, 1), work_full[x].init(0, 1);
    for (int x = 0; x < kSlots; ++x) work_empty[x].init(0, kWarps + loaders + (C::kBias ? 2 : 0));
    ending.init(0, 1);
    fence_barriers();
  }
};

// By a warp: the tiles that an item needs, first where there are no windows; the times of its rows; what they see, each and together.
template <typename Shared, typename T>
__device__ __forceinline__ void stage_item(Shared& shared, int slot, const Call<T>& p) {
  constexpr int kRows = Shared::C::kRows, size = Shared::C::kKeys;
  Work& work = shared.work[slot];
  int lane = lane_id();  // anew: registers are short
  VisibleKeys total{0, INT_MAX, 0, 0}, some = total;
  auto know = [&] {
    KeyTiles tiles{(total.prefix + size - 1) / size, total.end > 0 ? total.begin / size : 0, (total.end + size - 1) / size};
    if (tiles.gap >= tiles.resume) tiles.gap = -1;
    if (lane == 0) {
      if constexpr (Shared::C::kSplits) cut_out(tiles, shared.fragment[slot]);
      work.tiles = tiles;
    }
    __syncwarp();
    shared.work_known[slot].arrive_for_warp(lane);
  };
  bool simple = p.max_attn_len <= 0 && !p.contextual_full;  // keys from 0 on, the more the later a row is
  const Sequence& s = work.s;
  int i0 = s.shift + work.first;
  auto end = [&](int r) { return p.causal ? min(i0 + r + 1, s.history) : s.history; };
  auto any = [&](int r, int count) {  // of so many rows
    int there = min(work.rows - r, count);
    return there > 0 ? VisibleKeys{0, 0, end(r + there - 1), 0} : VisibleKeys{0, INT_MAX, 0, 0};
  };
  auto see = [&](int r) {
    int i = i0 + r, own = i + 1;
    if (i >= s.history) own = i - (i - s.history) % p.group;
    if (simple) shared.seen[slot][r] = r < work.rows ? VisibleKeys{0, 0, end(r), own} : VisibleKeys{0, 0, 0, i + 1};
  };
  if (simple) total = any(0, kRows), know();
  if constexpr (Shared::C::kBias) {
    stage_rows(shared, slot, p, work, see);
  } else {
#pragma unroll 1
    for (int r = lane; r < kRows; r += 32) see(r);
  }
  if (simple) {
    if (lane < kRows / 16) {
      shared.every[slot][lane] = {0, 0, work.rows >= 16 * lane + 16 ? end(16 * lane) : 0, 0};
      if constexpr (Shared::C::kBias) shared.bias.some[slot][lane] = any(16 * lane, 16);
    }
    if (lane < kRows / 64) shared.some[slot][lane] = any(64 * lane, 64);
  } else {
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
        bool here = lane / 16 == half;
        auto least = [&](int x) { return __reduce_min_sync(kFullWarp, here ? x : INT_MAX); };
        auto most = [&](int x) { return __reduce_max_sync(kFullWarp, here ? x : 0); };
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
    know();
  }
}

// A tile of one head from row `row` on, by the copy engine; one thread.
template <typename T, int kDim, int kTileRows>
__device__ __forceinline__ void load(T* tile, const CUtensorMap& map, int head, int64_t row, Barrier& full) {
  full.expect(kTileRows * kDim * int(sizeof(T)));
  load_tile<T, kDim, kTileRows>(tile, map, head, row, full);
}

// What the bias is made of is asked for into the L2 cache, a share by each block: later it would wait behind the first tiles of all blocks.
template <typename T>
__device__ __forceinline__ void prefetch_bias(const Call<T>& p) {
  constexpr int64_t kMost = 16 << 20;
  auto ask = [&](const void* data, int64_t bytes) {
    for (int64_t x = (int64_t(blockIdx.x) * 32 + threadIdx.x % 32) * 128; x < min(bytes, kMost); x += int64_t(gridDim.x) * 32 * 128)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(data) + x));
  };
  if (p.positions) ask(p.pos_w.data, int64_t(p.positions) * (p.pos_per_head ? p.heads : 1) * (p.pos_w.wide ? 4 : int(sizeof(T))));
  if (p.last_bucket < 0 || p.time_offsets || p.q_offsets) return;
  int64_t bytes = p.seq_offsets[p.sequences] * int64_t(sizeof(int64_t));
  ask(p.query_time, bytes), ask(p.key_time, bytes);
}

// Warp 1 of the loading warpgroup: draws items and finds what their rows see.
template <typename T, int kDim, Mode kMode, bool kFew>
__device__ __forceinline__ void draw_items(Shared<T, kDim, kMode, kFew>& shared, const Call<T>& p, const Plan& plan, bool split) {
  using C = Config<kDim, kMode, kFew>;
  int lane = threadIdx.x % 32, starts = 0, item = split ? 0 : int(blockIdx.x), items = -1;
  bool early = int(blockIdx.x) < plan.early * p.heads;
  Ring<1> ending;
  for (Ring<kSlots> turn;;) {
    if (!early) {
      bool begins = items < 0;
      if constexpr (C::kSplits)
        if (split) items = shared.shares.items();
      if (items < 0) await_kernel_before(), starts = plan.own_starts(p, C::kRows), items = plan.items(starts);
      if (!begins || plan.early) item = split ? item + 1 : plan.draw();
    }
    Work work{};
    if (early || item < items) {
      Plan::Item found;
      if (early) found = plan.first();
      else if (!C::kSplits || !split) found = plan.item(item, starts);
      else if constexpr (C::kSplits) found = shared.shares.item(item);
      work.head = found.head, work.s = sequence_of(p, found.sequence);
      if (early) found.tile += (work.s.queries + C::kRows - 1) / C::kRows;
      early = false;
      if (found.tile < 0) continue;
      TileRows rows = tile_rows<C>(work.s.queries, found.tile);
      work.first = rows.first, work.rows = rows.count;
    }
    shared.work_empty[turn.stage].wait(turn.parity ^ 1);
    if (lane == 0) {  // read from there: registers are short
      shared.work[turn.stage] = work;
      if constexpr (C::kSplits) shared.fragment[turn.stage] = split ? shared.shares.fragment(item) : Fragment{};
    }
    __syncwarp();
    const Work& here = shared.work[turn.stage];
    if (here.rows <= 0) {
      shared.work_known[turn.stage].arrive_for_warp(lane), shared.work_full[turn.stage].arrive_for_warp(lane);
      return;
    }
    if constexpr (C::kBias) ask_row_times(shared, turn.stage, p, here);
    if (lane == 0) {
      shared.keys[turn.stage] = rows_of(p, here.s, here.head, p.k, p.key_dim, false);
      shared.values[turn.stage] = rows_of(p, here.s, here.head, p.v, p.value_dim, true);
    }
    stage_item(shared, turn.stage, p);
    __syncwarp();
    shared.work_full[turn.stage].arrive_for_warp(lane);
    if (C::kBias && !split) shared.ending.wait(ending.parity), ending.next();
    turn.next();
  }
}

// Warp 0 of the loading warpgroup: the tiles of Q, K and V.
template <typename T, int kDim, Mode kMode, bool kFew>
__device__ __forceinline__ void load_tiles(Shared<T, kDim, kMode, kFew>& shared, const CUtensorMap& q_map, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map, const Call<T>& p) {
  using C = Config<kDim, kMode, kFew>;
  int lane = threadIdx.x % 32;
  bool early = true;  // the bias of the first tile would wait behind the tiles to come
  Ring<C::kRing> ring;
  Ring<C::kQueries> q_ring;
  for (Ring<kSlots> turn;; turn.next()) {
    shared.work_known[turn.stage].wait(turn.parity);
    const Work& work = shared.work[turn.stage];
    if (work.rows <= 0) return;
    auto bring = [&](T* tile, const CUtensorMap& map, int n, Barrier& full) {
      if (lane == 0) load<T, kDim, C::kKeys>(tile, map, work.head, work.s.key + n * C::kKeys, full);
      full.arrive_beside(lane);
    };
    bool q_to_come = true;
    auto bring_q = [&] {
      shared.q_empty[q_ring.stage].wait(q_ring.parity ^ 1);
      if (lane == 0)
        load<T, kDim, C::kRows>(shared.q[q_ring.stage], q_map, work.head, work.s.query + work.first, shared.q_full[q_ring.stage]);
      q_ring.next(), q_to_come = false;
    };
    if (C::kQueries > 1) bring_q();
    for (int n = first_tile(shared, turn.stage); n < work.tiles.last; n = work.tiles.from(n + 1)) {
      if (C::kBias && early && ring.stage == 1) shared.k_full[0].wait(0), early = false;
      shared.k_empty[ring.stage].wait(ring.parity ^ 1);
      bring(shared.k[ring.stage], k_map, n, shared.k_full[ring.stage]);
      if (q_to_come) bring_q();
      shared.v_empty[ring.stage].wait(ring.parity ^ 1);
      bring(shared.v[ring.stage], v_map, n, shared.v_full[ring.stage]);
      ring.next();
    }
    if (q_to_come) bring_q();
    __syncwarp();
    shared.work_empty[turn.stage].arrive_for_warp(lane);
  }
}

}  // namespace forward_sm90
}  // namespace hstu::cuda::attention
