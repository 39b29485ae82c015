// HSTU attention, backward with a bias, for Hopper (sm_90a): shared memory, the warps that find and load tiles and that bring their bias.
// See docs/hstu_attention.md.
#pragma once
#include "hstu_attention_bias.cuh"
#include "hstu_attention_bwd_sm90.cuh"

namespace hstu::cuda::attention {
namespace backward_sm90 {

// Time differences d by cells: the exponent and two bits of float(d + 1). At most one bucket begins within a cell.
constexpr int kCells = 128;
constexpr int kUntimedKey = INT_MIN, kUntimedQuery = INT_MAX - 1;  // d + 1 has 32 bits
constexpr int64_t cell_start(int cell) { return ((4 + cell % 4) * (int64_t(1) << cell / 4) + 3) / 4 - 1; }
struct CellBuckets {
  uint8_t at[kCells];
};
constexpr CellBuckets cell_buckets() {
  CellBuckets buckets{};
  for (int x = 0; x < kCells; ++x)
    while (kTimeThreshold[buckets.at[x]] <= cell_start(x)) ++buckets.at[x];
  return buckets;
}
constexpr bool cells_hold_one_threshold() {
  for (int x = 0; x + 1 < kCells; ++x) {
    int next = cell_buckets().at[x];
    while (kTimeThreshold[next] == kTimeThreshold[cell_buckets().at[x]]) ++next;
    if (kTimeThreshold[next] < cell_start(x + 1)) return false;
  }
  return true;
}
static_assert(cells_hold_one_threshold());
static __constant__ CellBuckets kCellBuckets = cell_buckets();
// The cell of |a - b|, which `apart` becomes.
__device__ __forceinline__ int cell_of(int a, int b, uint32_t& apart) {
  apart = (a > b ? uint32_t(a) - uint32_t(b) : uint32_t(b) - uint32_t(a)) + 1;
  return int(__float_as_uint(__uint2float_rz(apart)) >> 21) - (127 << 2);
}

// The bias by position / alpha as tiles take it, in aligned pieces: by query - key + begin, [heads of the table][2][width], the second row
// one further on.
struct PositionTable {
  const float* entries;
  int width, begin, count;  // count: of a row of pos_sums
};
template <typename T>
__global__ void __launch_bounds__(256) position_table_kernel(const Call<T> p, float* entries, int width, int begin) {
  int x = int(blockIdx.x) * 256 + int(threadIdx.x), head = blockIdx.y;
  if (x >= width) return;
  auto entry = [&](int x) {
    return p.positions ? 1 / p.alpha * p.pos_w.at(int64_t(head) * p.positions + min(abs(x - begin), p.positions - 1)) : 0.f;
  };
  float* row = entries + int64_t(head) * 2 * width;
  row[x] = entry(x), row[width + x] = entry(x + 1);
}

// What follows from an item, and from a tile of queries, and is needed after their slots have been given away.
struct TableItem {
  Sequence s;
  int head, tile;
  float unit;    // of dS as it is kept
  int64_t base;  // of near times
  float *pos_sums, *time_sums;
};
struct TableTile {
  int first, slot;     // its first query, -1: no more; its item's
  unsigned pieces[4];  // of 16 keys by 32 queries, each by itself: each warp's
  int ends[2];         // keys before this one, for each half of the queries, are summed by runs of keys in one bucket
  int low, high;       // the buckets of those
  int bucket;          // of all its pairs, so that the sum over its positions will do; -1: there are several
  bool last;
};

// One warp brings the bias of a tile, the others sum dS.
template <typename T, int kDim>
struct SharedWithBias : Shared<T, kDim, true> {
  using S = Shape<kDim, true>;
  static constexpr int kQ = S::kQueries, kK = S::kKeys, kAhead = S::kAhead, kPitch = kQ + kK + 8;
  static constexpr bool kPlans = kDim <= 64;  // the warp that loads finds the tiles, and warp 0 brings their bias
  static constexpr int kWarps = kPlans ? 4 : 3, kThreads = 32 * kWarps, kCounts = kDim <= 64 ? 8 : 2;  // that sum; copies of counts
  static constexpr bool kPairs = kDim <= 64;
  uint32_t threshold[kNearThresholds];
  float time[2][kNearThresholds + 1];  // of an item's head, 0 from kUntimed on
  alignas(16) int key_near[2][kK];
  TimeSpan key_span[kK / 16];
  // A threshold, the term below it, the term from there on; bytes of `counts` before the bucket below and (upper half) before the other.
  float4 cells[2][kCells];
  // Of the position table, from a multiple of four on: query - key + kK - 1 = 0 is at Tile::offset. kPairs: both rows, half a row of banks
  // apart.
  static constexpr int kPositions = kQ + kK + 4;
  alignas(16) float pos[kAhead][kPairs ? 2 : 1][kPositions + (kPairs ? 12 : 0)];
  alignas(8) int query_near[kAhead][kQ];
  alignas(8) int path[kAhead][kK / 16][kQ / 32];  // of 16 keys by 32 queries: kind, high, low, a byte each
  alignas(16) int counts[kWarps][kUntimed + 1][kCounts];  // the last row is for pairs without a time
  float far[kWarps][kTimeThresholds + 1];                 // by time bucket
  alignas(16) float before[kK / 8][kQ + 8];  // of each query, the sum of dS over the keys before a block of 8
  alignas(16) float blocks[8][kPitch];  // sums of blocks of 8 keys by 8 queries on one diagonal, one after the other from column 8 on
  alignas(16) uint32_t zero[4];
  float targets[kK];  // sums of dS over target rows, by key
  float clamped[kWarps];
  int copy[2];  // of the tables' sums, an item's
  TableItem item_of[2];
  TableTile tile_of[kAhead];
  Barrier tile_empty[kAhead], bias_full[kAhead], bias_empty[kAhead], ds_full[S::kDsStages],
      ds_empty[S::kDsStages], slot_empty[2];

  __device__ __forceinline__ void init() {
    for (int x = 0; x < kAhead; ++x) tile_empty[x].init(0, 8), bias_full[x].init(1, 1), bias_empty[x].init(0, kWarps);
    for (int x = 0; x < S::kDsStages; ++x) ds_full[x].init(0, 8), ds_empty[x].init(0, kWarps);
    for (int x = 0; x < 2; ++x) slot_empty[x].init(0, kWarps);
  }
  // Not limited to the table.
  __device__ __forceinline__ int near_bucket(uint32_t d) const {
    int guess = bucket_guess(fmaxf(__uint2float_rz(d), 1.f));
    return guess + int(d >= threshold[guess]);
  }
  static constexpr int kNothing = 255 << 8;  // a path: no query sees a key
  // `level`: whether terms may be made of differences.
  __device__ __forceinline__ int path_of(TimeSpan keys, TimeSpan queries, int last, bool level) const {
    auto coded = [](TimeKind kind, int low, int high) { return int(kind) << 16 | high << 8 | low; };
    if (last < 0) return coded(TimeKind::kOne, 0, 0);
    int kinds = queries.kinds | keys.kinds;
    if (kinds & kSomeFar) return coded(TimeKind::kFar, 0, last);
    if (queries.least > queries.most || keys.least > keys.most) return coded(TimeKind::kMany, 0, 0);
    int low = min(near_bucket(max(max(queries.least - keys.most, keys.least - queries.most), 0)), last);
    int high = min(near_bucket(max(queries.most - keys.least, keys.most - queries.least)), last);
    if (kinds || !level || keys.most > queries.least || high - low >= 4) return coded(TimeKind::kMany, low, high);
    return coded(low < high ? TimeKind::kFew : TimeKind::kOne, low, high);
  }
};
template <typename T, int kDim, bool kBias>
using SharedOf = std::conditional_t<kBias, SharedWithBias<T, kDim>, Shared<T, kDim, false>>;

struct ItemTimes {
  bool sorted;  // its keys are
  bool level;   // entries of its time table are small, so that differences of them add up to an entry but for some 1e-5
};
// An item's times and time table, before its first tile.
template <typename T, int kDim>
__device__ __forceinline__ ItemTimes stage_item(SharedWithBias<T, kDim>& shared, int at, const Call<T>& p, const Gradients<T>& g,
                                           int positions) {
  const Item& item = shared.item[at];
  int lane = thread_index() % 32, slot = item.parity;
  const Sequence& s = item.s;
  int64_t row = p.time_per_head ? item.head * p.time_width : 0, base = first_time(p, s);
  bool sorted = true, level = true;
#pragma unroll 2
  for (int x = 0; x < Shape<kDim, true>::kKeys / 32; ++x) {
    int r = 32 * x + lane, j = item.tile * Shape<kDim, true>::kKeys + r;
    bool there = p.last_bucket >= 0 && j < s.history;
    NearTime time{j < s.contextual ? kUntimedKey : kNoFixedTime, kSomeUntimed};
    if (there && j >= s.contextual) time = near_time(p.key_time[s.time + j], base);
    shared.key_near[slot][r] = time.at, sorted = sorted && !(time.kind & kSomeFar);
    TimeSpan low = TimeSpan::of_warp(time, there && lane < 16), high = TimeSpan::of_warp(time, there && lane >= 16);
    if (lane % 16 == 0) shared.key_span[r / 16] = lane ? high : low;
  }
  for (int x = lane; x <= kNearThresholds; x += 32) {
    float entry = p.last_bucket >= 0 && x < kUntimed ? p.unit * p.time_w.at(row + min(x, p.last_bucket)) : 0.f;
    shared.time[slot][x] = entry, level = level && fabsf(entry) <= 64.f;
  }
  __syncwarp();
#pragma unroll 1
  for (int r = lane; r < Shape<kDim, true>::kKeys - 1; r += 32)
    sorted = sorted && shared.key_near[slot][r] <= shared.key_near[slot][r + 1];
#pragma unroll
  for (int x = lane; x < kCells; x += 32) {
    int bucket = min(int(kCellBuckets.at[x]), kNearThresholds - 1), next = bucket;
    uint32_t threshold = shared.threshold[bucket];
    while (next < kNearThresholds - 1 && shared.threshold[next] == threshold) ++next;
    if (threshold != ~0u) ++threshold;
    auto bytes = [&](int x) { return uint32_t(x < kUntimed ? min(x, p.last_bucket) : kUntimed) * uint32_t(sizeof(shared.counts[0][0])); };
    shared.cells[slot][x] = float4{__uint_as_float(threshold), shared.time[slot][bucket], shared.time[slot][next],
                                   __uint_as_float(bytes(bucket) | bytes(next) << 16)};
  }
  if (lane == 0) {
    int64_t copy = int64_t(item.head) * g.copies + shared.copy[at];
    shared.item_of[slot] = {s,
                            item.head,
                            item.tile,
                            item.unit * item.ds_unit,
                            base,
                            g.pos_sums ? g.pos_sums + copy * positions : nullptr,
                            g.time_sums ? g.time_sums + copy * (p.last_bucket + 1) : nullptr};
  }
  ItemTimes times{__all_sync(kFullWarp, sorted) != 0, __all_sync(kFullWarp, level) != 0};
  __syncwarp();
  return times;
}

// A thread finds the items and tiles that come, up to kAhead tiles before they are done.
struct Planner {
  uint32_t turn = ~0u;
  int next = -1;  // its item's next tile
  bool more = true;
  // Tells tile `count`, or that there is none. False: not yet, for the next item has no tiles, or all was told. Waits until the item before
  // the last one is done.
  template <typename T, int kDim>
  __device__ __forceinline__ bool tell(SharedWithBias<T, kDim>& shared, const Call<T>& p, const Gradients<T>& g, uint32_t count) {
    using S = Shape<kDim, true>;
    int stage = count % S::kAhead;
    if (!more) return false;
    if (next < 0) {
      more = next_item<T, kDim, true>(shared, p, g, ++turn, false, false) >= 0;
      if (more) next = first_seen<S>(p, g, shared.item[turn % 2]);
      if (more && next < 0) return false;
    }
    shared.tile_empty[stage].wait(count / S::kAhead & 1 ^ 1);
    Tile& tile = shared.tile[stage];
    const Item& item = shared.item[turn % 2];
    if (more) {
      tile.before = item.s.history - item.s.shift - next * S::kQueries;
      tile.offset = min(item.s.shift + next * S::kQueries, item.s.history) + 1 & 3;
      next = tell_tile<S>(p, g, item, turn, next, false, tile);
    } else {
      tile.item = -1;
    }
    shared.told[stage].arrive();
    return true;
  }
};
template <typename T, int kDim>
__device__ __forceinline__ void plan(SharedWithBias<T, kDim>& shared, const Call<T>& p, const Gradients<T>& g) {
  Planner planner;
  for (uint32_t count = 0; planner.more; count += planner.tell(shared, p, g, count)) {
  }
}

// The warp that loads a tile and tells what its queries see.
template <typename T, int kDim>
__device__ __forceinline__ void load_tiles(SharedWithBias<T, kDim>& shared, const CUtensorMap& q_map, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map, const CUtensorMap& dout_map, const Call<T>& p, const Gradients<T>& g) {
  using S = Shape<kDim, true>;
  constexpr int kQ = S::kQueries, kK = S::kKeys, kAhead = S::kAhead, kTileBytes = kQ * kDim * int(sizeof(T));
  bool begins = true;
  auto load = [&](uint32_t count) {
    int stage = count % 2;
    shared.told[count % kAhead].wait(count / kAhead & 1);
    const Tile& tile = shared.tile[count % kAhead];
    if (tile.item < 0) return false;
    const Item& item = shared.item[tile.item];
    bool one = thread_index() % 32 == 0, last = tile.last;
    shared.q_empty[stage].wait(count / 2 & 1 ^ 1);
    if (one) {
      shared.q_full[stage].expect(2 * kTileBytes);
      load_tile<T, kDim, kQ>(shared.q[stage], q_map, item.head, item.s.query + tile.index * kQ, shared.q_full[stage]);
      load_tile<T, kDim, kQ>(shared.dout[stage], dout_map, item.head, item.s.query + tile.index * kQ, shared.q_full[stage]);
      if (begins) {
        shared.v_empty.wait(item.parity ^ 1);
        shared.v_full.expect(kK * kDim * int(sizeof(T)));
        load_tile<T, kDim, kK>(shared.v, v_map, item.head, item.s.key + item.tile * kK, shared.v_full);
        shared.k_empty.wait(item.parity ^ 1);
        shared.k_full.expect(kK * kDim * int(sizeof(T)));
        load_tile<T, kDim, kK>(shared.k, k_map, item.head, item.s.key + item.tile * kK, shared.k_full);
      }
    }
    tell_seen<T, kDim, true>(shared, p, g, stage, tile, item, false);
    // All that a tile needs is there when its queries are.
    if (begins) shared.k_full.wait(item.parity), shared.v_full.wait(item.parity);
    shared.bias_full[count % kAhead].wait(count / kAhead & 1);
    __syncwarp();
    shared.q_full[stage].arrive_for_warp(thread_index() % 32);
    begins = last;
    __syncwarp();
    return true;
  };
  if constexpr (SharedWithBias<T, kDim>::kPlans) {
    // A tile is found before the one in front of it is loaded; all are loaded when an item is waited for that may end only after them.
    Planner planner;
    for (uint32_t found = 0, loaded = 0;;) {
      bool told = thread_index() % 32 == 0 && planner.tell(shared, p, g, found);
      told = __shfl_sync(kFullWarp, told, 0), found += told;
      while (loaded + told < found)
        if (!load(loaded++)) return;
    }
  } else {
    for (uint32_t count = 0; load(count); ++count) {
    }
  }
}

// The warp that brings the bias: of a tile the positions, the times of its queries, how the time's term is found.
template <typename T, int kDim>
__device__ __forceinline__ void stage_bias(SharedWithBias<T, kDim>& shared, const Call<T>& p, const Gradients<T>& g,
                                           const PositionTable& positions) {
  using S = Shape<kDim, true>;
  using W = SharedWithBias<T, kDim>;
  bool begins = true;
  ItemTimes times{};
  int items = 0;
  for (uint32_t count = 0;; ++count) {
    constexpr int kAhead = S::kAhead;
    int stage = count % kAhead, lane = thread_index() % 32;
    shared.told[stage].wait(count / kAhead & 1);
    const Tile& tile = shared.tile[stage];
    if (tile.item < 0) {
      shared.bias_empty[stage].wait(count / kAhead & 1 ^ 1);
      if (lane == 0) shared.tile_of[stage].first = -1, shared.bias_full[stage].arrive();
      shared.bias_full[stage].arrive_for_warp(lane);
      return;
    }
    const Item& item = shared.item[tile.item];
    const Sequence& s = item.s;
    int first = tile.index * S::kQueries, i0 = s.shift + first, slot = item.parity;
    int nearest = min(i0, s.history) - item.tile * S::kKeys - (S::kKeys - 1);
    shared.bias_empty[stage].wait(count / kAhead & 1 ^ 1);
    if (begins) shared.slot_empty[slot].wait(items++ / 2 & 1 ^ 1);
    if (begins) times = stage_item<T, kDim>(shared, tile.item, p, g, positions.count);
    begins = tile.last;
    if (lane == 0) {
      constexpr int kBytes = W::kPositions * 4;
      shared.bias_full[stage].expect(W::kPairs ? 2 * kBytes : kBytes);
      int64_t row = p.pos_per_head ? int64_t(item.head) * 2 * positions.width : 0;
      const float* from = positions.entries + row + (nearest + positions.begin & ~3);
      load_bulk(shared_address(shared.pos[stage][0]), from, kBytes, shared.bias_full[stage]);
      if (W::kPairs) load_bulk(shared_address(shared.pos[stage][W::kPairs]), from + positions.width, kBytes, shared.bias_full[stage]);
    }
    TimeSpan span{INT_MAX, INT_MIN, 0};  // of the half of the queries that this lane's pieces have
    bool orderly = times.sorted;         // no query sees a later key
#pragma unroll 1
    for (int x = 0; x < S::kQueries / 32; ++x) {
      int r = lane + 32 * x, newest = (p.causal ? min(i0 + r, s.history - 1) : s.history - 1) - item.tile * S::kKeys;
      bool there = p.last_bucket >= 0 && r < tile.rows;
      NearTime time{kUntimedQuery, kSomeUntimed};
      if (there && i0 + r >= s.contextual) time = near_time(p.query_time[s.query + first + r], shared.item_of[slot].base);
      orderly = orderly && !(time.kind & kSomeFar) && (newest < 0 || time.at >= shared.key_near[slot][min(newest, S::kKeys - 1)]);
      shared.query_near[stage][r] = time.at;
      TimeSpan all = TimeSpan::of_warp(time, there);
      if (lane % 2 == x) span = all;
    }
    static_assert(S::kQueries == 64 && S::kKeys == 128);
    int path = shared.kNothing;
    if (lane < 16) {
      bool none = p.causal && !p.contextual_full && i0 + lane % 2 * 32 + 31 < item.tile * S::kKeys + lane / 2 * 16;
      if (!none) path = shared.path_of(shared.key_span[lane / 2], span, p.last_bucket, times.level);
      shared.path[stage][lane / 2][lane % 2] = path;
    }
    // Of an orderly tile the newest keys by pieces where these have many buckets, all before them by runs. The warps take pieces in turns.
    bool there = path != shared.kNothing, plain = __all_sync(kFullWarp, orderly) && there && path >> 16 < int(TimeKind::kMany);
    unsigned mine = __ballot_sync(kFullWarp, plain) & 0x5555u << lane % 2;
    int end = mine ? (31 - __clz(mine)) / 2 + 1 : 0;
    bool runs = there && lane / 2 < end, alone = there && !runs;
    int low = __reduce_min_sync(kFullWarp, runs ? path & 255 : 255), high = __reduce_max_sync(kFullWarp, runs ? path >> 8 & 255 : -1);
    int owner = __popc(__ballot_sync(kFullWarp, alone) & ((1u << lane) - 1)) % W::kWarps;
    unsigned pieces[4] = {};
#pragma unroll
    for (int x = 0; x < W::kWarps; ++x) pieces[x] = __ballot_sync(kFullWarp, alone && owner == x);
    int least = __reduce_min_sync(kFullWarp, there ? path : INT_MAX);
    bool one = __all_sync(kFullWarp, !there || path == least) && least >> 16 == int(TimeKind::kOne);
    int bucket = one && g.pos_sums && tile.before >= S::kQueries ? least & 255 : -1;
    int ends[2] = {16 * __shfl_sync(kFullWarp, end, 0), 16 * __shfl_sync(kFullWarp, end, 1)};
    if (lane == 0)
      shared.tile_of[stage] = {first, slot, {pieces[0], pieces[1], pieces[2], pieces[3]}, {ends[0], ends[1]}, low, high, bucket, tile.last};
    __syncwarp();
    shared.bias_full[stage].arrive_for_warp(lane);
  }
}

// A computing thread's scores begin as the position's bias / alpha.
template <typename T, int kDim>
__device__ __forceinline__ void begin_scores(const SharedWithBias<T, kDim>& shared, int stage, float (&scores)[32]) {
  using W = SharedWithBias<T, kDim>;
  int last = shared.tile[stage].before;
  uint32_t thread = thread_index() - 128, key = thread / 32 * 16 + thread % 32 / 4, query = thread % 4 * 2;
  uint32_t begin = shared.tile[stage].offset + W::kK - 1 - key;
  if (likely(last >= W::kQ - 1)) {
    int odd = W::kPairs ? begin & 1 : 0;  // pairs, from the row in which they are aligned
    const float* pos = &shared.pos[stage][odd][begin + query];
#pragma unroll
    for (int x = 0; x < W::kQ / 2; x += 2) {
      const float* at = pos + x / 4 * 8 - x / 2 % 2 * 8;
      float2 two;
      if constexpr (W::kPairs)
        two = *reinterpret_cast<const float2*>(at - odd);
      else
        two = float2{at[0], at[1]};
      scores[x] = two.x, scores[x + 1] = two.y;
    }
  } else {  // targets stand at one position
    const float* pos = &shared.pos[stage][0][begin];
#pragma unroll
    for (int x = 0; x < W::kQ / 2; ++x) scores[x] = pos[min(int(query) + x / 4 * 8 + x % 2, max(last, 0)) - x / 2 % 2 * 8];
  }
}

// How a computing thread finds the time's bias of its 16 keys by 64 queries: two pieces.
struct PieceTimes {
  int slot, fixed[2], kinds, low, high;
  float first;
  PieceTimes() = default;
  template <typename Memory>
  __device__ __forceinline__ PieceTimes(const Memory& shared, int slot, int stage) : slot(slot) {
    uint32_t thread = thread_index() - 128, key = thread / 32 * 16 + thread % 32 / 4;
    fixed[0] = shared.key_near[slot][key], fixed[1] = shared.key_near[slot][key + 8];
    int2 codes = *reinterpret_cast<const int2*>(shared.path[stage][key / 16]);
    if (codes.x == Memory::kNothing) codes.x = codes.y;
    if (codes.y == Memory::kNothing) codes.y = codes.x;
    kinds = max(codes.x, codes.y) >> 16, low = min(codes.x & 255, codes.y & 255);
    high = codes.x == Memory::kNothing ? 0 : max(codes.x >> 8 & 255, codes.y >> 8 & 255);
    first = shared.time[slot][low];
  }
};
// Its scores times `factor`, plus the time's bias. Each of few buckets adds to all that are at least so much later; else score by score.
template <typename T, int kDim>
__device__ __forceinline__ void add_times(const SharedWithBias<T, kDim>& shared, const Call<T>& p, const Item& item, int stage,
                                          float factor, const PieceTimes& times, float (&v)[32]) {
  using W = SharedWithBias<T, kDim>;
  uint32_t thread = (kDim <= 64 ? threadIdx.x : thread_index()) - 128;
  const float* time = shared.time[times.slot];
  const int* near = &shared.query_near[stage][thread % 4 * 2];
  const int(&fixed)[2] = times.fixed;
  if (likely(times.kinds <= int(TimeKind::kFew))) {
    int low = times.low, high = times.high;
    float term = times.first;
#pragma unroll
    for (int x = 0; x < 32; ++x) v[x] = fmaf(factor, v[x], term);
#pragma unroll 1
    for (; low < high;) {
      int least = int(shared.threshold[low]), from[2] = {fixed[0] + least, fixed[1] + least};
      float next = time[++low], more = next - term;
      term = next;
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        int2 at = *reinterpret_cast<const int2*>(near + 8 * x);
#pragma unroll
        for (int y = 0; y < 4; ++y)
          if ((y % 2 ? at.y : at.x) >= from[y / 2]) v[4 * x + y] += more;
      }
    }
  } else if (times.kinds != int(TimeKind::kFar)) {
    const float4* cells = shared.cells[times.slot];
#pragma unroll 1
    for (int x = 0; x < 4; ++x) {  // four of each piece at a time, those that are done go to the end
      float done[8];
#pragma unroll
      for (int y = 0; y < 8; ++y) {
        int2 at = *reinterpret_cast<const int2*>(near + 8 * x + y / 4 * 32);
        uint32_t apart;
        float4 cell = cells[cell_of(y % 2 ? at.y : at.x, fixed[y / 2 % 2], apart)];
        done[y] = fmaf(factor, v[y / 4 * 16 + y % 4], apart >= __float_as_uint(cell.x) ? cell.z : cell.y);
      }
#pragma unroll
      for (int y = 0; y < 32; ++y) v[y] = y % 16 < 12 ? v[y + 4] : done[y / 16 * 4 + y % 4];
    }
  } else {
#pragma unroll 1
    for (int y = 0; y < 32; ++y) {
      int key = int(thread) / 32 * 16 + int(thread) % 32 / 4;
      int i = item.s.shift + shared.tile[stage].index * W::kQ + y / 4 * 8 + int(thread) % 4 * 2 + y % 2;
      float value = time_term(p, item.head, exact_bucket(p, item.s, i, item.tile * W::kK + key + y / 2 % 2 * 8));
#pragma unroll
      for (int x = 0; x < 32; ++x) v[x] = x == y ? fmaf(factor, v[x], value) : v[x];
    }
  }
}

}  // namespace backward_sm90
}  // namespace hstu::cuda::attention
