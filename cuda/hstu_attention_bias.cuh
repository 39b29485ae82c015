// The relative bias of HSTU attention: a table by position difference and one by time bucket, staged for a tile in shared memory, and the
// gradients of both tables.
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
__device__ __forceinline__ int bucket_of(int64_t query_time, int64_t key_time, const int64_t* thresholds, int last) {
  uint64_t a = uint64_t(query_time), b = uint64_t(key_time), d = query_time > key_time ? a - b : b - a;
  int guess = min(bucket_guess(__ull2float_rz(max(d, uint64_t(1)))), kTimeThresholds - 1);
  return min(guess + int(d >= uint64_t(thresholds[guess])), last);
}

// The relative bias of kQueries queries from key position i0 on against tiles of keys, in shared memory. Times stand there twice:
// in full, and as 32-bit differences to one time of the sequence, which are used unless some time is 2^30 seconds (34 years) away.
template <int kQueries, int kTileKeys, int kStages>
struct BiasTile {
  int64_t threshold[kTimeThresholds + 1], query_time[kQueries], key_time[kStages][kTileKeys];
  int query_near[kQueries], key_near[kStages][kTileKeys];
  float pos[kStages][kQueries + kTileKeys];  // by pos(i) - j
  float time[kTimeThresholds + 1];           // time_w of the head
  int far[kStages + 1];                      // whether some time of a stage's keys, or of the queries (last), so far was far

  template <int kThreads, typename T>
  __device__ __forceinline__ void stage_table(const Call<T>& p, int head) {
    if (threadIdx.x <= kStages) far[threadIdx.x] = 0;
    for (int x = threadIdx.x; x <= p.last_bucket; x += kThreads)
      time[x] = to_float(p.time_w[(p.time_per_head ? head * p.time_width : 0) + x]);
    for (int x = threadIdx.x; p.last_bucket >= 0 && x < kTimeThresholds; x += kThreads) threshold[x] = kThresholds.at[x];
  }
  template <typename T>
  __device__ __forceinline__ void stage_time(int64_t& full, int& near, int& far, const Call<T>& p, const Sequence& s,
                                             const int64_t* time) {
    full = time ? *time : 0, near = 0;
    if (!time) return;
    int64_t base = p.key_time[s.time + min(s.contextual, s.length - 1)];
    uint64_t d = full > base ? uint64_t(full) - uint64_t(base) : uint64_t(base) - uint64_t(full);
    if (d < 1u << 30) near = full > base ? int(d) : -int(d);
    else far = 1;
  }
  // Call after a barrier that follows stage_table.
  template <int kThreads, typename T>
  __device__ __forceinline__ void stage_queries(const Call<T>& p, const Sequence& s, int i0) {
    for (int r = threadIdx.x; p.last_bucket >= 0 && r < kQueries; r += kThreads) {
      bool timed = i0 + r < s.length && i0 + r >= s.contextual;
      stage_time(query_time[r], query_near[r], far[kStages], p, s, timed ? p.query_time + s.query + i0 + r - s.shift : nullptr);
    }
  }
  template <int kThreads, typename T>
  __device__ __forceinline__ void stage_keys(const Call<T>& p, const Sequence& s, int stage, int j0) {
    for (int c = threadIdx.x; p.last_bucket >= 0 && c < kTileKeys; c += kThreads) {
      bool timed = j0 + c < s.history && j0 + c >= s.contextual;
      stage_time(key_time[stage][c], key_near[stage][c], far[stage], p, s, timed ? p.key_time + s.time + j0 + c : nullptr);
    }
  }
  template <int kThreads, typename T>
  __device__ __forceinline__ void stage_positions(const Call<T>& p, const Sequence& s, int head, int i0, int stage, int j0) {
    if (!p.positions) return;
    int nearest = min(i0, s.history) - j0 - (kTileKeys - 1);
    const T* table = p.pos_w + (p.pos_per_head ? int64_t(head) * p.positions : 0);
    for (int x = threadIdx.x; x < kQueries + kTileKeys - 1; x += kThreads)
      pos[stage][x] = to_float(table[min(abs(nearest + x), p.positions - 1)]);
  }

  // The score with the bias of query r and key c; `bucket` gets the time bucket, -1 where there is no time term.
  template <typename T>
  __device__ __forceinline__ float at(float score, const Call<T>& p, const Sequence& s, int i0, int stage, int j0, int r, int c,
                                      int& bucket) const {
    bucket = -1;
    if (p.positions) score += pos[stage][min(r, max(s.history - i0, 0)) - c + kTileKeys - 1];
    if (p.last_bucket < 0 || i0 + r < s.contextual || j0 + c < s.contextual) return score;
    if (far[stage] | far[kStages]) {
      bucket = bucket_of(query_time[r], key_time[stage][c], threshold, p.last_bucket);
    } else {
      uint32_t d = uint32_t(abs(query_near[r] - key_near[stage][c]));
      int guess = bucket_guess(__uint2float_rz(max(d, 1u)));
      bucket = min(guess + int(d >= uint32_t(threshold[guess])), p.last_bucket);
    }
    return score + time[bucket];
  }
  // The same for target i and a key j of its own group.
  template <typename T>
  __device__ __forceinline__ float own(float score, const Call<T>& p, const Sequence& s, int head, int64_t query_time, int j,
                                       int& bucket) const {
    bucket = -1;
    if (p.positions) score += to_float(p.pos_w[p.pos_per_head ? int64_t(head) * p.positions : 0]);
    if (p.last_bucket < 0) return score;
    bucket = bucket_of(query_time, p.key_time[s.time + j], threshold, p.last_bucket);
    return score + time[bucket];
  }
};

// ---- Gradients of the tables -----------------------------------------------------------------------------------------------------

constexpr int kTimeColumns = 8;

// A lane's run of equal time buckets. Eight lanes at a time add to their own columns, in a fixed order.
struct TimeRun {
  int bucket = -1;
  float sum = 0;
  __device__ __forceinline__ void add(float (*columns)[kTimeColumns], int next, float value) {
    int lane = threadIdx.x % 32;
    if (__any_sync(kFullWarp, next != bucket)) {
      bool ends = next != bucket && bucket >= 0;
#pragma unroll 1
      for (int turn = 0; turn < 32 / kTimeColumns; ++turn) {
        if (ends && lane / kTimeColumns == turn) columns[bucket][lane % kTimeColumns] += sum;
        __syncwarp();
      }
      if (next != bucket) bucket = next, sum = 0;
    }
    sum += value;
  }
};

// Adds a tile's dS to the sums by position difference: each thread owns a diagonal of the tile, then each entry of the table has one
// owner: the diagonals +d and -d belong to the thread of +d, those beyond the table to warp 0.
template <int kTile, int kThreads>
__device__ __forceinline__ void add_positions(float* sums, const float (*ds)[kTile + 1], float* diagonal, int positions, int history_rows,
                                              int nearest) {
  constexpr int kDiagonals = 2 * kTile - 1;
  static_assert(kDiagonals <= kThreads);
  int x = threadIdx.x, distance = nearest + x;  // of diagonal x
  if (x < kDiagonals) {
    float sum = 0;
    for (int r = max(0, x - kTile + 1); r < min(history_rows, x + 1); ++r) sum += ds[r][r + kTile - 1 - x];
    int c = history_rows + kTile - 1 - x;  // all targets stand at one position
    for (int r = history_rows; r < kTile && c >= 0 && c < kTile; ++r) sum += ds[r][c];
    diagonal[x] = sum;
  }
  __syncthreads();
  if (x < kDiagonals && abs(distance) < positions - 1) {
    int opposite = x - 2 * distance;
    bool paired = distance != 0 && opposite >= 0 && opposite < kDiagonals;
    if (!paired) sums[abs(distance)] += diagonal[x];
    else if (distance > 0) sums[distance] += diagonal[x] + diagonal[opposite];
  }
  if (x < 32) {
    float sum = 0;
    for (int y = x; y < kDiagonals; y += 32) sum += abs(nearest + y) >= positions - 1 ? diagonal[y] : 0.f;
    bool some = max(abs(nearest), abs(nearest + kDiagonals - 1)) >= positions - 1;
    if (some) sum = warp_sum(sum);
    if (some && x == 0) sums[positions - 1] += sum;
  }
}

// table [Hr, width] = sums over `copies` rows [copies, entries] of each of its rows, 0 from `entries` on. A block owns 32 entries, a thread
// every 32nd copy of one; sums in float64, in a fixed order.
static __global__ void __launch_bounds__(1024) reduce_table_kernel(float* table, const float* sums, int64_t copies, int entries, int64_t width) {
  __shared__ double parts[32][33];
  int64_t entry = int64_t(blockIdx.x) * 32 + threadIdx.x, row = blockIdx.y;
  double sum = 0;
  for (int64_t copy = threadIdx.y; entry < entries && copy < copies; copy += 32) sum += sums[(row * copies + copy) * entries + entry];
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || entry >= width) return;
  for (int y = 1; y < 32; ++y) sum += parts[y][threadIdx.x];
  table[row * width + entry] = float(sum);
}

inline void reduce_table(Tensor& table, const float* sums, int64_t copies, int heads, int entries, Stream stream) {
  int64_t rows = table.shape[0], width = table.shape[1];
  launch(reduce_table_kernel, dim3(unsigned(ceil_div(width, 32)), unsigned(rows)), dim3(32, 32), 0, stream, table.as<float>(), sums,
         rows > 1 ? copies : copies * heads, entries, width);
}

}  // namespace hstu::cuda::attention
