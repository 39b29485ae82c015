// HSTU attention, backward, head dims of 129 to 256, for Hopper (sm_90a): the kernel, the launches. See docs/hstu_attention.md for a
// drawing.
#include "hstu_attention_bwd_dq_sm90.cuh"
#include "hstu_attention_bwd_wide_sm90.cuh"
#include "hstu_attention_choice.cuh"

namespace hstu::cuda {
namespace attention {
namespace backward_sm90 {
namespace {

template <typename T>
__global__ void __launch_bounds__(Shape<256>::kThreads, 1)
    hstu_attention_backward_wide_sm90_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                             const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dout_map,
                                             const __grid_constant__ Call<T> p, const __grid_constant__ Gradients<T> g, float factor,
                                             bool last_first) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<WideShared<T>*>(memory);
  if (threadIdx.x == 0) {
    prefetch(q_map), prefetch(k_map), prefetch(v_map), prefetch(dout_map);
    shared.begin();
  }
  __syncthreads();
  int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0), group = warp / 4;
  if (group == 0) {
    give_registers<32>();
    if (warp == 3)
      tell_wide(shared, p);
    else if (threadIdx.x % 32 > 0)
      return;
    else if (warp == 0)
      produce<T, 256>(shared, q_map, k_map, v_map, dout_map, p, g, false, last_first);
    else if (g.deterministic)
      warp == 1 ? await_turns(shared) : announce_turns(shared);
  } else if (group == 1) {
    take_registers<192>();
    make_dv(shared, p, g, factor);
  } else if (group == 2) {
    take_registers<192>();
    make_dk(shared, p, g, factor);
  } else {
    give_registers<96>();
    add_dq(shared, g.deterministic);
  }
#endif
}

}  // namespace

constexpr int64_t kCached = 1 << 14;  // rows of one head whose Q, dO and sums of dQ, 2 KB each, stay in the L2 cache

template <typename T>
void run_wide(const Call<T>& p, Gradients<T> g, int64_t rows, int64_t keys, int64_t longest, Stream stream) {
  using S = Shape<256>;
  static_assert(sizeof(WideShared<T>) <= kHopperShared);
  int64_t tiles = ceil_div(longest, S::kQueries), query_tiles = tiles * p.sequences;
  int64_t key_tiles = std::min<int64_t>(ceil_div(int64_t(p.max_seq_len), S::kKeys) * p.sequences, keys / S::kKeys + p.sequences);
  HSTU_CHECK(query_tiles <= INT_MAX - 4 && key_tiles * p.heads <= INT_MAX / 2, kInvalidArgument, "hstu_attention_backward: ", p.sequences,
             " sequences of ", p.max_seq_len, " rows are too many for one call");
  int64_t blocks = std::min<int64_t>(processors(), key_tiles * p.heads);
  Scratch<float> dq_sums((rows / S::kQueries + p.sequences) * p.heads * 2 * S::kPart, stream);
  Scratch<QueryTile> seen(query_tiles, stream);
  Scratch<int> turns(query_tiles * p.heads + 2, stream);
  Scratch<int2> key_list(key_tiles, stream);
  Scratch<Largest> largest(p.scales || kScalesGradient<T> ? p.sequences : 0, stream);
  if (largest) largest.zero();
  if (!g.deterministic) dq_sums.zero();
  g.dq_sums = dq_sums, g.query_tiles = seen, g.turns = turns + 2, g.tiles = turns, g.ticket = turns + 1, g.key_tiles = key_list;
  g.largest = largest, g.most_query_tiles = int(tiles);
  // Tiles of keys that begin together and take turns last to first do not wait for each other under a causal mask, but are spread over
  // the sequence: that is for what stays in the L2 cache. First to last they go side by side, and wait where they begin: the fewer of one
  // sequence the better.
  bool fits = int64_t(p.max_seq_len) * p.heads <= kCached, last_first = g.deterministic && fits;
  for (g.group = 32; g.group > 1 && g.group * int64_t(p.max_seq_len) * p.heads > (g.deterministic && !fits ? 8 * kCached : kCached);)
    g.group /= 2;
  CUtensorMap q_map = tensor_map<T, 256>(p.q, rows, p.heads, p.key_dim, S::kQueries);
  CUtensorMap k_map = tensor_map<T, 256>(p.k, keys, p.heads, p.key_dim, S::kKeys);
  CUtensorMap v_map = tensor_map<T, 256>(p.v, keys, p.heads, p.value_dim, S::kKeys);
  CUtensorMap dout_map = tensor_map<T, 256>(g.dout, rows, p.heads, p.value_dim, S::kQueries);
  if (kScalesGradient<T>) launch(largest_kernel<T>, dim3(unsigned(p.sequences), 8), dim3(256), 0, stream, p, g);
  launch(prepare_kernel<T, S::kQueries, S::kKeys>, dim3(unsigned(ceil_div(query_tiles, 4) + 1)), dim3(128), 0, stream, p, g);
  launch(hstu_attention_backward_wide_sm90_kernel<T>, dim3(unsigned(blocks)), dim3(S::kThreads), sizeof(WideShared<T>), stream, q_map,
         k_map, v_map, dout_map, p, g, p.unit * p.alpha, last_first);
  launch(dq_sm90_kernel<T, 256>, dim3(unsigned(query_tiles), unsigned(p.heads)), dim3(256), 0, stream, p, g, int(tiles), nullptr, nullptr);
}
template void run_wide(const Call<__nv_bfloat16>&, Gradients<__nv_bfloat16>, int64_t, int64_t, int64_t, Stream);
template void run_wide(const Call<__half>&, Gradients<__half>, int64_t, int64_t, int64_t, Stream);

}  // namespace backward_sm90
}  // namespace attention
}  // namespace hstu::cuda
