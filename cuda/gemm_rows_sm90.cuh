// C = A B + bias + residual on Hopper where A is made on chip, row by row: a layer norm, then what `Rows` makes of it. Depth of at most
// kMostDepth. Drawing and log in docs/linear.md.
#pragma once
#include "gemm_choice.cuh"
#include "gemm_sm90.cuh"
#include "sm90/device.cuh"

namespace hstu::cuda::dense_sm90 {

constexpr int kMostDepth = 512, kMakers = 3, kMadeThreads = 384, kMakingRegisters = 104, kMultiplyingRegisters = 200;
constexpr int kSide = 2, kUnits = 64 / kSide;  // rows that a warp makes at a time, and how many times that is a tile
constexpr int kSlice = 32, kMadeStages = 6;    // depth of a stage of B
constexpr int kSliceBytes = kColumns * kSlice * 2;

struct MadeShared {
  alignas(1024) unsigned char a[2][64 * kMostDepth * 2];  // [depth / 64][64 rows][128 bytes], swizzled
  alignas(1024) unsigned char b[kMadeStages][kSliceBytes];
  Barrier full[kMadeStages], empty[kMadeStages], raw[2], made[2], used[2];
  int taken[2];  // units of the tile that somebody makes
};

// A visit: `count` tiles across C of a pair of tiles down, for which A is made once.
struct Visits {
  Walk walk;
  int count, bands, visits;  // bands: visits of a pair
  __device__ __forceinline__ int row(int visit) const { return (visit / bands * kBlocks + cluster_rank()) * 64; }
  __device__ __forceinline__ int column(int visit) const { return visit % bands * count * kColumns; }
};

// threadIdx.x, read anew: there is no register to keep it in.
__device__ __forceinline__ int thread() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// Two sums over the warp, each by the tree of warp_sum; the upper half of the lanes gets y's, the lower one x's.
__device__ __forceinline__ float warp_sums(float x, float y) {
  bool upper = threadIdx.x & 16;
  float sum = (upper ? y : x) + __shfl_xor_sync(kFullWarp, upper ? x : y, 16);
#pragma unroll
  for (int lane = 8; lane > 0; lane /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lane);
  return sum;
}

// Takes their means from kSide rows of n, whose sums of a lane are `sum`; 1 / deviation of the row of a lane's half.
template <int kPieces, typename There>
__device__ __forceinline__ float center(float (&v)[kSide][kPieces][8], const float (&sum)[kSide], int n, float eps, There&& there) {
  float squares[kSide] = {}, mean = warp_sums(sum[0], sum[1]) / float(n);
#pragma unroll
  for (int s = 0; s < kSide; ++s) {
    float own = __shfl_sync(kFullWarp, mean, 16 * s);
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        v[s][p][e] -= own;
        if (there(p)) squares[s] += v[s][p][e] * v[s][p][e];
      }
  }
  return 1.f / sqrtf(warp_sums(squares[0], squares[1]) / float(n) + eps);
}

// kSide rows of the tile whose row 0 is `first`, from r on. What is normed stands in the tile already, and is replaced; a lane has the
// columns 8 lane .. 8 lane + 7 of every 256. The sums are those of row_statistics. What the rows from `next` on need comes to L2 meanwhile.
template <typename T, typename Rows>
__device__ __forceinline__ void make_unit(uint32_t tile, const Rows& rows, int first, int next, int m, int r) {
  constexpr int kPieces = kMostDepth / 256;
  int lane = threadIdx.x % 32, n = rows.width();
  tile += (lane / 8 * 64 + r) * kLine;  // row and columns of the lane, as they stand before they are swizzled
  if (first + r < m) {
    int64_t at = int64_t(first + r) * n, then = int64_t(next + r) * n;
    asm volatile("" : "+r"(lane));  // what follows from it is made anew for each row: there are no registers to keep it in
    uint4 more[kSide][kPieces];
    float v[kSide][kPieces][8], sum[kSide] = {};
    auto place = [&](int s, int p) { return tile + (p * 256 * 64 / kDepth + s) * kLine + ((lane ^ (r + s)) & 7) * 16; };
    auto whole = [&](int p) {
      asm volatile("" : "+r"(lane));  // nor predicates
      return 8 * lane + 256 * p < n;
    };
#pragma unroll
    for (int s = 0; s < kSide; ++s) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        more[s][p] = uint4{0, 0, 0, 0};
        if (first + r + s < m && whole(p))
          more[s][p] = __ldg(reinterpret_cast<const uint4*>(rows.more() + at + s * n + 8 * lane + 256 * p));
      }
      if (next + r + s < m && 16 * lane < n) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(rows.normed() + then + s * n + 16 * lane));
        asm volatile("prefetch.global.L2 [%0];" ::"l"(rows.more() + then + s * n + 16 * lane));
      }
    }
#pragma unroll
    for (int s = 0; s < kSide; ++s)
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        widen<T>(v[s][p], whole(p) ? load_shared(place(s, p)) : uint4{0, 0, 0, 0});
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[s] += v[s][p][e];
      }
    float rstd = center(v, sum, n, rows.eps(), whole);
#pragma unroll
    for (int s = 0; s < kSide; ++s) {
      float own = __shfl_sync(kFullWarp, rstd, 16 * s);
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        if (!whole(p)) continue;
#pragma unroll
        for (int e = 0; e < 8; ++e) v[s][p][e] *= own;
        rows.make(v[s][p], first + r + s, 8 * lane + 256 * p, more[s][p]);
        uint32_t words[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) words[e] = pack_pair<T>(v[s][p][2 * e], v[s][p][2 * e + 1]);
        store_shared(place(s, p), words);
      }
    }
  }
  fence_async();
  __syncwarp();
}

// Makes units of the tile of a visit until all are taken. Whoever comes does so: the makers, and a warpgroup before it multiplies.
template <typename T, typename Rows>
__device__ __forceinline__ void make_rows(MadeShared& shared, const Rows& rows, const Visits& visits, int i, int side, int parity) {
  int m = int(visits.walk.m), first = visits.row(i), next = i + cluster_count() < visits.visits ? visits.row(i + cluster_count()) : m;
  shared.raw[side].wait(parity);
  for (;;) {
    int unit = 0;
    if (threadIdx.x % 32 == 0) unit = atomicAdd(&shared.taken[side], 1);
    unit = __shfl_sync(kFullWarp, unit, 0);
    if (unit >= kUnits) break;
    make_unit<T>(shared_address(shared.a[side]), rows, first, next, m, kSide * unit);
    shared.made[side].arrive_for_warp(threadIdx.x % 32);
  }
}

// One of kMakers warps; the first has what is normed brought to where A will stand.
template <typename T, typename Rows>
__device__ __forceinline__ void make_tiles(MadeShared& shared, const CUtensorMap& x_map, const Rows& rows, const Visits& visits,
                                           int maker) {
  Ring<2> ring;
  for (int i = cluster_index(); i < visits.visits; i += cluster_count(), ring.next()) {
    if (maker == 0 && threadIdx.x % 32 == 0) {
      Barrier& raw = shared.raw[ring.stage];
      shared.used[ring.stage].wait(ring.parity ^ 1);
      shared.taken[ring.stage] = 0;
      raw.expect(visits.walk.steps * 64 * kLine);
      for (int step = 0; step < visits.walk.steps; ++step)
        load_box(shared_address(shared.a[ring.stage]) + step * 64 * kLine, x_map, step * kDepth, 0, visits.row(i), raw);
    }
    __syncwarp();
    make_rows<T>(shared, rows, visits, i, ring.stage, ring.parity);
    shared.used[ring.stage].arrive_for_warp(threadIdx.x % 32);
  }
}

// One thread of each block: half of the columns of B for both blocks; the residual comes to L2 meanwhile.
template <typename T>
__device__ __forceinline__ void load_columns(MadeShared& shared, const CUtensorMap& b_map, const CUtensorMap& residual_map,
                                             const Visits& visits) {
  int rank = cluster_rank();
  Ring<kMadeStages> ring;
  for (int i = cluster_index(); i < visits.visits; i += cluster_count())
    for (int tile = 0; tile < visits.count; ++tile) {
      int row = visits.row(i), column = visits.column(i) + tile * kColumns;
      for (int x = 0; x < kColumns; x += kDepth) prefetch_box(residual_map, column + x, 0, row);
      for (int k = 0; k < visits.walk.steps * kDepth; k += kSlice, ring.next()) {
        Barrier& full = shared.full[ring.stage];
        shared.empty[ring.stage].wait(ring.parity ^ 1);
        full.expect(kSliceBytes);
        constexpr int kHalf = kColumns / kBlocks;
#pragma unroll
        for (int x = rank * kHalf; x < (rank + 1) * kHalf; x += 64)
          load_box_for_all(shared_address(shared.b[ring.stage]) + x / 64 * kSlice * kLine, b_map, column + x, 0, k, full,
                           (1 << kBlocks) - 1);
      }
    }
}

// Persistent clusters of two blocks; in each, two warpgroups that multiply 64 x 256 tiles by turns, a warp that loads B, and kMakers that
// make the next 64 rows of A meanwhile, helped by a warpgroup that has nothing to multiply. An element of C as in gemm_sm90_kernel.
template <typename T, typename Rows>
__global__ void __launch_bounds__(kMadeThreads, 1)
    gemm_rows_sm90_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap b_map,
                          const __grid_constant__ CUtensorMap residual_map, const __grid_constant__ Rows rows,
                          const __grid_constant__ Output<T> output, const __grid_constant__ Visits visits) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kTurn = 1;  // named barriers kTurn and kTurn + 1
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<MadeShared*>(memory);
  int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    prefetch(x_map), prefetch(b_map);
    for (int i = 0; i < kMadeStages; ++i) shared.full[i].init(1, 0), shared.empty[i].init(0, 4 * kBlocks);
    for (int i = 0; i < 2; ++i)
      shared.raw[i].init(1, 0), shared.made[i].init(0, kUnits), shared.used[i].init(0, 4 * visits.count + kMakers), shared.taken[i] = 0;
    fence_barriers();
  }
  cluster_sync();
  if (warp < 4) {
    give_registers<kMakingRegisters>();
    if (warp > 0)
      make_tiles<T>(shared, x_map, rows, visits, warp - 1);
    else if (threadIdx.x == 0)
      load_columns<T>(shared, b_map, residual_map, visits);
  } else {
    take_registers<kMultiplyingRegisters>();
    auto release = [&](int stage) { arrive_at_all_for_warp<kBlocks>(shared.empty[stage], thread() % 32); };
    auto group = [] { return thread() / 128 - 1; };
    if (group() == 0) announce(kTurn, 256);
    int slices = visits.walk.steps * (kDepth / kSlice);
    // Tiles of this cluster in order, one warpgroup the even ones, the other the odd ones.
    for (int item = group();; item += 2) {
      int visit = item / visits.count, i = cluster_index() + visit * cluster_count(), before = item * slices;
      if (i >= visits.visits) break;
      make_rows<T>(shared, rows, visits, i, visit & 1, visit >> 1 & 1);
      Ring<kMadeStages> ring{before % kMadeStages, before / kMadeStages & 1};
      float c[128] = {};  // no registers of the tile before are kept while rows are made
      shared.made[visit & 1].wait(visit >> 1 & 1);
      meet(kTurn + group(), 256);
      int last = 0;
      uint32_t made = shared_address(shared.a[visit & 1]);
      for (int slice = 0; slice < slices; ++slice, ring.next()) {
        shared.full[ring.stage].wait(ring.parity);
        uint64_t a = by_rows<kLine>(made + slice / 2 * 64 * kLine) + slice % 2 * kSlice * 2 / 16;
        uint64_t b = by_columns<kLine>(shared_address(shared.b[ring.stage]), kSlice * kLine);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kSlice; k += 16) wgmma_both<T, false, true>(c, a + k * 2 / 16, b + k * kLine / 16, slice > 0 || k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (slice > 0) release(last);
        last = ring.stage;
      }
      announce(kTurn + (group() ^ 1), 256);
      wgmma_wait<0>(c);
      release(last);
      shared.used[visit & 1].arrive_for_warp(thread() % 32);
      int64_t row = visits.row(i) + thread() / 32 % 4 * 16;
      int column = visits.column(i) + item % visits.count * kColumns;
      finish_added(output, visits.walk, c, row, column);
    }
  }
  cluster_sync();  // no block ends while the other one writes into it
#endif
}

// What ends soonest on these clusters: a visit takes its tiles' time, or what it takes to make its rows, about that of two tiles.
inline int tiles_a_visit(int pairs, int across) {
  constexpr int kMaking = 2;
  int64_t best = 0;
  int count = across, clusters = processors() / kBlocks;
  for (int tiles = across; tiles > 0; --tiles) {
    if (across % tiles != 0) continue;
    int64_t rounds = ceil_div(int64_t(pairs) * (across / tiles), clusters), time = tiles + (rounds - 1) * std::max(tiles, kMaking);
    if (best == 0 || time < best) best = time, count = tiles;
  }
  return count;
}

// False where the product is not for this kernel: the caller then makes A by a pass of its own, which gives the same bits.
template <typename T, typename Rows>
bool gemm_rows(const GemmOutput<T>& output, const Rows& rows, const T* b, int64_t m, int64_t n, Stream stream) {
  int64_t k = rows.width();
  auto fits = [&](const T* data, int64_t width) { return aligned(data, width); };
  if (linear_asked_for_mma() || k > kMostDepth || k % 8 != 0 || n % 8 != 0 || m > INT_MAX / 2 || m == 0 || n > INT_MAX / 2) return false;
  if (!aligned(output.parts) || !fits(output.bias, n) || !fits(output.residual, n) || !fits(b, n)) return false;
  if (!runs_hopper(reinterpret_cast<const void*>(gemm_rows_sm90_kernel<T, Rows>))) return false;
  Visits visits;
  visits.walk.m = m, visits.walk.n = n;
  visits.walk.pairs = int(ceil_div(m, 64 * kBlocks)), visits.walk.across = int(ceil_div(n, kColumns));
  visits.walk.steps = visits.walk.share = int(ceil_div(k, kDepth));
  visits.count = tiles_a_visit(visits.walk.pairs, visits.walk.across);
  visits.bands = visits.walk.across / visits.count;
  visits.visits = visits.walk.pairs * visits.bands;
  CUtensorMap b_map = tensor_map<T, kDepth>(b, k, 1, int(n), kSlice);
  launch_clusters(gemm_rows_sm90_kernel<T, Rows>, kBlocks, visits.visits, kMadeThreads, sizeof(MadeShared), stream,
                  tensor_map<T, kDepth>(rows.normed(), m, 1, int(k), 64), b_map, tensor_map<T, kDepth>(output.residual, m, 1, int(n), 64),
                  rows, Output<T>(output), visits);
  return true;
}

}  // namespace hstu::cuda::dense_sm90
