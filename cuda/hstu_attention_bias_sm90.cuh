// The relative bias of the forward for Hopper: what the computing warps need of it for an item's rows and for a tile of keys, and the warps
// that bring it; see hstu_attention_sm90.cuh.
#pragma once
#include "hstu_attention_bias.cuh"
#include "hstu_attention_split_sm90.cuh"
#include "sm90/wgmma.cuh"

namespace hstu::cuda::attention {
namespace forward_sm90 {

using namespace sm90;

constexpr int kSlots = 3;  // items under way
// Tiles of an item to come when the next one is drawn: those of long items take less time.
__device__ __forceinline__ int lead_of(int tiles) { return tiles > 32 ? 8 : 4; }
enum NamedBarrier { kTurn = 1, kGroup = 4, kStaging = 7 };  // of one warpgroup each, and of the warps that bring the bias

// One head of up to kRows rows of one sequence.
struct Work {
  Sequence s;
  int head, first, rows;  // rows = 0: there is no more
  KeyTiles tiles;
};

// Time differences d by cells: the exponent and two bits of float(d + 1). At most one bucket begins within a cell.
constexpr int kCells = 128;
constexpr int64_t cell_start(int cell) { return ((4 + cell % 4) * (int64_t(1) << cell / 4) + 3) / 4; }
constexpr uint32_t near_limit(int64_t threshold) { return threshold < UINT32_MAX ? uint32_t(threshold) : UINT32_MAX; }
struct NearBuckets {
  uint32_t threshold[kNearThresholds];
  uint32_t next[kCells];  // d + 1 where the bucket after a cell's first one begins
};
struct NearTables {
  NearBuckets near;
  uint32_t bucket[kCells + 1];  // where a cell begins
};
constexpr NearTables near_tables() {
  NearTables tables{};
  for (int x = 0; x < kNearThresholds; ++x) tables.near.threshold[x] = near_limit(kTimeThreshold[x]);
  unsigned bucket = 0;
  for (int x = 0; x < kCells; ++x) {
    while (kTimeThreshold[bucket] + 1 <= cell_start(x)) ++bucket;
    tables.bucket[x] = bucket, tables.near.next[x] = near_limit(kTimeThreshold[bucket] + 1);
  }
  tables.bucket[kCells] = bucket + 1;
  return tables;
}
constexpr bool cells_hold_one_threshold(const NearTables& tables) {
  for (int x = 0; x + 1 < kCells; ++x)
    if (kTimeThreshold[tables.bucket[x] + 1] + 1 < cell_start(x + 1)) return false;
  return tables.bucket[kCells] <= kNearThresholds;
}
static_assert(cells_hold_one_threshold(near_tables()));
static __device__ const NearTables kNearTables = near_tables();  // not constant memory: lanes read different entries

// 16 rows by 32 keys: what some row sees of them, and how their time's bias is found. Two buckets: `second` from the difference `least` on.
struct alignas(16) Piece {
  enum { kTwo = 1, kPartly = 2, kHidden = 4, kMany = 8, kFar = 16 };  // kPartly: a mask is needed
  int flags;  // 0: one bucket, all seen; kFar goes for all pieces of a tile
  float first, second;
  int least;
};

// What the bias needs of an item's rows and of a tile of keys, brought by two warps of the loading warpgroup. A tile shares all but kKeys
// of its position differences with the one before it: entries stand at key - row modulo kPositions, each beside the next one, for a thread
// reads pairs, and the first of them once more behind the last, so that it reads on without looking; a first tile takes the next part,
// while the last tiles of items before may still be read.
template <int kRows, int kKeys, int kRing>
struct BiasStages {
  static constexpr int kPositions = kRows + kKeys + kRing * kKeys <= 512 ? 512 : 1024;
  static_assert(kRows + kKeys + kRing * kKeys <= kPositions);
  alignas(8) NearBuckets buckets;
  float time[kSlots][kNearThresholds + 1];  // of the item's head; 0 from kUntimed on
  float begins[kSlots][kCells + 1];         // the same, where a cell begins
  VisibleKeys some[kSlots][kRows / 16];     // what some row of a warp sees
  int row_near[kSlots][kRows];
  TimeSpan row_span[kSlots][kRows / 16];
  float2 pos[kRing][kPositions + kKeys];
  alignas(8) int near[kRing][kKeys];
  TimeSpan span[kRing][kKeys / 32];
  int part[kRing];
  Piece piece[kRing][kRows / 16][kKeys / 32];

  // v[16] = factor s[16] + the time's bias: `fixed` are the near times of a thread's rows, near[8 x + 0, 1] those of its keys. kTwo: the
  // piece has two buckets or fewer. All ways add the same value in the same operation.
  template <bool kTwo>
  __device__ __forceinline__ void add_time(float* v, const float* s, float factor, const Piece& piece, int slot, const int (&fixed)[2],
                                           const int* near) const {
    if (!kTwo && piece.flags & Piece::kMany) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        int2 at = *reinterpret_cast<const int2*>(near + 8 * x);
#pragma unroll
        for (int y = 0; y < 4; ++y) v[4 * x + y] = fmaf(factor, s[4 * x + y], time_of(slot, __sad(fixed[y / 2], y % 2 ? at.y : at.x, 1)));
      }
      return;
    }
    int until[2] = {int(uint32_t(fixed[0]) - uint32_t(piece.least)), int(uint32_t(fixed[1]) - uint32_t(piece.least))};
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      int2 at = *reinterpret_cast<const int2*>(near + 8 * x);
#pragma unroll
      for (int y = 0; y < 4; ++y)
        v[4 * x + y] = fmaf(factor, s[4 * x + y], (y % 2 ? at.y : at.x) <= until[y / 2] ? piece.second : piece.first);
    }
  }
  // The bias of a difference `more` - 1.
  __device__ __forceinline__ float time_of(int slot, uint32_t more) const {
    constexpr int kFirst = 127 << 4;
    uint32_t at = __float_as_uint(__uint2float_rz(more)) >> 19 & ~3u;  // bytes to the cell's entry, and kFirst
    uint32_t next = *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(buckets.next) + at - kFirst);
    asm("{\n.reg .pred beyond;\nsetp.ge.u32 beyond, %1, %2;\n@beyond add.u32 %0, %0, 4;\n}" : "+r"(at) : "r"(more), "r"(next));
    return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(begins[slot]) + at - kFirst);
  }
  // Not limited to the table.
  __device__ __forceinline__ int near_bucket(uint32_t d) const {
    int guess = bucket_guess(fmaxf(__uint2float_rz(d), 1.f));
    return guess + int(d >= buckets.threshold[guess]);
  }
  __device__ __forceinline__ Piece piece_of(TimeSpan rows, TimeSpan keys, const float* time, bool far, int last) const {
    if (last < 0) return {0, 0.f, 0.f, 0};
    if (far) return {Piece::kFar, 0.f, 0.f, 0};
    if (rows.kinds | keys.kinds || rows.least > rows.most || keys.least > keys.most) return {Piece::kMany, 0.f, 0.f, 0};
    int low = min(near_bucket(max(max(rows.least - keys.most, keys.least - rows.most), 0)), last);
    int high = min(near_bucket(max(rows.most - keys.least, keys.most - rows.least)), last);
    int kind = low == high ? 0 : keys.most > rows.least || high > low + 1 ? Piece::kMany : Piece::kTwo;
    return {kind, time[low], time[low == high ? low : low + 1], int(buckets.threshold[low])};
  }
};

// By the warp that draws: the times of an item's rows are asked for first, for they take longest. They stand where masks will.
template <typename Shared, typename T>
__device__ __forceinline__ void ask_row_times(Shared& shared, int slot, const Call<T>& p, const Work& work) {
  const int64_t* from = p.query_time + work.s.query + work.first;
#pragma unroll 1
  for (int r = threadIdx.x % 32; r < Shared::C::kRows; r += 32)
    if (p.last_bucket >= 0 && r < work.rows) copy_async<8>(shared_address(&shared.seen[slot][r]), from + r);
  copy_async_commit();
}
// By a warp: a head's table of times, for some slots.
template <typename Shared, typename T>
__device__ __forceinline__ void stage_times(Shared& shared, int from, int to, const Call<T>& p, int head) {
  constexpr int kEach = kNearThresholds / 32 + 1;
  auto& bias = shared.bias;
  int lane = threadIdx.x % 32;
  int64_t time_row = p.time_per_head ? head * p.time_width : 0;
  uint32_t bits[kEach], first[kCells / 32 + 1];
#pragma unroll
  for (int x = 0; x <= kCells / 32; ++x) first[x] = kNearTables.bucket[min(32 * x + lane, kCells)];
#pragma unroll
  for (int x = 0; x < kEach; ++x) bits[x] = p.last_bucket >= 0 ? p.time_w.bits(time_row + min(32 * x + lane, p.last_bucket)) : 0;
#pragma unroll 1
  for (int slot = from; slot < to; ++slot) {
#pragma unroll
    for (int x = 0; x < kEach; ++x) {
      int bucket = 32 * x + lane;
      bool timed = p.last_bucket >= 0 && bucket < kUntimed;
      if (bucket <= kNearThresholds) bias.time[slot][bucket] = timed ? p.unit * p.time_w.value(bits[x]) : 0.f;
    }
    __syncwarp();
#pragma unroll
    for (int x = 0; x <= kCells / 32; ++x)
      if (32 * x + lane <= kCells) bias.begins[slot][32 * x + lane] = bias.time[slot][first[x]];
  }
}
// By the same warp: what the bias needs of the rows, and see(r), which may write where a row's time stood. A loop of few instructions: they
// are in no cache when an item is drawn.
template <typename Shared, typename T, typename See>
__device__ __forceinline__ void stage_rows(Shared& shared, int slot, const Call<T>& p, const Work& work, See&& see) {
  auto& bias = shared.bias;
  int lane = threadIdx.x % 32, untimed = work.s.contextual - work.s.shift - work.first;
  int64_t base = first_time(p, work.s);
  if (p.time_per_head) stage_times(shared, slot, slot + 1, p, work.head);
  copy_async_wait<0>();
  __syncwarp();
#pragma unroll 1
  for (int r = lane; r < Shared::C::kRows; r += 32) {
    bool there = p.last_bucket >= 0 && r < work.rows, low = lane < 16;
    NearTime time{kNoFixedTime, kSomeUntimed};
    if (there && r >= untimed) time = near_time(*reinterpret_cast<const int64_t*>(&shared.seen[slot][r]), base);
    bias.row_near[slot][r] = time.at;
    bool timed = there && !(time.kind & kSomeUntimed);
    int least = timed ? time.at : INT_MAX, most = timed ? time.at : INT_MIN;
    TimeSpan of_low{__reduce_min_sync(kFullWarp, low ? least : INT_MAX), __reduce_max_sync(kFullWarp, low ? most : INT_MIN)};
    TimeSpan of_high{__reduce_min_sync(kFullWarp, low ? INT_MAX : least), __reduce_max_sync(kFullWarp, low ? INT_MIN : most)};
    int kinds = __reduce_or_sync(kFullWarp, there ? unsigned(time.kind) << (low ? 0 : 4) : 0u);
    of_low.kinds = kinds & 15, of_high.kinds = kinds >> 4;
    if (lane % 16 == 0) bias.row_span[slot][r / 16] = low ? of_low : of_high;
    __syncwarp();
    see(r);
  }
  __syncwarp();
}

// Warps 2 and 3 of the loading warpgroup bring what the bias needs of a tile of keys, in turns.
template <typename Shared, typename T>
__device__ __forceinline__ void stage_bias(Shared& shared, const Call<T>& p, bool split) {
  using C = typename Shared::C;
  constexpr int kKeys = C::kKeys, kRows = C::kRows, kPieces = kKeys / 32, kBatch = kRows / 64;
  auto& bias = shared.bias;
  constexpr int kMod = std::remove_reference_t<decltype(bias)>::kPositions;
  int lane = threadIdx.x % 32, part = 0;
  float up = 1 / p.alpha;
  bool mine = threadIdx.x / 32 == 2, tells = mine && !split;  // where keys are split nobody waits for an item's end
  Ring<C::kRing> ring;
  if (mine) {
    constexpr int kWords = sizeof(NearBuckets) / 8, kEach = (kWords + 31) / 32;
    uint2 words[kEach];
#pragma unroll
    for (int x = 0; x < kEach; ++x)
      if (32 * x + lane < kWords) words[x] = reinterpret_cast<const uint2*>(&kNearTables.near)[32 * x + lane];
#pragma unroll
    for (int x = 0; x < kEach; ++x)
      if (32 * x + lane < kWords) reinterpret_cast<uint2*>(&bias.buckets)[32 * x + lane] = words[x];
  } else if (kArrivalsOfWarp == 1 && !p.time_per_head) {  // for racecheck, which does not follow this: before the block's first barrier
    stage_times(shared, 0, kSlots, p, 0);
  }
  meet(kStaging, 64);
  for (Ring<kSlots> turn;; turn.next()) {
    shared.work_known[turn.stage].wait(turn.parity);
    const Work& work = shared.work[turn.stage];
    bool full = false;  // what its rows see is known, too
    if (work.rows <= 0) return;
    int64_t base = first_time(p, work.s);
    int64_t position_row = p.pos_per_head ? int64_t(work.head) * p.positions : 0;
    int last = -2;  // the tile before
    bool told = !tells;
    auto tell = [&] {  // the next item can be drawn
      if (!told) shared.ending.arrive_for_warp(lane);
      told = true;
    };
    for (int n = first_tile(shared, turn.stage); n < work.tiles.last; last = n, n = work.tiles.from(n + 1), ring.next(), mine = !mine) {
      bool first = n != last + 1;
      if (first && ++part == C::kRing) part = 0;
      if (n + lead_of(work.tiles.last) >= work.tiles.last) tell();
      if (!mine) continue;
      int j0 = n * kKeys, history = work.s.history, farthest = j0 - min(work.s.shift + work.first + kRows - 1, history);
      // Asked for before the wait, looked at behind it.
      auto entry = [&](int x) { return p.positions ? p.pos_w.bits(position_row + min(abs(farthest + x), p.positions - 1)) : 0; };
      uint32_t fresh[kPieces];
      int64_t times[kPieces];
#pragma unroll
      for (int c = 0; c < kPieces; ++c) {
        int j = j0 + 32 * c + lane;
        fresh[c] = entry(kRows + 32 * c + lane);
        times[c] = p.last_bucket >= 0 && j < history ? p.key_time[work.s.time + j] : 0;
      }
      shared.k_empty[ring.stage].wait(ring.parity ^ 1);
      auto put = [&](int x, uint32_t bits) {
        float value = p.positions ? up * p.pos_w.value(bits) : 0.f;
        int at = farthest + x & kMod - 1, before = at - 1 & kMod - 1;
        bias.pos[part][at].x = bias.pos[part][before].y = value;
        if (at < kKeys) bias.pos[part][at + kMod].x = value;
        if (before < kKeys) bias.pos[part][before + kMod].y = value;
      };
#pragma unroll
      for (int c = 0; c < kPieces; ++c) {
        int j = 32 * c + lane;
        put(kRows + j, fresh[c]);
        bool there = p.last_bucket >= 0 && j0 + j < history;
        NearTime time{kNoMovingTime + 1, kSomeUntimed};
        if (there && j0 + j >= work.s.contextual) time = near_time(times[c], base);
        bias.near[ring.stage][j] = time.at;
        TimeSpan span = TimeSpan::of_warp(time, there);
        if (lane == 0) bias.span[ring.stage][c] = span;
      }
      if (first)
#pragma unroll
        for (int x0 = 0; x0 < kRows; x0 += 32 * kBatch) {
          uint32_t whole[kBatch];
#pragma unroll
          for (int x = 0; x < kBatch; ++x) whole[x] = entry(x0 + 32 * x + lane);
#pragma unroll
          for (int x = 0; x < kBatch; ++x) put(x0 + 32 * x + lane, whole[x]);
        }
      if (lane == 0) bias.part[ring.stage] = part;
      if (!full) shared.work_full[turn.stage].wait(turn.parity), full = true;
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
    tell();
    __syncwarp();
    shared.work_empty[turn.stage].arrive_for_warp(lane);
  }
}

}  // namespace forward_sm90
}  // namespace hstu::cuda::attention
