// dA = dz W^T on Hopper with dz = dy silu'(z) made on chip as it is needed, and left for the weight gradient. Drawing
// and log in docs/linear.md.
#pragma once
#include "gemm_held_sm90.cuh"

namespace hstu::cuda::dense_sm90 {

constexpr int kDzMakers = 8, kDzMultiplying = 8, kDzThreads = 32 * (kDzMakers + kDzMultiplying + 2);

// A cluster of two rows of kAcross blocks: a block multiplies 64 rows by 256 columns. Neighbours across share the rows
// of dz, each makes 64 / kAcross of them for both; those one above the other share the columns of W^T, each loads half
// of them for both.
template <int kAcross>
struct DzShared {
  static constexpr int kBlocks = 2 * kAcross, kShare = 64 / kAcross, kStages = 4, kBStages = 3, kRawStages = kAcross == 2 ? 6 : 4;
  static_assert(kStages % 2 == 0 && kRawStages % 2 == 0);  // a stage is always the same makers'
  alignas(1024) unsigned char a[kStages][64 * kLine], b[kBStages][kColumns * kLine];
  alignas(1024) unsigned char raw[kRawStages][2][kShare * kLine];  // dy, z
  alignas(1024) unsigned char c[2][64 * kHeldColumns * 2];
  Barrier full[kStages], empty[kStages], b_full[kBStages], b_empty[kBStages], raw_full[kRawStages], raw_empty[kRawStages];
};

// Place of this block in its cluster.
template <int kAcross>
struct DzBlock {
  int rank = cluster_rank(), down = rank / kAcross, across = rank % kAcross;
  __device__ __forceinline__ int row(int tile) const { return tile * 128 + down * 64; }
};

struct DzMaps {
  CUtensorMap dy[kMostParts], z, dz, w, da;
  int from[kMostParts];
  bool active[kMostParts];
  int tiles, steps;
  __device__ __forceinline__ int part(int column) const {
    int part = 0;
#pragma unroll
    for (int i = 1; i < kMostParts; ++i)
      if (column >= from[i]) part = i;
    return part;
  }
};

// The steps of this cluster's tiles, one after another.
struct DzPlace {
  int tile, step;
  __device__ __forceinline__ void next(const DzMaps& maps, int steps = 1) {
    step += steps;
    while (step >= maps.steps) step -= maps.steps, tile += cluster_count();
  }
};

template <int kAcross>
__device__ __forceinline__ void load_gradients(DzShared<kAcross>& shared, const DzMaps& maps) {
  using S = DzShared<kAcross>;
  DzBlock<kAcross> block;
  Ring<S::kRawStages> ring;
  for (DzPlace at{cluster_index(), 0}; at.tile < maps.tiles; at.next(maps), ring.next()) {
    int column = at.step * kDepth, part = maps.part(column), row = block.row(at.tile) + block.across * S::kShare;
    bool active = maps.active[part];
    Barrier& full = shared.raw_full[ring.stage];
    shared.raw_empty[ring.stage].wait(ring.parity ^ 1);
    full.expect(S::kShare * kLine * (active ? 2 : 1));
    load_box(shared_address(shared.raw[ring.stage][0]), maps.dy[part], column - maps.from[part], 0, row, full);
    if (active) load_box(shared_address(shared.raw[ring.stage][1]), maps.z, column, 0, row, full);
  }
}

template <int kAcross>
__device__ __forceinline__ void load_weights(DzShared<kAcross>& shared, const DzMaps& maps) {
  using S = DzShared<kAcross>;
  constexpr int kHalf = kColumns / 2;
  DzBlock<kAcross> block;
  Ring<S::kBStages> ring;
  for (DzPlace at{cluster_index(), 0}; at.tile < maps.tiles; at.next(maps), ring.next()) {
    Barrier& full = shared.b_full[ring.stage];
    shared.b_empty[ring.stage].wait(ring.parity ^ 1);
    full.expect(int(sizeof(shared.b[0])));
    load_box_for_all(shared_address(shared.b[ring.stage]) + block.down * kHalf * kLine, maps.w, at.step * kDepth, 0,
                     block.across * kColumns + block.down * kHalf, full, (1 | 1 << kAcross) << block.across);
  }
}

// Four warps, every other step: the block's share of the rows of dz, to this block's stage of A, to the others' and to
// memory.
template <typename T, int kAcross>
__device__ __forceinline__ void make_dz(DzShared<kAcross>& shared, const DzMaps& maps, int group) {
  using S = DzShared<kAcross>;
  constexpr int kEach = S::kShare / 16;  // rows of a lane
  int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, first = warp * 4 * kEach + lane / 8;
  DzBlock<kAcross> block;
  bool leader = threadIdx.x % 128 == 0;
  Ring<S::kStages> ring;
  Ring<S::kRawStages> raw;
  DzPlace at{cluster_index(), 0};
  if (group > 0) at.next(maps), ring.next(), raw.next();
  for (; at.tile < maps.tiles; at.next(maps, 2), ring.next(), ring.next(), raw.next(), raw.next()) {
    int column = at.step * kDepth;
    bool active = maps.active[maps.part(column)];
    uint32_t from = shared_address(shared.raw[raw.stage]), to = shared_address(shared.a[ring.stage]) + block.across * S::kShare * kLine;
    uint32_t words[kEach][4];
    shared.raw_full[raw.stage].wait(raw.parity);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      int r = first + 4 * i, place = r * kLine + ((lane ^ r) & 7) * 16;
      uint4 bits = load_shared(from + place);
      words[i][0] = bits.x, words[i][1] = bits.y, words[i][2] = bits.z, words[i][3] = bits.w;
      if (active) {
        float gradient[8], before[8];
        widen<T>(gradient, bits);
        widen<T>(before, load_shared(from + S::kShare * kLine + place));
#pragma unroll
        for (int e = 0; e < 8; ++e) gradient[e] = through_activation<T>(gradient[e], before[e], Activation::kSilu);
#pragma unroll
        for (int e = 0; e < 4; ++e) words[i][e] = pack_pair<T>(gradient[2 * e], gradient[2 * e + 1]);
      }
    }
    __syncwarp();
    shared.raw_empty[raw.stage].arrive_for_warp(lane);
    Barrier& full = shared.full[ring.stage];
    shared.empty[ring.stage].wait(ring.parity ^ 1);
    if (leader) full.expect((kAcross - 1) * S::kShare * kLine), bulk_wait_read();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      int r = first + 4 * i;
      store_shared(to + r * kLine + ((lane ^ r) & 7) * 16, words[i]);
    }
    fence_async();
    __syncwarp();
    full.arrive_for_warp(lane);
    meet(kMakersMeet + group, 128);
    if (leader) {
      store_box(maps.dz, column, 0, block.row(at.tile) + block.across * S::kShare, to);
      bulk_commit();
      if constexpr (kAcross > 1) copy_to_block(to, S::kShare * kLine, full, block.rank ^ 1);
    }
  }
  if (leader) bulk_wait_read();
}

// Persistent clusters with 128 rows at a time. An element of dA as in gemm_sm90_kernel.
template <typename T, int kAcross>
__global__ void __launch_bounds__(kDzThreads, 1) gemm_dz_sm90_kernel(const __grid_constant__ DzMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = DzShared<kAcross>;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<S*>(memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    prefetch(maps.w), prefetch(maps.z);
    for (int i = 0; i < S::kStages; ++i) shared.full[i].init(1, kDzMakers / 2), shared.empty[i].init(0, kDzMultiplying * kAcross);
    for (int i = 0; i < S::kBStages; ++i) shared.b_full[i].init(1, 0), shared.b_empty[i].init(0, kDzMultiplying * 2);
    for (int i = 0; i < S::kRawStages; ++i) shared.raw_full[i].init(1, 0), shared.raw_empty[i].init(0, kDzMakers / 2);
    fence_barriers();
  }
  cluster_sync();
  if (warp < kDzMakers) {
    make_dz<T>(shared, maps, warp / 4);
  } else if (warp >= kDzMakers + kDzMultiplying) {
    if (lane == 0) {
      if (warp == kDzMakers + kDzMultiplying)
        load_gradients(shared, maps);
      else
        load_weights(shared, maps);
    }
  } else {
    int group = warp / 4 - kDzMakers / 4;
    bool leader = threadIdx.x % 128 == 0;
    uint32_t tile = shared_address(shared.c[group]), bias[16] = {};
    DzBlock<kAcross> block;
    auto release = [&](int stage, int b_stage) {
      shared.empty[stage].arrive_for_warp(lane);
      if (kAcross > 1 && arrives(lane)) arrive_at(shared.empty[stage], block.rank ^ 1);
      shared.b_empty[b_stage].arrive_for_warp(lane);
      if (arrives(lane)) arrive_at(shared.b_empty[b_stage], block.rank ^ kAcross);
    };
    Ring<S::kStages> ring;
    Ring<S::kBStages> b_ring;
    for (int i = cluster_index(); i < maps.tiles; i += cluster_count()) {
      float c[64];
      int last = 0, b_last = 0;
      for (int step = 0; step < maps.steps; ++step, ring.next(), b_ring.next()) {
        shared.b_full[b_ring.stage].wait(b_ring.parity);
        shared.full[ring.stage].wait(ring.parity);
        uint64_t a = by_rows<kLine>(shared_address(shared.a[ring.stage]));
        uint64_t b = by_rows<kLine>(shared_address(shared.b[b_ring.stage]) + group * kHeldColumns * kLine);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) wgmma<T, false>(c, a + k * 2 / 16, b + k * 2 / 16, step > 0 || k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) release(last, b_last);
        last = ring.stage, b_last = b_ring.stage;
      }
      wgmma_wait<0>(c);
      release(last, b_last);
      if (leader) bulk_wait_read();
      meet(kMeet + group, 128);
      finish_held<T, false>(tile, c, bias, false);
      fence_async();
      meet(kMeet + group, 128);
      if (leader) {
        for (int x = 0; x < kHeldColumns; x += 64)
          store_box(maps.da, block.across * kColumns + group * kHeldColumns + x, 0, block.row(i), tile + x * 64 * 2);
        bulk_commit();
      }
    }
    if (leader) bulk_wait_read();
  }
  cluster_sync();  // no block ends while others write into it
#endif
}

template <typename T, int kAcross>
bool gemm_dz_by(DzMaps& maps, T* da, T* dz, const GemmOutput<const T>& dy, const T* z, const T* w, int64_t m, int64_t n, int64_t k,
                Stream stream) {
  using S = DzShared<kAcross>;
  auto kernel = gemm_dz_sm90_kernel<T, kAcross>;
  int at_once = clusters_at_once<gemm_dz_sm90_kernel<T, kAcross>>(S::kBlocks, kDzThreads, sizeof(S));
  if (at_once == 0) return false;
  for (int i = 0; i < kMostParts; ++i) {
    const ColumnPart<const T>& part = dy.parts[i];
    maps.from[i] = int(std::min<int64_t>(part.column, INT_MAX)), maps.active[i] = part.activated;
    if (part.width > 0) maps.dy[i] = tensor_map<T, kDepth>(part.data, m, 1, int(part.width), S::kShare);
  }
  maps.z = tensor_map<T, kDepth>(z, m, 1, int(k), S::kShare), maps.dz = tensor_map<T, kDepth>(dz, m, 1, int(k), S::kShare);
  maps.w = tensor_map<T, kDepth>(w, n, 1, int(k), kColumns / 2), maps.da = tensor_map<T, kDepth>(da, m, 1, int(n), 64);
  maps.tiles = int(ceil_div(m, 128)), maps.steps = int(k / kDepth);
  launch_clusters(kernel, S::kBlocks, std::min(maps.tiles, at_once), kDzThreads, sizeof(S), stream, maps);
  return true;
}

// False where dz is for a pass of its own, which gives the same bits.
template <typename T>
bool gemm_dz(T* da, T* dz, const GemmOutput<const T>& dy, const T* z, const T* w, int64_t m, int64_t n, int64_t k, Stream stream) {
  bool fits = dy.activation == Activation::kSilu && n > 0 && k > 0 && n <= 2 * kColumns && n % 8 == 0 && m > 0 && m <= INT_MAX / 2;
  for (const ColumnPart<const T>& part : dy.parts)
    if (part.width > 0) fits = fits && part.column % kDepth == 0 && part.width % kDepth == 0;
  fits = fits && aligned(dy.parts) && aligned(z, k) && aligned(w, k) && aligned(da, n) && aligned(dz, k);
  if (!fits || linear_asked_for_mma() || !runs_hopper(reinterpret_cast<const void*>(gemm_dz_sm90_kernel<T, 2>))) return false;
  DzMaps maps;
  if (n > kColumns) return gemm_dz_by<T, 2>(maps, da, dz, dy, z, w, m, n, k, stream);
  return gemm_dz_by<T, 1>(maps, da, dz, dy, z, w, m, n, k, stream);
}

}  // namespace hstu::cuda::dense_sm90
