// C = A B + bias + residual on Hopper where A is made on chip (a layer norm, then what `Rows` makes of it) and B stays
// there: a cluster of kBlocks blocks holds 128 kBlocks columns of B and walks down C, 64 rows at a time. Depth of at
// most kMostDepth. Drawing and log in docs/linear.md.
#pragma once
#include "gemm_choice.cuh"
#include "gemm_rows_sm90.cuh"
#include "gemm_sm90.cuh"
#include "sm90/device.cuh"

namespace hstu::cuda::dense_sm90 {

constexpr int kHeldColumns = 128, kHeldThreads = 512, kMakerWarps = 8;
// Named barriers, two of each: a group of makers meets; a multiplying warpgroup does; a warpgroup's turn, without which its wait for every
// other phase of `full` would end a phase early.
constexpr int kMakersMeet = 1, kMeet = 3, kTurn = 5;
constexpr int kPiece = 256, kPieceSteps = kPiece / kDepth;  // of k, eight a lane

struct HeldShared {
  alignas(1024) unsigned char b[kMostDepth / kDepth][kDepth * kHeldColumns * 2];  // [columns / 64][kDepth][128 bytes], swizzled
  alignas(1024) unsigned char a[kMostDepth / kDepth][64 * kLine];
  alignas(1024) unsigned char c[2][64 * kHeldColumns * 2];  // of a multiplying warpgroup: residual, then C; [columns / 64][64][128 bytes]
  Barrier held[kMostDepth / kDepth], full[kMostDepth / kPiece], empty[kMostDepth / kPiece], residual[2];
};

// Tiles of 64 rows, bands of 128 kBlocks columns; clusters `bands` apart share a band.
struct HeldWalk {
  int m, n, steps, tiles, bands;
};

template <typename T>
struct HeldOutput {
  CUtensorMap c, residual;
  const T* bias;
};

// Of rows of A, what a lane reads: eight columns of each piece.
template <int kCount, int kPieces>
struct RowBits {
  uint4 bits[kCount][kPieces];
};

template <typename T, int kCount, int kPieces>
__device__ __forceinline__ void read_rows(RowBits<kCount, kPieces>& to, const T* from, int n, int row, int m) {
  int j = threadIdx.x % 32 * 8;
  from += int64_t(row) * n + j;
#pragma unroll
  for (int s = 0; s < kCount; ++s)
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      to.bits[s][p] = uint4{0, 0, 0, 0};
      if (s < m - row && j + kPiece * p < n) to.bits[s][p] = __ldg(reinterpret_cast<const uint4*>(from + s * n + kPiece * p));
    }
}

// Two rows of A, from rows `at`, at + 1 of what was read. The sums are those of row_statistics. Zeros beyond the width.
template <typename T, int kCount, int kPieces, typename Rows>
__device__ __forceinline__ void make_two(uint32_t (&words)[kSide][kPieces][4], const RowBits<kCount, kPieces>& x,
                                         const RowBits<kCount, kPieces>& more, int at, const Rows& rows) {
  int n = rows.width(), lane = threadIdx.x % 32;
  float v[kSide][kPieces][8], sum[kSide] = {};
#pragma unroll
  for (int s = 0; s < kSide; ++s)
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      widen<T>(v[s][p], x.bits[at + s][p]);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[s] += v[s][p][e];
    }
  float rstd = center(v, sum, n, rows.eps(), [&](int p) { return 8 * lane + kPiece * p < n; });
#pragma unroll
  for (int s = 0; s < kSide; ++s) {
    float own = __shfl_sync(kFullWarp, rstd, 16 * s);
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
#pragma unroll
      for (int e = 0; e < 8; ++e) v[s][p][e] *= own;
  }
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    int j = 8 * lane + kPiece * p;
    if (j < n) rows.make(v[0][p], v[1][p], j, more.bits[at][p], more.bits[at + 1][p]);
#pragma unroll
    for (int s = 0; s < kSide; ++s)
#pragma unroll
      for (int e = 0; e < 4; ++e) words[s][p][e] = j < n ? pack_pair<T>(v[s][p][2 * e], v[s][p][2 * e + 1]) : 0;
  }
}

// Two rows' v = v weight + bias at column j; nothing where they are null.
template <typename T>
__device__ __forceinline__ void scale_and_shift_both(float (&x)[8], float (&y)[8], const T* weight, const T* bias, int j) {
  if (!weight) return;
  float w[8], b[8];
  widen<T>(w, __ldg(reinterpret_cast<const uint4*>(weight + j)));
  widen<T>(b, __ldg(reinterpret_cast<const uint4*>(bias + j)));
#pragma unroll
  for (int e = 0; e < 8; ++e) x[e] = x[e] * w[e] + b[e], y[e] = y[e] * w[e] + b[e];
}

// kMakerWarps warps: the block's share of the rows of each tile, for this block and by the copy engine for the others.
template <typename T, int kBlocks, int kPieces, typename Rows>
__device__ __forceinline__ void make_shares(HeldShared& shared, const Rows& rows, const HeldWalk& walk, int first, int count) {
  constexpr int kShare = 64 / kBlocks, kEach = kShare / kMakerWarps;  // kEach: rows of a warp
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = cluster_rank(), own = rank * kShare + kEach * warp, n = rows.width();
  uint32_t tile = shared_address(shared.a);
  RowBits<kEach, kPieces> x, more;
  int parity = 1;
  auto read = [&](int i) {
    read_rows<T>(x, rows.normed(), n, i * 64 + own, walk.m);
    read_rows<T>(more, rows.more(), n, i * 64 + own, walk.m);
  };
  read(first);
  for (int i = first; i < walk.tiles; i += count, parity ^= 1) {
    uint32_t words[kEach / kSide][kSide][kPieces][4];
#pragma unroll
    for (int unit = 0; unit < kEach / kSide; ++unit) make_two<T>(words[unit], x, more, kSide * unit, rows);
    if (i + count < walk.tiles) read(i + count);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      int steps = min(kPieceSteps, walk.steps - p * kPieceSteps);
      if (steps <= 0) break;
      Barrier& full = shared.full[p];
      shared.empty[p].wait(parity);
      if (threadIdx.x == 0) full.expect((kBlocks - 1) * kShare * kLine * steps);
#pragma unroll
      for (int s = 0; s < kEach; ++s) {
        int r = own + s;
        store_shared(tile + ((p * kPieceSteps + lane / 8) * 64 + r) * kLine + ((lane ^ r) & 7) * 16, words[s / kSide][s % kSide][p]);
      }
      fence_async();
      __syncwarp();
      full.arrive_for_warp(lane);
      meet(kMakersMeet, 32 * kMakerWarps);
      if (warp < steps && lane < kBlocks - 1)
        copy_to_block(tile + ((p * kPieceSteps + warp) * 64 + rank * kShare) * kLine, kShare * kLine, full, (rank + 1 + lane) % kBlocks);
    }
  }
}

// The accumulators of a warp, 16 rows, to shared memory; with kAdds bias (the lane's pairs of columns) and what stands
// there are added.
template <typename T, bool kAdds>
__device__ __forceinline__ void finish_held(uint32_t tile, const float (&c)[64], const uint32_t (&bias)[16], bool biased) {
  int lane = threadIdx.x % 32, r = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
  for (int x = 0; x < 8; ++x) {
    uint32_t place = tile + x / 4 * 64 * kLine + r * kLine + (((2 * x + lane / 16) ^ r) & 7) * 16, words[4];
    if constexpr (kAdds) load_matrices(words, place);
#pragma unroll
    for (int y = 0; y < 4; ++y) {
      float v[2] = {c[8 * x + 2 * y], c[8 * x + 2 * y + 1]};
      if constexpr (kAdds) {
        float2 shift = unpack_pair<T>(bias[2 * x + y / 2]), pair = unpack_pair<T>(words[y]);
        if (biased) v[0] = __fadd_rn(v[0], shift.x), v[1] = __fadd_rn(v[1], shift.y);
        v[0] = __fadd_rn(v[0], pair.x), v[1] = __fadd_rn(v[1], pair.y);
      }
      words[y] = pack_pair<T>(v[0], v[1]);
    }
    store_matrices(place, words);
  }
}

// Persistent clusters; in each block kMakerWarps that make rows, and two warpgroups that multiply 64 x 128 tiles by
// turns, as A comes.
template <typename T, int kBlocks, int kPieces, typename Rows>
__global__ void __launch_bounds__(kHeldThreads, 1)
    gemm_held_sm90_kernel(const __grid_constant__ CUtensorMap b_map, const __grid_constant__ Rows rows,
                          const __grid_constant__ HeldOutput<T> output, const __grid_constant__ HeldWalk walk) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<HeldShared*>(memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int band = cluster_index() % walk.bands, first = cluster_index() / walk.bands, count = cluster_count() / walk.bands;
  int column = (band * kBlocks + cluster_rank()) * kHeldColumns;
  if (threadIdx.x == 0) {
    prefetch(b_map);
    for (Barrier& barrier : shared.held) barrier.init(1, 0);
    for (Barrier& barrier : shared.full) barrier.init(1, kMakerWarps);
    for (Barrier& barrier : shared.empty) barrier.init(0, 4 * kBlocks);
    for (Barrier& barrier : shared.residual) barrier.init(1, 0);
    fence_barriers(), fence_async();
    for (int step = 0; step < walk.steps; ++step) {
      shared.held[step].expect(int(sizeof(shared.b[0])));
      for (int x = 0; x < kHeldColumns; x += 64)
        load_box(shared_address(shared.b[step]) + x * kDepth * 2, b_map, column + x, 0, step * kDepth, shared.held[step]);
    }
  }
  cluster_sync();
  if (warp < kMakerWarps) {
    make_shares<T, kBlocks, kPieces>(shared, rows, walk, first, count);
  } else {
    int group = warp / 4 - kMakerWarps / 4;
    bool leader = threadIdx.x % 128 == 0, biased = output.bias;
    uint32_t tile = shared_address(shared.c[group]), bias[16] = {};
#pragma unroll
    for (int x = 0; x < 16; ++x) {
      int at = column + 8 * x + lane % 4 * 2;
      if (biased && at < walk.n) bias[x] = *reinterpret_cast<const uint32_t*>(output.bias + at);
    }
    if (group == 0) announce(kTurn, 256);
    int visit = group;
    for (int i = first + group * count; i < walk.tiles; i += 2 * count, visit += 2) {
      if (leader) {
        Barrier& full = shared.residual[group];
        bulk_wait_read();
        full.expect(int(sizeof(shared.c[0])));
        for (int x = 0; x < kHeldColumns; x += 64) load_box(tile + x * 64 * 2, output.residual, column + x, 0, i * 64, full);
      }
      float c[64];
      meet(kTurn + group, 256);
      for (int step = 0; step < walk.steps; ++step) {
        if (step % kPieceSteps == 0) shared.full[step / kPieceSteps].wait(visit & 1);
        if (visit < 2) shared.held[step].wait(0);
        uint64_t a = by_rows<kLine>(shared_address(shared.a[step]));
        uint64_t b = by_columns<kLine>(shared_address(shared.b[step]), kDepth * kLine);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) wgmma<T, true>(c, a + k * 2 / 16, b + k * kLine / 16, step > 0 || k > 0);
        wgmma_commit();
        if (step == kPieceSteps) {
          wgmma_wait<1>();
          arrive_at_all_for_warp<kBlocks>(shared.empty[0], lane);
        }
      }
      announce(kTurn + (group ^ 1), 256);
      wgmma_wait<0>(c);
      arrive_at_all_for_warp<kBlocks>(shared.empty[walk.steps > kPieceSteps], lane);
      shared.residual[group].wait(visit >> 1 & 1);
      finish_held<T, true>(tile, c, bias, biased);
      fence_async();
      meet(kMeet + group, 128);
      if (leader) {
        for (int x = 0; x < kHeldColumns; x += 64) store_box(output.c, column + x, 0, i * 64, tile + x * 64 * 2);
        bulk_commit();
      }
    }
    if (leader) bulk_wait_read();
  }
  cluster_sync();  // no block ends while others write into it
#endif
}

template <typename T, int kBlocks, int kPieces, typename Rows>
bool gemm_held_by(const GemmOutput<T>& output, const Rows& rows, const T* b, int64_t m, int64_t n, Stream stream) {
  auto kernel = gemm_held_sm90_kernel<T, kBlocks, kPieces, Rows>;
  int at_once = clusters_at_once<gemm_held_sm90_kernel<T, kBlocks, kPieces, Rows>>(kBlocks, kHeldThreads, sizeof(HeldShared));
  int64_t k = rows.width();
  HeldWalk walk;
  walk.m = int(m), walk.n = int(n), walk.steps = int(ceil_div(k, kDepth));
  walk.tiles = int(ceil_div(m, 64)), walk.bands = int(ceil_div(n, kBlocks * kHeldColumns));
  if (walk.bands > at_once) return false;
  HeldOutput<T> held{tensor_map<T, kDepth>(output.parts[0].data, m, 1, int(n), 64),
                     tensor_map<T, kDepth>(output.residual, m, 1, int(n), 64), output.bias};
  int64_t clusters = int64_t(std::min(walk.tiles, at_once / walk.bands)) * walk.bands;
  launch_clusters(kernel, kBlocks, clusters, kHeldThreads, sizeof(HeldShared), stream, tensor_map<T, kDepth>(b, k, 1, int(n), kDepth), rows,
                  held, walk);
  return true;
}

// Of a single part with a residual and no activation. False where the product is not for this kernel.
template <typename T, typename Rows>
bool gemm_held(const GemmOutput<T>& output, const Rows& rows, const T* b, int64_t m, int64_t n, Stream stream) {
  int64_t k = rows.width();
  auto fits = [&](const T* data, int64_t width) { return aligned(data, width); };
  if (linear_asked_for_mma() || m == 0 || m > INT_MAX / 2) return false;
  if (k == 0 || k > kMostDepth || k % 8 != 0 || n == 0 || n > INT_MAX / 2 || n % 8 != 0) return false;
  if (!aligned(output.parts) || !fits(output.bias, n) || !fits(output.residual, n) || !fits(b, n)) return false;
  if (!runs_hopper(reinterpret_cast<const void*>(gemm_held_sm90_kernel<T, 4, 2, Rows>))) return false;
  if (k > kPiece || n > 2 * kHeldColumns) return gemm_held_by<T, 4, 2>(output, rows, b, m, n, stream);
  return gemm_held_by<T, 2, 1>(output, rows, b, m, n, stream);
}

}  // namespace hstu::cuda::dense_sm90
