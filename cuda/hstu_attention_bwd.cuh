// Around the backward kernel of HSTU attention: tile sizes, what each tile of queries sees (before it), dQ in its dtype (after it).
#pragma once
#include <cfloat>

#include "hstu_attention_bias.cuh"
#include "hstu_attention_tiles.cuh"

namespace hstu::cuda::attention {

// kSmall: tiles for 99 KB of shared memory a block.
template <typename T, int kDim, bool kSmall>
struct BackwardShape {
  static constexpr bool kSplit = kDim == 256;  // dK and dV of 16 keys do not fit in one warp's registers: half of the warps own either
  static constexpr int kQueryTile = kIsHalf<T> && !(kSmall && kDim == 256) ? 64 : 32;
  static constexpr int kKeyTile = kIsHalf<T> && !kSmall && kDim <= 128 ? 128 : kQueryTile;
  static constexpr int kKeyWarps = kKeyTile / 16, kWarps = kKeyWarps * (kSplit ? 2 : 1), kThreads = 32 * kWarps;
  static constexpr int kStages = kDim <= (kSmall ? 64 : 128) ? 2 : 1;                       // of Q and dO
  static constexpr int kRowGroups = kQueryTile / 16, kPart = kDim / (kWarps / kRowGroups);  // dQ: a warp has 16 rows, kPart columns
  static constexpr int kPitchDs = kQueryTile + 8;
};
template <typename T, int kDim>
constexpr bool kHasSmallBackward = kIsHalf<T> ? kDim >= 64 : kDim == 128;

// What a tile of queries sees: all keys that some row sees lie within `any`, those within `all` every row sees.
struct QueryTile {
  VisibleKeys any, all;
};

// float16 alone holds dS in a narrower range than that of dO.
template <typename T>
constexpr bool kScalesGradient = std::is_same_v<T, __half>;

// Bits of the largest |scale|, |dO| and |v| of a sequence.
struct Largest {
  unsigned scale, dout, value;
};

// float16 weights and dS stay normal numbers: row scales (and so dV) are in units of `weight`, dS (and so dQ, dK and the tables) in units
// of weight * gradient, `gradient` a power of two.
struct Units {
  float weight, weight_inverse, gradient;
};

// What a call has beside its inputs.
template <typename T>
struct Gradients {
  T *dq, *dk, *dv;
  const T* dout;
  const float *lse, *delta;      // float32 [Tq, H], softmax only
  float *pos_sums, *time_sums;   // [H, copies, P], [H, copies, last_bucket + 1]; null where the table has no gradient
  float* dq_sums;                // [Tq, H, kDim]
  QueryTile* query_tiles;        // [B, most_query_tiles]
  int* turns;                    // [B, H, most_query_tiles]: how many key tiles have added to dQ
  int2* key_tiles;               // [key tiles]: sequence and number of each, in the order in which they are worked on
  int *tiles, *ticket;           // how many there are; the next item, a tile of one head
  Largest* largest;              // [B], with row scales or float16
  int most_query_tiles, group;   // group: sequences whose tiles are worked on in turn
  int first_tile, copies;        // this launch has key_tiles[first_tile ..], at most `copies`, each with its own sums of the tables
  bool deterministic;
  // On Hopper with a bias: dS for the tables, by launches that have about as many tiles of it each, at most ds_most (and the rest of a tile
  // of keys), key_tiles[ds_bounds[launch] .. ds_bounds[launch + 1]]. A tile of keys has them from its ds_first on, of each tile of queries
  // from `first_tile_of_queries` on those of all heads.
  T* ds_tiles = nullptr;
  int *ds_first = nullptr, *ds_bounds = nullptr;  // [key tiles], [launches + 1]
  int launch = 0, launches = 1, ds_most = 0, ds_least = 0;  // ds_least: what a tile of keys counts at least
  bool last_first = false;  // up to D 128 on Hopper: the order in which key tiles add to dQ
  __device__ __forceinline__ Units units_of(const Call<T>& p, int b, bool softmax) const {
    Units units{softmax ? 1.f : p.scale, 1.f, 1.f};
    if (!softmax && p.scales) {
      float most = __uint_as_float(largest[b].scale);
      units.weight = most > 0 ? fmaxf(most, FLT_MIN) : 1.f;
      units.weight_inverse = 1 / units.weight;
    }
    if constexpr (kScalesGradient<T>) {
      // |dP| <= bound < 2^14 units: room for the two terms of a softmax gradient and for silu's derivative of at most 1.1.
      float bound = __uint_as_float(largest[b].dout) * __uint_as_float(largest[b].value) * float(p.value_dim) * p.keep_scale;
      if (bound > 0 && bound <= FLT_MAX) units.gradient = ldexpf(1.f, ilogbf(bound) - 13);
    }
    return units;
  }
};

template <typename T>
__device__ __forceinline__ const T* row_of(const T* data, const Call<T>& p, int64_t row, int head, int dim) {
  return data + (row * p.heads + head) * dim;
}

// A weight and the gradient of its score from the score in registers and the gradient of the (dropped) weight.
struct Pair {
  float weight, ds;
};
template <typename T, bool kSoftmax>
__device__ __forceinline__ Pair pair_of(float score, float dweight, bool keep, float keep_scale, float lse, float delta) {
  if constexpr (kSoftmax) {
    float weight = exponential<T>(score - lse), factor = keep ? keep_scale : 0.f;
    return {weight * factor, weight * (dweight * factor - delta)};
  } else if constexpr (kIsHalf<T>) {  // score = s / 2: sigmoid = (1 + tanh) / 2, silu = s / 2 (1 + tanh)
    float sigmoid = fmaf(tanh_approx(score), 0.5f, 0.5f), weight = 2 * score * sigmoid;
    return {weight, dweight * fmaf(weight, 1.f - sigmoid, sigmoid)};
  } else {
    float sigmoid = 1.f / (1.f + expf(-score)), weight = score * sigmoid;
    return {weight, dweight * fmaf(weight, 1.f - sigmoid, sigmoid)};
  }
}

// Blocks of a kernel that run at once on the current device.
template <typename Kernel>
int64_t resident_blocks(Kernel kernel, int threads, size_t shared) {
  int device = 0, multiprocessors = 0, blocks = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  allow_shared(kernel, shared);
  CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared));
  return int64_t(multiprocessors) * blocks;
}

// delta = <dout, out>, [Tq, H]: a warp a row and head.
template <typename T>
__global__ void __launch_bounds__(256) delta_kernel(float* delta, const T* dout, const T* out, int64_t rows, int dim) {
  int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  float sum = 0;
  for (int x = threadIdx.x % 32; x < dim; x += 32) sum = fmaf(to_float(dout[row * dim + x]), to_float(out[row * dim + x]), sum);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}

// Without rows that look ahead no query before the first key sees any.
template <typename T>
__device__ __forceinline__ int first_tile_of_queries(const Call<T>& p, const Sequence& s, int first_key, int queries) {
  return p.causal && !p.contextual_full ? max(first_key - s.shift, 0) / queries : 0;
}

// Where tiles of dS stand and which launch makes them, from how many each tile of keys has. By 128 threads.
template <typename T>
__device__ __forceinline__ void place_ds(const Gradients<T>& g, int tiles) {
  __shared__ int sums[4];
  int thread = int(threadIdx.x), lane = thread % 32, all = 0;
  for (int x0 = 0; x0 < tiles; x0 += 128) {
    int x = x0 + thread, own = x < tiles ? g.ds_first[x] : 0, to = own;
    for (int step = 1; step < 32; step *= 2)
      if (int before = __shfl_up_sync(kFullWarp, to, step); lane >= step) to += before;
    __syncthreads();
    if (lane == 31) sums[thread / 32] = to;
    __syncthreads();
    for (int w = 0; w < 4; ++w) to += w < thread / 32 ? sums[w] : 0;
    if (x < tiles) g.ds_first[x] = all + to - own;
    for (int w = 0; w < 4; ++w) all += sums[w];
  }
  __syncthreads();
  int launches = min(max((all + g.ds_most - 1) / g.ds_most, 1), g.launches), each = max((all + launches - 1) / launches, 1), last = -1;
  for (int x0 = 0; x0 < tiles; x0 += 128) {
    int x = x0 + thread, first = x < tiles ? g.ds_first[x] : 0, launch = first / each;
    if (x > x0 && x < tiles) last = g.ds_first[x - 1] / each;
    __syncthreads();
    if (x < tiles) {
      for (int y = last + 1; y <= launch; ++y) g.ds_bounds[y] = x;
      g.ds_first[x] = first - launch * each;
    }
    if (thread == 127) sums[0] = launch;
    __syncthreads();
    last = sums[0];
  }
  if (thread == 0)
    for (int y = (tiles > 0 ? (all - 1) / each : -1) + 1; y <= g.launches; ++y) g.ds_bounds[y] = tiles;
}

// The tiles of keys in the order in which they are worked on: of `group` sequences all last tiles, then those before, ..., so that tiles of
// one sequence start some time after each other. With last_first the sequences with the most tiles come first, of each 128.
template <int kQueryTile, int kKeyTile, typename T>
__device__ __forceinline__ void list_key_tiles(const Call<T>& p, const Gradients<T>& g) {
  __shared__ int counts[128], sorted[128];
  int thread = int(threadIdx.x), total = 0;
  for (int b0 = 0; b0 < p.sequences; b0 += 128) {
    int b = b0 + thread, own = b < p.sequences ? (sequence_of(p, b).length + kKeyTile - 1) / kKeyTile : 0, rank = thread;
    __syncthreads();
    counts[thread] = own;
    __syncthreads();
    if (g.last_first) {
      rank = 0;
      for (int x = 0; x < 128; ++x) rank += counts[x] > own || (counts[x] == own && x < thread);
    }
    sorted[rank] = own;
    __syncthreads();
    int first = rank / g.group * g.group, before = total;
    for (int x = 0; x < first; ++x) before += sorted[x];
    for (int n = 0; n < own; ++n) {
      int at = before;
      for (int x = first; x < first + g.group; ++x) at += min(sorted[x], n) + int(x < rank && sorted[x] > n);
      g.key_tiles[at] = {b, own - 1 - n};
      if (g.ds_first) {
        Sequence s = sequence_of(p, b);
        int tile = g.last_first ? own - 1 - n : n;
        int count = (s.queries + kQueryTile - 1) / kQueryTile - first_tile_of_queries(p, s, tile * kKeyTile, kQueryTile);
        g.ds_first[at] = max(count, g.ds_least);
      }
    }
    for (int x = 0; x < 128; ++x) total += counts[x];
  }
  if (thread == 0) *g.tiles = total, *g.ticket = 0;
  __syncthreads();
  if (g.ds_first) place_ds(g, total);
}

// A warp a tile of queries: what it sees, its turns set to 0, the largest scale of its rows. The last block lists the tiles of keys.
template <typename T, int kQueryTile, int kKeyTile>
__global__ void __launch_bounds__(128) prepare_kernel(const Call<T> p, const Gradients<T> g) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (blockIdx.x == gridDim.x - 1) return list_key_tiles<kQueryTile, kKeyTile>(p, g);
  int64_t item = int64_t(blockIdx.x) * 4 + warp;
  if (item >= int64_t(p.sequences) * g.most_query_tiles) return;
  int b = int(item / g.most_query_tiles), tile = int(item % g.most_query_tiles), first = tile * kQueryTile;
  Sequence s = sequence_of(p, b);
  if (first >= s.queries) return;
  VisibleKeys any{0, INT_MAX, 0, 0}, all{INT_MAX, 0, INT_MAX, 0};
  float most = 0;
  for (int r = first + lane; r < min(first + kQueryTile, s.queries); r += 32) {
    VisibleKeys keys = visible_keys(p, s, s.shift + r);
    any.prefix = max(any.prefix, keys.prefix), all.prefix = min(all.prefix, keys.prefix);
    if (keys.begin < keys.end) any.begin = min(any.begin, keys.begin), any.end = max(any.end, keys.end);
    all.begin = max(all.begin, keys.begin), all.end = min(all.end, keys.end);
    if (p.scales) most = fmaxf(most, fabsf(p.scales[s.query + r]));
  }
  any = any.any_of_warp(), all = all.all_of_warp();
  if (lane == 0) g.query_tiles[item] = {any, all};
  for (int head = lane; head < p.heads; head += 32) g.turns[(int64_t(b) * p.heads + head) * g.most_query_tiles + tile] = 0;
  if (p.scales) {
    unsigned bits = __reduce_max_sync(kFullWarp, __float_as_uint(most));
    if (lane == 0) atomicMax(&g.largest[b].scale, bits);
  }
}

// The largest |dO| and |v| of each sequence: a column of blocks a sequence.
template <typename T>
__global__ void __launch_bounds__(256) largest_kernel(const Call<T> p, const Gradients<T> g) {
  Sequence s = sequence_of(p, int(blockIdx.x));
  int64_t width = int64_t(p.heads) * p.value_dim, step = int64_t(gridDim.y) * 256;
  auto largest_of = [&](const T* data, int64_t count, unsigned& to) {
    float most = 0;
    for (int64_t x = int64_t(blockIdx.y) * 256 + threadIdx.x; x < count; x += step) {
      float value = fabsf(to_float(data[x]));
      most = value <= most ? most : value;  // NaN stays
    }
    unsigned bits = __reduce_max_sync(kFullWarp, __float_as_uint(most));
    if (threadIdx.x % 32 == 0 && bits > 0) atomicMax(&to, bits);
  };
  largest_of(g.dout + s.query * width, s.queries * width, g.largest[blockIdx.x].dout);
  largest_of(p.v + s.key * width, (s.length - s.paged) * width, g.largest[blockIdx.x].value);
}

// c [16, kPart] += ds^T k over all keys of the tile: 16 queries from column `row` of ds [kKeyTile, kPitchDs] on.
template <typename T, int kDim, typename S>
__device__ __forceinline__ void multiply_ds(float (&c)[S::kPart / 8][4], const T* ds, int row, const T* k) {
  constexpr int kStep = kPitch<T, kDim>, kX = S::kPart / 8;
  int lane = threadIdx.x % 32;
  if constexpr (kIsHalf<T>) {
    uint32_t a_row = shared_address(ds + (lane / 16 * 8 + lane % 8) * S::kPitchDs + row + lane / 8 % 2 * 8);
    uint32_t b_row = shared_address(k + lane % 16 * kStep + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < S::kKeyTile; j += 16) {
      uint32_t left[4];
      load_matrices_transposed(left, a_row + j * S::kPitchDs * 2);
#pragma unroll
      for (int x = 0; x < kX; x += 2) {
        uint32_t right[4];
        load_matrices_transposed(right, b_row + (j * kStep + x * 8) * 2);
        mma_m16n8k16<T>(c[x], left, right[0], right[1]);
        mma_m16n8k16<T>(c[x + 1], left, right[2], right[3]);
      }
    }
  } else {
    const float *a_row = ds + lane % 4 * S::kPitchDs + row + lane / 4, *b_row = k + lane % 4 * kStep + lane / 4;
#pragma unroll
    for (int j = 0; j < S::kKeyTile; j += 8) {
      uint32_t high[4], low[4];
      const float* a = a_row + j * S::kPitchDs;
      split_tf32(high, low, a[0], a[8], a[4 * S::kPitchDs], a[4 * S::kPitchDs + 8]);
#pragma unroll(kX > 16 ? 8 : kX)
      for (int x = 0; x < kX; ++x)
        mma_m16n8k8_3xtf32(c[x], high, low, split_tf32(b_row[j * kStep + x * 8]), split_tf32(b_row[(j + 4) * kStep + x * 8]));
    }
  }
}

// A block's dynamic shared memory as an S. The address goes through a register, or sm_90 would make it anew, slowly, wherever it is used.
template <typename S>
__device__ __forceinline__ S& shared_as() {
  extern __shared__ __align__(16) unsigned char memory[];
  uint32_t address;
  asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"(shared_address(memory)));
  return *reinterpret_cast<S*>(__cvta_shared_to_generic(address));
}

// A barrier where a warp says that it has come and waits for the others later (PTX ISA, "mbarrier"). All warps go through all of its
// phases; `parity` is 0 for the first, then 1, 0, ...
struct SplitBarrier {
  alignas(8) uint64_t state;
  __device__ __forceinline__ void begin(int warps) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(warps * kArrivalsOfWarp) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    __syncwarp();
    if (arrives(threadIdx.x % 32))
      asm volatile("{\n.reg .b64 token;\nmbarrier.arrive.shared.b64 token, [%0];\n}" ::"r"(shared_address(&state)) : "memory");
  }
  __device__ __forceinline__ void wait(unsigned parity) {
    uint32_t come;
    do {
#if __CUDA_ARCH__ >= 900
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
#else
      asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
#endif
                   : "=r"(come)
                   : "r"(shared_address(&state)), "r"(parity)
                   : "memory");
    } while (!come);
  }
};

// The order in which tiles of keys add to the dQ of a tile of queries, by one thread a block. What the block has added before a barrier
// is there for the block whose turn comes next, once that has passed a barrier too.
__device__ __forceinline__ int turns_taken(const int* turns) {
  int taken;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(taken) : "l"(turns) : "memory");
  return taken;
}
__device__ __forceinline__ void wait_for_turn(const int* turns, int taken, int turn) {
  while (taken < turn) taken = turns_taken(turns);
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}
__device__ __forceinline__ void announce(int* turns) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turns) : "memory"); }

__device__ __forceinline__ void add_pair(float* to, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
#else
  atomicAdd(to, x), atomicAdd(to + 1, y);
#endif
}

// A tile of keys of one head of one sequence. It stands in shared memory, for registers are what the kernel is short of.
template <typename T>
struct Item {
  Sequence sequence;
  int head, tile, begin, count;  // tiles of queries [begin, count)
  const QueryTile* query_tiles;
  int* turns;
  const T *q, *dout;  // of the sequence's first query
  float *dq_sums, *pos_sums, *time_sums;
  Units units;
  float inverse_gradient;
  int64_t base;  // of near times
};

template <typename T, int kDim, bool kSmall>
struct BackwardShared {
  using S = BackwardShape<T, kDim, kSmall>;
  static constexpr int kKeySize = S::kKeyTile * kPitch<T, kDim>, kQuerySize = S::kQueryTile * kPitch<T, kDim>;
  union {
    struct {
      alignas(16) T k[kKeySize], v[kKeySize], q[S::kStages][kQuerySize], dout[S::kStages][kQuerySize];
    };
    Slab<kDim> slabs[S::kSplit ? 1 : 2][S::kWarps];  // of dK and dV, after the last tile
  };
  alignas(16) T ds[2][S::kKeyTile * S::kPitchDs];
  VisibleKeys visible[2][S::kQueryTile];  // unless the tile sees all keys
  float scale[2][S::kQueryTile], lse[2][S::kQueryTile], delta[2][S::kQueryTile];
  SplitBarrier ds_there, tile_done;
  int ticket;
  Item<T> item;
};
template <typename T, int kDim, bool kSmall>
struct BackwardSharedWithBias : BackwardShared<T, kDim, kSmall> {
  using S = BackwardShape<T, kDim, kSmall>;
  BiasTile<S::kQueryTile, S::kQueryTile + S::kKeyTile, 2> bias;
  TimeSums time_sums[S::kKeyWarps];
  Diagonals<T, S::kKeyTile, S::kQueryTile, S::kPitchDs, S::kWarps> diagonals[2];
  float targets[2][S::kKeyTile];  // sums of dS over target rows, by key
  float clamped[S::kWarps], own[S::kKeyWarps];
};

// dQ from its sums, and targets' own groups: a block a tile of queries, a warp a row of one head.
template <typename T, int kDim, bool kSoftmax, int kQueryTile, int kKeyTile>
__global__ void __launch_bounds__(256) dq_kernel(const Call<T> p, const Gradients<T> g) {
  constexpr int kEach = kDim / 32;
  int b = int(blockIdx.x) / g.most_query_tiles, tile = int(blockIdx.x) % g.most_query_tiles, first = tile * kQueryTile;
  Sequence s = sequence_of(p, b);
  int rows = min(kQueryTile, s.queries - first), lane = threadIdx.x % 32;
  if (rows <= 0) return;
  bool some = !g.deterministic || KeyTiles::of(g.query_tiles[blockIdx.x].any, kKeyTile).last > 0;
  Units units = g.units_of(p, b, kSoftmax);
  float inverse = kScalesGradient<T> ? 1 / units.gradient : 1.f;
  for (int x = threadIdx.x / 32; x < rows * p.heads; x += 8) {
    int r = first + x / p.heads, head = x % p.heads, i = s.shift + r;
    int64_t row = s.query + r, at = row * p.heads + head;
    float sums[kEach];
#pragma unroll
    for (int y = 0; y < kEach; ++y) sums[y] = some ? g.dq_sums[at * kDim + lane + 32 * y] : 0.f;
    if (i >= s.history) {
      const T *query = p.q + at * p.key_dim, *dout = g.dout + at * p.value_dim;
      float scale = !kSoftmax && p.scales ? p.scales[row] * units.weight_inverse : 1.f;
      for (int j = i - (i - s.history) % p.group; j <= i; ++j) {
        const T *key = row_of(p.k, p, s.key + j, head, p.key_dim), *value = row_of(p.v, p, s.key + j, head, p.value_dim);
        float score = 0, dweight = 0;
        for (int d = lane; d < p.key_dim; d += 32) score = fmaf(to_float(query[d]), to_float(key[d]), score);
        for (int d = lane; d < p.value_dim; d += 32) dweight = fmaf(to_float(dout[d]), to_float(value[d]), dweight);
        int bucket;
        score = p.unit * p.alpha * warp_sum(score) + own_bias(p, s, head, row, j, bucket), dweight = inverse * warp_sum(dweight);
        bool keeps = !p.dropout || kept(p, b, head, i, j);
        float lse = kSoftmax ? g.lse[at] : 0.f, delta = kSoftmax ? inverse * g.delta[at] : 0.f;
        float ds = scale * pair_of<T, kSoftmax>(score, dweight, keeps, p.keep_scale, lse, delta).ds;
#pragma unroll
        for (int y = 0; y < kEach; ++y)
          if (int d = lane + 32 * y; d < p.key_dim) sums[y] = fmaf(ds, to_float(key[d]), sums[y]);
      }
    }
#pragma unroll
    for (int y = 0; y < kEach; ++y)
      if (int d = lane + 32 * y; d < p.key_dim) g.dq[at * p.key_dim + d] = from_float<T>(p.alpha * units.weight * units.gradient * sums[y]);
  }
}

}  // namespace hstu::cuda::attention
