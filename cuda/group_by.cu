#include "group_by.cuh"

#include "debug.cuh"
#include "scan.cuh"

namespace hstu::cuda {
namespace {

// Least-significant-digit radix sort of (id, position), stable, kBits a pass; only as many passes as num_rows has digits. Tiles of
// kTile pairs are counted by digit, the counts summed digit by digit and tile by tile, and each tile scattered to where they say.
constexpr int kBits = 8, kDigits = 1 << kBits, kThreads = kDigits, kWarps = kThreads / 32, kRounds = 16;
constexpr int kTile = kThreads * kRounds;

// The sort key of position `at`: its id, or num_rows for ids that are no row.
struct Ids {
  const int64_t* ids;
  int64_t num_rows;
  __device__ uint32_t operator[](int64_t at) const {
    int64_t id = ids[at];
    return uint32_t(id >= 0 && id < num_rows ? id : num_rows);
  }
};

__device__ __forceinline__ int digit_of(uint32_t key, int shift) { return int(key >> shift) & (kDigits - 1); }

// A block counts the digits of one tile; counts[digit, tile].
template <typename Keys>
__global__ void __launch_bounds__(kThreads) count_digits(uint32_t* counts, Keys keys, int64_t count, int shift) {
  __shared__ uint32_t counted[kDigits];
  counted[threadIdx.x] = 0;
  __syncthreads();
  int64_t begin = int64_t(blockIdx.x) * kTile;
  for (int round = 0; round < kRounds; ++round) {
    int64_t at = begin + round * kThreads + threadIdx.x;
    if (at < count) atomicAdd(&counted[digit_of(keys[at], shift)], 1u);
  }
  __syncthreads();
  counts[int64_t(threadIdx.x) * gridDim.x + blockIdx.x] = counted[threadIdx.x];
}

// A block scatters one tile, a warp kRounds x 32 neighbouring pairs of it, 32 a round, so that (warp, round, lane) is the order of
// positions. next[warp, digit] counts what the warp has seen of a digit; lanes with one digit find each other by match and rank by
// lane. Once all warps have counted, next becomes where the warp's first pair of the digit goes.
template <typename Keys, bool kFirst>
__global__ void __launch_bounds__(kThreads) scatter(uint32_t* keys_out, uint32_t* positions_out, Keys keys, const uint32_t* positions,
                                                    const uint32_t* tile_starts, int64_t count, int shift) {
  __shared__ uint32_t next[kWarps][kDigits];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int w = 0; w < kWarps; ++w) next[w][threadIdx.x] = 0;
  __syncthreads();
  int64_t begin = int64_t(blockIdx.x) * kTile + warp * (kRounds * 32) + lane;
  uint32_t key[kRounds], rank[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) key[round] = begin + round * 32 < count ? keys[begin + round * 32] : 0;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    bool valid = begin + round * 32 < count;
    int digit = digit_of(key[round], shift);
    uint32_t same = __match_any_sync(kFullWarp, valid ? digit : kDigits);
    uint32_t seen = valid ? next[warp][digit] : 0;
    rank[round] = seen + __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (valid && lane == 31 - __clz(same)) next[warp][digit] = seen + __popc(same);
    __syncwarp();
  }
  __syncthreads();
  uint32_t start = tile_starts[int64_t(threadIdx.x) * gridDim.x + blockIdx.x];
  for (int w = 0; w < kWarps; ++w) {
    uint32_t own = next[w][threadIdx.x];
    next[w][threadIdx.x] = start;
    start += own;
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    int64_t at = begin + round * 32;
    if (at >= count) continue;
    uint32_t to = next[warp][digit_of(key[round], shift)] + rank[round];
    keys_out[to] = key[round];
    positions_out[to] = kFirst ? uint32_t(at) : positions[at];
  }
}

// A thread finds where one row begins: the number of sorted keys below it.
__global__ void find_starts(int64_t* starts, const uint32_t* keys, int64_t count, int64_t num_rows) {
  int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row > num_rows) return;
  int64_t low = 0, high = count;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (keys[middle] < row)
      low = middle + 1;
    else
      high = middle;
  }
  starts[row] = low;
}

__global__ void find_outside(unsigned long long* first, const int64_t* ids, int64_t count, int64_t low, int64_t high,
                             const float* weights, int64_t ids_a_weight) {
  for (int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; t < count; t += int64_t(gridDim.x) * blockDim.x)
    if ((ids[t] < low || ids[t] > high) && (!weights || weights[t / ids_a_weight] != 0)) atomicMin(first, static_cast<unsigned long long>(t));
}

}  // namespace

SortedIds::SortedIds(const int64_t* ids, int64_t count, int64_t num_rows, Stream stream) : keys(count, stream), order(count, stream) {
  HSTU_CHECK(count < (int64_t(1) << 32), kInvalidArgument, "group_by_id: ", count, " ids, at most 2^32 - 1 are supported");
  HSTU_CHECK(num_rows < (int64_t(1) << 32), kInvalidArgument, "group_by_id: ", num_rows, " rows, at most 2^32 - 1 are supported");
  int passes = 1;  // keys are 0 .. num_rows
  while (passes * kBits < 32 && (num_rows >> (passes * kBits)) > 0) ++passes;
  int64_t tiles = ceil_div(count, kTile), cells = tiles * kDigits;
  Scratch<uint32_t> spare_order(passes > 1 ? count : 0, stream), spare_keys(passes > 1 ? count : 0, stream);
  Scratch<uint32_t> counts(cells, stream), tile_starts(cells + 1, stream);
  uint32_t* sorted[2] = {keys, spare_keys};  // the last pass writes sorted[0] and positions[0]
  uint32_t* positions[2] = {order, spare_order};
  for (int pass = 0; pass < passes && count > 0; ++pass) {
    int to = (passes - 1 - pass) % 2, from = 1 - to, shift = pass * kBits;
    auto sort = [&](auto source, auto count_kernel, auto scatter_kernel) {
      launch(count_kernel, unsigned(tiles), kThreads, 0, stream, counts.get(), source, count, shift);
      exclusive_scan<uint32_t, uint32_t>(tile_starts, counts, cells, stream);
      launch(scatter_kernel, unsigned(tiles), kThreads, 0, stream, sorted[to], positions[to], source,
             static_cast<const uint32_t*>(positions[from]), static_cast<const uint32_t*>(tile_starts), count, shift);
    };
    if (pass == 0)
      sort(Ids{ids, num_rows}, count_digits<Ids>, scatter<Ids, true>);
    else
      sort(static_cast<const uint32_t*>(sorted[from]), count_digits<const uint32_t*>, scatter<const uint32_t*, false>);
  }
}

Groups::Groups(const int64_t* ids, int64_t count, int64_t num_rows, Stream stream)
    : SortedIds(ids, count, num_rows, stream), starts(num_rows + 1, stream) {
  launch(find_starts, unsigned(ceil_div(num_rows + 1, 256)), 256, 0, stream, starts.get(), static_cast<const uint32_t*>(keys), count,
         num_rows);
}

void check_ids(const char* op, const char* name, const int64_t* ids, int64_t count, int64_t low, int64_t high, Stream stream,
               const float* weights, int64_t ids_a_weight) {
  if (!debugging() || count == 0) return;
  Scratch<unsigned long long> first(1, stream);
  unsigned long long t = ~0ull;
  CUDA_CHECK(cudaMemsetAsync(first, 0xff, sizeof t, handle_of(stream)));
  launch(find_outside, blocks_for(count, 256, 4096), 256, 0, stream, first.get(), ids, count, low, high, weights, ids_a_weight);
  read(&t, first, sizeof t, stream);
  if (t == ~0ull) return;
  int64_t id = 0;
  read(&id, ids + t, sizeof id, stream);
  throw Error(kInvalidArgument, message(op, ": ", name, "[", t, "] = ", id, " is outside ", low, "..", high));
}

}  // namespace hstu::cuda
