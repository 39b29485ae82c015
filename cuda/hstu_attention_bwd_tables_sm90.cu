// HSTU attention, backward, for Hopper (sm_90a): gradients of the tables of positions and times, from tiles of dS that the kernel before
// left in memory. See docs/hstu_attention.md for a drawing.
#include "hstu_attention_bwd_tables_sm90.cuh"
#include "sm90/device.cuh"

namespace hstu::cuda::attention {
namespace backward_sm90 {
namespace {

// How tiles of keys are cut into items: `groups` of up to `heads` heads, `parts` of `length` tiles of 64 queries.
struct Cuts {
  int heads, groups, parts, length;
  int rows;    // of sums by position: distances from 0 on, those below 0 where there are any, targets where there are any
  int halves;  // tiles of 64 queries in a tile of dS in memory
};

// The first tile of 64 queries of the item's from m on whose dS is in memory, -1: none.
template <typename T>
__device__ __forceinline__ int next_cut(const Call<T>& p, const Gradients<T>& g, const Cuts& cuts, const CutItem& item, int m) {
  int turn;
  for (; m < item.end; ++m)
    if (sees<TableShape>(g.query_tiles[int64_t(item.s.index) * g.most_query_tiles + m / cuts.halves], item.tile, turn)) return m;
  return -1;
}

// The next item that has tiles, by one thread; returns its first tile, -1: there is no more.
template <typename T>
__device__ __forceinline__ int next_item(const Call<T>& p, const Gradients<T>& g, const Cuts& cuts, CutItem& item, int positions) {
  using S = TableShape;
  int first_tile = g.ds_bounds[g.launch];
  unsigned each = unsigned(cuts.parts * cuts.groups), tiles = unsigned(g.ds_bounds[g.launch + 1] - first_tile);
  for (;;) {
    unsigned ticket = atomicAdd(g.ticket, 1);
    if (ticket >= tiles * each) return -1;
    unsigned tile = ticket / each, rest = ticket % each;
    if (g.last_first) tile = tiles - 1 - tile;  // the longest first
    int part = int(rest) / cuts.groups, group = int(rest) % cuts.groups;
    int2 where = g.key_tiles[first_tile + tile];
    item.s = sequence_of(p, where.x);
    item.head = group * cuts.heads, item.heads = min(cuts.heads, p.heads - item.head);
    item.place = g.ds_first[first_tile + tile], item.tile = g.last_first ? where.y : (item.s.length - 1) / S::kKeys - where.y;
    item.end = item.tile * S::kKeys < item.s.history ? min((item.s.queries + S::kQueries - 1) / S::kQueries, (part + 1) * cuts.length) : 0;
    int from = first_tile_of_queries(p, item.s, item.tile * S::kKeys, S::kQueries);
    int next = next_cut(p, g, cuts, item, max(from, part * cuts.length));
    if (next < 0) continue;
    item.unit = 0.5f * g.units_of(p, where.x, false).weight;
    item.base = first_time(p, item.s);
    int64_t copy = (int64_t(group) * g.copies + tile) * cuts.parts + part;
    item.pos_sums = g.pos_sums ? g.pos_sums + copy * cuts.rows * positions : nullptr;
    // Without keys that are later than their queries there is no row for them: only what is not a number would be added there.
    item.below_sums = item.pos_sums + (!p.causal || p.contextual_full ? positions : 0);
    item.target_sums = item.pos_sums + (cuts.rows - 1) * positions;
    item.time_sums = g.time_sums ? g.time_sums + copy * (p.last_bucket + 1) : nullptr;
    return next;
  }
}

// An item's times, before its first tile.
template <typename T>
__device__ __forceinline__ void stage_cut(TableMemory<T>& shared, int slot, const Call<T>& p) {
  CutItem& item = shared.item_of[slot];
  int lane = thread_index() % 32;
  const Sequence& s = item.s;
  bool sorted = true;
#pragma unroll 2
  for (int x = 0; x < shared.kK / 32; ++x) {
    int r = 32 * x + lane, j = item.tile * shared.kK + r;
    bool there = p.last_bucket >= 0 && j < s.history;
    NearTime time{j < s.contextual ? kUntimedKey : kNoFixedTime, kSomeUntimed};
    if (there && j >= s.contextual) time = near_time(p.key_time[s.time + j], item.base);
    shared.key_near[slot][r] = time.at, sorted = sorted && !(time.kind & kSomeFar);
    TimeSpan low = TimeSpan::of_warp(time, there && lane < 16), high = TimeSpan::of_warp(time, there && lane >= 16);
    if (lane % 16 == 0) shared.key_span[slot][r / 16] = lane ? high : low;
  }
  __syncwarp();
#pragma unroll 1
  for (int r = lane; r < shared.kK - 1; r += 32) sorted = sorted && shared.key_near[slot][r] <= shared.key_near[slot][r + 1];
  sorted = __all_sync(kFullWarp, sorted);
  if (lane == 0) item.sorted = sorted;
  __syncwarp();
}

// The warp that finds items and tiles, up to kAhead tiles before they are done.
template <typename T>
__device__ __forceinline__ void find_tiles(TableMemory<T>& shared, const Call<T>& p, const Gradients<T>& g, const Cuts& cuts,
                                           int positions) {
  using S = TableShape;
  uint32_t count = 0;
  int lane = thread_index() % 32;
  for (uint32_t turn = 0;; ++turn) {
    int slot = turn % 2, m = -1;
    CutItem& item = shared.item_of[slot];
    shared.slot_empty[slot].wait(turn / 2 & 1 ^ 1);
    if (lane == 0) m = next_item(p, g, cuts, item, positions);
    __syncwarp();
    m = __shfl_sync(kFullWarp, m, 0);
    if (m < 0) break;
    stage_cut(shared, slot, p);
    for (; m >= 0; ++count) {
      CutTile& tile = shared.tile[count % S::kAhead];
      shared.tile_empty[count % S::kAhead].wait(count / S::kAhead & 1 ^ 1);
      if (lane == 0) {
        tile.index = m, tile.first = m * S::kQueries, tile.rows = item.s.queries - tile.first, tile.slot = slot;
        tile.before = item.s.history - item.s.shift - tile.first;
        int next = next_cut(p, g, cuts, item, m + 1);
        tile.steps = next < 0 ? 3 : min(next - m, 3), m = next;
        tile.last = m < 0;
      }
      m = __shfl_sync(kFullWarp, m, 0);
      shared.told[count % S::kAhead].arrive_for_warp(lane);
    }
  }
  shared.tile_empty[count % S::kAhead].wait(count / S::kAhead & 1 ^ 1);
  if (lane == 0) shared.tile[count % S::kAhead].first = -1;
  __syncwarp();
  shared.told[count % S::kAhead].arrive_for_warp(lane);
}

// kStaging warps take tiles in turns: the times of a tile's queries, how its sums by time are made.
template <typename T>
__device__ __forceinline__ void stage_tiles(TableMemory<T>& shared, const Call<T>& p, const Gradients<T>& g, int warp) {
  using S = TableShape;
  using W = TableMemory<T>;
  constexpr int kAhead = S::kAhead;
  auto stage_tile = [&](int stage, const CutTile& tile) {
    int lane = thread_index() % 32;
    const CutItem& item = shared.item_of[tile.slot];
    const Sequence& s = item.s;
    int first = tile.first, i0 = s.shift + first, j0 = item.tile * S::kKeys, slot = tile.slot;
    TimeSpan span{INT_MAX, INT_MIN, 0};  // of the half of the queries that this lane's pieces have
    bool orderly = item.sorted;          // no query sees a later key
#pragma unroll 1
    for (int x = 0; x < S::kQueries / 32; ++x) {
      int r = lane + 32 * x, newest = (p.causal ? min(i0 + r, s.history - 1) : s.history - 1) - j0;
      bool there = p.last_bucket >= 0 && r < tile.rows;
      NearTime time{kUntimedQuery, kSomeUntimed};
      if (there && i0 + r >= s.contextual) time = near_time(p.query_time[s.query + first + r], item.base);
      orderly = orderly && !(time.kind & kSomeFar) && (newest < 0 || time.at >= shared.key_near[slot][min(newest, S::kKeys - 1)]);
      shared.query_near[stage][r] = time.at;
      TimeSpan all = TimeSpan::of_warp(time, there);
      if (lane % 2 == x) span = all;
    }
    static_assert(S::kQueries == 64 && S::kKeys == 128);
    int path = W::kNothing;
    if (lane < 16) {
      bool none = p.causal && !p.contextual_full && i0 + lane % 2 * 32 + 31 < j0 + lane / 2 * 16;
      if (!none) path = shared.path_of(shared.key_span[slot][lane / 2], span, p.last_bucket);
      shared.path[stage][lane / 2][lane % 2] = path;
    }
    // Of an orderly tile the newest keys by pieces where these have many buckets, all before them by runs. The warps take pieces in turns.
    bool there = path != W::kNothing, plain = __all_sync(kFullWarp, orderly) && there && path >> 16 < int(TimeKind::kMany);
    unsigned mine = __ballot_sync(kFullWarp, plain) & 0x5555u << lane % 2;
    int end = mine ? (31 - __clz(mine)) / 2 + 1 : 0;
    bool runs = there && lane / 2 < end, alone = there && !runs;
    int low = __reduce_min_sync(kFullWarp, runs ? path & 255 : 255), high = __reduce_max_sync(kFullWarp, runs ? path >> 8 & 255 : -1);
    int owner = __popc(__ballot_sync(kFullWarp, alone) & ((1u << lane) - 1)) % W::kWarps;
    SumTile& sums = shared.tile_of[stage];
#pragma unroll
    for (int x = 0; x < W::kWarps; ++x)
      if (unsigned pieces = __ballot_sync(kFullWarp, alone && owner == x); lane == 0) sums.pieces[x] = pieces;
    int least = __reduce_min_sync(kFullWarp, there ? path : INT_MAX);
    bool one = __all_sync(kFullWarp, !there || path == least) && least >> 16 == int(TimeKind::kOne);
    if (lane < 2) sums.ends[lane] = 16 * end;
    if (lane == 0) {
      sums.first = first, sums.slot = slot, sums.low = low, sums.high = high, sums.last = tile.last, sums.steps = tile.steps;
      sums.bucket = one && g.pos_sums && tile.before >= S::kQueries ? least & 255 : -1;
    }
  };
  for (uint32_t count = 0;; ++count) {
    int stage = count % kAhead, lane = thread_index() % 32;
    shared.told[stage].wait(count / kAhead & 1);
    const CutTile& tile = shared.tile[stage];
    int first = tile.first, slot = tile.slot;
    bool mine = int(count % S::kStaging) == warp, last = tile.last;
    if (mine && first < 0 && lane == 0) shared.tile_of[stage].first = -1;
    if (mine && first >= 0) stage_tile(stage, tile);
    __syncwarp();
    if (mine) shared.staged[stage].arrive_for_warp(lane);
    if (first < 0) return;
    shared.tile_empty[stage].arrive_for_warp(lane);
    if (last) shared.slot_empty[slot].arrive_for_warp(lane);
  }
}

// Eight warps bring tiles of dS, added over the heads of their group, by blocks of 8 x 8: a warp 8 queries, a thread 8 keys of one at a
// time.
template <typename T>
__device__ __forceinline__ void add_heads(TableMemory<T>& shared, const Call<T>& p, const Gradients<T>& g, const Cuts& cuts) {
  using S = TableShape;
  static_assert(std::is_same_v<T, __nv_bfloat16>);
  constexpr int kEach = S::kKeys / 32;
  int lane = thread_index() % 32, block = int(thread_index() / 32) - 4, row = 8 * block + lane % 8, chunk = cuts.halves * 64 * 128;
  const int64_t step = int64_t(cuts.halves) * S::kQueries * S::kKeys * int(sizeof(T));  // to the next head
  for (uint32_t count = 0;; ++count) {
    int stage = count % S::kAhead, to = count % S::kDsStages;
    shared.told[stage].wait(count / S::kAhead & 1);
    const CutTile& tile = shared.tile[stage];
    if (tile.first < 0) return;
    const CutItem& item = shared.item_of[tile.slot];
    int64_t place = place_of_ds(p, item.s, item.place, item.tile, S::kKeys, tile.index / cuts.halves, 64 * cuts.halves, item.head);
    const unsigned char* from =
        reinterpret_cast<const unsigned char*>(g.ds_tiles) + place * step + (tile.index % cuts.halves * 64 + row) * 128;
    float sum[kEach][8] = {};
#pragma unroll 2
    for (int head = 0, heads = item.heads; head < heads; ++head, from += step) {
      uint4 words[kEach];
#pragma unroll
      for (int x = 0; x < kEach; ++x) {
        int unit = 4 * x + lane / 8;
        words[x] = __ldcs(reinterpret_cast<const uint4*>(from + unit / 8 * chunk + (unit % 8 ^ row % 8) * 16));
      }
#pragma unroll
      for (int x = 0; x < kEach; ++x) {
        const uint32_t pairs[4] = {words[x].x, words[x].y, words[x].z, words[x].w};
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sum[x][2 * e] += __uint_as_float(pairs[e] << 16), sum[x][2 * e + 1] += __uint_as_float(pairs[e] & 0xffff0000);
      }
    }
    __syncwarp();
    shared.tile_empty[stage].arrive_for_warp(lane);
    shared.ds_empty[to].wait(count / S::kDsStages & 1 ^ 1);
    unsigned char* ds = reinterpret_cast<unsigned char*>(shared.ds(to)) + lane % 8 * 16;
#pragma unroll
    for (int x = 0; x < kEach; ++x) {
      uint32_t pairs[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) pairs[e] = pack_pair<T>(sum[x][2 * e], sum[x][2 * e + 1]);
      *reinterpret_cast<uint4*>(ds + diagonal_block(block, 4 * x + lane / 8)) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
    __syncwarp();
    shared.ds_full[to].arrive_for_warp(lane);
  }
}

template <typename T>
__global__ void __launch_bounds__(TableShape::kThreads, 1)
    hstu_attention_tables_sm90_kernel(const __grid_constant__ Call<T> p, const __grid_constant__ Gradients<T> g,
                                      const __grid_constant__ Cuts cuts, int positions) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<TableMemory<T>*>(memory);
  int warp = __shfl_sync(kFullWarp, int(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) shared.init(), fence_barriers();
  begin_tables(shared, p.last_bucket);
  if (warp == 3) return find_tiles(shared, p, g, cuts, positions);
  if (warp < TableShape::kStaging) return stage_tiles(shared, p, g, warp);
  if (warp < 4) return;
  if (warp < 12) return add_heads(shared, p, g, cuts);
  sum_tiles<T>(shared, p, positions);
#endif
}

constexpr int64_t kTableScratch = 1 << 26;  // floats for private sums of the tables
constexpr int64_t kItems = 8;               // a block
constexpr int64_t kLeastTiles = 8;          // of queries, where an item is a part of a tile of keys

// Floats of an item's sums, of all its groups.
template <typename T>
int64_t entries_of(const Call<T>& p, const Cuts& cuts, bool positions, bool times) {
  int64_t of_positions = std::min<int64_t>(p.positions, int64_t(p.max_seq_len)) * cuts.rows;
  return cuts.groups * ((positions ? of_positions : 0) + (times ? p.last_bucket + 1 : 0));
}
template <typename T>
Cuts cuts_of(const Call<T>& p, const Gradients<T>& g, int queries, bool positions, bool times) {
  int halves = queries / TableShape::kQueries, groups = p.pos_per_head || p.time_per_head ? p.heads : 1;
  int64_t tiles = int64_t(g.most_query_tiles) * halves;
  Cuts cuts{p.heads / groups, groups, 1, 1, 1 + int(!p.causal || p.contextual_full) + int(p.num_targets != nullptr), halves};
  // Half of the tiles of queries see a tile of keys, or fewer. Parts are fewer where their sums would be too large.
  int64_t length = std::max(kLeastTiles, g.copies * groups * tiles / 2 / (processors() * kItems));
  int64_t most = std::max<int64_t>(kTableScratch / (entries_of(p, cuts, positions, times) * g.copies), 1);
  length = std::max(length, ceil_div(tiles, most));
  cuts.length = int(length), cuts.parts = int(ceil_div(tiles, length));
  return cuts;
}

}  // namespace

template <typename T>
int table_copies(const Call<T>& p, const Gradients<T>& g, int queries, bool positions, bool times) {
  Cuts cuts = cuts_of(p, g, queries, positions, times);
  return int(std::clamp<int64_t>(kTableScratch / (entries_of(p, cuts, positions, times) * cuts.parts), 1, g.copies));
}
template int table_copies(const Call<__nv_bfloat16>&, const Gradients<__nv_bfloat16>&, int, bool, bool);

template <typename T>
void table_gradients(const Call<T>& p, Gradients<T> g, int queries, Tensor* dpos_w, Tensor* dtime_w, Stream stream) {
  static_assert(sizeof(TableMemory<T>) <= kHopperShared);
  Cuts cuts = cuts_of(p, g, queries, dpos_w, dtime_w);
  int64_t positions = std::min<int64_t>(p.positions, int64_t(p.max_seq_len)), buckets = p.last_bucket + 1;
  int64_t copies = int64_t(g.copies) * cuts.parts, sums = copies * cuts.groups, blocks = std::min<int64_t>(processors(), sums);
  Scratch<float> pos_sums(dpos_w ? sums * cuts.rows * positions : 0, stream), time_sums(dtime_w ? sums * buckets : 0, stream);
  if (dpos_w) pos_sums.zero();
  if (dtime_w) time_sums.zero();
  g.pos_sums = pos_sums, g.time_sums = time_sums;
  CUDA_CHECK(cudaMemsetAsync(g.ticket, 0, sizeof(int), handle_of(stream)));
  launch(hstu_attention_tables_sm90_kernel<T>, dim3(unsigned(blocks)), dim3(TableShape::kThreads), sizeof(TableMemory<T>), stream, p, g,
         cuts, int(positions));
  if (dpos_w) reduce_table(*dpos_w, pos_sums, int(copies * cuts.rows), cuts.groups, int(positions), g.launch > 0, stream);
  if (dtime_w) reduce_table(*dtime_w, time_sums, int(copies), cuts.groups, int(buckets), g.launch > 0, stream);
}
template void table_gradients(const Call<__nv_bfloat16>&, Gradients<__nv_bfloat16>, int, Tensor*, Tensor*, Stream);

}  // namespace backward_sm90
}  // namespace hstu::cuda::attention
