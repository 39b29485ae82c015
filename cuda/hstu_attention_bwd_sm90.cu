// HSTU attention, backward, for Hopper (sm_90a): the kernel, the launches. See docs/hstu_attention.md for a drawing.
#include <cmath>

#include "hstu_attention_bwd_bias_sm90.cuh"
#include "hstu_attention_bwd_dq_sm90.cuh"
#include "hstu_attention_choice.cuh"

namespace hstu::cuda {
namespace attention {
namespace backward_sm90 {
namespace {

// Scores and dP are made transposed, rows are keys, so that P^T and dS^T are operands from registers. Scores s / 2 in registers: with
// th = tanh(s / 2), P = s / 2 (1 + th) and 2 dsilu = 1 + v, v = th + P (1 - th), which waits for dP in float16. dS is kept doubled.
// Softmax: 2^14 P waits for dP in float16.
template <typename T, int kDim, Mode kMode>
__global__ void __launch_bounds__(Shape<kDim>::kThreads, 1)
    hstu_attention_backward_sm90_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                        const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dout_map,
                                        const __grid_constant__ Call<T> p, const __grid_constant__ Gradients<T> g, float factor,
                                        const __grid_constant__ PositionTable positions) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool kSoftmax = kMode == Mode::kSoftmax, kBias = kMode == Mode::kSiluBias;
  using S = Shape<kDim, kBias>;
  constexpr int kQ = S::kQueries, kK = S::kKeys, kBytes = kRowBytes<T, kDim>, kColumns = kBytes / int(sizeof(T));
  constexpr int kSteps = kBias ? 1 : kDim / 32;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<SharedOf<T, kDim, kBias>*>(memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4 - 1;

  if (threadIdx.x == 0) {
    prefetch(q_map), prefetch(k_map), prefetch(v_map), prefetch(dout_map);
    shared.k_full.init(1, 0), shared.k_empty.init(0, 8), shared.v_full.init(1, 0), shared.v_empty.init(0, 8);
    for (int x = 0; x < S::kAhead; ++x) shared.told[x].init(1, 0);
    for (int x = 0; x < S::kStages; ++x)
      shared.q_full[x].init(1, 1), shared.q_empty[x].init(kBias ? 0 : 2, 8), shared.dout_full[x].init(1, 0),
          shared.dout_empty[x].init(0, 8);
    for (int x = 0; x < 2; ++x)
      shared.dq_full[x].init(0, 4), shared.dq_empty[x].init(1, 0), shared.sums_full[x].init(1, 0), shared.item_full[x].init(1, 0),
          shared.item_empty[x].init(0, 8);
    if constexpr (kBias) shared.init();
    fence_barriers();
  }
  if constexpr (kBias) shared.bias.begin(threadIdx.x, S::kThreads);
  __syncthreads();

  if (group < 0) {
    give_registers<S::kLoading>();
    if constexpr (kBias) {
      if (warp == 3) return load_tiles<T, kDim>(shared, q_map, k_map, v_map, dout_map, p, g);
      if (warp == 0) return stage_bias<T, kDim>(shared, p, positions);
    } else {
      if (warp == 3) return tell<T, kDim>(shared, p, g);
      if (warp == 0 && lane == 0) return produce<T, kDim, kBias>(shared, q_map, k_map, v_map, dout_map, p, g, kSoftmax, g.last_first);
    }
    if (warp > 0 && lane == 0) add_parts<T, kDim>(shared, warp - 1, g.deterministic);
    return;
  }

  take_registers<S::kComputing>();
  group = __shfl_sync(kFullWarp, group, 0), warp = __shfl_sync(kFullWarp, warp, 0) % 4;
  auto release = [&](Barrier& barrier) { barrier.arrive_for_warp(lane); };
  uint32_t count = 0;  // tiles of queries so far
  for (uint32_t turn = 0;; ++turn) {
    shared.item_full[turn % 2].wait(turn / 2 & 1);
    const Item& item = shared.item[turn % 2];
    if ((kBias ? read(&item.tile) : item.tile) < 0) break;
    float dk[kDim / 2], dv[kDim / 2];
#pragma unroll
    for (int x = 0; x < kDim / 2; ++x) dk[x] = dv[x] = 0.f;

    if (item.any) {
      if (int valid = item.s.history - item.tile * kK; valid < kK) {
        shared.k_full.wait(item.parity), shared.v_full.wait(item.parity);
        clear_tail<T, kDim, kK>(shared.k, valid), clear_tail<T, kDim, kK>(shared.v, valid);
        fence_async();
        meet(1, 256);
      }
      float scores[kQ / 2], gradient[kQ / 2], dq[S::kPart / 128];
      uint32_t weights[kQ / 4], slopes[kQ / 4], ds[kQ / 4];
      auto multiply = [&](float(&c)[kQ / 2], const T* keys_tile, const T* tile, bool add) {
        uint64_t keys = by_rows<kBytes>(shared_address(keys_tile) + 64 * group * kBytes), queries = by_rows<kBytes>(shared_address(tile));
#pragma unroll
        for (int d = 0; d < kDim; d += 16)
          wgmma<T, false>(c, moved(keys, d / kColumns * kK * kBytes + d % kColumns * 2),
                          moved(queries, d / kColumns * kQ * kBytes + d % kColumns * 2), add || d > 0);
        wgmma_commit();
      };
      auto accumulate = [&](float(&c)[kDim / 2], const uint32_t* a, const T* tile) {
        uint64_t queries = by_columns<kBytes>(shared_address(tile), kQ * kBytes);
#pragma unroll
        for (int x = 0; x < kQ; x += 16) wgmma<T, true>(c, a + x / 4, moved(queries, x * kBytes), true);
        wgmma_commit();
      };
      std::conditional_t<kBias, BiasAhead<decltype(SharedWithBias<T, kDim>::bias)>, int> ahead;
      auto begin = [&](uint32_t count) {  // scores begin as the position's bias
        if constexpr (kBias) {
          const Tile& tile = shared.tile[count % S::kAhead];
          begin_scores(shared.bias, count % S::kAhead, tile.before, tile.offset & 3, scores);
        }
      };
      auto multiply_scores = [&] {
        if (!kBias) shared.q_full[count % 2].wait(count / 2 & 1);
        wgmma_fence();
        multiply(scores, shared.k, shared.q[count % 2], kBias);
      };
      auto multiply_gradient = [&] {
        int stage = count % 2;
        if (!kBias) shared.dout_full[stage].wait(count / 2 & 1);
        if (int rows = shared.tile[count % S::kAhead].rows; !likely(rows >= kQ)) {
          clear_tail<T, kDim, kQ>(shared.q[stage], rows), clear_tail<T, kDim, kQ>(shared.dout[stage], rows);
          fence_async();
          meet(1, 256);
        }
        if (kBias) forget(gradient);
        wgmma_fence();
        multiply(gradient, shared.v, shared.dout[stage], false);
      };
      constexpr float kHidden = kSoftmax ? -1e30f : -128.f;  // a score where P and dsilu are 0 in float32
      auto hide = [&](float factor) {
        uint32_t thread = thread_index(), key = thread / 4 % 8 + thread / 32 % 2 * 16;
        const uint32_t* seen = &shared.seen[count % 2][thread / 64 - 2][thread % 4 * 2];
#pragma unroll
        for (int x = 0; x < kQ / 8; ++x) {
          uint2 bits = *reinterpret_cast<const uint2*>(seen + 8 * x);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            scores[4 * x + e] = (e % 2 ? bits.y : bits.x) >> (key + e / 2 * 8) & 1 ? factor * scores[4 * x + e] : kHidden;
        }
      };
      auto weigh_tile = [&](float factor, auto scaled) {
#pragma unroll
        for (int x = 0; x < kQ / 8; ++x) {
          if (x > 0 && x % (kBias ? 6 : 8) == 0) part(count);
          float weight[4], slope[4];
          if constexpr (kSoftmax) {
            float2 lse = *reinterpret_cast<const float2*>(&shared.scale[count % 2][8 * x + thread_index() % 4 * 2]);
#pragma unroll
            for (int e = 0; e < 4; ++e)
              weight[e] = exp2_approx(fmaf(factor, scores[4 * x + e], e % 2 ? -lse.y : -lse.x)), slope[e] = weight[e] * 16384.f;
          } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float t = kBias ? scores[4 * x + e] : factor * scores[4 * x + e], th = tanh_approx(t);
              weight[e] = fmaf(t, th, t);
              slope[e] = fmaf(weight[e], 1.f - th, th);
            }
          }
          slopes[2 * x] = pack_pair<__half>(slope[0], slope[1]), slopes[2 * x + 1] = pack_pair<__half>(slope[2], slope[3]);
          if (scaled) {
            float2 scale = *reinterpret_cast<const float2*>(&shared.scale[count % 2][8 * x + thread_index() % 4 * 2]);
            weight[0] *= scale.x, weight[1] *= scale.y, weight[2] *= scale.x, weight[3] *= scale.y;
          }
          weights[2 * x] = pack_pair<T>(weight[0], weight[1]), weights[2 * x + 1] = pack_pair<T>(weight[2], weight[3]);
        }
      };
      auto weigh = [&] {
        bool all = shared.tile[count % S::kAhead].all;
        float whole = kSoftmax ? factor * kLog2E : factor, last = all ? whole : 1.f;
        if (!likely(all)) hide(kBias ? 1.f : whole);
        if (!kSoftmax && !likely(!p.scales))
          weigh_tile(last, std::true_type{});
        else
          weigh_tile(last, std::false_type{});
      };
      auto differentiate_tile = [&](auto scaled) {
        float unit = item.inverse_ds_unit * (kSoftmax ? 0x1p-14f : 0.5f);
#pragma unroll
        for (int x = 0; x < kQ / 8; ++x) {
          float value[4];
          float2 delta{0, 0};
          if (kSoftmax) delta = *reinterpret_cast<const float2*>(&shared.delta[count % 2][8 * x + thread_index() % 4 * 2]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float2 slope = __half22float2(*reinterpret_cast<const __half2*>(&slopes[2 * x + half]));
            float* from = &gradient[4 * x + 2 * half];
            if (kSoftmax) {
              value[2 * half] = slope.x * fmaf(from[0], unit, -delta.x), value[2 * half + 1] = slope.y * fmaf(from[1], unit, -delta.y);
            } else {
              if (kScalesGradient<T>) from[0] *= unit, from[1] *= unit;
              value[2 * half] = fmaf(from[0], slope.x, from[0]), value[2 * half + 1] = fmaf(from[1], slope.y, from[1]);
            }
          }
          if (scaled) {
            float2 scale = *reinterpret_cast<const float2*>(&shared.scale[count % 2][8 * x + thread_index() % 4 * 2]);
            value[0] *= scale.x, value[1] *= scale.y, value[2] *= scale.x, value[3] *= scale.y;
          }
          ds[2 * x] = pack_pair<T>(value[0], value[1]), ds[2 * x + 1] = pack_pair<T>(value[2], value[3]);
        }
      };
      auto differentiate = [&] {
        if (!kSoftmax && !likely(!p.scales))
          differentiate_tile(std::true_type{});
        else
          differentiate_tile(std::false_type{});
        uint32_t thread = thread_index(), row = thread / 16 % 2 * 8 + thread % 8, unit = thread / 32 % 4 * 2 + thread / 8 % 2;
        uint32_t to = shared_address(shared.ds[count % 2]) + (group * kQ + row) * 128 + (unit ^ row % 8) * 16;
#pragma unroll
        for (int x = 0; x < kQ / 8; x += 2) store_matrices_transposed(to + x * 1024, ds + 2 * x);
        fence_async();
      };
      auto multiply_ds = [&] {
        constexpr bool kByColumns = kQ == 64;  // the warpgroups share dQ by columns, else by rows
        uint64_t a = by_rows<128>(shared_address(shared.ds[count % 2]) + (kByColumns ? 0 : 64 * group * 128));
        uint64_t b = by_columns<kBytes>(
            shared_address(shared.k) + (kByColumns ? group * kDim / 2 / kColumns * kK * kBytes + kDim / 2 % kColumns * 2 * group : 0),
            kK * kBytes);
        if (kBias) forget(dq);
#pragma unroll
        for (int x = 0; x < kK; x += 16) wgmma<T, true>(dq, moved(a, x / 64 * kQ * 128 + x % 64 * 2), moved(b, x * kBytes), x > 0);
        wgmma_commit();
      };
      auto leave = [&] {  // dQ of a tile is added by another warp
        shared.dq_empty[group].wait(count & 1 ^ 1);
        uint32_t thread = thread_index() % 128;
#pragma unroll
        for (int x = 0; x < S::kPart / 512; ++x)
          *reinterpret_cast<float4*>(&shared.dq[group][(x * 128 + thread) * 4]) =
              float4{dq[4 * x], dq[4 * x + 1], dq[4 * x + 2], dq[4 * x + 3]};
        fence_async();
        __syncwarp();
        release(shared.dq_full[group]);
      };
      auto finish = [&] {  // the last part of dQ: dQ in its dtype
        const Tile& tile = shared.tile[count % S::kAhead];
        constexpr bool kByColumns = kQ == 64;
        shared.dq_empty[group].wait(count & 1 ^ 1), shared.sums_full[group].wait(tile.finished & 1);
        if (tile.turn > 0) {
#pragma unroll
          for (int x = 0; x < S::kPart / 512; ++x) {
            float4 sums = *reinterpret_cast<const float4*>(&shared.dq[group][(x * 128 + thread_index() % 128) * 4]);
            dq[4 * x] += sums.x, dq[4 * x + 1] += sums.y, dq[4 * x + 2] += sums.z, dq[4 * x + 3] += sums.w;
          }
        }
        __syncwarp();
        release(shared.dq_full[group]);
        int row = (kByColumns ? 0 : 64 * group) + thread_index() / 32 % 4 * 16 + thread_index() % 32 / 4;
        int64_t at = (item.s.query + tile.index * kQ + row) * p.heads + item.head;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          store_row(g.dq + (at + 8 * half * p.heads) * p.key_dim, dq, half, p.alpha * item.unit * item.ds_unit,
                    kByColumns ? kDim / 2 * group : 0, p.key_dim, row + 8 * half < tile.rows);
      };

      auto make_weights = [&](bool first) {
        multiply_scores();
        if constexpr (kBias) ahead.load(shared.bias, count % S::kAhead);
        if constexpr (kBias) {  // dP comes later: its registers are needed
          wgmma_wait<0>(scores);
          add_times(shared.bias, ahead, p, item, shared.tile[count % S::kAhead], count % S::kAhead, factor, scores);
        }
        if (first && !kBias) shared.v_full.wait(item.parity);
        multiply_gradient();
        if (!kBias) wgmma_wait<1>(scores);
        weigh();
        wgmma_wait<0>(gradient);
      };

      // With a bias one copy of the loop's first half: code is what the instruction cache is short of.
      shared.k_full.wait(item.parity);
      if (kBias) shared.v_full.wait(item.parity);
      if (kBias) shared.q_full[count % 2].wait(count / 2 & 1), begin(count);
      if (!kBias) make_weights(true);
      for (;;) {
        if (kBias) make_weights(true);
        int stage = count % 2;
        if (shared.tile[count % S::kAhead].last) release(shared.v_empty);
        wgmma_fence();
        accumulate(dv, weights, shared.dout[stage]);
        differentiate();
        bool stores = kBias && threadIdx.x == 128 && g.ds_tiles;
        if (stores) bulk_wait_read();
        meet(1, 256);  // dS of all keys is there; that of the tile before is read no more
        if (stores) {
          int64_t place = place_of_ds(p, item.s, item.place, item.tile, kK, shared.tile[count % S::kAhead].index, kQ, item.head);
          store_bulk(g.ds_tiles + place * (kQ * kK), shared_address(shared.ds[count % 2]), kQ * kK * int(sizeof(T)));
          bulk_commit();
        }
        wgmma_fence();
        multiply_ds();
        wgmma_fence();
        accumulate(dk, ds, shared.q[stage]);
        bool last = shared.tile[count % S::kAhead].last;
        wgmma_wait<1>(dq);
        if (!kBias) release(shared.dout_empty[stage]);
        if (last) release(shared.k_empty);
        if (likely(!shared.tile[count % S::kAhead].finishes))
          leave();
        else
          finish();
        if (kBias) {  // behind the last tile scores are anything
          if (!last) shared.q_full[(count + 1) % 2].wait((count + 1) / 2 & 1);
          begin(count + 1);
        }
        wgmma_wait<0>(dk);
        release(shared.q_empty[stage]);
        if (kBias) release(shared.tile_empty[count % S::kAhead]);
        if (last) break;
        ++count;
        if (!kBias) make_weights(false);
      }
      wgmma_wait<0>(dv);
      ++count;
    }

    // Targets' own groups, in float32, a quad a key. Then out.
    const Sequence& s = item.s;
    int j0 = item.tile * kK, head = item.head, row0 = int(thread_index() - 128) / 32 * 16 + thread_index() % 32 / 4,
        column0 = thread_index() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int j = j0 + row0 + 8 * half, own = 0, from = max(j, s.shift);
      if (j >= s.history && j < s.length) {
        int64_t end = int64_t(j) - (j - s.history) % p.group + p.group;
        own = max(int(min(end, int64_t(s.length))) - from, 0);
      }
#pragma unroll 1
      for (int x = 0, longest = __reduce_max_sync(kFullWarp, own); x < longest; ++x) {
        bool active = x < own;
        int64_t row = s.query + (active ? from + x - s.shift : 0);
        const T *query = row_of(p.q, p, row, head, p.key_dim), *dout = row_of(g.dout, p, row, head, p.value_dim);
        float score = factor * dot<kSteps>(query, row_of(p.k, p, s.key + j, head, p.key_dim), p.key_dim, active);
        float dweight = dot<kSteps>(dout, row_of(p.v, p, s.key + j, head, p.value_dim), p.value_dim, active);
        if (active) {
          int64_t at = row * p.heads + head;
          float lse = kSoftmax ? g.lse[at] : 0.f, delta = kSoftmax ? g.delta[at] : 0.f;
          [[maybe_unused]] int bucket;
          if constexpr (kBias) score += own_bias(p, s, head, row, j, bucket);
          Pair pair = pair_of<T, kSoftmax>(score, dweight, true, 1.f, lse, delta);
          float scale = !kSoftmax && p.scales ? p.scales[row] * item.inverse_unit : 1.f;
          add_to_row(dv, half, scale * pair.weight, dout, column0, p.value_dim);
          add_to_row(dk, half, scale * item.inverse_ds_unit * pair.ds, query, column0, p.key_dim);
        }
      }
      int64_t at = (s.key + j) * p.heads + head;
      if (kBias) continue;
      store_row(g.dk + at * p.key_dim, dk, half, p.alpha * item.unit * item.ds_unit, 0, p.key_dim, j < s.length);
      store_row(g.dv + at * p.value_dim, dv, half, item.unit, 0, p.value_dim, j < s.length);
    }
    if constexpr (kBias) {
      int64_t at = (s.key + j0 + row0) * p.heads + head;
      int rows = s.length - j0 - row0;
      store_rows(g.dk + at * p.key_dim, int64_t(8) * p.heads * p.key_dim, dk, p.alpha * item.unit * item.ds_unit, p.key_dim, rows);
      store_rows(g.dv + at * p.value_dim, int64_t(8) * p.heads * p.value_dim, dv, item.unit, p.value_dim, rows);
    }
    __syncwarp();
    release(shared.item_empty[turn % 2]);
  }
  if (kBias && threadIdx.x == 128) bulk_wait();
  shared.dq_empty[group].wait(count & 1 ^ 1);  // for ptxas: without it all products are serialised (C7512)
#endif
}

constexpr int64_t kDsScratch = int64_t(3) << 29;  // bytes of dS that wait for the tables
constexpr int64_t kTargetParts = 4;         // blocks for a sequence's tiles with targets
constexpr int64_t kCached = 1 << 21;        // entries of Q, 8 bytes each with dO and sums of dQ, that stay in the L2 cache
constexpr int64_t kGroupTokens = 1 << 14;   // where tiles of keys work on the same queries

template <typename T, int kDim, Mode kMode>
void run(const Call<T>& p, Gradients<T> g, Tensor* dpos_w, Tensor* dtime_w, int64_t rows, int64_t keys, int64_t longest, Stream stream) {
  constexpr bool kBias = kMode == Mode::kSiluBias;
  using S = Shape<kDim, kBias>;
  static_assert(sizeof(SharedOf<T, kDim, kBias>) <= kHopperShared);
  int64_t tiles = ceil_div(longest, S::kQueries), query_tiles = tiles * p.sequences;
  int64_t key_tiles = std::min<int64_t>(ceil_div(int64_t(p.max_seq_len), S::kKeys) * p.sequences, keys / S::kKeys + p.sequences);
  HSTU_CHECK(query_tiles <= INT_MAX - 4 && key_tiles * p.heads <= INT_MAX / 2, kInvalidArgument, "hstu_attention_backward: ", p.sequences,
             " sequences of ", p.max_seq_len, " rows are too many for one call");
  int64_t blocks = std::min<int64_t>(processors(), key_tiles * p.heads), buckets = p.last_bucket + 1,
          own = p.num_targets ? query_tiles * p.heads : 0;
  int64_t farthest = std::min<int64_t>(p.max_seq_len, keys), position_rows = p.pos_per_head ? p.heads : 1;
  PositionTable table{nullptr, 0, int(ceil_div(farthest + S::kKeys, 4) * 4)};
  if (kBias) table.width = table.begin + int(ceil_div(farthest + S::kQueries + 8, 4) * 4);
  Scratch<float> table_rows(position_rows * 2 * table.width, stream);
  table.entries = table_rows;
  Scratch<float> own_pos(dpos_w ? own : 0, stream), own_time(dtime_w ? own * buckets : 0, stream);
  Scratch<float> dq_sums((rows / S::kQueries + p.sequences) * p.heads * 2 * S::kPart, stream);
  Scratch<QueryTile> seen(query_tiles, stream);
  Scratch<int> turns(query_tiles * p.heads + 2, stream);
  Scratch<int2> key_list(key_tiles, stream);
  Scratch<Largest> largest(p.scales || kScalesGradient<T> ? p.sequences : 0, stream);
  if (largest) largest.zero();
  if (!g.deterministic) dq_sums.zero();
  g.dq_sums = dq_sums, g.query_tiles = seen, g.turns = turns + 2, g.tiles = turns, g.ticket = turns + 1, g.key_tiles = key_list;
  g.largest = largest, g.most_query_tiles = int(tiles);
  g.last_first = S::kFinishes && g.deterministic;
  int64_t most = g.last_first ? kCached / (p.heads * kDim) : kGroupTokens;
  for (g.group = 32; g.group > 1 && g.group * int64_t(p.max_seq_len) > most;) g.group /= 2;
  // Tiles of dS wait in memory for the tables; where all would be too large, a launch has a part of the tiles of keys.
  constexpr int64_t kWide = S::kKeys / S::kQueries;  // tiles of queries beside a tile of keys
  bool tables = kBias && (dpos_w || dtime_w);
  int64_t ds_tile = int64_t(p.heads) * S::kQueries * S::kKeys, ds_tiles = 0;
  int64_t wanted = key_tiles * (p.causal && !p.contextual_full && !p.q_offsets && !p.kv_lengths ? ceil_div(tiles + kWide, 2) : tiles);
  g.copies = int(std::max<int64_t>(key_tiles, 1)), g.ds_most = INT_MAX / 2;
  if (tables) {
    int64_t most = std::max<int64_t>(kDsScratch / int64_t(sizeof(T)) / ds_tile, 1);
    if (int copies = table_copies(p, g, S::kQueries, dpos_w, dtime_w); copies < g.copies) {
      int64_t others = std::max(copies - 1, 1);
      most = std::min(most, others * tiles), g.copies = copies, g.ds_least = int(ceil_div(most, others));
      wanted += key_tiles * g.ds_least;
    }
    g.launches = int(std::max<int64_t>(ceil_div(wanted, most), 1)), g.ds_most = int(most), ds_tiles = std::min(wanted, most) + tiles;
  }
  HSTU_CHECK(!kBias || wanted <= INT_MAX / 2, kInvalidArgument, "hstu_attention_backward: ", p.sequences, " sequences of ", p.max_seq_len,
             " rows are too many for one call");
  Scratch<T> ds(ds_tiles * ds_tile, stream);
  Scratch<int> ds_places(kBias ? key_tiles + g.launches + 1 : 0, stream);
  if (tables) g.ds_tiles = ds;
  if (kBias) g.ds_first = ds_places, g.ds_bounds = ds_places + key_tiles;
  CUtensorMap q_map = tensor_map<T, kDim>(p.q, rows, p.heads, p.key_dim, S::kQueries);
  CUtensorMap k_map = tensor_map<T, kDim>(p.k, keys, p.heads, p.key_dim, S::kKeys);
  CUtensorMap v_map = tensor_map<T, kDim>(p.v, keys, p.heads, p.value_dim, S::kKeys);
  CUtensorMap dout_map = tensor_map<T, kDim>(g.dout, rows, p.heads, p.value_dim, S::kQueries);
  if (kScalesGradient<T>) launch(largest_kernel<T>, dim3(unsigned(p.sequences), 8), dim3(256), 0, stream, p, g);
  launch(prepare_kernel<T, S::kQueries, S::kKeys>, dim3(unsigned(ceil_div(query_tiles, 4) + 1)), dim3(128), 0, stream, p, g);
  if (kBias)
    launch(position_table_kernel<T>, dim3(unsigned(ceil_div(table.width, 256)), unsigned(position_rows)), dim3(256), 0, stream, p,
           table_rows.get(), table.width, table.begin);
  for (;; ++g.launch) {
    if (g.launch > 0) CUDA_CHECK(cudaMemsetAsync(g.ticket, 0, sizeof(int), handle_of(stream)));
    launch(hstu_attention_backward_sm90_kernel<T, kDim, kMode>, dim3(unsigned(blocks)), dim3(S::kThreads), sizeof(SharedOf<T, kDim, kBias>),
           stream, q_map, k_map, v_map, dout_map, p, g, p.unit * p.alpha, table);
    if constexpr (kBias)
      if (tables) table_gradients(p, g, S::kQueries, dpos_w, dtime_w, stream);
    if (g.launch + 1 == g.launches) break;
  }
  if (own_pos) own_pos.zero();
  if (own_time) own_time.zero();
  bool all = !S::kFinishes || !g.deterministic;  // or only tiles with targets
  int64_t parts = all ? tiles : std::min<int64_t>(tiles, kTargetParts);
  if (all || p.num_targets)
    launch(dq_sm90_kernel<T, kDim, kMode>, dim3(unsigned(parts * p.sequences), unsigned(p.heads)), dim3(256), 0, stream, p, g, int(parts),
           own_pos.get(), own_time.get());
  if (own_pos) reduce_table(*dpos_w, own_pos, query_tiles, p.heads, 1, true, stream);
  if (own_time) reduce_table(*dtime_w, own_time, query_tiles, p.heads, int(buckets), true, stream);
}

}  // namespace
}  // namespace backward_sm90

template <typename T>
bool backward_on_hopper(const Call<T>& p, const Gradients<T>& g, Tensor* dpos_w, Tensor* dtime_w, int64_t rows, int64_t keys,
                        int64_t longest, Stream stream) {
  using namespace backward_sm90;
  auto whole = [](const T* data, int dim) { return piece_of(data, dim) == 16; };
  int dim = std::max(p.key_dim, p.value_dim);
  constexpr bool kTakesBias = std::is_same_v<T, __nv_bfloat16>;
  bool bias = p.positions || p.last_bucket >= 0;
  if (g.deterministic && p.max_seq_len / Shape<32>::kKeys > 65535) return false;  // turns are counted in 16 bits
  if (bias && (!kTakesBias || g.lse || dim > 128)) return false;
  if (bias && (dim <= 32 || p.max_seq_len < (dim <= 64 ? 256 : 512)) && !asked_for("wgmma")) return false;  // mma.sync is faster, or may be
  if (bias && !(std::fabs(p.alpha) > 1e-20f && std::fabs(p.alpha) < 1e20f)) return false;  // scores begin as bias / alpha
  if ((g.lse && (dim > 128 || p.dropout)) || rows == 0 || keys == 0 || !whole(g.dq, p.key_dim) || !whole(g.dk, p.key_dim) ||
      !whole(g.dv, p.value_dim) ||
      !takes_hopper(p, rows, keys, reinterpret_cast<const void*>(hstu_attention_backward_sm90_kernel<T, 64, Mode::kSilu>)))
    return false;
  auto go = [&]<int kDim, Mode kMode>() { run<T, kDim, kMode>(p, g, dpos_w, dtime_w, rows, keys, longest, stream); };
  auto run_bucket = [&](auto bucket) {
    constexpr int kDim = decltype(bucket)::value;
    if constexpr (kTakesBias && kDim > 32)
      if (bias) return go.template operator()<kDim, Mode::kSiluBias>();
    g.lse ? go.template operator()<kDim, Mode::kSoftmax>() : go.template operator()<kDim, Mode::kSilu>();
  };
  if (dim > 128)
    run_wide(p, g, rows, keys, longest, stream);
  else
    pick<32, 64, 128>("head_dim", dim <= 32 && !bias ? 32 : dim <= 64 ? 64 : 128, run_bucket);
  return true;
}
template bool backward_on_hopper(const Call<__nv_bfloat16>&, const Gradients<__nv_bfloat16>&, Tensor*, Tensor*, int64_t, int64_t, int64_t,
                                 Stream);
template bool backward_on_hopper(const Call<__half>&, const Gradients<__half>&, Tensor*, Tensor*, int64_t, int64_t, int64_t, Stream);

}  // namespace attention
}  // namespace hstu::cuda
