// The relative bias of HSTU attention: a table by position difference and one by time bucket. Time buckets, the bias of a tile of the
// backward, and the gradients of both tables. Tables are staged times Call::unit.
#pragma once
#include "hstu_attention.cuh"

namespace hstu::cuda::attention {

struct TimeThresholds {
  int64_t at[kTimeThresholds];
};
constexpr TimeThresholds time_thresholds() {
  TimeThresholds copy{};
  for (int x = 0; x < kTimeThresholds; ++x) copy.at[x] = kTimeThreshold[x];
  return copy;
}
static __constant__ TimeThresholds kThresholds = time_thresholds();

// time_bucket() of mask.h for a difference d >= 1. bucket(d) = floor(ln d / 0.301) for whole d, so a guess from below that is less than 1
// off leaves one comparison: log2 d by a truncated float's exponent and mantissa (at most 0.09 too small) times 9432 / 4096, a little
// less than ln 2 / 0.301.
__device__ __forceinline__ int bucket_guess(float d) { return int(__umulhi(__float_as_uint(d) - (127u << 23), 9432u / 8)); }
__device__ __forceinline__ int bucket_of(int64_t query_time, int64_t key_time, int last) {
  uint64_t a = uint64_t(query_time), b = uint64_t(key_time), d = query_time > key_time ? a - b : b - a;
  int guess = min(bucket_guess(__ull2float_rz(max(d, uint64_t(1)))), kTimeThresholds - 1);
  return min(guess + int(d >= uint64_t(kThresholds.at[guess])), last);
}

// Times as 32-bit differences to one time of the sequence, unless some time is 2^29 seconds (17 years) away from it. Differences of near
// times then fall into buckets below kUntimed, and those of a row without a time (contextual) into later ones, where the staged table is 0.
constexpr int kNoMovingTime = INT_MIN, kNoFixedTime = INT_MAX;
constexpr int kNearThresholds = 76, kUntimed = 70;
static_assert(kTimeThreshold[kUntimed - 1] > 1 << 30 && kTimeThreshold[kUntimed - 1] < (1ll << 31) - (1 << 29) &&
              kTimeThreshold[kNearThresholds - 1] > UINT32_MAX);
constexpr int kFewBuckets = 6;
enum TimeKinds { kSomeFar = 1, kSomeUntimed = 2 };
struct NearTime {
  int at, kind;
};
template <typename T>
__device__ __forceinline__ int64_t first_time(const Call<T>& p, const Sequence& s) {
  return p.last_bucket >= 0 && s.length > 0 ? p.key_time[s.time + min(s.contextual, s.length - 1)] : 0;
}
__device__ __forceinline__ NearTime near_time(int64_t time, int64_t base) {
  uint64_t d = time > base ? uint64_t(time) - uint64_t(base) : uint64_t(base) - uint64_t(time);
  if (d >= 1u << 29) return {0, kSomeFar};
  return {int(time - base), 0};
}

// Times of some rows: the earliest and the latest, and whether some are far or missing.
struct TimeSpan {
  int least, most, kinds;
  // Of the rows of a warp's lanes; `there` false: the lane has none.
  static __device__ __forceinline__ TimeSpan of_warp(NearTime time, bool there) {
    bool timed = there && !(time.kind & kSomeUntimed);
    return {__reduce_min_sync(kFullWarp, timed ? time.at : INT_MAX), __reduce_max_sync(kFullWarp, timed ? time.at : INT_MIN),
            int(__reduce_or_sync(kFullWarp, unsigned(there ? time.kind : 0)))};
  }
};

template <typename T>
__device__ __forceinline__ float time_term(const Call<T>& p, int head, int bucket) {
  return bucket < 0 ? 0.f : p.unit * p.time_w.at((p.time_per_head ? head * p.time_width : 0) + bucket);
}

// How a tile's time term is found: by one bucket; by two or a few (low to high), where no key is later than a query; each element by
// itself; or from whole times.
enum class TimeKind { kOne, kTwo, kFew, kMany, kFar };
struct TimePath {
  int low = 0, high = 0;
  TimeKind kind = TimeKind::kOne;
  // fn(kind), one branch for all that follows from it.
  template <typename Fn>
  __device__ __forceinline__ void pick(Fn&& fn) const {
    if (kind == TimeKind::kOne) fn(std::integral_constant<TimeKind, TimeKind::kOne>{});
    else if (kind == TimeKind::kTwo) fn(std::integral_constant<TimeKind, TimeKind::kTwo>{});
    else if (kind == TimeKind::kMany) fn(std::integral_constant<TimeKind, TimeKind::kMany>{});
    else if (kind == TimeKind::kFew) fn(std::integral_constant<TimeKind, TimeKind::kFew>{});
    else fn(std::integral_constant<TimeKind, TimeKind::kFar>{});
  }
};

// What a thread brings for the next tile or stage: read from global memory before a tile's work, written to shared memory after it.
template <int kSegment, int kThreads>
struct BiasAhead {
  uint32_t pos[(kSegment + kThreads - 1) / kThreads];  // bits of table entries
  int64_t time;
  bool there, timed;
};

// The bias of the backward's tiles: keys stand still (they are a warp's accumulator rows), queries move on (kMoving columns of the
// accumulators, in kStages buffers). kSegment: rows plus columns of the block's tile, position differences that occur in it.
template <int kMoving, int kSegment, int kStages>
struct BiasTile {
  float time[kNearThresholds + 1];  // time_w of the head, its last entry repeated; 0 from kUntimed on
  uint32_t threshold[kNearThresholds];
  float pos[kStages][kSegment];     // by query row - key + keys of a tile - 1
  alignas(8) int near[kStages][kMoving];
  TimeSpan spans[kStages][kMoving / 32];

  template <int kThreads>
  using Ahead = BiasAhead<kSegment, kThreads>;

  template <int kThreads, typename T>
  __device__ __forceinline__ void stage_table(const Call<T>& p, int head) {
    if (p.last_bucket < 0) return;
    for (int x = threadIdx.x; x <= kNearThresholds; x += kThreads) {
      time[x] = x < kUntimed ? p.unit * p.time_w.at((p.time_per_head ? head * p.time_width : 0) + min(x, p.last_bucket)) : 0.f;
      if (x < kNearThresholds) threshold[x] = uint32_t(min(kThresholds.at[x], int64_t(UINT32_MAX)));
    }
  }
  // nearest: the least position difference of the tile; times: of the moving rows, `timed` of them from the first that has one.
  template <int kThreads, typename T>
  __device__ __forceinline__ void fetch(Ahead<kThreads>& ahead, const Call<T>& p, int head, int nearest, const int64_t* times, int untimed,
                                        int count) const {
    if (p.positions) {
#pragma unroll
      for (int y = 0; y < (kSegment + kThreads - 1) / kThreads; ++y)
        ahead.pos[y] = p.pos_w.bits((p.pos_per_head ? int64_t(head) * p.positions : 0) +
                                    min(abs(nearest + int(threadIdx.x) + y * kThreads), p.positions - 1));
    }
    int x = threadIdx.x;
    ahead.there = p.last_bucket >= 0 && x < kMoving && x < count, ahead.timed = ahead.there && x >= untimed;
    if (ahead.timed) ahead.time = times[x];
  }
  template <int kThreads, typename T>
  __device__ __forceinline__ void commit(int stage, const Ahead<kThreads>& ahead, const Call<T>& p, int64_t base) {
#pragma unroll
    for (int y = 0; y < (kSegment + kThreads - 1) / kThreads; ++y)
      if (int x = threadIdx.x + y * kThreads; p.positions && x < kSegment) pos[stage][x] = p.unit * p.pos_w.value(ahead.pos[y]);
    if (p.last_bucket >= 0 && threadIdx.x < kMoving) {
      NearTime time = ahead.timed ? near_time(ahead.time, base) : NearTime{kNoMovingTime, kSomeUntimed};
      near[stage][threadIdx.x] = time.at;
      TimeSpan span = TimeSpan::of_warp(time, ahead.there);
      if (threadIdx.x % 32 == 0) spans[stage][threadIdx.x / 32] = span;
    }
  }

  // Not limited to the table.
  __device__ __forceinline__ int near_bucket(uint32_t d) const {
    int guess = bucket_guess(fmaxf(__uint2float_rz(d), 1.f));
    return guess + int(d >= threshold[guess]);
  }
  __device__ __forceinline__ TimePath path(int stage, TimeSpan fixed, int last) const {
    TimeSpan moving = spans[stage][0];
#pragma unroll
    for (int x = 1; x < kMoving / 32; ++x) {
      TimeSpan more = spans[stage][x];
      moving = {min(moving.least, more.least), max(moving.most, more.most), moving.kinds | more.kinds};
    }
    int kinds = moving.kinds | fixed.kinds;
    if (kinds || fixed.least > fixed.most || moving.least > moving.most)
      return {0, last, kinds & kSomeFar ? TimeKind::kFar : TimeKind::kMany};
    int least = max(max(fixed.least - moving.most, moving.least - fixed.most), 0);
    int most = max(fixed.most - moving.least, moving.most - fixed.least);
    int low = min(near_bucket(least), last), high = min(near_bucket(most), last);
    bool sorted = fixed.most <= moving.least;
    if (low == high || !sorted || high - low > kFewBuckets) return {low, high, low == high ? TimeKind::kOne : TimeKind::kMany};
    return {low, high, high == low + 1 ? TimeKind::kTwo : TimeKind::kFew};
  }
  static __device__ __forceinline__ uint32_t apart(int a, int b) { return a > b ? uint32_t(a) - uint32_t(b) : uint32_t(b) - uint32_t(a); }
  // Whether the time difference is at least `least` where no key is later than a query.
  static __device__ __forceinline__ bool reaches(int fixed, int moving, int least) {
    // Rows that are not there (kNoFixedTime, kNoMovingTime) may wrap; what they give is masked.
    return moving >= int(uint32_t(fixed) + uint32_t(least));
  }

  // v [kN][2] += the time term of one accumulator row, whose near time is `fixed`, against columns first + 8 x + e. exact(column) is the
  // term from whole times. For kOne it is nothing: `time[path.low]` is to be added to all.
  template <TimeKind kKind, int kN, typename Exact>
  __device__ __forceinline__ void add_time(float (&v)[kN][2], TimePath path, int stage, int fixed, int first, Exact&& exact) const {
    if constexpr (kKind == TimeKind::kFar) {
#pragma unroll 1
      for (int y = 0; y < 2 * kN; ++y) {
        float value = exact(first + y / 2 * 8 + y % 2);
#pragma unroll
        for (int x = 0; x < 2 * kN; ++x) v[x / 2][x % 2] += x == y ? value : 0.f;
      }
    } else if constexpr (kKind == TimeKind::kMany) {
#pragma unroll
      for (int x = 0; x < kN; ++x) {
        int2 at = *reinterpret_cast<const int2*>(&near[stage][first + 8 * x]);
        v[x][0] += time[near_bucket(apart(fixed, at.x))], v[x][1] += time[near_bucket(apart(fixed, at.y))];
      }
    } else if constexpr (kKind == TimeKind::kTwo) {
      int least = int(threshold[path.low]);
      float low = time[path.low], high = time[path.high];
#pragma unroll
      for (int x = 0; x < kN; ++x) {
        int2 at = *reinterpret_cast<const int2*>(&near[stage][first + 8 * x]);
        v[x][0] += reaches(fixed, at.x, least) ? high : low, v[x][1] += reaches(fixed, at.y, least) ? high : low;
      }
    } else if constexpr (kKind == TimeKind::kFew) {
      float term[kN][2];
#pragma unroll
      for (int x = 0; x < kN; ++x) term[x][0] = term[x][1] = time[path.low];
#pragma unroll 1
      for (int bucket = path.low + 1; bucket <= path.high; ++bucket) {
        int least = int(threshold[bucket - 1]);
        float value = time[bucket];
#pragma unroll
        for (int x = 0; x < kN; ++x) {
          int2 at = *reinterpret_cast<const int2*>(&near[stage][first + 8 * x]);
          if (reaches(fixed, at.x, least)) term[x][0] = value;
          if (reaches(fixed, at.y, least)) term[x][1] = value;
        }
      }
#pragma unroll
      for (int x = 0; x < kN; ++x) v[x][0] += term[x][0], v[x][1] += term[x][1];
    }
  }
};

// The bias of a target, row `query_row` of q, and key j of its own group; `bucket` gets the time bucket, -1 without a time table.
template <typename T>
__device__ __forceinline__ float own_bias(const Call<T>& p, const Sequence& s, int head, int64_t query_row, int j, int& bucket) {
  bucket = -1;
  float bias = p.positions ? p.unit * p.pos_w.at(p.pos_per_head ? int64_t(head) * p.positions : 0) : 0.f;
  if (p.last_bucket < 0) return bias;
  bucket = bucket_of(p.query_time[query_row], p.key_time[s.time + j], p.last_bucket);
  return bias + time_term(p, head, bucket);
}

// The bucket of query row i (key position) and key j from whole times, -1 where one is contextual.
template <typename T>
__device__ __forceinline__ int exact_bucket(const Call<T>& p, const Sequence& s, int i, int j) {
  if (i < s.contextual || j < s.contextual || i >= s.length || j >= s.length) return -1;
  return bucket_of(p.query_time[s.query + i - s.shift], p.key_time[s.time + j], p.last_bucket);
}

// ---- Gradients of the tables -----------------------------------------------------------------------------------------------------

// One warp's sums by time bucket, in shared memory. Where a tile holds one bucket or two a lane only adds to registers; where it holds
// many, dS is rounded to 20 bits below the tile's largest and summed as integers, for integers may be added in any order.
struct TimeSums {
  float sum[kTimeThresholds + 2];
  int part[kTimeThresholds + 1];
};
struct TimeGradient {
  int bucket = 0;
  float run = 0, next_run = 0;  // of `bucket`, of the one after it

  __device__ __forceinline__ void flush(TimeSums& sums) {
    float total = warp_sum(run), next_total = warp_sum(next_run);
    if (threadIdx.x % 32 == 0) sums.sum[bucket] += total, sums.sum[bucket + 1] += next_total;
    __syncwarp();
    run = next_run = 0;
  }
  template <int kN, typename Bias, typename Exact>
  __device__ __forceinline__ void add(TimeSums& sums, const Bias& bias, TimePath path, int last, int stage, const int (&fixed)[2],
                                      int first, const float (&ds)[kN][4], Exact&& exact) {
    int lane = threadIdx.x % 32;
    if (path.kind == TimeKind::kOne) {
      if (path.low != bucket && path.low != bucket + 1) flush(sums), bucket = path.low;
      float sum = 0;
#pragma unroll
      for (int x = 0; x < kN; ++x) sum += (ds[x][0] + ds[x][1]) + (ds[x][2] + ds[x][3]);
      if (path.low == bucket) run += sum;
      else next_run += sum;
    } else if (path.kind == TimeKind::kTwo) {
      if (path.low != bucket) flush(sums), bucket = path.low;
      int least = int(bias.threshold[path.low]);
#pragma unroll
      for (int x = 0; x < kN; ++x) {
        int2 at = *reinterpret_cast<const int2*>(&bias.near[stage][first + 8 * x]);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (bias.reaches(fixed[e / 2], e % 2 ? at.y : at.x, least)) next_run += ds[x][e];
          else run += ds[x][e];
      }
    } else if (path.kind == TimeKind::kFew) {
      float above = 0;
#pragma unroll 1
      for (int b = path.high; b >= path.low; --b) {
        int least = b > path.low ? int(bias.threshold[b - 1]) : 0;
        float from = 0;  // sum from this bucket on
#pragma unroll
        for (int x = 0; x < kN; ++x) {
          int2 at = *reinterpret_cast<const int2*>(&bias.near[stage][first + 8 * x]);
          if (bias.reaches(fixed[0], at.x, least)) from += ds[x][0];
          if (bias.reaches(fixed[0], at.y, least)) from += ds[x][1];
          if (bias.reaches(fixed[1], at.x, least)) from += ds[x][2];
          if (bias.reaches(fixed[1], at.y, least)) from += ds[x][3];
        }
        float total = warp_sum(from - above);
        above = from;
        if (lane == 0) sums.sum[b] += total;
      }
      __syncwarp();
    } else {
      float most = 0;
#pragma unroll
      for (int x = 0; x < kN; ++x)
#pragma unroll
        for (int e = 0; e < 4; ++e) most = fmaxf(most, fabsf(ds[x][e]));
      bool finite = true;
#pragma unroll
      for (int x = 0; x < kN; ++x)
#pragma unroll
        for (int e = 0; e < 4; ++e) finite = finite && isfinite(ds[x][e]);
      uint32_t bits = __reduce_max_sync(kFullWarp, __float_as_uint(most));
      if (!__all_sync(kFullWarp, finite)) {
        for (int b = path.low + lane; b <= path.high; b += 32) sums.sum[b] = __int_as_float(0x7fffffff);
        __syncwarp();
        return;
      }
      if (bits == 0) return;
      int shift = min(19 + 127 - int(bits >> 23), 126);
      float up = __int_as_float((127 + shift) << 23), down = __int_as_float((127 - shift) << 23);
      if (path.kind == TimeKind::kFar) {
#pragma unroll 1
        for (int y = 0; y < 4 * kN; ++y) {
          int found = exact(first + y / 4 * 8 + y % 2, y % 4 / 2);
          float value = 0;
#pragma unroll
          for (int x = 0; x < 4 * kN; ++x) value += x == y ? ds[x / 4][x % 4] : 0.f;
          if (found >= 0) atomicAdd(&sums.part[found], __float2int_rn(value * up));
        }
      } else {
#pragma unroll
        for (int x = 0; x < kN; ++x)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            int found = bias.near_bucket(bias.apart(fixed[e / 2], bias.near[stage][first + 8 * x + e % 2]));
            int value = __float2int_rn(ds[x][e] * up);
            if (value != 0 && found < kUntimed) atomicAdd(&sums.part[min(found, last)], value);
          }
      }
      __syncwarp();
      for (int b = path.low + lane; b <= path.high; b += 32) sums.sum[b] += float(sums.part[b]) * down, sums.part[b] = 0;
      __syncwarp();
    }
  }
};

// v[0 .. ceil(kCount / 2)) = the lower or (where this lane's bit is set) the upper half of v, each added to the partner lane's.
template <int kCount>
__device__ __forceinline__ void halve(float* v, int bit) {
  bool upper = threadIdx.x & bit;
#pragma unroll
  for (int x = 0; x < (kCount + 1) / 2; ++x) {
    float high = x + (kCount + 1) / 2 < kCount ? v[x + (kCount + 1) / 2] : 0.f, sent = upper ? v[x] : high;
    v[x] = (upper ? high : v[x]) + __shfl_xor_sync(kFullWarp, sent, bit);
  }
}

// Sums of dS along the diagonals of a tile of keys by queries, from shared memory. A warp has kEach neighbouring diagonals of 8 x 8 blocks.
// The blocks of each are added first, in the 16-bit types by mma with two unit matrices side by side; then element (g, c) of a sum of
// blocks belongs to diagonal c - g, of this block or (c < g) 8 before: rows are rotated by g and added over g.
template <typename T, int kKeyTile, int kQueryTile, int kPitch, int kWarps>
struct Diagonals {
  static constexpr int kKeyBlocks = kKeyTile / 8, kQueryBlocks = kQueryTile / 8;
  static constexpr int kBlocks = kKeyBlocks < kQueryBlocks ? kKeyBlocks : kQueryBlocks;
  static constexpr int kEach = (kKeyBlocks + kQueryBlocks - 2) / kWarps + 1;
  float part[kWarps][8 * (kEach + 1)];

  // Columns of ds [kKeyTile, kPitch] from `columns` on count as 0.
  __device__ __forceinline__ void add(const T* ds, int columns) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    float block[kEach + 2][4] = {};  // the first and the last stay 0
#pragma unroll
    for (int x = 0; x < kEach; ++x) {
      int apart = 1 - kKeyBlocks + warp * kEach + x, first = max(-apart, 0), last = min(kKeyBlocks, kQueryBlocks - apart);
      if constexpr (kIsHalf<T>) {
        uint32_t unit = pack_pair<T>(2 * t == g ? 1.f : 0.f, 2 * t + 1 == g ? 1.f : 0.f), left[4] = {unit, 0, unit, 0};
#pragma unroll
        for (int b = 0; b < kBlocks; b += 4) {
          int mine = min(first + b + lane / 8, last - 1), column = 8 * (first + b + apart) + g;
          uint32_t right[4];
          load_matrices_transposed(right, shared_address(ds + max(8 * mine + lane % 8, 0) * kPitch + max(8 * (mine + apart), 0)));
#pragma unroll
          for (int y = 0; y < 4; ++y)
            if (first + b + y >= last || column + 8 * y >= columns) right[y] = 0;
          mma_m16n8k16<T>(block[x + 1], left, right[0], right[1]);
          mma_m16n8k16<T>(block[x + 1], left, right[2], right[3]);
        }
      } else {
        for (int b = first; b < last; ++b) {
          int column = 8 * (b + apart) + 2 * t;
          float2 two = *reinterpret_cast<const float2*>(ds + (8 * b + g) * kPitch + column);
          block[x + 1][0] += column < columns ? two.x : 0.f, block[x + 1][1] += column + 1 < columns ? two.y : 0.f;
        }
      }
    }
    constexpr int kCount = 2 * (kEach + 1), kHalf = (kCount + 1) / 2, kQuarter = (kHalf + 1) / 2, kEighth = (kQuarter + 1) / 2;
    float sums[kCount];
#pragma unroll
    for (int x = 0; x <= kEach; ++x) {
      float low = 2 * t >= g ? block[x][0] : block[x + 1][0], high = 2 * t + 1 >= g ? block[x][1] : block[x + 1][1];
      sums[2 * x] = __shfl_sync(kFullWarp, g % 2 ? high : low, g * 4 + (t + g / 2) % 4);
      sums[2 * x + 1] = __shfl_sync(kFullWarp, g % 2 ? low : high, g * 4 + (t + (g + 1) / 2) % 4);
    }
    halve<kCount>(sums, 16), halve<kHalf>(sums, 8), halve<kQuarter>(sums, 4);
    int start = (lane & 16 ? kHalf : 0) + (lane & 8 ? kQuarter : 0) + (lane & 4 ? kEighth : 0);
    int end = min(lane & 16 ? kCount : kHalf, (lane & 16 ? kHalf : 0) + (lane & 8 ? kHalf : kQuarter));
    end = min(end, (lane & 16 ? kHalf : 0) + (lane & 8 ? kQuarter : 0) + (lane & 4 ? kQuarter : kEighth));
#pragma unroll
    for (int x = 0; x < kEighth; ++x)
      if (int j = start + x; j < end) part[warp][j / 2 * 8 + 2 * t + j % 2] = sums[x];
  }
  // The diagonal where query - key + kKeyTile - 1 = x; between neighbouring warps lie eight that both have a part of.
  __device__ __forceinline__ float at(int x) const {
    int slot = (x + 1) / 8, offset = (x + 1) % 8, warp = slot / kEach, own = slot % kEach;
    return part[warp][8 * own + offset] + (own == 0 && warp > 0 ? part[warp - 1][8 * kEach + offset] : 0.f);
  }
};

// table [Hr, width] = (or, with `more`, +=) sums over `copies` rows [copies, entries] of each of its rows, 0 from `entries` on. A block
// owns 32 entries, a thread every 32nd copy of one; sums in float64, in a fixed order.
static __global__ void __launch_bounds__(1024) reduce_table_kernel(float* table, const float* sums, int64_t copies, int entries,
                                                                   int64_t width, bool more) {
  __shared__ double parts[32][33];
  int64_t entry = int64_t(blockIdx.x) * 32 + threadIdx.x, row = blockIdx.y;
  double sum = 0;
  for (int64_t copy = threadIdx.y; entry < entries && copy < copies; copy += 32) sum += sums[(row * copies + copy) * entries + entry];
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || entry >= width) return;
  for (int y = 1; y < 32; ++y) sum += parts[y][threadIdx.x];
  table[row * width + entry] = float(more ? table[row * width + entry] + sum : sum);
}

inline void reduce_table(Tensor& table, const float* sums, int64_t copies, int heads, int entries, bool more, Stream stream) {
  int64_t rows = table.shape[0], width = table.shape[1];
  launch(reduce_table_kernel, dim3(unsigned(ceil_div(width, 32)), unsigned(rows)), dim3(32, 32), 0, stream, table.as<float>(), sums,
         rows > 1 ? copies : copies * heads, entries, width, more);
}

}  // namespace hstu::cuda::attention
