// HSTU attention, backward with a bias, for Hopper (sm_90a): shared memory, the warps that find and load tiles and that bring their bias,
// and how scores get it.
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
// The cell of |a - b|, which and 1 `apart` becomes.
__device__ __forceinline__ int cell_of(int a, int b, uint32_t& apart) {
  apart = __sad(a, b, 1);
  return int(__float_as_uint(__uint2float_rz(apart)) >> 21) - (127 << 2);
}

// Where buckets begin, in shared memory.
using Thresholds = uint32_t[kNearThresholds];
__device__ __forceinline__ void stage_thresholds(Thresholds& threshold, int thread, int threads) {
  for (int x = thread; x < kNearThresholds; x += threads) threshold[x] = uint32_t(min(kThresholds.at[x], int64_t(UINT32_MAX)));
}
// The first and the last bucket that occur between keys and queries with times.
struct BucketRange {
  int low, high;
};
__device__ __forceinline__ BucketRange buckets_between(const Thresholds& threshold, TimeSpan keys, TimeSpan queries, int last) {
  auto bucket = [&](uint32_t d) {
    int guess = bucket_guess(fmaxf(__uint2float_rz(d), 1.f));
    return min(guess + int(d >= threshold[guess]), last);
  };
  return {bucket(max(max(queries.least - keys.most, keys.least - queries.most), 0)),
          bucket(max(queries.most - keys.least, keys.most - queries.least))};
}

// The bias by position / alpha as tiles take it, in aligned pieces: by query - key + begin, [heads of the table][2][width], the second row
// one further on.
struct PositionTable {
  const float* entries;
  int width, begin;
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

// 16 keys by 32 queries of a tile, and how their time's bias is found: of few buckets the first one's to all, then for each further one the
// difference to all that are at least so much later.
struct Piece {
  TimeKind kind;
  int low, high;  // buckets, kOne and kFew
};
constexpr int kFewSteps = 3;
// The same as computing warps take it: two buckets and more.
struct alignas(16) Step {
  int low, high, least;
  float more;
};

// What the bias needs: of items, two at a time, and of kTiles tiles of kQueries queries by kKeys keys.
template <int kQueries, int kKeys, int kTiles>
struct BiasStages {
  static constexpr int kQ = kQueries, kK = kKeys, kAhead = kTiles, kPieces = kQ / 32;
  uint32_t threshold[kNearThresholds];
  float time[2][kNearThresholds + 1];  // of an item's head, 0 from kUntimed on
  alignas(16) int key_near[2][kK];
  TimeSpan key_span[kK / 16];
  float4 cells[2][kCells];  // a threshold, the term below it, the term from there on, the buckets of these
  // Of the position table, from a multiple of four on: query - key + kK - 1 = 0 is at `offset`. Both rows, half a row of banks apart.
  static constexpr int kPositions = kQ + kK + 4;
  alignas(16) float pos[kAhead][2][kPositions + 12];
  alignas(16) int query_near[kAhead][kQ];  // at near_place
  struct alignas(4 * kPieces) Row {
    float of[kPieces];
  } first[kAhead][kK / 16];  // of 16 keys, what all queries of a piece have
  Step step[kAhead][kK / 16][kPieces];
  int kinds[kAhead][kK / 16];  // which pieces have few buckets, many (from bit 4 on), far times (from bit 8 on)
  Barrier full[kAhead];

  // A thread's queries 8 x + 0, 1 and 8 x + 8, 9 stand together.
  static __device__ __forceinline__ int near_place(int query) {
    return query / 16 * 16 + query / 2 % 4 * 4 + query / 8 % 2 * 2 + query % 2;
  }
  // `level`: whether terms may be made of differences.
  __device__ __forceinline__ Piece piece_of(TimeSpan keys, TimeSpan queries, int last, bool level) const {
    int kinds = queries.kinds | keys.kinds;
    if (last < 0 || (!kinds && (queries.least > queries.most || keys.least > keys.most))) return {TimeKind::kOne, kUntimed, kUntimed};
    if (kinds) return {kinds & kSomeFar ? TimeKind::kFar : TimeKind::kMany, 0, last};
    auto [low, high] = buckets_between(threshold, keys, queries, last);
    bool many = low < high && (!level || keys.most > queries.least || high - low > kFewSteps);
    return {many ? TimeKind::kMany : low < high ? TimeKind::kFew : TimeKind::kOne, low, high};
  }
  // By all threads of a block, before its first barrier.
  __device__ __forceinline__ void begin(int thread, int threads) {
    stage_thresholds(threshold, thread, threads);
  }
};

// A warp stages a head's time table. Whether its entries are small, so that differences of them add up to an entry but for some 1e-5.
template <typename Bias, typename T>
__device__ __forceinline__ bool stage_table(Bias& bias, int slot, const Call<T>& p, int head) {
  constexpr int kEach = kNearThresholds / 32 + 1;
  int lane = thread_index() % 32;
  int64_t row = p.time_per_head ? head * p.time_width : 0;
  bool level = true;
  uint32_t bits[kEach];
#pragma unroll
  for (int x = 0; x < kEach; ++x) bits[x] = p.last_bucket >= 0 ? p.time_w.bits(row + min(32 * x + lane, p.last_bucket)) : 0;
#pragma unroll
  for (int x = 0; x < kEach; ++x) {
    int bucket = 32 * x + lane;
    float entry = p.last_bucket >= 0 && bucket < kUntimed ? p.unit * p.time_w.value(bits[x]) : 0.f;
    if (bucket <= kNearThresholds) bias.time[slot][bucket] = entry, level = level && fabsf(entry) <= 64.f;
  }
  __syncwarp();
#pragma unroll 1
  for (int x = lane; x < kCells; x += 32) {
    int bucket = min(int(kCellBuckets.at[x]), kNearThresholds - 1), next = bucket;
    uint32_t threshold = bias.threshold[bucket];
    while (next < kNearThresholds - 1 && bias.threshold[next] == threshold) ++next;
    if (threshold != ~0u) ++threshold;
    auto kept = [&](int x) { return x < kUntimed ? min(x, p.last_bucket) : kUntimed; };
    bias.cells[slot][x] =
        float4{__uint_as_float(threshold), bias.time[slot][bucket], bias.time[slot][next], __int_as_float(kept(bucket) | kept(next) << 16)};
  }
  level = __all_sync(kFullWarp, level);
  __syncwarp();
  return level;
}
// A warp stages the times of an item's keys. All loads first.
template <typename Bias, typename T>
__device__ __forceinline__ void stage_keys(Bias& bias, int slot, const Call<T>& p, const Sequence& s, int tile, int64_t base) {
  constexpr int kK = Bias::kK;
  int lane = thread_index() % 32, j0 = tile * kK;
  unsigned far = 0;
  {
    int64_t at[kK / 32];
#pragma unroll
    for (int x = 0; x < kK / 32; ++x) {
      int j = j0 + 32 * x + lane;
      at[x] = p.last_bucket >= 0 && j >= s.contextual && j < s.history ? p.key_time[s.time + j] : base;
    }
#pragma unroll
    for (int x = 0; x < kK / 32; ++x) {
      NearTime time = near_time(at[x], base);
      bias.key_near[slot][32 * x + lane] = time.at, far |= (time.kind & kSomeFar) << x;
    }
  }
#pragma unroll 1
  for (int x = 0; x < kK / 32; ++x) {
    int r = 32 * x + lane, j = j0 + r;
    bool there = p.last_bucket >= 0 && j < s.history;
    NearTime time{bias.key_near[slot][r], int(far >> x & 1)};
    if (!there || j < s.contextual) time = {j < s.contextual ? kUntimedKey : kNoFixedTime, kSomeUntimed};
    bias.key_near[slot][r] = time.at;
    TimeSpan low = TimeSpan::of_warp(time, there && lane < 16), high = TimeSpan::of_warp(time, there && lane >= 16);
    if (lane % 16 == 0) bias.key_span[r / 16] = lane ? high : low;
  }
  __syncwarp();
}

// One thread brings the positions of a tile: of its first query and its last key, `nearest` apart.
template <typename Bias, typename T>
__device__ __forceinline__ void load_positions(Bias& bias, int stage, const PositionTable& positions, const Call<T>& p, int head,
                                               int nearest) {
  constexpr int kBytes = Bias::kPositions * 4;
  bias.full[stage].expect(2 * kBytes);
  const float* from = positions.entries + (p.pos_per_head ? int64_t(head) * 2 * positions.width : 0) + (nearest + positions.begin & ~3);
  load_bulk(shared_address(bias.pos[stage][0]), from, kBytes, bias.full[stage]);
  load_bulk(shared_address(bias.pos[stage][1]), from + positions.width, kBytes, bias.full[stage]);
}

// A warp asks for the times of a tile's queries.
template <typename Bias>
struct QueryTimes {
  int64_t at[Bias::kPieces];
  template <typename T>
  __device__ __forceinline__ QueryTimes(const Call<T>& p, const Sequence& s, int first) {
#pragma unroll
    for (int x = 0; x < Bias::kPieces; ++x) {
      int r = first + 32 * x + int(thread_index() % 32);
      at[x] = p.last_bucket >= 0 && r < s.queries ? p.query_time[s.query + r] : 0;
    }
  }
};
// Its queries' times and how each piece's bias is found. Returns a lane's piece: of keys lane / kPieces, of queries lane % kPieces. first:
// of the tile, a query; j0: a key.
template <typename Bias, typename T>
__device__ __forceinline__ Piece stage_tile(Bias& bias, int stage, int slot, const QueryTimes<Bias>& asked, int64_t base, bool level,
                                            const Call<T>& p, const Sequence& s, int first, int j0) {
  constexpr int kPieces = Bias::kPieces;
  int lane = thread_index() % 32, i0 = s.shift + first;
  TimeSpan span{INT_MAX, INT_MIN, 0};  // of the queries of this lane's piece
#pragma unroll
  for (int x = 0; x < kPieces; ++x) {
    int r = lane + 32 * x;
    bool there = p.last_bucket >= 0 && first + r < s.queries;
    NearTime time{kUntimedQuery, kSomeUntimed};
    if (there && i0 + r >= s.contextual) time = near_time(asked.at[x], base);
    bias.query_near[stage][Bias::near_place(r)] = time.at;
    TimeSpan all = TimeSpan::of_warp(time, there);
    if (lane % kPieces == x) span = all;
  }
  int strip = lane / kPieces, x = lane % kPieces, kinds = 0;
  bool mine = strip < Bias::kK / 16, none = p.causal && !p.contextual_full && i0 + x * 32 + 31 < j0 + strip * 16;
  Piece piece{TimeKind::kOne, kUntimed, kUntimed};  // of one that no query sees
  if (mine && !none) piece = bias.piece_of(bias.key_span[strip], span, p.last_bucket, level);
  bool few = piece.kind == TimeKind::kFew, single = few || piece.kind == TimeKind::kOne;
  if (mine) {
    const float* time = bias.time[slot];
    bias.first[stage][strip].of[x] = single ? time[piece.low] : 0.f;
    if (few) bias.step[stage][strip][x] = {piece.low, piece.high, int(bias.threshold[piece.low]), time[piece.low + 1] - time[piece.low]};
    kinds = (few ? 1 : single ? 0 : piece.kind == TimeKind::kMany ? 16 : 256) << x;
  }
#pragma unroll
  for (int step = 1; step < kPieces; step *= 2) kinds |= __shfl_xor_sync(kFullWarp, kinds, step);
  if (mine && x == 0) bias.kinds[stage][strip] = kinds;
  return piece;
}

template <typename T, int kDim>
struct SharedWithBias : Shared<T, kDim, true> {
  using S = Shape<kDim, true>;
  BiasStages<S::kQueries, S::kKeys, S::kAhead> bias;
  int turn;  // items drawn but one
  __device__ __forceinline__ void init() {
    turn = -1;
    for (int x = 0; x < S::kAhead; ++x) this->tile_empty[x].init(2, 8), bias.full[x].init(1, 1);
  }
};
template <typename T, int kDim, bool kBias>
using SharedOf = std::conditional_t<kBias, SharedWithBias<T, kDim>, Shared<T, kDim, false>>;

// A warp finds the items and tiles that come, up to kAhead tiles before they are done: 32 tiles of an item at a time.
struct Planner {
  int first = 0;      // of the tiles of queries that were looked at
  unsigned left = 0;  // those of them that see the item's keys and are still to be told
  int told = 0;       // of this lane's one: its turn, whether it finishes dQ, whether all is seen
  bool more = true;
  // Looks at tiles from `first` on until some see the item's keys, or there are no more.
  template <typename S, typename T>
  __device__ __forceinline__ void look(const Call<T>& p, const Gradients<T>& g, const Item& item) {
    int tiles = item.tile * S::kKeys < item.s.history ? (item.s.queries + S::kQueries - 1) / S::kQueries : 0;
    for (left = 0; left == 0 && first < tiles;) {
      int m = first + int(thread_index() % 32), before = 0, behind = 0;
      bool seen = false;
      if (m < tiles) {
        const QueryTile& queries = g.query_tiles[int64_t(item.s.index) * g.most_query_tiles + m];
        seen = sees<S>(queries, item.tile, before, g.last_first), sees<S>(queries, item.tile, behind, !g.last_first);
        bool finishes = g.deterministic && behind == 0 && item.s.shift + min((m + 1) * S::kQueries, item.s.queries) <= item.s.history;
        bool all = queries.all.all(item.tile * S::kKeys, (item.tile + 1) * S::kKeys) && item.s.queries - m * S::kQueries >= S::kQueries;
        told = before & 0xffff | int(finishes) << 16 | int(all) << 17;
      }
      left = __ballot_sync(kFullWarp, seen);
      if (left == 0) first += 32;
    }
  }
  // Tells tile `count`, or that there is none. False: not yet, for the next item has no tiles, or all was told. Waits until the item before
  // the last one is done.
  template <typename T, int kDim>
  __device__ __forceinline__ bool tell(SharedWithBias<T, kDim>& shared, const Call<T>& p, const Gradients<T>& g, uint32_t count) {
    using S = Shape<kDim, true>;
    bool one = thread_index() % 32 == 0;
    int stage = count % S::kAhead;
    if (!more) return false;
    bool begins = left == 0;
    if (begins) {
      if (one) ++shared.turn;
      __syncwarp();
      more = __shfl_sync(kFullWarp, one ? draw_item<S, true>(shared, p, g, shared.turn, false, g.last_first) : 0, 0) >= 0;
      Item& item = shared.item[read(&shared.turn) % 2];
      __syncwarp();
      if (more) {
        first = first_tile_of_queries(p, item.s, item.tile * S::kKeys, S::kQueries);
        look<S>(p, g, item);
        if (one) item.any = left != 0, shared.item_full[read(&shared.turn) % 2].arrive();
        if (left == 0) return false;
      }
    }
    shared.tile_empty[stage].wait(count / S::kAhead & 1 ^ 1);
    Tile& tile = shared.tile[stage];
    const Item& item = shared.item[read(&shared.turn) % 2];
    if (more) {
      int x = __ffs(left) - 1, m = first + x, word = __shfl_sync(kFullWarp, told, x);
      left &= left - 1;
      if (left == 0) first += 32, look<S>(p, g, item);
      if (one) {
        const Tile& before = shared.tile[(count + S::kAhead - 1) % S::kAhead];
        int i0 = item.s.shift + m * S::kQueries;
        tile = {sums_of<S>(p, g, item.s, m, item.head),
                g.turns + (int64_t(item.s.index) * p.heads + item.head) * g.most_query_tiles + m,
                read(&shared.turn) % 2,
                m,
                word & 0xffff,
                item.s.queries - m * S::kQueries,
                item.s.history - i0,
                min(i0, item.s.history) + 1 & 3,
                begins,
                bool(word >> 17 & 1),
                left == 0,
                bool(word >> 16 & 1),
                count > 0 ? before.finished + before.finishes : 0};
      }
    } else if (one) {
      tile.item = -1;
    }
    if (one) shared.told[stage].arrive();
    return true;
  }
};

// The warp that finds and loads tiles and tells what their queries see.
template <typename T, int kDim>
__device__ __forceinline__ void load_tiles(SharedWithBias<T, kDim>& shared, const CUtensorMap& q_map, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map, const CUtensorMap& dout_map, const Call<T>& p, const Gradients<T>& g) {
  using S = Shape<kDim, true>;
  constexpr int kQ = S::kQueries, kK = S::kKeys, kAhead = S::kAhead, kTileBytes = kQ * kDim * int(sizeof(T));
  auto load = [&](uint32_t count) {
    int stage = count % 2;
    shared.told[count % kAhead].wait(count / kAhead & 1);
    const Tile& tile = shared.tile[count % kAhead];
    if (tile.item < 0) return false;
    const Item& item = shared.item[tile.item];
    bool one = thread_index() % 32 == 0;
    shared.q_empty[stage].wait(count / 2 & 1 ^ 1);
    if (one) {
      shared.q_full[stage].expect(2 * kTileBytes);
      load_tile<T, kDim, kQ>(shared.q[stage], q_map, item.head, item.s.query + tile.index * kQ, shared.q_full[stage]);
      load_tile<T, kDim, kQ>(shared.dout[stage], dout_map, item.head, item.s.query + tile.index * kQ, shared.q_full[stage]);
    }
    tell_seen<T, kDim, true>(shared, p, g, stage, tile, item, false);
    if (one && tile.first) load_keys<T, kDim, kK>(shared, k_map, v_map, item);
    // All that a tile needs is there when its queries are.
    shared.bias.full[count % kAhead].wait(count / kAhead & 1);
    __syncwarp();
    shared.q_full[stage].arrive_for_warp(thread_index() % 32);
    return true;
  };
  // A tile is found before the one in front of it is loaded; all are loaded before the next item is drawn, which waits for the one before
  // this one.
  Planner planner;
  for (uint32_t found = 0, loaded = 0;;) {
    while (loaded + (planner.left != 0) < found)
      if (!load(loaded++)) return;
    found += planner.tell(shared, p, g, found);
  }
}

// The warp that brings the bias: of a tile the positions, the times of its queries, how the time's term is found.
template <typename T, int kDim>
__device__ __forceinline__ void stage_bias(SharedWithBias<T, kDim>& shared, const Call<T>& p, const PositionTable& positions) {
  using S = Shape<kDim, true>;
  bool level = true;
  int64_t base = 0;
  unsigned staged = 0;  // slots that have the table of all heads
  for (uint32_t count = 0;; ++count) {
    int stage = count % S::kAhead, lane = thread_index() % 32;
    shared.told[stage].wait(count / S::kAhead & 1);
    const Tile& tile = shared.tile[stage];
    if (tile.item < 0) return;
    const Item& item = shared.item[tile.item];
    int first = tile.index * S::kQueries, j0 = item.tile * S::kKeys, slot = item.parity;
    if (lane == 0)
      load_positions(shared.bias, stage, positions, p, item.head, min(item.s.shift + first, item.s.history) - j0 - (S::kKeys - 1));
    if (tile.first) {
      base = first_time(p, item.s);
      if (!(staged >> slot & 1)) level = stage_table(shared.bias, slot, p, item.head), staged |= int(!p.time_per_head) << slot;
      stage_keys(shared.bias, slot, p, item.s, item.tile, base);
    }
    QueryTimes<decltype(shared.bias)> asked(p, item.s, first);
    stage_tile(shared.bias, stage, slot, asked, base, level, p, item.s, first, j0);
    __syncwarp();
    shared.bias.full[stage].arrive_for_warp(lane);
  }
}

// A computing thread's scores, of its two keys of 128 and all queries, begin as the position's bias / alpha.
template <typename Bias>
__device__ __forceinline__ void begin_scores(const Bias& bias, int stage, int before, int offset, float (&scores)[Bias::kQ / 2]) {
  uint32_t thread = thread_index() - 128, query = thread % 4 * 2, begin = offset + Bias::kK - 1 - thread / 32 * 16 - thread % 32 / 4;
  if (likely(before >= Bias::kQ - 1)) {
    int odd = begin & 1;  // pairs, from the row in which they are aligned
    const float* pos = &bias.pos[stage][odd][begin + query - odd];
#pragma unroll
    for (int x = 0; x < Bias::kQ / 2; x += 2) {
      float2 two = *reinterpret_cast<const float2*>(pos + x / 4 * 8 - x / 2 % 2 * 8);
      scores[x] = two.x, scores[x + 1] = two.y;
    }
  } else {  // targets stand at one position
    const float* pos = &bias.pos[stage][0][begin];
#pragma unroll
    for (int x = 0; x < Bias::kQ / 2; ++x) scores[x] = pos[min(int(query) + x / 4 * 8 + x % 2, max(before, 0)) - x / 2 % 2 * 8];
  }
}

// What is asked for before scores are there.
template <typename Bias>
struct BiasAhead {
  typename Bias::Row first;
  int kinds;
  __device__ __forceinline__ void load(const Bias& bias, int stage) {
    uint32_t strip = thread_index() / 32 - 4;
    first = bias.first[stage][strip], kinds = bias.kinds[stage][strip];
  }
};
// Scores times `factor`, and the time's bias.
template <typename Bias, typename T>
__device__ __forceinline__ void add_times(const Bias& bias, const BiasAhead<Bias>& ahead, const Call<T>& p, const Item& item,
                                          const Tile& tile, int stage, float factor, float (&v)[Bias::kQ / 2]) {
  constexpr int kPieces = Bias::kPieces;
  int kinds = ahead.kinds, slot = item.parity;
#pragma unroll
  for (int x = 0; x < Bias::kQ / 2; ++x) v[x] = fmaf(factor, v[x], ahead.first.of[x / 16]);
  if (kinds == 0) return;
#pragma unroll
  for (int c = 0; c < kPieces; ++c) {
    if (!(kinds >> c & 1)) continue;
    uint32_t thread = thread_index() - 128, key = thread / 32 * 16 + thread % 32 / 4;
    const int* near = &bias.query_near[stage][thread % 4 * 4];
    Step step = bias.step[stage][thread / 32][c];
    const int fixed[2] = {bias.key_near[slot][key], bias.key_near[slot][key + 8]};
    int4 at[2] = {*reinterpret_cast<const int4*>(near + 32 * c), *reinterpret_cast<const int4*>(near + 32 * c + 16)};
#pragma unroll 1
    for (;;) {
      int from[2] = {fixed[0] + step.least, fixed[1] + step.least};
#pragma unroll
      for (int x = 0; x < 16; ++x) {
        const int times[4] = {at[x / 8].x, at[x / 8].y, at[x / 8].z, at[x / 8].w};
        if (times[x / 4 % 2 * 2 + x % 2] >= from[x / 2 % 2]) v[16 * c + x] += step.more;
      }
      if (++step.low >= step.high) break;
      step.least = int(bias.threshold[step.low]), step.more = bias.time[slot][step.low + 1] - bias.time[slot][step.low];
    }
  }
  if (likely(kinds < 16)) return;
  uint32_t thread = thread_index() - 128, key = thread / 32 * 16 + thread % 32 / 4;
  const int fixed[2] = {bias.key_near[slot][key], bias.key_near[slot][key + 8]}, *near = &bias.query_near[stage][thread % 4 * 4];
  const float4* cells = bias.cells[slot];
#pragma unroll 1
  for (int c = 0; c < kPieces; ++c) {
    if (!(kinds >> 4 + c & 1)) continue;
    float term[16];
#pragma unroll
    for (int x = 0; x < 16; x += 4) {
      if (kPieces < 4 && x > 0) part(key);
      int2 at = *reinterpret_cast<const int2*>(near + 32 * c + x / 8 * 16 + x / 4 % 2 * 2);
#pragma unroll
      for (int y = 0; y < 4; ++y) {
        uint32_t apart;
        float4 cell = cells[cell_of(y % 2 ? at.y : at.x, fixed[y / 2], apart)];
        term[x + y] = apart >= __float_as_uint(cell.x) ? cell.z : cell.y;
      }
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
      if (piece == c)
#pragma unroll
        for (int x = 0; x < 16; ++x) v[16 * piece + x] += term[x];
  }
  if (likely(kinds < 256)) return;
#pragma unroll 1
  for (int y = 0; y < Bias::kQ / 2; ++y) {
    if (!(kinds >> 8 + y / 16 & 1)) continue;
    int i = item.s.shift + tile.index * Bias::kQ + y / 4 * 8 + int(thread) % 4 * 2 + y % 2;
    float value = time_term(p, item.head, exact_bucket(p, item.s, i, item.tile * Bias::kK + int(key) + y / 2 % 2 * 8));
#pragma unroll
    for (int x = 0; x < Bias::kQ / 2; ++x) v[x] += x == y ? value : 0.f;
  }
}

}  // namespace backward_sm90
}  // namespace hstu::cuda::attention
