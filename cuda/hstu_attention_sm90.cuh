// The forward for Hopper, sm_90a: what its warps share, and what the loading warpgroup does. The kernel is in hstu_attention_sm90.cu, a
// drawing in docs/hstu_attention.md.
#pragma once
#include "hstu_attention.cuh"
#include "hstu_attention_bias.cuh"
#include "hstu_attention_plan.cuh"
#include "sm90/wgmma.cuh"

namespace hstu::cuda::attention {
namespace forward_sm90 {

using namespace sm90;

// Tile sizes were measured (docs/hstu_attention.md). kFew: fewer rows an item, for calls that have few items.
template <int kDim, Mode kMode, bool kFew = false>
struct Config {
  static constexpr bool kBias = kMode == Mode::kSiluBias;
  static constexpr int kGroups = kFew ? 2 : kDim <= 64 || (kBias && kDim <= 128) ? 3 : 2;  // warpgroups that compute; one more loads
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kKeys = kBias || kDim > 128 ? 64 : 128;  // of a tile
  static constexpr int kRing = kBias && kDim <= 64 ? 3 : 2;     // tiles of K and of V in shared memory
  static constexpr int kQueries = kDim <= 128 ? 2 : 1;          // tiles of Q
  static constexpr bool kTurns = !kBias && kDim == 128;         // warpgroups start their products in turns
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kLoading = kBias || kDim == 128 ? 56 : kDim > 128 ? 24 : 32;  // registers a thread
  static constexpr int kComputing = kDim > 128 && !kBias ? 240 : kGroups == 2 ? 224 : kBias ? 152 : 160;
};
constexpr int kSlots = 3;                     // items under way
enum NamedBarrier { kTurn = 1, kGroup = 4 };  // of one warpgroup each

// One head of up to kRows rows of one sequence.
struct Work {
  Sequence s;
  int head, first, rows;  // rows = 0: there is no more
  KeyTiles tiles;
};

// Time differences d >= 1 by cells: the exponent and two bits of float(d). At most one bucket begins within a cell.
constexpr int kCells = 128;
constexpr int64_t cell_start(int cell) { return ((4 + cell % 4) * (int64_t(1) << cell / 4) + 3) / 4; }
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
  for (int x = 0; x + 1 < kCells; ++x)
    if (kTimeThreshold[cell_buckets().at[x] + 1] < cell_start(x + 1) && kTimeThreshold[cell_buckets().at[x]] < cell_start(x + 1))
      return false;
  return true;
}
static_assert(cells_hold_one_threshold());
static __constant__ CellBuckets kCellBuckets = cell_buckets();

// 16 rows by 32 keys: what some row sees of them, and how their time's bias is found.
struct alignas(16) Piece {
  enum { kOne, kTwo, kMany, kFar, kKind = 3, kPartly = 4, kHidden = 8 };  // kPartly: a mask is needed; kFar goes for all pieces of a tile
  int flags;
  float first, second;  // of two buckets, the later one from a difference of `least` on
  int least;
};

// What the bias needs of an item's rows and of a tile of keys, brought by two warps of the loading warpgroup. A tile shares all but kKeys
// of its position differences with the one before it: entries stand at key - row modulo kPositions, twice in a row, so that a thread reads
// on without looking, and once more one place earlier, so that pairs are aligned for odd differences too; a first tile takes the next part,
// while the last tiles of items before may still be read.
template <int kRows, int kKeys, int kRing>
struct BiasStages {
  static constexpr int kPositions = kRows + kKeys + kRing * kKeys <= 512 ? 512 : 1024, kCopy = 2 * kPositions + 16;
  static_assert(kRows + kKeys + kRing * kKeys <= kPositions);
  uint32_t threshold[kNearThresholds];
  float time[kSlots][kNearThresholds + 1];  // of the item's head; 0 from kUntimed on
  float4 cells[kSlots][kCells];             // a threshold, the bias below it, the bias from there on
  VisibleKeys some[kSlots][kRows / 16];     // what some row of a warp sees
  int row_near[kSlots][kRows];
  TimeSpan row_span[kSlots][kRows / 16];
  alignas(8) float pos[kRing][2][kCopy];
  alignas(8) int near[kRing][kKeys];
  TimeSpan span[kRing][kKeys / 32];
  int part[kRing];
  Piece piece[kRing][kRows / 16][kKeys / 32];

  // Not limited to the table.
  __device__ __forceinline__ int near_bucket(uint32_t d) const {
    int guess = bucket_guess(fmaxf(__uint2float_rz(d), 1.f));
    return guess + int(d >= threshold[guess]);
  }
  __device__ __forceinline__ Piece piece_of(TimeSpan rows, TimeSpan keys, const float* time, bool far, int last) const {
    if (last < 0) return {Piece::kOne, 0.f, 0.f, 0};
    if (far) return {Piece::kFar, 0.f, 0.f, 0};
    if (rows.kinds | keys.kinds || rows.least > rows.most || keys.least > keys.most) return {Piece::kMany, 0.f, 0.f, 0};
    int low = min(near_bucket(max(max(rows.least - keys.most, keys.least - rows.most), 0)), last);
    int high = min(near_bucket(max(rows.most - keys.least, keys.most - rows.least)), last);
    int kind = low == high ? Piece::kOne : keys.most <= rows.least && high == low + 1 ? Piece::kTwo : Piece::kMany;
    return {kind, time[low], time[high], int(threshold[low])};
  }
};

template <typename T, int kDim, Mode kMode, bool kFew = false>
struct Shared {
  using C = Config<kDim, kMode, kFew>;
  struct None {};
  alignas(1024) T q[C::kQueries][C::kRows * kDim];
  alignas(1024) T k[C::kRing][C::kKeys * kDim];
  alignas(1024) T v[C::kRing][C::kKeys * kDim];
  Barrier q_full[C::kQueries], q_empty[C::kQueries], k_full[C::kRing], k_empty[C::kRing], v_full[C::kRing], v_empty[C::kRing],
      work_full[kSlots], work_empty[kSlots];
  Work work[kSlots];
  Rows<T> keys[kSlots], values[kSlots];       // of an item's head: registers are short
  VisibleKeys seen[kSlots][C::kRows];         // of a row
  VisibleKeys some[kSlots][C::kGroups];       // what some row of a warpgroup sees
  VisibleKeys every[kSlots][4 * C::kGroups];  // what every row of a warp sees
  std::conditional_t<C::kBias, BiasStages<C::kRows, C::kKeys, C::kRing>, None> bias;

  // Loaders: warps that bring tiles.
  __device__ __forceinline__ void init(int loaders) {
    constexpr int kWarps = 4 * C::kGroups;
    for (int x = 0; x < C::kQueries; ++x) q_full[x].init(1, 0), q_empty[x].init(0, kWarps);
    for (int x = 0; x < C::kRing; ++x)
      k_full[x].init(0, C::kBias ? 2 : 1), v_full[x].init(0, 1), k_empty[x].init(0, kWarps), v_empty[x].init(0, kWarps);
    for (int x = 0; x < kSlots; ++x) work_full[x].init(0, 1), work_empty[x].init(0, kWarps + loaders + (C::kBias ? 2 : 0));
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
__device__ __forceinline__ void stage_masks(Shared& shared, int slot, const Call<T>& p) {
  constexpr int kRows = Shared::C::kRows, size = Shared::C::kKeys;
  Work& work = shared.work[slot];
  int lane = threadIdx.x % 32;
  VisibleKeys total{0, INT_MAX, 0, 0}, some = total;
#pragma unroll 1
  for (int r0 = 0; r0 < kRows; r0 += 32) {
    int r = r0 + lane, i = work.s.shift + work.first + r;
    VisibleKeys keys{0, 0, 0, i + 1};
    if (r < work.rows) keys = visible_keys(p, work.s, i);
    shared.seen[slot][r] = keys;
    VisibleKeys every = keys;
#pragma unroll
    for (int x = 8; x > 0; x /= 2)
      every = {min(every.prefix, __shfl_xor_sync(kFullWarp, every.prefix, x)), max(every.begin, __shfl_xor_sync(kFullWarp, every.begin, x)),
               min(every.end, __shfl_xor_sync(kFullWarp, every.end, x)), 0};
    if (lane % 16 == 0) shared.every[slot][r / 16] = every;
    bool empty = keys.begin >= keys.end;
    if constexpr (Shared::C::kBias) {
      VisibleKeys any{keys.prefix, empty ? INT_MAX : keys.begin, empty ? 0 : keys.end, 0};
#pragma unroll
      for (int x = 8; x > 0; x /= 2)
        any = {max(any.prefix, __shfl_xor_sync(kFullWarp, any.prefix, x)), min(any.begin, __shfl_xor_sync(kFullWarp, any.begin, x)),
               max(any.end, __shfl_xor_sync(kFullWarp, any.end, x)), 0};
      if (lane % 16 == 0) shared.bias.some[slot][r / 16] = any;
    }
    some = {max(some.prefix, __reduce_max_sync(kFullWarp, keys.prefix)),
            min(some.begin, __reduce_min_sync(kFullWarp, empty ? INT_MAX : keys.begin)),
            max(some.end, __reduce_max_sync(kFullWarp, empty ? 0 : keys.end)), 0};
    if (r0 % 64 == 0) continue;
    if (lane == 0) shared.some[slot][r0 / 64] = some;
    total = {max(total.prefix, some.prefix), min(total.begin, some.begin), max(total.end, some.end), 0};
    some = {0, INT_MAX, 0, 0};
  }
  KeyTiles tiles{(total.prefix + size - 1) / size, total.end > 0 ? total.begin / size : 0, (total.end + size - 1) / size};
  if (tiles.gap >= tiles.resume) tiles.gap = -1;
  if (lane == 0) work.tiles = tiles;
}

// A tile of one head from row `row` on, by the copy engine; one thread.
template <typename T, int kDim, int kTileRows>
__device__ __forceinline__ void load(T* tile, const CUtensorMap& map, int head, int64_t row, Barrier& full) {
  full.expect(kTileRows * kDim * int(sizeof(T)));
  load_tile<T, kDim, kTileRows>(tile, map, head, row, full);
}
// By the same warp: what the bias needs of an item's rows.
template <typename Shared, typename T>
__device__ __forceinline__ void stage_rows(Shared& shared, int slot, const Call<T>& p) {
  constexpr int kRows = Shared::C::kRows;
  auto& bias = shared.bias;
  const Work& work = shared.work[slot];
  int lane = threadIdx.x % 32, i0 = work.s.shift + work.first;
  int64_t time_row = p.time_per_head ? work.head * p.time_width : 0;
#pragma unroll 1
  for (int x = lane; x <= kNearThresholds; x += 32)
    bias.time[slot][x] = p.last_bucket >= 0 && x < kUntimed ? p.unit * p.time_w.at(time_row + min(x, p.last_bucket)) : 0.f;
  __syncwarp();
#pragma unroll 1
  for (int x = lane; x < kCells; x += 32) {
    int bucket = kCellBuckets.at[x];
    bias.cells[slot][x] = float4{__uint_as_float(bias.threshold[bucket]), bias.time[slot][bucket], bias.time[slot][bucket + 1], 0.f};
  }
  int64_t base = first_time(p, work.s);
  const int64_t* times = p.query_time + work.s.query + work.first;
#pragma unroll 1
  for (int r = lane; r < kRows; r += 32) {
    bool there = p.last_bucket >= 0 && r < work.rows;
    NearTime time{kNoFixedTime, kSomeUntimed};
    if (there && i0 + r >= work.s.contextual) time = near_time(times[r], base);
    bias.row_near[slot][r] = time.at;
    TimeSpan low = TimeSpan::of_warp(time, there && lane < 16), high = TimeSpan::of_warp(time, there && lane >= 16);
    if (lane % 16 == 0) bias.row_span[slot][r / 16] = lane ? high : low;
  }
}

// Warp 1 of the loading warpgroup: draws items and finds what their rows see.
template <typename T, int kDim, Mode kMode, bool kFew>
__device__ __forceinline__ void draw_items(Shared<T, kDim, kMode, kFew>& shared, const Call<T>& p, const Plan& plan) {
  using C = Config<kDim, kMode, kFew>;
  int lane = threadIdx.x % 32, starts = plan.own_starts(p, C::kRows), item = int(blockIdx.x), items = plan.items(starts);
  if constexpr (C::kBias) {
    for (int x = lane; x < kNearThresholds; x += 32) shared.bias.threshold[x] = uint32_t(min(kThresholds.at[x], int64_t(UINT32_MAX)));
    __syncwarp();
  }
  for (Ring<kSlots> turn;; turn.next()) {
    Work work{};
    if (item < items) {
      Plan::Item found = plan.item(item, starts);
      work.head = found.head, work.s = sequence_of(p, found.sequence);
      if constexpr (C::kBias) {  // the first tile of a sequence, which sees fewest keys, is the one that may not be full
        int last = work.s.queries - (work.s.queries - 1) / C::kRows * C::kRows + found.tile * C::kRows;
        work.first = max(last - C::kRows, 0), work.rows = last - work.first;
      } else {
        work.first = found.tile * C::kRows, work.rows = min(C::kRows, work.s.queries - work.first);
      }
    }
    shared.work_empty[turn.stage].wait(turn.parity ^ 1);
    if (lane == 0) shared.work[turn.stage] = work;  // read from there: registers are short
    __syncwarp();
    const Work& drawn = shared.work[turn.stage];
    bool some = drawn.rows > 0;
    if (some) stage_masks(shared, turn.stage, p);
    if (some && lane == 0) {
      shared.keys[turn.stage] = rows_of(p, drawn.s, drawn.head, p.k, p.key_dim, false);
      shared.values[turn.stage] = rows_of(p, drawn.s, drawn.head, p.v, p.value_dim, true);
    }
    if constexpr (C::kBias)
      if (some) stage_rows(shared, turn.stage, p);
    __syncwarp();
    shared.work_full[turn.stage].arrive_for_warp(lane);
    if (!some) return;
    item = plan.draw();
  }
}

// Warp 0 of the loading warpgroup: the tiles of Q, K and V.
template <typename T, int kDim, Mode kMode, bool kFew>
__device__ __forceinline__ void load_tiles(Shared<T, kDim, kMode, kFew>& shared, const CUtensorMap& q_map, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map, const Call<T>& p) {
  using C = Config<kDim, kMode, kFew>;
  int lane = threadIdx.x % 32;
  Ring<C::kRing> ring;
  Ring<C::kQueries> q_ring;
  for (Ring<kSlots> turn;; turn.next()) {
    shared.work_full[turn.stage].wait(turn.parity);
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
    shared.work_empty[turn.stage].arrive_for_warp(lane);
  }
}

// Warps 2 and 3 of the loading warpgroup bring what the bias needs of a tile of keys, in turns.
template <typename T, int kDim, Mode kMode, bool kFew>
__device__ __forceinline__ void stage_bias(Shared<T, kDim, kMode, kFew>& shared, const Call<T>& p) {
  using C = Config<kDim, kMode, kFew>;
  constexpr int kKeys = C::kKeys, kRows = C::kRows, kPieces = kKeys / 32;
  auto& bias = shared.bias;
  constexpr int kMod = std::remove_reference_t<decltype(bias)>::kPositions;
  int lane = threadIdx.x % 32, part = 0;
  float up = 1 / p.alpha;
  bool mine = threadIdx.x / 32 == 2;
  Ring<C::kRing> ring;
  for (Ring<kSlots> turn;; turn.next()) {
    shared.work_full[turn.stage].wait(turn.parity);
    const Work& work = shared.work[turn.stage];
    if (work.rows <= 0) return;
    int64_t base = first_time(p, work.s);
    int64_t position_row = p.pos_per_head ? int64_t(work.head) * p.positions : 0;
    int last = -2;  // the tile before
    for (int n = work.tiles.from(0); n < work.tiles.last; last = n, n = work.tiles.from(n + 1), ring.next(), mine = !mine) {
      bool first = n != last + 1;
      if (first && ++part == C::kRing) part = 0;
      if (!mine) continue;
      int j0 = n * kKeys, history = work.s.history, farthest = j0 - min(work.s.shift + work.first + kRows - 1, history);
      auto entry = [&](int x) { return p.positions ? up * p.pos_w.at(position_row + min(abs(farthest + x), p.positions - 1)) : 0.f; };
      NearTime time[kPieces];
      float fresh[kPieces];
      const int64_t* times = p.key_time + work.s.time + j0;
#pragma unroll
      for (int c = 0; c < kPieces; ++c) {
        int j = 32 * c + lane;
        fresh[c] = entry(kRows + j);
        time[c] = {kNoMovingTime, kSomeUntimed};
        if (p.last_bucket >= 0 && j0 + j >= work.s.contextual && j0 + j < history) time[c] = near_time(times[j], base);
      }
      shared.k_empty[ring.stage].wait(ring.parity ^ 1);
      auto put = [&](int x, float value) {
        int at = farthest + x;
        float *even = bias.pos[part][0] + (at & (kMod - 1)), *odd = bias.pos[part][1] + (at - 1 & (kMod - 1));
        even[0] = even[kMod] = odd[0] = odd[kMod] = value;
      };
#pragma unroll
      for (int c = 0; c < kPieces; ++c) {
        int j = 32 * c + lane;
        put(kRows + j, fresh[c]);
        bias.near[ring.stage][j] = time[c].at;
        TimeSpan span = TimeSpan::of_warp(time[c], p.last_bucket >= 0 && j0 + j < history);
        if (lane == 0) bias.span[ring.stage][c] = span;
      }
      if (first)
#pragma unroll 2
        for (int x = lane; x < kRows; x += 32) put(x, entry(x));
      if (lane == 0) bias.part[ring.stage] = part;
      __syncwarp();
#pragma unroll 1
      for (int x = lane; x < kRows / 16 * kPieces; x += 32) {
        int strip = x / kPieces, c = x % kPieces, j = j0 + 32 * c;
        TimeSpan rows = bias.row_span[turn.stage][strip];
        int kinds = rows.kinds;
#pragma unroll
        for (int y = 0; y < kPieces; ++y) kinds |= bias.span[ring.stage][y].kinds;
        Piece piece = bias.piece_of(rows, bias.span[ring.stage][c], bias.time[turn.stage], kinds & kSomeFar, p.last_bucket);
        if (!shared.every[turn.stage][strip].all(j, j + 32)) piece.flags |= Piece::kPartly;
        if (!bias.some[turn.stage][strip].any(j, j + 32)) piece.flags |= Piece::kHidden;
        bias.piece[ring.stage][strip][c] = piece;
      }
      __syncwarp();
      shared.k_full[ring.stage].arrive_for_warp(lane);
    }
    __syncwarp();
    shared.work_empty[turn.stage].arrive_for_warp(lane);
  }
}

}  // namespace forward_sm90
}  // namespace hstu::cuda::attention
