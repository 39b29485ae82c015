// C = A B + bias + residual on Hopper where A is made on chip (a layer norm, then what `Rows` makes of it) and B stays
// there: a cluster of kBlocks blocks holds 128 kBlocks columns of B and walks down C, 64 rows at a time. Depth of at
// most kMostDepth. Drawing and log in docs/linear.md.
#pragma once
#include "gemm_choice.cuh"
#include "gemm_sm90.cuh"
#include "sm90/device.cuh"

namespace hstu::cuda::dense_sm90 {

constexpr int kMostDepth = 512, kHeldColumns = 128, kMakerWarps = 8, kHeldThreads = 32 * (kMakerWarps + 8 + 4);
// 24 + 2 x (128 + 96) of the 5 x 96 that the launch allots.
constexpr int kGivingRegisters = 24, kRowRegisters = 128, kHeldRegisters = 96;
// Named barriers, two of each: a group of makers' turn; a multiplying warpgroup meets; its turn. Without turns a wait for every other phase
// of `empty` or `full` would end a phase early.
constexpr int kMakersTurn = 1, kMeet = 3, kTurn = 5;
constexpr int kPiece = 256;                                                  // of k, eight a lane
constexpr int kPart = 128, kPartSteps = kPart / kDepth;                      // of k, what is given at a time
constexpr int kParts = kMostDepth / kPart, kEight = kPartSteps * 8 * kLine;  // kEight: bytes of eight rows of a part

struct HeldShared {
  alignas(1024) unsigned char b[kMostDepth / kDepth][kDepth * kHeldColumns * 2];  // [columns / 64][kDepth][128 bytes], swizzled
  alignas(1024) unsigned char a[kParts][64 / 8][kPartSteps][8 * kLine];           // what a block makes of a part stands together
  alignas(1024) unsigned char c[2][64 * kHeldColumns * 2];  // of a multiplying warpgroup: residual, then C; [columns / 64][64][128 bytes]
  alignas(16) uint16_t bias[2][kHeldColumns];
  Barrier held[kMostDepth / kDepth], made[kParts], full[kParts], empty[kParts], residual[2];
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

// What stands beyond the rows or the width is read from within.
template <typename T, int kCount, int kPieces>
__device__ __forceinline__ void read_rows(RowBits<kCount, kPieces>& to, const T* from, int n, int row, int m) {
#pragma unroll
  for (int s = 0; s < kCount; ++s)
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      int j = min(int(threadIdx.x) % 32 * 8 + kPiece * p, n - 8);
      to.bits[s][p] = __ldg(reinterpret_cast<const uint4*>(from + int64_t(min(row + s, m - 1)) * n + j));
    }
}

// Sums over the warp of kRows rows, each by the tree of warp_sum. Row 2 q + h ends where h is bit 4 of the lane, q (of
// two) its bit 3.
template <int kRows>
__device__ __forceinline__ float row_sums(const float (&x)[kRows]) {
  int lane = threadIdx.x % 32;
  float pairs[2];
#pragma unroll
  for (int q = 0; q < kRows / 2; ++q) {
    float kept = lane & 16 ? x[2 * q + 1] : x[2 * q], given = lane & 16 ? x[2 * q] : x[2 * q + 1];
    pairs[q] = kept + __shfl_xor_sync(kFullWarp, given, 16);
  }
  float kept = pairs[0], given = pairs[0];
  if constexpr (kRows == 4) kept = lane & 8 ? pairs[1] : pairs[0], given = lane & 8 ? pairs[0] : pairs[1];
  float sum = kept + __shfl_xor_sync(kFullWarp, given, 8);
#pragma unroll
  for (int bit = 4; bit > 0; bit /= 2) sum += __shfl_xor_sync(kFullWarp, sum, bit);
  return sum;
}
__device__ __forceinline__ float of_row(float sums, int s) { return __shfl_sync(kFullWarp, sums, 16 * (s % 2) + 8 * (s / 2)); }

// What was read, from here on: it is widened anew in each pass, for which there are registers, and not kept.
template <int kCount, int kPieces>
__device__ __forceinline__ void read_anew(RowBits<kCount, kPieces>& x) {
#pragma unroll
  for (int s = 0; s < kCount; ++s)
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
      asm volatile("" : "+r"(x.bits[s][p].x), "+r"(x.bits[s][p].y), "+r"(x.bits[s][p].z), "+r"(x.bits[s][p].w));
}

// Rows `at` .. at + kRows - 1 of those that were read, which are rows of A from `row` on. The sums are those of
// row_statistics. Zeros beyond the width.
template <typename T, bool kDrops, int kRows, int kCount, int kPieces, typename Rows>
__device__ __forceinline__ void make_rows(uint32_t (&words)[kRows][kPieces][4], RowBits<kCount, kPieces>& x, RowBits<kCount, kPieces>& more,
                                          int at, int row, const Rows& rows) {
  int n = rows.width(), lane = threadIdx.x % 32;
  float sum[kRows] = {}, squares[kRows] = {}, mean[kRows];
  auto there = [&](int p) { return 8 * lane + kPiece * p < n; };
#pragma unroll
  for (int s = 0; s < kRows; ++s)
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      float v[8];
      widen<T>(v, x.bits[at + s][p]);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (there(p)) sum[s] += v[e];
    }
  float sums = row_sums(sum) / float(n);
  read_anew(x);
#pragma unroll
  for (int s = 0; s < kRows; ++s) {
    mean[s] = of_row(sums, s);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      float v[8];
      widen<T>(v, x.bits[at + s][p]);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        v[e] -= mean[s];
        if (there(p)) squares[s] += v[e] * v[e];
      }
    }
  }
  float rstd = 1.f / sqrtf(row_sums(squares) / float(n) + rows.eps());
  read_anew(x), read_anew(more);
#pragma unroll
  for (int s = 0; s < kRows; s += 2) {
    float own[2] = {of_row(rstd, s), of_row(rstd, s + 1)};
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      float v[2][8];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        widen<T>(v[h], x.bits[at + s + h][p]);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[h][e] = (v[h][e] - mean[s + h]) * own[h];
      }
      if (there(p)) rows.template make<kDrops>(v[0], v[1], row + s, 8 * lane + kPiece * p, more.bits[at + s][p], more.bits[at + s + 1][p]);
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          words[s + h][p][e] = there(p) ? pack_pair<T>(v[h][2 * e], v[h][2 * e + 1]) : 0;
          if constexpr (kDrops) asm volatile("" : "+r"(words[s + h][p][e]), "+r"(row));  // before the next random numbers are begun
        }
    }
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

// kGroups groups of kMakerWarps / kGroups warps: by turns the block's share of the rows of a tile.
template <typename T, bool kDrops, int kGroups, int kBlocks, int kPieces, typename Rows>
__device__ __forceinline__ void make_shares(HeldShared& shared, const Rows& rows, const HeldWalk& walk, int first, int count, int group) {
  constexpr int kGroupWarps = kMakerWarps / kGroups, kShare = 64 / kBlocks, kEach = kShare / kGroupWarps, kAtOnce = std::min(kEach, 4);
  int warp = threadIdx.x / 32 % kGroupWarps, lane = threadIdx.x % 32, own = cluster_rank() * kShare + kEach * warp, n = rows.width();
  static_assert(8 % kEach == 0);
  int r = own % 8;  // of eight; that of its row s is r + s, or r ^ s
  uint32_t place = shared_address(shared.a) + own / 8 * kEight + lane / 8 % kPartSteps * 8 * kLine + r * kLine + ((lane ^ r) & 7) * 16;
  RowBits<kEach, kPieces> x, more;
  auto read = [&](int i) {
    if (i >= walk.tiles) return;
    read_rows<T>(x, rows.normed(), n, i * 64 + own, walk.m);
    const T* from = rows.more() + int64_t(i * 64 + own) * n + lane * kDepth;
    if (lane * kDepth < min(kEach, walk.m - i * 64 - own) * n) asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  };
  first += group * count, count *= kGroups;
  int parity = group ^ 1;
  read(first);
  cluster_wait();
  if (kGroups == 2 && group == 0) announce(kMakersTurn, 32 * kMakerWarps);
  for (int i = first; i < walk.tiles; i += count) {
    uint32_t words[kEach / kAtOnce][kAtOnce][kPieces][4];
    read_rows<T>(more, rows.more(), n, i * 64 + own, walk.m);
#pragma unroll
    for (int at = 0; at < kEach; at += kAtOnce) make_rows<T, kDrops>(words[at / kAtOnce], x, more, at, i * 64 + own + at, rows);
    read(i + count);
    if (kGroups == 2) meet(kMakersTurn + group, 32 * kMakerWarps);
#pragma unroll
    for (int part = 0; part < kPieces * (kPiece / kPart); ++part) {
      if (part * kPartSteps >= walk.steps) break;
      shared.empty[part].wait(parity);
      asm volatile("" : "+r"(place));  // there are no registers for what follows from it
      if (lane / 16 == part % 2) {
#pragma unroll
        for (int s = 0; s < kEach; ++s)
          store_shared((place ^ s * 16) + s * kLine + part * (64 / 8 * kEight), words[s / kAtOnce][s % kAtOnce][part / 2]);
      }
      __syncwarp();
      shared.made[part].arrive_for_warp(lane);
    }
    if (kGroups == 2)
      announce(kMakersTurn + (group ^ 1), 32 * kMakerWarps);
    else
      parity ^= 1;
  }
}

// A warp for each part: what the makers have made, for this block's products and by the copy engine for the others. The
// fence is its own, for it would have the makers wait for the rows that they read meanwhile.
template <int kBlocks>
__device__ __forceinline__ void give_shares(HeldShared& shared, const HeldWalk& walk, int first, int count, int part) {
  constexpr int kBytes = 64 / 8 / kBlocks * kEight;
  if (part * kPartSteps >= walk.steps) return;
  int lane = threadIdx.x % 32, rank = cluster_rank(), parity = 0;
  uint32_t from = shared_address(shared.a[part]) + rank * kBytes;
  for (int i = first; i < walk.tiles; i += count, parity ^= 1) {
    shared.made[part].wait(parity);
    fence_async();
    if (lane == 0) {
      shared.full[part].expect((kBlocks - 1) * kBytes);
#pragma unroll
      for (int other = 1; other < kBlocks; ++other) copy_to_block(from, kBytes, shared.full[part], (rank + other) % kBlocks);
    }
    __syncwarp();
  }
}

// Columns 16 kFrom .. 16 kTo - 1 of the accumulators of a warp, 16 rows, to shared memory; with kAdds bias (of the
// tile's columns) and what stands there are added.
template <typename T, bool kAdds, int kFrom = 0, int kTo = 8>
__device__ __forceinline__ void finish_held(uint32_t tile, const float (&c)[64], const T* bias = nullptr) {
  int lane = threadIdx.x % 32, r = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
  for (int x = kFrom; x < kTo; ++x) {
    uint32_t place = tile + (x - kFrom) / 4 * 64 * kLine + r * kLine + (((2 * x + lane / 16) ^ r) & 7) * 16, words[4];
    if constexpr (kAdds) load_matrices(words, place);
#pragma unroll
    for (int y = 0; y < 4; ++y) {
      float v[2] = {c[8 * x + 2 * y], c[8 * x + 2 * y + 1]};
      if constexpr (kAdds) {
        float2 shift = load_pair(bias + 16 * x + 8 * (y / 2) + lane % 4 * 2), pair = unpack_pair<T>(words[y]);
        v[0] = __fadd_rn(v[0], shift.x), v[1] = __fadd_rn(v[1], shift.y);
        v[0] = __fadd_rn(v[0], pair.x), v[1] = __fadd_rn(v[1], pair.y);
      }
      words[y] = pack_pair<T>(v[0], v[1]);
    }
    store_matrices(place, words);
  }
}

// Persistent clusters; in each block kMakerWarps that make rows, two warpgroups that multiply 64 x 128 tiles by turns, as A comes, and a
// warp for each part of k that gives it on.
template <typename T, bool kDrops, int kGroups, int kBlocks, int kPieces, typename Rows>
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
    for (Barrier& barrier : shared.made) barrier.init(0, kMakerWarps / kGroups);
    for (Barrier& barrier : shared.full) barrier.init(1, 0);
    for (Barrier& barrier : shared.empty) barrier.init(0, 4 * kBlocks);
    for (Barrier& barrier : shared.residual) barrier.init(1, 0);
    fence_barriers(), fence_async();
    for (int step = 0; step < walk.steps; ++step) {
      shared.held[step].expect(int(sizeof(shared.b[0])));
      for (int x = 0; x < kHeldColumns; x += 64)
        load_box(shared_address(shared.b[step]) + x * kDepth * 2, b_map, column + x, 0, step * kDepth, shared.held[step]);
    }
  }
  cluster_arrive();
  if (warp < kMakerWarps) {
    take_registers<kRowRegisters>();
    make_shares<T, kDrops, kGroups, kBlocks, kPieces>(shared, rows, walk, first, count, warp / (kMakerWarps / kGroups));
  } else if (warp >= kMakerWarps + 8) {
    give_registers<kGivingRegisters>();
    cluster_wait();
    give_shares<kBlocks>(shared, walk, first, count, warp - kMakerWarps - 8);
  } else {
    take_registers<kHeldRegisters>();
    int group = warp / 4 - kMakerWarps / 4;
    bool leader = threadIdx.x % 128 == 0;
    uint32_t tile = shared_address(shared.c[group]);
    T* bias = reinterpret_cast<T*>(shared.bias[group]);
    int own = threadIdx.x % 128;
    bias[own] = output.bias && column + own < walk.n ? output.bias[column + own] : T(-0.f);  // x + -0 is x for all x
    meet(kMeet + group, 128);
    cluster_wait();
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
        if (step % kPartSteps == 0) shared.full[step / kPartSteps].wait(visit & 1);
        if (visit < 2) shared.held[step].wait(0);
        uint64_t a = descriptor<kLine>(shared_address(shared.a[step / kPartSteps][0][step % kPartSteps]), 16, kEight);
        uint64_t b = by_columns<kLine>(shared_address(shared.b[step]), kDepth * kLine);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) wgmma<T, true>(c, a + k * 2 / 16, b + k * kLine / 16, step > 0 || k > 0);
        wgmma_commit();
        if (step > 0 && step % kPartSteps == 0) {
          wgmma_wait<1>();
          arrive_at_all_for_warp<kBlocks>(shared.empty[step / kPartSteps - 1], lane);
        }
      }
      announce(kTurn + (group ^ 1), 256);
      wgmma_wait<0>(c);
      arrive_at_all_for_warp<kBlocks>(shared.empty[(walk.steps - 1) / kPartSteps], lane);
      shared.residual[group].wait(visit >> 1 & 1);
      finish_held<T, true>(tile, c, bias);
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

template <typename T, bool kDrops, int kGroups, int kBlocks, int kPieces, typename Rows>
bool gemm_held_by(const GemmOutput<T>& output, const Rows& rows, const T* b, int64_t m, int64_t n, Stream stream) {
  constexpr auto kKernel = gemm_held_sm90_kernel<T, kDrops, kGroups, kBlocks, kPieces, Rows>;
  int at_once = clusters_at_once<kKernel>(kBlocks, kHeldThreads, sizeof(HeldShared));
  int64_t k = rows.width();
  HeldWalk walk;
  walk.m = int(m), walk.n = int(n), walk.steps = int(ceil_div(k, kDepth));
  walk.tiles = int(ceil_div(m, 64)), walk.bands = int(ceil_div(n, kBlocks * kHeldColumns));
  if (walk.bands > at_once) return false;
  HeldOutput<T> held{tensor_map<T, kDepth>(output.parts[0].data, m, 1, int(n), 64),
                     tensor_map<T, kDepth>(output.residual, m, 1, int(n), 64), output.bias};
  int64_t clusters = int64_t(std::min(walk.tiles, at_once / walk.bands)) * walk.bands;
  launch_clusters(kKernel, kBlocks, clusters, kHeldThreads, sizeof(HeldShared), stream, tensor_map<T, kDepth>(b, k, 1, int(n), kDepth),
                  rows, held, walk);
  return true;
}

// Of a single part with a residual and no activation. False where the product is not for this kernel. Makers in one
// group are sooner done with a tile, in two with many; random numbers want all of them.
template <typename T, bool kDrops, typename Rows>
bool gemm_held(const GemmOutput<T>& output, const Rows& rows, const T* b, int64_t m, int64_t n, Stream stream) {
  constexpr int64_t kFewRows = 10240;
  int64_t k = rows.width();
  auto fits = [&](const T* data, int64_t width) { return aligned(data, width); };
  if (linear_asked_for_mma() || m == 0 || m > INT_MAX / 2) return false;
  if (k == 0 || k > kMostDepth || k % 8 != 0 || n == 0 || n > INT_MAX / 2 || n % 8 != 0) return false;
  if (!aligned(output.parts) || !fits(output.bias, n) || !fits(output.residual, n) || !fits(b, n)) return false;
  if (!runs_hopper(reinterpret_cast<const void*>(gemm_held_sm90_kernel<T, kDrops, 1, 4, 2, Rows>))) return false;
  auto by = [&](auto kGroups) {
    if (k > kPiece || n > 2 * kHeldColumns) return gemm_held_by<T, kDrops, kGroups, 4, 2>(output, rows, b, m, n, stream);
    return gemm_held_by<T, kDrops, kGroups, 2, 1>(output, rows, b, m, n, stream);
  };
  if constexpr (!kDrops)
    if (m > kFewRows) return by(std::integral_constant<int, 2>{});
  return by(std::integral_constant<int, 1>{});
}

}  // namespace hstu::cuda::dense_sm90
