// dA = dz W^T on Hopper with dz = dy silu'(z) made on chip as it is needed, and left for the weight gradient. Drawing
// and log in docs/linear.md.
#pragma once
#include "gemm_held_sm90.cuh"

namespace hstu::cuda::dense_sm90 {

constexpr int kDzMakers = 4, kDzMultiplying = 16, kDzThreads = 32 * (kDzMultiplying + kDzMakers);

// A cluster of kAcross blocks: a block multiplies 128 rows by 256 columns. They share the rows of dz, each makes 128 /
// kAcross of them for both.
template <int kAcross>
struct DzShared {
  static constexpr bool kAlone = kAcross == 1;                              // a maker loads and stores its own rows
  static constexpr int kShare = 128 / kAcross, kEach = kShare / kDzMakers;  // rows that a block and a warp make
  static constexpr int kBox = kAlone ? kEach : kShare;                      // rows of a load and of a store
  static constexpr int kStages = 3, kBStages = kAcross == 2 ? 3 : 2, kRawStages = kAcross == 2 ? 3 : 2;
  alignas(1024) unsigned char a[kStages][128 * kLine], b[kBStages][kColumns * kLine];
  alignas(1024) unsigned char raw[kRawStages][2][kShare * kLine];  // dy, z
  alignas(1024) unsigned char c[kDzMultiplying / 4][64 * kLine];
  Barrier full[kStages], empty[kStages], b_full[kBStages], b_empty[kBStages], raw_full[kDzMakers][kRawStages];
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
  __device__ __forceinline__ void next(const DzMaps& maps) {
    if (++step == maps.steps) step = 0, tile += cluster_count();
  }
};

// dy and z of a step: of one maker, or of the block.
template <int kAcross>
__device__ __forceinline__ void load_gradients(DzShared<kAcross>& shared, const DzMaps& maps, const DzPlace& at, int stage, int maker = 0) {
  using S = DzShared<kAcross>;
  int column = at.step * kDepth, part = maps.part(column), first = maker * S::kEach;
  int row = at.tile * 128 + int(cluster_rank()) * S::kShare + first;
  bool active = maps.active[part];
  Barrier& full = shared.raw_full[maker][stage];
  full.expect(S::kBox * kLine * (active ? 2 : 1));
  load_box(shared_address(shared.raw[stage][0]) + first * kLine, maps.dy[part], column - maps.from[part], 0, row, full);
  if (active) load_box(shared_address(shared.raw[stage][1]) + first * kLine, maps.z, column, 0, row, full);
}
// Their dz, from a stage of A.
template <int kAcross>
__device__ __forceinline__ void store_gradients(DzShared<kAcross>& shared, const DzMaps& maps, const DzPlace& at, int stage,
                                                int maker = 0) {
  using S = DzShared<kAcross>;
  int first = int(cluster_rank()) * S::kShare + maker * S::kEach;
  store_box(maps.dz, at.step * kDepth, 0, at.tile * 128 + first, shared_address(shared.a[stage]) + first * kLine);
  bulk_commit();
}

// A warp: its rows of dz of each step, to this block's stage of A and to the other's.
template <typename T, int kAcross>
__device__ __forceinline__ void make_dz(DzShared<kAcross>& shared, const DzMaps& maps) {
  using S = DzShared<kAcross>;
  constexpr int kAtOnce = 16;  // rows
  int maker = threadIdx.x / 32 - kDzMultiplying, lane = threadIdx.x % 32, rank = cluster_rank();
  bool alone = S::kAlone && lane == 0;
  Ring<S::kStages> ring;
  Ring<S::kRawStages> raw;
  DzPlace at{cluster_index(), 0}, ahead = at;
  auto load = [&](int stage) {
    if (alone && ahead.tile < maps.tiles) load_gradients(shared, maps, ahead, stage, maker);
    ahead.next(maps);
  };
  if constexpr (S::kAlone)
    for (int stage = 0; stage < S::kRawStages; ++stage) load(stage);
  for (; at.tile < maps.tiles; at.next(maps), ring.next(), raw.next()) {
    bool active = maps.active[maps.part(at.step * kDepth)];
    uint32_t from = shared_address(shared.raw[raw.stage]) + maker * S::kEach * kLine;
    uint32_t to = shared_address(shared.a[ring.stage]) + (rank * S::kShare + maker * S::kEach) * kLine;
    Barrier& full = shared.full[ring.stage];
    shared.raw_full[S::kAlone ? maker : 0][raw.stage].wait(raw.parity);
    auto read = [&](int what, int r) { return load_shared(from + what * S::kShare * kLine + r * kLine + ((lane ^ r) & 7) * 16); };
#pragma unroll
    for (int part = 0; part < S::kEach / kAtOnce; ++part) {
      int first = part * kAtOnce + lane / 8;
      uint32_t words[kAtOnce / 4][4];
      branch(active, [&](auto kActive) {
#pragma unroll
        for (int i = 0; i < kAtOnce / 4; ++i) {
          uint4 bits = read(0, first + 4 * i);
          words[i][0] = bits.x, words[i][1] = bits.y, words[i][2] = bits.z, words[i][3] = bits.w;
          if constexpr (kActive) {
            float gradient[8], before[8];
            widen<T>(gradient, bits);
            widen<T>(before, read(1, first + 4 * i));
#pragma unroll
            for (int e = 0; e < 8; ++e) gradient[e] = through_activation<T>(gradient[e], before[e], Activation::kSilu);
#pragma unroll
            for (int e = 0; e < 4; ++e) words[i][e] = pack_pair<T>(gradient[2 * e], gradient[2 * e + 1]);
          }
        }
      });
      if (S::kAlone && part == S::kEach / kAtOnce - 1) {
        __syncwarp();
        load(raw.stage);
      }
      if (part == 0) {
        shared.empty[ring.stage].wait(ring.parity ^ 1);
        if (alone) bulk_wait_read();
        if constexpr (S::kAlone) __syncwarp();
      }
#pragma unroll
      for (int i = 0; i < kAtOnce / 4; ++i) {
        int r = first + 4 * i;
        store_shared(to + r * kLine + ((lane ^ r) & 7) * 16, words[i]);
      }
    }
    fence_async();
    __syncwarp();
    full.arrive_beside(lane);
    if (lane == 0) {
      full.expect((kAcross - 1) * S::kEach * kLine);
      if constexpr (kAcross > 1) copy_to_block(to, S::kEach * kLine, full, rank ^ 1);
      if (alone) store_gradients(shared, maps, at, ring.stage, maker);
    }
  }
  if (alone) bulk_wait_read();
}

// Persistent clusters with 128 rows at a time; four warpgroups of a block multiply 64 x 128 each, and four warps make
// dz. Of the multiplying threads one loads W, and where the makers do not, one dy and z, and one stores dz, while
// products run. An element of dA as in gemm_sm90_kernel.
template <typename T, int kAcross>
__global__ void __launch_bounds__(kDzThreads, 1) gemm_dz_sm90_kernel(const __grid_constant__ DzMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = DzShared<kAcross>;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<S*>(memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, w_row = cluster_rank() * kColumns;
  auto load_weights = [&](int stage, int step) {
    shared.b_full[stage].expect(int(sizeof(shared.b[0])));
    load_box(shared_address(shared.b[stage]), maps.w, step * kDepth, 0, w_row, shared.b_full[stage]);
  };
  if (threadIdx.x == 0) {
    prefetch(maps.w), prefetch(maps.z);
    for (int i = 0; i < S::kStages; ++i) shared.full[i].init(0, kDzMakers), shared.empty[i].init(0, kDzMultiplying * kAcross);
    for (int i = 0; i < S::kBStages; ++i) shared.b_full[i].init(1, 0), shared.b_empty[i].init(0, kDzMultiplying);
    for (auto& barriers : shared.raw_full)
      for (Barrier& barrier : barriers) barrier.init(1, 0);
    fence_barriers();
  }
  cluster_arrive();
  cluster_wait();
  if (warp >= kDzMultiplying) {
    make_dz<T>(shared, maps);
  } else {
    int group = warp / 4, rows = group / 2 * 64, columns = group % 2 * kHeldColumns;
    bool leader = threadIdx.x % 128 == 0;
    uint32_t tile = shared_address(shared.c[group]);
    // Of by_rows only the lower half changes, without a carry.
    uint32_t a_first = uint32_t(by_rows<kLine>(shared_address(shared.a) + rows * kLine));
    uint32_t b_first = uint32_t(by_rows<kLine>(shared_address(shared.b) + columns * kLine));
    auto place = [](uint32_t low) { return by_rows<kLine>(0) >> 32 << 32 | low; };
    Ring<S::kStages> ring;
    Ring<S::kBStages> b_ring;
    DzPlace ahead{cluster_index(), 0};
    bool loads = threadIdx.x == 0, reads = !S::kAlone && threadIdx.x == 128, stores = !S::kAlone && threadIdx.x == 256;
    if (loads)
      for (int stage = 0; stage < S::kBStages; ++stage, ahead.next(maps))
        if (ahead.tile < maps.tiles) load_weights(stage, ahead.step);
    Ring<S::kRawStages> raw;
    if (reads)
      for (int stage = 0; stage < S::kRawStages; ++stage, ahead.next(maps))
        if (ahead.tile < maps.tiles) load_gradients(shared, maps, ahead, stage);
    // A step is done: the thread that loads W waits for the others here, while the next step's products run.
    auto release = [&](const Ring<S::kStages>& done, const Ring<S::kBStages>& b_done) {
      if (stores) bulk_wait_read();
      __syncwarp();
      arrive_at_all_for_warp<kAcross>(shared.empty[done.stage], lane);
      shared.b_empty[b_done.stage].arrive_for_warp(lane);
      if (loads && ahead.tile < maps.tiles) {
        shared.b_empty[b_done.stage].wait(b_done.parity);
        load_weights(b_done.stage, ahead.step);
        ahead.next(maps);
      }
      __syncwarp();
    };
    for (int i = cluster_index(); i < maps.tiles; i += cluster_count()) {
      float c[64];
      Ring<S::kStages> last;
      Ring<S::kBStages> b_last;
      for (int step = 0; step < maps.steps; ++step, ring.next(), b_ring.next()) {
        shared.b_full[b_ring.stage].wait(b_ring.parity);
        shared.full[ring.stage].wait(ring.parity);
        uint32_t a = a_first + ring.stage * int(sizeof(shared.a[0]) / 16), b = b_first + b_ring.stage * int(sizeof(shared.b[0]) / 16);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) wgmma<T, false>(c, place(a + k * 2 / 16), place(b + k * 2 / 16), step > 0 || k > 0);
        wgmma_commit();
        if (reads && ahead.tile < maps.tiles) {  // the makers have read this step's
          load_gradients(shared, maps, ahead, raw.stage);
          ahead.next(maps), raw.next();
        }
        __syncwarp();
        wgmma_wait<1>();
        if (step > 0) release(last, b_last);
        if (stores) store_gradients(shared, maps, {i, step}, ring.stage);
        __syncwarp();
        last = ring, b_last = b_ring;
      }
      wgmma_wait<0>(c);
      release(last, b_last);
      auto store = [&](auto kHalf) {
        if (leader) bulk_wait_read();
        meet(kMeet + group, 128);
        finish_held<T, false, 4 * kHalf.value, 4 * kHalf.value + 4>(tile, c);
        fence_async();
        meet(kMeet + group, 128);
        if (leader) {
          store_box(maps.da, w_row + columns + kHalf.value * kDepth, 0, i * 128 + rows, tile);
          bulk_commit();
        }
      };
      store(std::integral_constant<int, 0>{});
      store(std::integral_constant<int, 1>{});
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
  int at_once = clusters_at_once<gemm_dz_sm90_kernel<T, kAcross>>(kAcross, kDzThreads, sizeof(S));
  if (at_once == 0) return false;
  for (int i = 0; i < kMostParts; ++i) {
    const ColumnPart<const T>& part = dy.parts[i];
    maps.from[i] = int(std::min<int64_t>(part.column, INT_MAX)), maps.active[i] = part.activated;
    if (part.width > 0) maps.dy[i] = tensor_map<T, kDepth>(part.data, m, 1, int(part.width), S::kBox);
  }
  maps.z = tensor_map<T, kDepth>(z, m, 1, int(k), S::kBox), maps.dz = tensor_map<T, kDepth>(dz, m, 1, int(k), S::kBox);
  maps.w = tensor_map<T, kDepth>(w, n, 1, int(k), kColumns), maps.da = tensor_map<T, kDepth>(da, m, 1, int(n), 64);
  maps.tiles = int(ceil_div(m, 128)), maps.steps = int(k / kDepth);
  launch_clusters(kernel, kAcross, std::min(maps.tiles, at_once), kDzThreads, sizeof(S), stream, maps);
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
