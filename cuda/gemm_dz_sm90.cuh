// dA = dz W^T on Hopper with dz = dy silu'(z) made in the registers that the product takes it from, and left for the weight
// gradient. Drawing and log in docs/linear.md.
#pragma once
#include "gemm_choice.cuh"
#include "gemm_sm90.cuh"
#include "sm90/device.cuh"

namespace hstu::cuda::dense_sm90 {

constexpr int kDzRows = 128, kDzSteps = 2;  // rows of a tile; steps of the loop, by turns with registers of their own

// A cluster of kAcross blocks: a block multiplies 128 rows by 256 columns. They share the rows of dy and z.
template <int kAcross>
struct DzShared {
  static constexpr int kShare = kDzRows / kAcross, kBytes = kDzRows * kLine;  // rows that a block loads; of dy or z
  static constexpr int kStages = 3, kRawStages = 4;
  alignas(1024) unsigned char w[kStages][kColumns * kLine], raw[kRawStages][2][kBytes];  // dy, z
  Barrier full[kStages], empty[kStages], raw_full[kRawStages], raw_empty[kRawStages];
};

template <typename T>
struct DzOperands {
  CUtensorMap dy[kMostParts], z, w;
  int from[kMostParts];
  bool active[kMostParts];
  T* dz;
  int tiles, steps;
  __device__ __forceinline__ int part(int column) const {
    int part = 0;
#pragma unroll
    for (int i = 1; i < kMostParts; ++i)
      if (column >= from[i]) part = i;
    return part;
  }
};

// One thread of each block: its rows of dy and z of each step, for all blocks.
template <typename T, int kAcross>
__device__ __forceinline__ void load_gradients(DzShared<kAcross>& shared, const DzOperands<T>& operands) {
  using S = DzShared<kAcross>;
  int first = cluster_rank() * S::kShare;
  Ring<S::kRawStages> ring;
  for (int i = cluster_index(); i < operands.tiles; i += cluster_count())
    for (int step = 0; step < operands.steps; ++step, ring.next()) {
      int column = step * kDepth, part = operands.part(column), row = i * kDzRows + first;
      Barrier& full = shared.raw_full[ring.stage];
      auto load = [&](int what, const CUtensorMap& map, int column) {
        uint32_t to = shared_address(shared.raw[ring.stage][what]) + first * kLine;
        if constexpr (kAcross > 1)
          load_box_for_all(to, map, column, 0, row, full, (1 << kAcross) - 1);
        else
          load_box(to, map, column, 0, row, full);
      };
      shared.raw_empty[ring.stage].wait(ring.parity ^ 1);
      full.expect(S::kBytes * (operands.active[part] ? 2 : 1));
      load(0, operands.dy[part], column - operands.from[part]);
      if (operands.active[part]) load(1, operands.z, column);
    }
}

// Another: the block's rows of W.
template <typename T, int kAcross>
__device__ __forceinline__ void load_weights(DzShared<kAcross>& shared, const DzOperands<T>& operands) {
  Ring<DzShared<kAcross>::kStages> ring;
  for (int i = cluster_index(); i < operands.tiles; i += cluster_count())
    for (int step = 0; step < operands.steps; ++step, ring.next()) {
      shared.empty[ring.stage].wait(ring.parity ^ 1);
      shared.full[ring.stage].expect(int(sizeof(shared.w[0])));
      load_box(shared_address(shared.w[ring.stage]), operands.w, step * kDepth, 0, cluster_rank() * kColumns, shared.full[ring.stage]);
    }
}

// dz of a warp's 16 rows and kDepth columns, as the product takes it; `place`: of dy for this lane, z stands kBytes on.
template <typename T, bool kActive, int kBytes>
__device__ __forceinline__ void make_dz(uint32_t (&dz)[kDepth / 4], uint32_t place) {
#pragma unroll
  for (int x = 0; x < kDepth / 16; ++x) {
    uint32_t dy[4], z[4];
    load_matrices(dy, place ^ x * 32);
    if constexpr (kActive) load_matrices(z, (place ^ x * 32) + kBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      dz[4 * x + i] = dy[i];
      if constexpr (kActive) {
        float2 gradient = unpack_pair<T>(dy[i]), before = unpack_pair<T>(z[i]);
        dz[4 * x + i] = pack_pair<T>(through_activation<T>(gradient.x, before.x, Activation::kSilu),
                                     through_activation<T>(gradient.y, before.y, Activation::kSilu));
      }
    }
  }
}

// To rows `to` and eight below, `rows` of which there are; lane t of a quad stores columns 8 t .. 8 t + 7 of 32.
template <typename T>
__device__ __forceinline__ void store_dz(T* to, int64_t stride, int64_t rows, const uint32_t (&dz)[kDepth / 4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      uint32_t words[4];
#pragma unroll
      for (int y = 0; y < 4; ++y) words[y] = dz[8 * x + 2 * y + half];
      transpose_quad(words);
      if (8 * half < rows) store_words(to + 8 * half * stride + 32 * x, words);
    }
}

// Persistent clusters with 128 rows at a time. Two warpgroups make and multiply 64 rows each: the next step's dz while this one's products
// run. Of a cluster of two each makes all of dz and stores every other step's. An element of dA as in gemm_sm90_kernel.
template <typename T, int kAcross>
__global__ void __launch_bounds__(Shape<true>::kThreads, 1)
    gemm_dz_sm90_kernel(const __grid_constant__ DzOperands<T> operands, const __grid_constant__ Output<T> output,
                        const __grid_constant__ Walk walk) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = DzShared<kAcross>;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<S*>(memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4 - 1, rank = cluster_rank();
  if (threadIdx.x == 0) {
    prefetch(operands.w), prefetch(operands.z);
    for (int i = 0; i < S::kStages; ++i) shared.full[i].init(1, 0), shared.empty[i].init(0, 8);
    for (int i = 0; i < S::kRawStages; ++i) shared.raw_full[i].init(1, 0), shared.raw_empty[i].init(0, 8 * kAcross);
    fence_barriers();
  }
  cluster_arrive();
  cluster_wait();
  if (group < 0) {
    give_registers<Shape<true>::kLoading>();
    if (threadIdx.x == 0) load_gradients(shared, operands);
    if (threadIdx.x == 32) load_weights(shared, operands);
  } else {
    take_registers<Shape<true>::kComputing>();
    Ring<S::kStages> ring;
    Ring<S::kRawStages> raw;
    int own = group * 64 + warp % 4 * 16, r = own + lane % 16;  // the warp's rows; that which a lane gives ldmatrix
    uint32_t place = shared_address(shared.raw) + r * kLine + ((lane / 16 ^ r) & 7) * 16;
    int64_t k = int64_t(operands.steps) * kDepth;
    for (int i = cluster_index(); i < operands.tiles; i += cluster_count()) {
      int64_t row = int64_t(i) * kDzRows + own + lane / 4;
      float c[128];
      uint32_t dz[kDzSteps][kDepth / 4];
      int last = 0;
      auto multiply = [&](int step, auto kTurn) {
        shared.raw_full[raw.stage].wait(raw.parity);
        uint32_t from = place + raw.stage * 2 * S::kBytes;
        branch(operands.active[operands.part(step * kDepth)],
               [&](auto kActive) { make_dz<T, kActive, S::kBytes>(dz[kTurn], from); });
        __syncwarp();
        arrive_at_all_for_warp<kAcross>(shared.raw_empty[raw.stage], lane);
        raw.next();
        if (kAcross == 1 || rank == kTurn) store_dz(operands.dz + row * k + step * kDepth + lane % 4 * 8, k, walk.m - row, dz[kTurn]);
        shared.full[ring.stage].wait(ring.parity);
        uint64_t b = by_rows<kLine>(shared_address(shared.w[ring.stage]));
        wgmma_fence();
#pragma unroll
        for (int x = 0; x < kDepth; x += 16) wgmma<T, false>(c, dz[kTurn] + x / 4, b + x * 2 / 16, step > 0 || x > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) shared.empty[last].arrive_for_warp(lane);
        last = ring.stage;
        ring.next();
      };
#pragma unroll 1
      for (int step = 0; step < operands.steps; step += kDzSteps)
        multiply(step, std::integral_constant<int, 0>{}), multiply(step + 1, std::integral_constant<int, 1>{});
      wgmma_wait<0>(c);
      shared.empty[last].arrive_for_warp(lane);
      typename Output<T>::Part part = output.at(0, int(walk.n));
      if ((rank + 1) * kColumns > walk.n)
        finish_any(output, walk, c, row, rank * kColumns);
      else
        finish_tile<false, false, false, false>(output, part, walk, c, row, rank * kColumns);
    }
  }
  cluster_sync();  // no block ends while others write into it
#endif
}

template <typename T, int kAcross>
bool gemm_dz_by(T* da, T* dz, const GemmOutput<const T>& dy, const T* z, const T* w, int64_t m, int64_t n, int64_t k, Stream stream) {
  using S = DzShared<kAcross>;
  auto kernel = gemm_dz_sm90_kernel<T, kAcross>;
  int at_once = clusters_at_once<gemm_dz_sm90_kernel<T, kAcross>>(kAcross, Shape<true>::kThreads, sizeof(S));
  if (at_once == 0) return false;
  DzOperands<T> operands;
  for (int i = 0; i < kMostParts; ++i) {
    const ColumnPart<const T>& part = dy.parts[i];
    operands.from[i] = int(std::min<int64_t>(part.column, INT_MAX)), operands.active[i] = part.activated;
    if (part.width > 0) operands.dy[i] = tensor_map<T, kDepth>(part.data, m, 1, int(part.width), S::kShare);
  }
  operands.z = tensor_map<T, kDepth>(z, m, 1, int(k), S::kShare), operands.w = tensor_map<T, kDepth>(w, n, 1, int(k), kColumns);
  operands.dz = dz, operands.tiles = int(ceil_div(m, kDzRows)), operands.steps = int(k / kDepth);
  GemmOutput<T> output;
  output.parts[0] = {da, 0, n}, output.n = n;
  Walk walk{};
  walk.m = m, walk.n = n;
  launch_clusters(kernel, kAcross, std::min(operands.tiles, at_once), Shape<true>::kThreads, sizeof(S), stream, operands, Output<T>(output),
                  walk);
  return true;
}

// False where dz is for a pass of its own, which gives the same bits.
template <typename T>
bool gemm_dz(T* da, T* dz, const GemmOutput<const T>& dy, const T* z, const T* w, int64_t m, int64_t n, int64_t k, Stream stream) {
  bool fits = dy.activation == Activation::kSilu && n > 0 && k > 0 && n <= 2 * kColumns && n % 8 == 0 && m > 0 && m <= INT_MAX / 2;
  fits = fits && k % (kDzSteps * kDepth) == 0;
  for (const ColumnPart<const T>& part : dy.parts)
    if (part.width > 0) fits = fits && part.column % kDepth == 0 && part.width % kDepth == 0;
  fits = fits && aligned(dy.parts) && aligned(z, k) && aligned(w, k) && aligned(da, n) && aligned(dz, k);
  if (!fits || linear_asked_for_mma() || !runs_hopper(reinterpret_cast<const void*>(gemm_dz_sm90_kernel<T, 2>))) return false;
  if (n > kColumns) return gemm_dz_by<T, 2>(da, dz, dy, z, w, m, n, k, stream);
  return gemm_dz_by<T, 1>(da, dz, dy, z, w, m, n, k, stream);
}

}  // namespace hstu::cuda::dense_sm90
