// C = A B on Hopper (sm_90a): wgmma and TMA, 16-bit types. Drawing, arithmetic and log in docs/linear.md.
#pragma once
#include <algorithm>
#include <climits>

#include "gemm.cuh"
#include "sm90/bulk.cuh"
#include "sm90/cluster.cuh"
#include "sm90/wgmma.cuh"

namespace hstu::cuda::dense_sm90 {

using namespace sm90;

// Partial sums of a weight gradient: [splits, m, n].
struct PartialOutput {
  float* data;
  static constexpr bool kReads = false;
};

// What the tiles of C are and which block takes which. A cluster of two blocks takes two neighbours down C, which share the columns of B.
struct Walk {
  int64_t m, n;
  int pairs, across;  // tiles of C: pairs of tiles down, tiles across
  int panel;          // tiles across that are walked before the next pair: what of B stays in L2 meanwhile
  int steps, share;   // steps of kDepth along k, and how many of them a split takes
  int items;          // pairs * across * splits

  struct Item {
    int pair, column, split, begin, steps;
  };
  __device__ __forceinline__ Item operator[](int item) const {
    int split = item / (pairs * across), rest = item - split * pairs * across;
    int first = rest / (panel * pairs) * panel, width = min(panel, across - first);
    rest -= first * pairs;
    return {rest / width, first + rest % width, split, split * share, min(share, steps - split * share)};
  }
};

// Both halves of a meeting of the cluster's blocks that comes without a fence: barriers are seen that were made known by fence_barriers.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

constexpr int kDepth = 64, kColumns = 256, kLine = 128;  // of k and of n a step; bytes of a row in shared memory
constexpr int kBlocks = 2;                               // of a cluster

// kTurns: each of two warpgroups computes 64 x 256 tiles of its own, by turns, one's stores under the other's products. Else both
// compute 128 x 256 together.
template <bool kTurns>
struct Shape {
  static constexpr int kRows = kTurns ? 64 : 128, kStages = kTurns ? 5 : 4;
  static constexpr int kABytes = kRows * kLine, kBBytes = kColumns * kLine, kBytes = kABytes + kBBytes;
  static constexpr int kThreads = 384, kLoading = 40, kComputing = 232;  // threads; registers of a thread
};

template <bool kTurns>
struct Shared {
  using S = Shape<kTurns>;
  alignas(1024) unsigned char stage[S::kStages][S::kBytes];  // A, then B
  Barrier full[S::kStages], empty[S::kStages];
};

template <bool kTurns>
__device__ __forceinline__ void advance(Ring<Shape<kTurns>::kStages>& ring, int steps) {
  int to = ring.stage + steps, rounds = to / Shape<kTurns>::kStages;
  ring.stage = to - rounds * Shape<kTurns>::kStages, ring.parity ^= rounds & 1;
}

// One thread of each block: its own rows of A, and half of the columns of B for both blocks. The residual comes to L2 meanwhile.
template <typename T, bool kATransposed, bool kBTransposed, bool kTurns, typename Epilogue>
__device__ __forceinline__ void load_operands(Shared<kTurns>& shared, const CUtensorMap& a_map, const CUtensorMap& b_map,
                                              const CUtensorMap& residual_map, const Epilogue& output, const Walk& walk) {
  using S = Shape<kTurns>;
  int rank = cluster_rank();
  Ring<S::kStages> ring;
  for (int i = cluster_index(); i < walk.items; i += cluster_count()) {
    Walk::Item item = walk[i];
    int row = (item.pair * kBlocks + rank) * S::kRows, column = item.column * kColumns;
    if constexpr (Epilogue::kReads)
      for (int x = 0; output.residual && x < kColumns; x += kDepth) prefetch_box(residual_map, column + x, 0, row);
    for (int step = 0; step < item.steps; ++step, ring.next()) {
      int k = (item.begin + step) * kDepth;
      Barrier& full = shared.full[ring.stage];
      shared.empty[ring.stage].wait(ring.parity ^ 1);
      full.expect(S::kBytes);
      uint32_t a = shared_address(shared.stage[ring.stage]), b = a + S::kABytes;
      if constexpr (kATransposed) {
#pragma unroll
        for (int x = 0; x < S::kRows; x += 64) load_box(a + x * kLine, a_map, row + x, 0, k, full);
      } else {
        load_box(a, a_map, k, 0, row, full);
      }
      constexpr int kHalf = kColumns / kBlocks;
      if constexpr (kBTransposed) {
        load_box_for_all(b + rank * kHalf * kLine, b_map, k, 0, column + rank * kHalf, full, (1 << kBlocks) - 1);
      } else {
#pragma unroll
        for (int x = 0; x < kHalf; x += 64)
          load_box_for_all(b + (rank * kHalf + x) * kLine, b_map, column + rank * kHalf + x, 0, k, full, (1 << kBlocks) - 1);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
  else
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
template <typename T>
__device__ __forceinline__ float2 load_pair(const T* from) {
  return unpack_pair<T>(*reinterpret_cast<const uint32_t*>(from));
}

// Eight neighbours as they lie, widened.
template <typename T>
__device__ __forceinline__ void widen(float (&v)[8], const uint4& bits) {
  uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      v[2 * i] = __uint_as_float(words[i] << 16), v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      float2 pair = unpack_pair<T>(words[i]);
      v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
  }
}

// Of a result that is rounded to T: by tanh, one instruction, where its 11 bits are enough, else by exp and a reciprocal. No product is
// left open for the compiler to fuse with what comes next.
template <typename T>
__device__ __forceinline__ float silu_fast(float x) {
  float y;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    float half = 0.5f * x;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(half));
    return __fmaf_rn(half, y, half);
  } else {
    float denominator = __fadd_rn(1.f, __expf(-x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(denominator));
    return __fmul_rn(x, y);
  }
}

__device__ __forceinline__ void store_words(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]));
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// GemmOutput as the epilogue wants it: part i begins at column `from[i]`, and data[i] is where its column 0 of C would be.
template <typename T>
struct Output {
  T* data[kMostParts];
  int from[kMostParts], width[kMostParts];
  bool activated[kMostParts];
  const T *bias, *residual;
  T* z;
  Activation activation;
  static constexpr bool kReads = true;  // maybe a residual

  explicit Output(const GemmOutput<T>& output) : bias(output.bias), residual(output.residual), z(output.z), activation(output.activation) {
    for (int i = 0; i < kMostParts; ++i) {
      const ColumnPart<T>& part = output.parts[i];
      from[i] = int(std::min<int64_t>(part.column, INT_MAX)), width[i] = int(part.width), activated[i] = part.activated;
      data[i] = part.width > 0 ? part.data - part.column : nullptr;
    }
  }

  struct Part {
    T* data;
    int width, end;  // end: first column behind it
    bool activated;
  };
  // Asks for the bias to be in L2 soon: by thread i of `threads`.
  __device__ __forceinline__ void prefetch_bias(int n, int i, int threads) const {
    constexpr int kSector = 32 / sizeof(T);
    for (int j = i * kSector; bias && j < n; j += threads * kSector) asm volatile("prefetch.global.L2 [%0];" ::"l"(bias + j));
  }
  __device__ __forceinline__ Part at(int column, int n) const {
    Part part{data[0], width[0], n, activated[0]};
#pragma unroll
    for (int i = 1; i < kMostParts; ++i) {
      if (column >= from[i])
        part.data = data[i], part.width = width[i], part.activated = activated[i];
      else
        part.end = min(part.end, from[i]);
    }
    return part;
  }
};

constexpr int kGroup = 32;  // columns of a turn of the epilogue's loop

// kGroup columns of a warp's 16 rows, from a lane's own rows and column on.
template <typename T>
struct Residual {
  uint4 bits[2] = {};
  __device__ __forceinline__ void read(const Output<T>& output, const Walk& walk, int64_t row, int column) {
    int n = int(walk.n);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (row + 8 * half < walk.m && column < n)
        bits[half] = *reinterpret_cast<const uint4*>(output.residual + (row + 8 * half) * n + column);
  }
};

// The sums v[half] of kGroup columns from `column` on, in four groups of eight; lane t of a quad gets group t, eight neighbours, to load
// and store in 16 bytes. kWhole: all columns are of one part.
template <bool kWhole, typename T>
__device__ __forceinline__ void finish_group(const Output<T>& output, const Walk& walk, float (&v)[2][8], Residual<T>& residual,
                                             int64_t row, int column) {
  int t = threadIdx.x % 4, n = int(walk.n), mine = column + 8 * t;
  typename Output<T>::Part part = output.at(kWhole ? column : mine, n);
  bool here = kWhole || mine < n;
  auto leave = [&](T* to, int stride) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
#pragma unroll
      for (int y = 0; y < 4; ++y) words[y] = pack_pair<T>(v[half][2 * y], v[half][2 * y + 1]);
      transpose_quad(words);
      if (here && row + 8 * half < walk.m) store_words(to + (row + 8 * half) * stride + mine, words);
    }
  };
  auto activate = [&](auto fn) {
#pragma unroll
    for (int y = 0; y < 4; ++y)
      if (kWhole || output.at(column + 8 * y, n).activated) {
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e / 2][2 * y + e % 2] = fn(v[e / 2][2 * y + e % 2]);
      }
  };
  if (output.bias) {
#pragma unroll
    for (int y = 0; y < 4; ++y) {
      int pair = column + 8 * y;
      if (!kWhole && pair >= n) continue;
      float2 bias = load_pair(output.bias + pair + 2 * t);
#pragma unroll
      for (int half = 0; half < 2; ++half) v[half][2 * y] += bias.x, v[half][2 * y + 1] += bias.y;
    }
  }
  if (output.z) leave(output.z, n);
  if (!kWhole || part.activated) {
    if (output.activation == Activation::kSilu)
      activate([](float x) { return silu_fast<T>(x); });
    else if (output.activation == Activation::kRelu)
      activate([](float x) { return x > 0.f ? x : 0.f; });
  }
  if (output.residual) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4] = {residual.bits[half].x, residual.bits[half].y, residual.bits[half].z, residual.bits[half].w};
      transpose_quad(words);
#pragma unroll
      for (int y = 0; y < 4; ++y) {
        float2 pair = unpack_pair<T>(words[y]);
        v[half][2 * y] = __fadd_rn(v[half][2 * y], pair.x), v[half][2 * y + 1] = __fadd_rn(v[half][2 * y + 1], pair.y);
      }
    }
  }
  leave(part.data, part.width);
}

// The same for all kColumns columns at once, where they are of one part and what there is to do is known: straight code, short enough for
// the instruction cache.
template <bool kBias, bool kZ, bool kSilu, bool kResidual, typename T>
__device__ __forceinline__ void finish_tile(const Output<T>& output, const typename Output<T>::Part& part, const Walk& walk,
                                            const float (&c)[128], int64_t row, int column) {
  constexpr int kAhead = 3, kGroups = kColumns / kGroup;  // kAhead: groups whose residual is on its way
  int t = threadIdx.x % 4, n = int(walk.n), mine = column + 8 * t;
  bool inside[2] = {row < walk.m, row + 8 < walk.m};
  T *to = part.data + row * part.width + mine, *z = output.z + row * n + mine;
  const T *bias = output.bias + column + 2 * t, *residual = output.residual + row * n + mine;
  uint32_t shifts[kGroups][4];
  auto ask = [&](int group) {  // for the bias: a group's stores let nothing by that comes after them
#pragma unroll
    for (int y = 0; kBias && y < 4; ++y) shifts[group][y] = *reinterpret_cast<const uint32_t*>(bias + kGroup * group + 8 * y);
  };
  ask(0), ask(1);
  uint4 more[kGroups][2];
  auto read = [&](int group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      more[group][half] = uint4{0, 0, 0, 0};
      if (inside[half]) more[group][half] = *reinterpret_cast<const uint4*>(residual + 8 * half * n + kGroup * group);
    }
  };
  if constexpr (kResidual) {
#pragma unroll
    for (int group = 0; group < kAhead; ++group) read(group);
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    float v[2][8];
    if (group + 2 < kGroups) ask(group + 2);
#pragma unroll
    for (int y = 0; y < 4; ++y) {
      float2 shift{0.f, 0.f};
      if constexpr (kBias) shift = unpack_pair<T>(shifts[group][y]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float sum = c[16 * group + 4 * y + e];
        v[e / 2][2 * y + e % 2] = kBias ? sum + (e % 2 ? shift.y : shift.x) : sum;
      }
    }
    auto leave = [&](T* from, int stride) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int y = 0; y < 4; ++y) words[y] = pack_pair<T>(v[half][2 * y], v[half][2 * y + 1]);
        transpose_quad(words);
        if (inside[half]) store_words(from + 8 * half * stride + kGroup * group, words);
      }
    };
    if constexpr (kZ) leave(z, n);
    if constexpr (kSilu) {
#pragma unroll
      for (int y = 0; y < 16; ++y) v[y / 8][y % 8] = silu_fast<T>(v[y / 8][y % 8]);
    }
    if constexpr (kResidual) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4] = {more[group][half].x, more[group][half].y, more[group][half].z, more[group][half].w};
        transpose_quad(words);
#pragma unroll
        for (int y = 0; y < 4; ++y) {
          float2 pair = unpack_pair<T>(words[y]);
          v[half][2 * y] = __fadd_rn(v[half][2 * y], pair.x), v[half][2 * y + 1] = __fadd_rn(v[half][2 * y + 1], pair.y);
        }
      }
      if (group + kAhead < kGroups) read(group + kAhead);
    }
    leave(to, part.width);
  }
}

// flag as a constant.
template <typename Fn>
__device__ __forceinline__ void branch(bool flag, Fn&& fn) {
  if (flag)
    fn(std::true_type{});
  else
    fn(std::false_type{});
}

// The accumulators of a warp, 16 rows from a lane's `row` on and kColumns columns from `column` on, to their parts of the output: in a loop
// over copies of the accumulators, whatever the output.
template <typename T>
__device__ __forceinline__ void finish_any(const Output<T>& output, const Walk& walk, const float (&c)[128], int64_t row, int column) {
  int n = int(walk.n), mine = threadIdx.x % 4 * 8;
  Residual<T> residual;
#pragma unroll 1
  for (int group = 0; group < kColumns / kGroup; ++group) {
    int first = column + kGroup * group;
    if (first >= n) return;
    if (output.residual) residual.read(output, walk, row, first + mine);
    float v[2][8];
#pragma unroll
    for (int i = 0; i < kColumns / kGroup; ++i)
      if (group == i) {
#pragma unroll
        for (int x = 0; x < 16; ++x) v[x / 2 % 2][x / 4 * 2 + x % 2] = c[16 * i + x];
      }
    if (first + kGroup <= output.at(first, n).end)
      finish_group<true>(output, walk, v, residual, row, first);
    else
      finish_group<false>(output, walk, v, residual, row, first);
  }
}

// The same, common cases by finish_tile: both do the same to an element.
template <typename T>
__device__ __forceinline__ void finish(const Output<T>& output, const Walk& walk, const float (&c)[128], int64_t row, int column, int) {
  row += threadIdx.x % 32 / 4;
  typename Output<T>::Part part = output.at(column, int(walk.n));
  bool active = part.activated && output.activation != Activation::kNone;
  bool adds = output.residual, keeps = output.z;
  if (column + kColumns > part.end || (active && output.activation == Activation::kRelu) || (adds && (active || keeps)))
    return finish_any(output, walk, c, row, column);
  branch(output.bias, [&](auto kBias) {
    if (adds) return finish_tile<kBias, false, false, true>(output, part, walk, c, row, column);
    branch(keeps, [&](auto kZ) {
      branch(active, [&](auto kSilu) { finish_tile<kBias, kZ, kSilu, false>(output, part, walk, c, row, column); });
    });
  });
}

// Of a single part with a residual and no activation.
template <typename T>
__device__ __forceinline__ void finish_added(const Output<T>& output, const Walk& walk, const float (&c)[128], int64_t row, int column) {
  row += threadIdx.x % 32 / 4;
  typename Output<T>::Part part = output.at(column, int(walk.n));
  if (column + kColumns > part.end) return finish_any(output, walk, c, row, column);
  branch(output.bias, [&](auto kBias) { finish_tile<kBias, false, false, true>(output, part, walk, c, row, column); });
}

__device__ __forceinline__ void finish(const PartialOutput& output, const Walk& walk, const float (&c)[128], int64_t row, int column,
                                       int split) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int64_t r = row + lane / 4 + 8 * half, at = column + lane % 4 * 2;
    float* to = output.data + (split * walk.m + r) * walk.n + at;
#pragma unroll
    for (int x = 0; x < 32; ++x)
      if (r < walk.m && at + 8 * x < walk.n)
        *reinterpret_cast<float2*>(to + 8 * x) = make_float2(c[4 * x + 2 * half], c[4 * x + 2 * half + 1]);
  }
}

// Persistent clusters of two blocks; in each a warpgroup that loads and two that compute. An element of C is one chain over k in ascending
// order, 16 at a time, and its epilogue, whatever the tile, its place and the way of the warpgroups.
template <typename T, bool kATransposed, bool kBTransposed, bool kTurns, typename Epilogue>
__global__ void __launch_bounds__(Shape<kTurns>::kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                     const __grid_constant__ CUtensorMap residual_map, const __grid_constant__ Epilogue output,
                     const __grid_constant__ Walk walk) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<kTurns>;
  constexpr int kTurn = 1;  // named barriers kTurn and kTurn + 1
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kTurns>*>(memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4 - 1;
  if (threadIdx.x == 0) {
    prefetch(a_map), prefetch(b_map);
    for (int i = 0; i < S::kStages; ++i) shared.full[i].init(1, 0), shared.empty[i].init(0, (kTurns ? 4 : 8) * kBlocks);
    fence_barriers();
  }
  cluster_arrive();
  cluster_wait();
  if (group < 0) {
    give_registers<S::kLoading>();
    if (threadIdx.x == 0) load_operands<T, kATransposed, kBTransposed>(shared, a_map, b_map, residual_map, output, walk);
    if constexpr (Epilogue::kReads)
      if (warp > 0) output.prefetch_bias(int(walk.n), threadIdx.x - 32, 96);
  } else {
    take_registers<S::kComputing>();
    Ring<S::kStages> ring;
    int rank = cluster_rank();
    auto release = [&](int stage) { arrive_at_all_for_warp<kBlocks>(shared.empty[stage], lane); };
    if (kTurns && group == 0) announce(kTurn, 256);
    bool mine = !kTurns || group == 0;
    for (int i = cluster_index(); i < walk.items; i += cluster_count(), mine = !kTurns || !mine) {
      Walk::Item item = walk[i];
      if (!mine) {
        advance<kTurns>(ring, item.steps);
        continue;
      }
      float c[128];
      if constexpr (kTurns) meet(kTurn + group, 256);
      int last = 0;
      for (int step = 0; step < item.steps; ++step, ring.next()) {
        shared.full[ring.stage].wait(ring.parity);
        uint32_t tile = shared_address(shared.stage[ring.stage]);
        uint32_t rows = tile + (kTurns ? 0 : group * 64 * kLine), columns = tile + S::kABytes;
        uint64_t a = kATransposed ? by_columns<kLine>(rows, 64 * kLine) : by_rows<kLine>(rows);
        uint64_t b = kBTransposed ? by_rows<kLine>(columns) : by_columns<kLine>(columns, 64 * kLine);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth; k += 16)
          wgmma_both<T, kATransposed, !kBTransposed>(c, a + k * (kATransposed ? kLine : 2) / 16, b + k * (kBTransposed ? 2 : kLine) / 16,
                                                     step > 0 || k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) release(last);
        last = ring.stage;
      }
      if constexpr (kTurns) announce(kTurn + (group ^ 1), 256);
      wgmma_wait<0>(c);
      if (item.steps > 0) release(last);
      int64_t row = int64_t(item.pair * kBlocks + rank) * S::kRows + (kTurns ? 0 : group * 64) + warp % 4 * 16;
      finish(output, walk, c, row, item.column * kColumns, item.split);
    }
  }
  cluster_sync();  // no block ends while the other one writes into it
#endif
}

}  // namespace hstu::cuda::dense_sm90
