// The relative bias of the forward, for scores in registers: by position they begin with it, by time it is found for pieces of 16 rows by
// 32 keys.
#pragma once
#include "hstu_attention_bias.cuh"

namespace hstu::cuda::attention {

// Time differences d by cells: the exponent and two bits of float(d + 1). At most one bucket begins within a cell.
constexpr int kCells = 128;
constexpr int64_t cell_start(int cell) { return ((4 + cell % 4) * (int64_t(1) << cell / 4) + 3) / 4; }  // the least d + 1
struct CellBuckets {
  uint8_t at[kCells];
};
constexpr CellBuckets cell_buckets() {
  CellBuckets buckets{};
  for (int x = 0; x < kCells; ++x)
    while (kTimeThreshold[buckets.at[x]] + 1 <= cell_start(x)) ++buckets.at[x];
  return buckets;
}
constexpr bool cells_hold_one_threshold() {
  for (int x = 0; x + 1 < kCells; ++x) {
    int64_t next = kTimeThreshold[cell_buckets().at[x]] + 1, after = kTimeThreshold[cell_buckets().at[x] + 1] + 1;
    if (after < cell_start(x + 1) && next < cell_start(x + 1)) return false;
  }
  return true;
}
static_assert(cells_hold_one_threshold());
static __constant__ CellBuckets kCellBuckets = cell_buckets();

// How the time's term of a piece is found: by two values (often the same), of which the later one goes for differences of `least` and more,
// where no key is later than a query; each score by itself; or from whole times, which goes for all pieces of a tile.
struct Piece {
  enum Kind { kTwo, kMany, kFar };
  int kind, partly, least;  // partly: some pair is hidden
  float first, second;
};
// Of a warp: each lane's, and by lane which have two values or more, kinds, hidden pairs.
struct Pieces {
  Piece mine;
  unsigned apart, many, far, partly;
};

// kRows query rows of a block against tiles of kTile keys, in two buffers.
template <int kRows, int kTile>
struct BiasPieces {
  static constexpr int kSegment = kRows + kTile, kHalves = kTile / 32, kStrips = kRows / 16;
  static constexpr int kPosPitch = kSegment / 32 * 32 + (kSegment % 32 ? 48 : 16);  // 16 mod 32: rows of either copy meet other banks
  struct Strip {  // 16 rows
    TimeSpan span;
    VisibleKeys some, every;  // what some and what every row sees
  };
  float4 cells[kCells];             // d + 1 where a bucket begins, the term below it, the term from there on
  float time[kNearThresholds + 1];  // time_w of the head, its last entry repeated; 0 from kUntimed on
  uint32_t threshold[kNearThresholds];
  alignas(16) float pos[2][2][kPosPitch];  // / alpha, by key - row + kRows - 1; and one place earlier, so that all pairs are aligned
  alignas(8) int near[2][kTile];
  TimeSpan spans[2][kHalves];
  Strip strips[kStrips];
  int row_near[kRows];

  template <int kThreads>
  using Ahead = BiasAhead<kSegment, kThreads>;

  template <int kThreads, typename T>
  __device__ __forceinline__ void stage_tables(const Call<T>& p, int head) {
    auto term = [&](int x) { return p.last_bucket >= 0 && x < kUntimed ? time_term(p, head, min(x, p.last_bucket)) : 0.f; };
    auto start = [](int x) { return uint32_t(min(kThresholds.at[x], int64_t(UINT32_MAX))); };
    for (int x = threadIdx.x; x <= kNearThresholds; x += kThreads) {
      time[x] = term(x);
      if (x < kNearThresholds) threshold[x] = start(x);
    }
    for (int x = threadIdx.x; x < kCells; x += kThreads) {
      int bucket = kCellBuckets.at[x];
      uint32_t begin = uint32_t(min(kThresholds.at[bucket] + 1, int64_t(UINT32_MAX)));
      cells[x] = float4{__uint_as_float(begin), term(bucket), term(bucket + 1), 0.f};
    }
    if (!p.positions)
      for (int x = threadIdx.x; x < int(sizeof(pos) / 4); x += kThreads) (&pos[0][0][0])[x] = 0;
  }
  // By a warp, for its rows: lane l has row `first` + l, if it is one of kEach and `there`.
  template <int kEach, int kWarps>
  __device__ __forceinline__ void stage_rows(int first, bool there, NearTime time_of_row, const SeenKeys<kRows, kWarps>& seen) {
    int lane = threadIdx.x % 32;
    VisibleKeys keys = seen.row[first + lane % kEach];
    if (lane < kEach) row_near[first + lane] = min(time_of_row.at, kNoFixedTime - 1);  // d + 1 is not 0
    bool empty = keys.begin >= keys.end;
#pragma unroll
    for (int x = 0; x < kEach / 16; ++x) {
      bool mine = lane / 16 == x;
      TimeSpan span = TimeSpan::of_warp(time_of_row, there && mine);
      VisibleKeys some{mine ? keys.prefix : 0, mine && !empty ? keys.begin : INT_MAX, mine && !empty ? keys.end : 0, 0};
      VisibleKeys every{mine ? keys.prefix : INT_MAX, mine ? keys.begin : 0, mine ? keys.end : INT_MAX, 0};
      some = some.any_of_warp(), every = every.all_of_warp();
      if (lane == 0) strips[first / 16 + x] = {span, some, every};
    }
  }
  // farthest: the position difference of entry 0; times: of the keys, `untimed` of them before the first that has one.
  template <int kThreads, typename T>
  __device__ __forceinline__ void fetch(Ahead<kThreads>& ahead, const Call<T>& p, int head, int farthest, const int64_t* times, int untimed,
                                        int count) const {
    if (p.positions) {
#pragma unroll
      for (int y = 0; y < (kSegment + kThreads - 1) / kThreads; ++y)
        if (y * kThreads + int(threadIdx.x) < kSegment) ahead.pos[y] = p.pos_w.bits((p.pos_per_head ? int64_t(head) * p.positions : 0) +
                                    min(abs(farthest - int(threadIdx.x) - y * kThreads), p.positions - 1));
    }
    int x = int(threadIdx.x) - (kThreads - kTile);  // the first threads have more of the positions
    ahead.there = p.last_bucket >= 0 && x >= 0 && x < count, ahead.timed = ahead.there && x >= untimed;
    if (ahead.timed) ahead.time = times[x];
  }
  template <int kThreads, typename T>
  __device__ __forceinline__ void commit(int stage, const Ahead<kThreads>& ahead, const Call<T>& p, float up, int64_t base) {
    if (p.positions) {
#pragma unroll
      for (int y = 0; y < (kSegment + kThreads - 1) / kThreads; ++y)
        if (int x = threadIdx.x + y * kThreads; x < kSegment) {
          float value = up * p.pos_w.value(ahead.pos[y]);
          pos[stage][0][x] = value;
          if (x > 0) pos[stage][1][x - 1] = value;
        }
    }
    if (int x = int(threadIdx.x) - (kThreads - kTile); p.last_bucket >= 0 && x >= 0) {
      NearTime time = ahead.timed ? near_time(ahead.time, base) : NearTime{kNoMovingTime, kSomeUntimed};
      near[stage][x] = time.at;
      TimeSpan span = TimeSpan::of_warp(time, ahead.there);
      if (x % 32 == 0) spans[stage][x / 32] = span;
    }
  }

  // Position bias / alpha, with which scores begin. First of a row: keys column, column + 1, the pair of keys 8 later, ...
  __device__ __forceinline__ const float2* row_starts(int stage, int row, int column) const {
    int at = column - row + kRows - 1;
    return reinterpret_cast<const float2*>(&pos[stage][at & 1][at & ~1]);
  }
  // Fragments on one diagonal begin alike. This thread has rows row0 + 8 x.
  template <int kM, int kN>
  struct Starts {
    float fragment[kN + 2 * kM - 2][4];
    __device__ __forceinline__ const float* of(int m, int n) const { return fragment[n + 2 * (kM - 1 - m)]; }
  };
  template <int kM, int kN>
  __device__ __forceinline__ Starts<kM, kN> starts(int stage, int row0, int column) const {
    Starts<kM, kN> starts;
    const float2* start = row_starts(stage, row0, column);
#pragma unroll
    for (int x = 0; x < kN + 2 * kM - 2; ++x) {
      float2 low = start[4 * (x - 2 * kM + 2)], high = start[4 * (x - 2 * kM + 1)];
      starts.fragment[x][0] = low.x, starts.fragment[x][1] = low.y, starts.fragment[x][2] = high.x, starts.fragment[x][3] = high.y;
    }
    return starts;
  }
  // Rows from `last` on stand at one position.
  template <int kM, int kN>
  __device__ __forceinline__ void begin(float (&c)[kM][kN][4], int stage, int row0, int column, int last) const {
#pragma unroll
    for (int y = 0; y < 2 * kM; ++y) {
      const float2* start = row_starts(stage, min(row0 + 8 * y, last), column);
#pragma unroll
      for (int x = 0; x < kN; ++x) c[y / 2][x][y % 2 * 2] = start[4 * x].x, c[y / 2][x][y % 2 * 2 + 1] = start[4 * x].y;
    }
  }

  // Not limited to the table.
  __device__ __forceinline__ int near_bucket(uint32_t d) const {
    int guess = bucket_guess(fmaxf(__uint2float_rz(d), 1.f));
    return guess + int(d >= threshold[guess]);
  }
  // Of strip `strip` and the tile's keys from 32 half on, which begin at key j.
  __device__ __forceinline__ Piece piece_of(int stage, int strip, int half, int j, int last) const {
    Strip rows = strips[strip];
    TimeSpan span = rows.span, keys = spans[stage][half];
    int kinds = span.kinds;
#pragma unroll
    for (int x = 0; x < kHalves; ++x) kinds |= spans[stage][x].kinds;
    int low = max(min(near_bucket(max(max(span.least - keys.most, keys.least - span.most), 0)), last), 0);
    int high = max(min(near_bucket(max(span.most - keys.least, keys.most - span.least)), last), 0);
    bool odd = (kinds != 0) | (span.least > span.most) | (keys.least > keys.most);
    bool many = odd | ((low != high) & !((keys.most <= span.least) & (high == low + 1)));
    bool hidden = !rows.some.any(j, j + 32), partly = !rows.every.all(j, j + 32);
    int kind = (last < 0) | hidden ? Piece::kTwo : kinds & kSomeFar ? Piece::kFar : many ? Piece::kMany : Piece::kTwo;
    bool one = (last < 0) | hidden | (low == high);
    return {kind, partly, int(threshold[low]), time[low], time[one ? low : high]};
  }

  // By a warp, of whose rows the strips are first_strip and the kM - 1 behind it, against keys from column c0 of the tile on, which begins
  // at key j0: a lane looks at one piece.
  template <int kM, int kN>
  __device__ __forceinline__ Pieces look(int stage, int first_strip, int c0, int j0, int last) const {
    constexpr int kEach = kN / 4;
    int lane = threadIdx.x % 32, half = c0 / 32 + lane % kEach;
    Pieces pieces;
    Piece& mine = pieces.mine;
    mine = piece_of(stage, first_strip + lane / kEach % kM, half, j0 + 32 * half, last);
    pieces.apart = __ballot_sync(kFullWarp, mine.first != mine.second || mine.kind != Piece::kTwo);
    pieces.many = __ballot_sync(kFullWarp, mine.kind == Piece::kMany), pieces.far = __ballot_sync(kFullWarp, mine.kind == Piece::kFar);
    pieces.partly = __ballot_sync(kFullWarp, mine.partly);
    return pieces;
  }

  // c = factor c + the time's term, unless some piece is kFar. All ways add the same value in the same operation.
  template <int kM, int kN>
  __device__ __forceinline__ void add_times(float (&c)[kM][kN][4], const Pieces& pieces, float factor, int stage, int row0,
                                            int column) const {
    auto shared_by = [&](auto value, int m, int h) { return __shfl_sync(kFullWarp, value, m * (kN / 4) + h); };
    if (!pieces.apart) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < kN / 4; ++h) {
          float term = shared_by(pieces.mine.first, m, h);
#pragma unroll
          for (int y = 0; y < 16; ++y) c[m][4 * h + y / 4][y % 4] = fmaf(factor, c[m][4 * h + y / 4][y % 4], term);
        }
      return;
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      int row[2] = {row_near[row0 + 16 * m], row_near[row0 + 16 * m + 8]};
#pragma unroll
      for (int h = 0; h < kN / 4; ++h) {
        const int* times = &near[stage][column + 32 * h];
        if (pieces.many >> (m * (kN / 4) + h) & 1)
          add_many(&c[m][4 * h], factor, row, times);
        else
          add_two(&c[m][4 * h], factor, row, times, shared_by(pieces.mine.least, m, h), shared_by(pieces.mine.first, m, h),
                  shared_by(pieces.mine.second, m, h));
      }
    }
  }
  // Of one piece: near times of this thread's two rows, and of its keys.
  __device__ __forceinline__ void add_two(float (*c)[4], float factor, const int (&row)[2], const int* times, int least, float first,
                                          float second) const {
    // Rows that are not there (kNoFixedTime, kNoMovingTime) may wrap; what they give is masked.
    int until[2] = {int(uint32_t(row[0]) - uint32_t(least)), int(uint32_t(row[1]) - uint32_t(least))};
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      int2 at = *reinterpret_cast<const int2*>(times + 8 * x);
#pragma unroll
      for (int e = 0; e < 4; ++e) c[x][e] = fmaf(factor, c[x][e], (e % 2 ? at.y : at.x) <= until[e / 2] ? second : first);
    }
  }
  __device__ __forceinline__ void add_many(float (*c)[4], float factor, const int (&row)[2], const int* times) const {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      int2 at = *reinterpret_cast<const int2*>(times + 8 * x);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        uint32_t d = __sad(row[e / 2], e % 2 ? at.y : at.x, 1);
        int place;  // by asm: the compiler makes four instructions of shift and load
        asm("shr.u32 %0, %1, 21;" : "=r"(place) : "r"(__float_as_uint(__uint2float_rz(d))));
        float4 cell = cells[place - (127 << 2)];
        c[x][e] = fmaf(factor, c[x][e], d >= __float_as_uint(cell.x) ? cell.z : cell.y);
      }
    }
  }

  // c = 0 for pairs that are hidden. seen: of this thread's first row; j: the key of column 0.
  template <int kM, int kN>
  __device__ __forceinline__ void hide(float (&c)[kM][kN][4], const Pieces& pieces, const VisibleKeys* seen, int j, int column0) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < kN / 4; ++h) {
        if (!(pieces.partly >> (m * (kN / 4) + h) & 1)) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t bits = seen[16 * m + 8 * half].bits32(j + 32 * h) >> column0;
#pragma unroll
          for (int x = 0; x < 8; ++x)
            if (!(bits >> (x / 2 * 8 + x % 2) & 1)) c[m][4 * h + x / 2][2 * half + x % 2] = 0.f;
        }
      }
  }
};

}  // namespace hstu::cuda::attention
