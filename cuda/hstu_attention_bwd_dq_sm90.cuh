// HSTU attention, backward, for Hopper (sm_90a): dQ in its dtype from sums in memory, and what targets' own groups add to it and to the
// tables. See docs/hstu_attention.md.
#pragma once
#include "hstu_attention_bwd_sm90.cuh"

namespace hstu::cuda::attention {
namespace backward_sm90 {

// sums[bucket] += value over a warp's lanes; bucket -1: nothing. One bucket after the other.
__device__ __forceinline__ void add_by_bucket(float* sums, int bucket, float value) {
  for (unsigned left = __ballot_sync(kFullWarp, bucket >= 0); left;) {
    int now = __shfl_sync(kFullWarp, bucket, __ffs(left) - 1);
    float total = warp_sum(bucket == now ? value : 0.f);
    if (threadIdx.x % 32 == 0) sums[now] += total;
    left &= ~__ballot_sync(kFullWarp, bucket == now);
  }
  __syncwarp();
}

// dQ of a tile of queries of one head from its sums, and targets' own groups. own_pos, own_time: what own groups add to the tables,
// [H, tiles of queries] and [H, tiles of queries, last_bucket + 1]; null where nothing is wanted.
template <typename T, int kDim, Mode kMode>
__device__ __forceinline__ void make_dq(const Call<T>& p, const Gradients<T>& g, const Sequence& s, int tile, int head, float* own_pos,
                                        float* own_time) {
  constexpr bool kSoftmax = kMode == Mode::kSoftmax, kBias = kMode == Mode::kSiluBias;
  using S = Shape<kDim, kBias>;
  constexpr int kCount = S::kPart / 128;
  constexpr bool kByColumns = S::kQueries == 64;
  constexpr int kSteps = kBias ? 1 : std::min(kDim, 128) / 32;
  int first = tile * S::kQueries, rows = s.queries - first, group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  constexpr int kOwnWarps = kByColumns ? 4 : 8;  // that have all rows of the tile
  __shared__ float time_sums[kBias ? kOwnWarps : 1][kBias ? kTimeThresholds + 1 : 1], pos_sums[kOwnWarps];
  bool own = kBias && (own_pos || own_time) && s.shift + min(first + S::kQueries, s.queries) > s.history;
  float own_sum = 0;
  if (own) {
    __syncthreads();  // the tile before
    for (int x = threadIdx.x; x < kOwnWarps * (kTimeThresholds + 1); x += 256) (&time_sums[0][0])[x] = 0;
    __syncthreads();
  }
  bool some = !g.deterministic || KeyTiles::of(g.query_tiles[int64_t(s.index) * g.most_query_tiles + tile].any, S::kKeys).last > 0;
  Units units = g.units_of(p, s.index, kSoftmax);
  float unit = units.weight, ds_unit = (kSoftmax ? 1.f : 0.5f) * units.gradient, c[kCount];
  const float* sums = sums_of<S>(p, g, s, tile, head) + group * S::kPart;
#pragma unroll
  for (int x = 0; x < kCount / 4; ++x) {
    float4 four = some ? *reinterpret_cast<const float4*>(sums + (x * 128 + thread) * 4) : float4{0, 0, 0, 0};
    c[4 * x] = four.x, c[4 * x + 1] = four.y, c[4 * x + 2] = four.z, c[4 * x + 3] = four.w;
  }
  int column = kByColumns ? kDim / 2 * group : 0, row0 = (kByColumns ? 0 : 64 * group) + thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int r = row0 + 8 * half, i = s.shift + first + r, count = 0;
    if (r < rows && i >= s.history) count = (i - s.history) % p.group + 1;
    int64_t row = s.query + first + (r < rows ? r : 0), at = row * p.heads + head;
    float scale = !kSoftmax && p.scales ? p.scales[row] / unit : 1.f;
#pragma unroll 1
    for (int x = 0, longest = __reduce_max_sync(kFullWarp, count); x < longest; ++x) {
      bool active = x < count;
      int64_t j = s.key + (active ? i - count + 1 + x : 0);
      const T *key = row_of(p.k, p, j, head, p.key_dim), *value = row_of(p.v, p, j, head, p.value_dim);
      float score = p.unit * p.alpha * dot<kSteps>(p.q + at * p.key_dim, key, p.key_dim, active);
      float dweight = dot<kSteps>(g.dout + at * p.value_dim, value, p.value_dim, active);
      int bucket = -1;
      float ds = 0;
      if (active) {
        if constexpr (kBias) score += own_bias(p, s, head, row, int(j - s.key), bucket);
        Pair pair = pair_of<T, kSoftmax>(score, dweight, true, 1.f, kSoftmax ? g.lse[at] : 0.f, kSoftmax ? g.delta[at] : 0.f);
        ds = scale / ds_unit * pair.ds;
        add_to_row(c, half, ds, key, column + lane % 4 * 2, p.key_dim);
      }
      if (own && threadIdx.x < 32 * kOwnWarps) {
        if (lane % 4 != 0) bucket = -1, ds = 0;
        own_sum += ds;
        if (own_time) add_by_bucket(time_sums[threadIdx.x / 32], bucket, ds);
      }
    }
    store_row(g.dq + at * p.key_dim, c, half, p.alpha * unit * ds_unit, column, p.key_dim, r < rows);
  }
  if constexpr (kBias) {
    if (!own) return;
    own_sum = warp_sum(own_sum);
    if (threadIdx.x < 32 * kOwnWarps && lane == 0) pos_sums[threadIdx.x / 32] = own_sum;
    __syncthreads();
    int64_t to = (int64_t(head) * p.sequences + s.index) * g.most_query_tiles + tile;
    auto of_warps = [&](auto&& of) {
      float sum = 0;
#pragma unroll
      for (int x = 0; x < kOwnWarps; x += 4) sum += (of(x) + of(x + 1)) + (of(x + 2) + of(x + 3));
      return unit * ds_unit * sum;
    };
    if (own_pos && threadIdx.x == 0) own_pos[to] = of_warps([&](int w) { return pos_sums[w]; });
    if (int x = threadIdx.x; own_time && x <= p.last_bucket)
      own_time[to * (p.last_bucket + 1) + x] = of_warps([&](int w) { return time_sums[w][x]; });
  }
}
// A block has a tile of each sequence, the first or one after it, and each `parts`-th from there. Where the computing warps write dQ only
// tiles with targets are left.
template <typename T, int kDim, Mode kMode = Mode::kSilu>
__global__ void __launch_bounds__(256, 2)
    dq_sm90_kernel(const Call<T> p, const Gradients<T> g, int parts, float* own_pos, float* own_time) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<kDim, kMode == Mode::kSiluBias>;
  Sequence s = sequence_of(p, int(blockIdx.x) / parts);
  int tile = int(blockIdx.x) % parts;
  if (S::kFinishes && g.deterministic) {
    if (s.history == s.length) return;
    tile += max(s.history - s.shift, 0) / S::kQueries;
  }
  for (; tile * S::kQueries < s.queries; tile += parts) make_dq<T, kDim, kMode>(p, g, s, tile, int(blockIdx.y), own_pos, own_time);
#endif
}

}  // namespace backward_sm90
}  // namespace hstu::cuda::attention
