// HSTU attention, backward, head dims of 129 to 256, for Hopper (sm_90a): shared memory, and what each warpgroup does. See
// docs/hstu_attention.md.
#pragma once
#include "hstu_attention_bwd_sm90.cuh"

namespace hstu::cuda::attention {
namespace backward_sm90 {

template <typename T>
struct WideShared {
  using S = Shape<256>;
  alignas(1024) T k[S::kKeys * 256];
  alignas(1024) T v[S::kKeys * 256];
  alignas(1024) T q[S::kStages][S::kQueries * 256];
  alignas(1024) T dout[S::kStages][S::kQueries * 256];
  alignas(1024) T ds[2][S::kQueries * S::kKeys];  // [query][key], swizzled: dsilu, then dS in its place
  uint32_t seen[S::kStages][S::kKeys / 32][S::kQueries];
  float scale[S::kStages][S::kQueries];
  Barrier k_full, k_empty, v_full, v_empty, told[S::kStages], ready[S::kStages], q_full[S::kStages], q_empty[S::kStages],
      dout_full[S::kStages], dout_empty[S::kStages];
  Barrier slope_full[2], ds_full[2], ds_empty[2], item_full[2], item_empty[2];
  Barrier turn_come[2], added[2], announced[2];
  Tile tile[S::kStages], out[2];
  int* turns[2];  // to announce; null: no more
  Item item[2];

  __device__ __forceinline__ void begin() {
    k_full.init(1, 0), k_empty.init(0, 8), v_full.init(1, 0), v_empty.init(0, 4);
    for (int x = 0; x < S::kStages; ++x)
      told[x].init(1, 0), ready[x].init(0, 1), q_full[x].init(1, 0), q_empty[x].init(0, 8), dout_full[x].init(1, 0),
          dout_empty[x].init(0, 8);
    for (int x = 0; x < 2; ++x)
      slope_full[x].init(0, 4), ds_full[x].init(0, 4), ds_empty[x].init(0, 4), item_full[x].init(1, 0), item_empty[x].init(0, 8),
          turn_come[x].init(1, 0), added[x].init(0, 4), announced[x].init(1, 0);
    fence_barriers();
  }
};

__device__ __forceinline__ void release(Barrier& barrier) { barrier.arrive_for_warp(thread_index() % 32); }

// The warp that tells which keys of a tile its queries see, and their scales, and clears rows that belong to others.
template <typename T>
__device__ __forceinline__ void tell_wide(WideShared<T>& shared, const Call<T>& p) {
  using S = Shape<256>;
  constexpr int kQ = S::kQueries, kK = S::kKeys;
  auto below = [](int n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; };
  bool first = true;  // of its item
  for (uint32_t count = 0;; ++count) {
    int stage = count % 2, parity = count / 2 & 1, lane = thread_index() % 32;
    shared.told[stage].wait(parity);
    const Tile& tile = shared.tile[stage];
    if (tile.item < 0) return;
    const Item& item = shared.item[tile.item];
    if (!tile.all || p.scales)
#pragma unroll 1
      for (int r = lane; r < kQ; r += 32) {
        bool there = r < tile.rows;
        VisibleKeys keys{0, 0, 0, 0};
        if (there) keys = visible_keys(p, item.s, item.s.shift + tile.index * kQ + r);
#pragma unroll
        for (int x = 0; x < kK / 32; ++x) {
          int j = item.tile * kK + 32 * x;
          shared.seen[stage][x][r] = below(keys.prefix - j) | (below(keys.end - j) & ~below(keys.begin - j));
        }
        if (p.scales) shared.scale[stage][r] = there ? p.scales[item.s.query + tile.index * kQ + r] * item.inverse_unit : 1.f;
      }
    if (int valid = item.s.history - item.tile * kK; first && valid < kK) {
      shared.k_full.wait(item.parity), shared.v_full.wait(item.parity);
      clear_tail<T, 256, kK>(shared.k, valid, lane, 32), clear_tail<T, 256, kK>(shared.v, valid, lane, 32);
    }
    if (tile.rows < kQ) {
      shared.q_full[stage].wait(parity), shared.dout_full[stage].wait(parity);
      clear_tail<T, 256, kQ>(shared.q[stage], tile.rows, lane, 32), clear_tail<T, 256, kQ>(shared.dout[stage], tile.rows, lane, 32);
    }
    first = tile.last;
    fence_async();
    __syncwarp();
    release(shared.ready[stage]);
  }
}

// What the compiler must not read before the last wait.
template <int kCount>
__device__ __forceinline__ void hold(float (&c)[kCount]) {
#pragma unroll
  for (int x = 0; x < kCount; ++x) asm volatile("" : "+f"(c[x])::"memory");
}

// c [64 keys, 64 queries] = keys_tile tile^T; c [64 keys, 256] += a tile (by halves of the columns:
// an m64n256 wants more registers than a thread has before setmaxnreg).
template <typename T>
__device__ __forceinline__ void multiply_wide(float (&c)[32], const T* keys_tile, const T* tile) {
  uint64_t keys = by_rows<128>(shared_address(keys_tile)), queries = by_rows<128>(shared_address(tile));
  wgmma_fence();
#pragma unroll
  for (int d = 0; d < 256; d += 16)
    wgmma<T, false>(c, moved(keys, d / 64 * 64 * 128 + d % 64 * 2), moved(queries, d / 64 * 64 * 128 + d % 64 * 2), d > 0);
  wgmma_commit();
}
template <typename T>
__device__ __forceinline__ void accumulate_wide(float (&c)[2][64], const uint32_t (&a)[16], const T* tile) {
  uint64_t queries = by_columns<128>(shared_address(tile), 64 * 128);
  wgmma_fence();
#pragma unroll
  for (int x = 0; x < 64; x += 16)
#pragma unroll
    for (int part = 0; part < 2; ++part) wgmma<T, true>(c[part], a + x / 4, moved(queries, part * 2 * 64 * 128 + x * 128), true);
  wgmma_commit();
}

// Where this thread's row of dS goes by stmatrix, and comes back from by ldmatrix: a warp has its own 16 keys.
template <typename T>
__device__ __forceinline__ uint32_t ds_address(const T* ds) {
  uint32_t thread = thread_index(), row = thread / 16 % 2 * 8 + thread % 8, unit = thread / 32 % 4 * 2 + thread / 8 % 2;
  return shared_address(ds) + row * 128 + (unit ^ row % 8) * 16;
}

// Targets' own groups, in float32, a quad a key: add(half, row of q and dO, score, dweight, scale) for each pair; then out.
template <typename T, typename Add, typename Store>
__device__ __forceinline__ void finish_wide(const Call<T>& p, const Gradients<T>& g, const Item& item, float factor, bool wants_gradient,
                                            Add&& add, Store&& store) {
  const Sequence& s = item.s;
  int row0 = int(thread_index() % 128) / 32 * 16 + thread_index() % 32 / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int j = item.tile * Shape<256>::kKeys + row0 + 8 * half, own = 0, from = max(j, s.shift);
    if (j >= s.history && j < s.length) {
      int64_t end = int64_t(j) - (j - s.history) % p.group + p.group;
      own = max(int(min(end, int64_t(s.length))) - from, 0);
    }
#pragma unroll 1
    for (int x = 0, longest = __reduce_max_sync(kFullWarp, own); x < longest; ++x) {
      bool active = x < own;
      int64_t row = s.query + (active ? from + x - s.shift : 0);
      const T *query = row_of(p.q, p, row, item.head, p.key_dim), *dout = row_of(g.dout, p, row, item.head, p.value_dim);
      float score = factor * dot(query, row_of(p.k, p, s.key + j, item.head, p.key_dim), p.key_dim, active), dweight = 0;
      if (wants_gradient) dweight = dot(dout, row_of(p.v, p, s.key + j, item.head, p.value_dim), p.value_dim, active);
      if (active) {
        Pair pair = pair_of<T, false>(score, dweight, true, 1.f, 0.f, 0.f);
        add(half, query, dout, pair, p.scales ? p.scales[row] * item.inverse_unit : 1.f);
      }
    }
    store(half, (s.key + j) * p.heads + item.head, j < s.length);
  }
}

// The warpgroup of S^T = K Q^T and dV += P^T dO. The other one gets dsilu of each pair.
template <typename T>
__device__ __forceinline__ void make_dv(WideShared<T>& shared, const Call<T>& p, const Gradients<T>& g, float factor) {
  using S = Shape<256>;
  constexpr int kQ = S::kQueries;
  uint32_t count = 0;
  for (uint32_t turn = 0;; ++turn) {
    shared.item_full[turn % 2].wait(turn / 2 & 1);
    const Item& item = shared.item[turn % 2];
    if (item.tile < 0) return;
    float dv[2][64];
#pragma unroll
    for (int x = 0; x < 64; ++x) dv[0][x] = dv[1][x] = 0.f;
    if (item.any) {
      shared.k_full.wait(item.parity);
      for (bool last = false; !last; ++count) {
        int stage = count % 2, parity = count / 2 & 1;
        shared.ready[stage].wait(parity), shared.q_full[stage].wait(parity);
        last = shared.tile[stage].last;
        float scores[32];
        uint32_t weights[16];
        multiply_wide(scores, shared.k, shared.q[stage]);
        wgmma_wait<0>(scores);
        release(shared.q_empty[stage]);
        if (last) release(shared.k_empty);

        bool all = shared.tile[stage].all;
        if (!all) {  // hidden pairs get a score where P and dsilu are 0 in float32
          uint32_t thread = thread_index(), key = thread / 4 % 8 + thread / 32 % 2 * 16;
          const uint32_t* seen = &shared.seen[stage][thread / 64 % 2][thread % 4 * 2];
#pragma unroll
          for (int x = 0; x < kQ / 8; ++x) {
            uint2 bits = *reinterpret_cast<const uint2*>(seen + 8 * x);
#pragma unroll
            for (int e = 0; e < 4; ++e)
              scores[4 * x + e] = (e % 2 ? bits.y : bits.x) >> (key + e / 2 * 8) & 1 ? factor * scores[4 * x + e] : -128.f;
          }
        }
        shared.ds_empty[stage].wait(parity ^ 1);
        uint32_t to = ds_address(shared.ds[stage]);
        auto weigh = [&](float factor, auto scaled) {
#pragma unroll
          for (int x = 0; x < kQ / 8; x += 2) {
            uint32_t slopes[4];
#pragma unroll
            for (int y = 0; y < 2; ++y) {
              float weight[4], slope[4];
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                float t = factor * scores[4 * (x + y) + e], th = tanh_approx(t);
                weight[e] = fmaf(t, th, t);
                slope[e] = fmaf(weight[e], 1.f - th, th);
              }
              slopes[2 * y] = pack_pair<__half>(slope[0], slope[1]), slopes[2 * y + 1] = pack_pair<__half>(slope[2], slope[3]);
              if (scaled) {
                float2 scale = *reinterpret_cast<const float2*>(&shared.scale[stage][8 * (x + y) + thread_index() % 4 * 2]);
                weight[0] *= scale.x, weight[1] *= scale.y, weight[2] *= scale.x, weight[3] *= scale.y;
              }
              weights[2 * (x + y)] = pack_pair<T>(weight[0], weight[1]), weights[2 * (x + y) + 1] = pack_pair<T>(weight[2], weight[3]);
            }
            store_matrices_transposed(to + x * 1024, slopes);
          }
        };
        float rest = all ? factor : 1.f;
        if (p.scales)
          weigh(rest, std::true_type{});
        else
          weigh(rest, std::false_type{});
        __syncwarp();
        release(shared.slope_full[stage]);
        shared.dout_full[stage].wait(parity);
        accumulate_wide(dv, weights, shared.dout[stage]);
        wgmma_wait<0>(dv[0]), hold(dv[1]);
        release(shared.dout_empty[stage]);
      }
    }
    int column0 = thread_index() % 4 * 2;
    finish_wide(
        p, g, item, factor, false,
        [&](int half, const T*, const T* dout, Pair pair, float scale) {
          add_to_row(dv[0], half, scale * pair.weight, dout, column0, p.value_dim);
          add_to_row(dv[1], half, scale * pair.weight, dout, 128 + column0, p.value_dim);
        },
        [&](int half, int64_t at, bool there) {
          store_row(g.dv + at * p.value_dim, dv[0], half, item.unit, 0, p.value_dim, there);
          store_row(g.dv + at * p.value_dim, dv[1], half, item.unit, 128, p.value_dim, there);
        });
    __syncwarp();
    release(shared.item_empty[turn % 2]);
  }
}

// The warpgroup of dP^T = V dO^T, dS and dK += dS^T Q.
template <typename T>
__device__ __forceinline__ void make_dk(WideShared<T>& shared, const Call<T>& p, const Gradients<T>& g, float factor) {
  using S = Shape<256>;
  constexpr int kQ = S::kQueries;
  uint32_t count = 0;
  for (uint32_t turn = 0;; ++turn) {
    shared.item_full[turn % 2].wait(turn / 2 & 1);
    const Item& item = shared.item[turn % 2];
    if (item.tile < 0) break;
    float dk[2][64];
#pragma unroll
    for (int x = 0; x < 64; ++x) dk[0][x] = dk[1][x] = 0.f;
    if (item.any) {
      shared.v_full.wait(item.parity);
      for (bool last = false; !last; ++count) {
        int stage = count % 2, parity = count / 2 & 1;
        shared.ready[stage].wait(parity), shared.dout_full[stage].wait(parity);
        last = shared.tile[stage].last;
        float gradient[32], inverse = 0.5f * item.inverse_ds_unit;
        uint32_t ds[16];
        multiply_wide(gradient, shared.v, shared.dout[stage]);
        wgmma_wait<0>(gradient);
        release(shared.dout_empty[stage]);
        if (last) release(shared.v_empty);

        shared.slope_full[stage].wait(parity);
        uint32_t at = ds_address(shared.ds[stage]);
        auto differentiate = [&](auto scaled) {
#pragma unroll
          for (int x = 0; x < kQ / 8; x += 2) {
            uint32_t slopes[4];
            load_matrices_transposed(slopes, at + x * 1024);
#pragma unroll
            for (int y = 0; y < 2; ++y) {
              float value[4];
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                float2 slope = __half22float2(*reinterpret_cast<const __half2*>(&slopes[2 * y + half]));
                float* from = &gradient[4 * (x + y) + 2 * half];
                if (kScalesGradient<T>) from[0] *= inverse, from[1] *= inverse;
                value[2 * half] = fmaf(from[0], slope.x, from[0]), value[2 * half + 1] = fmaf(from[1], slope.y, from[1]);
              }
              if (scaled) {
                float2 scale = *reinterpret_cast<const float2*>(&shared.scale[stage][8 * (x + y) + thread_index() % 4 * 2]);
                value[0] *= scale.x, value[1] *= scale.y, value[2] *= scale.x, value[3] *= scale.y;
              }
              ds[2 * (x + y)] = pack_pair<T>(value[0], value[1]), ds[2 * (x + y) + 1] = pack_pair<T>(value[2], value[3]);
            }
          }
        };
        if (p.scales)
          differentiate(std::true_type{});
        else
          differentiate(std::false_type{});
        __syncwarp();
#pragma unroll
        for (int x = 0; x < kQ / 8; x += 2) store_matrices_transposed(at + x * 1024, ds + 2 * x);
        if (thread_index() % 128 == 0) shared.out[stage] = shared.tile[stage];
        fence_async();
        __syncwarp();
        release(shared.ds_full[stage]);
        shared.q_full[stage].wait(parity);
        accumulate_wide(dk, ds, shared.q[stage]);
        wgmma_wait<0>(dk[0]), hold(dk[1]);
        release(shared.q_empty[stage]);
      }
    }
    int column0 = thread_index() % 4 * 2;
    finish_wide(
        p, g, item, factor, true,
        [&](int half, const T* query, const T*, Pair pair, float scale) {
          add_to_row(dk[0], half, scale * item.inverse_ds_unit * pair.ds, query, column0, p.key_dim);
          add_to_row(dk[1], half, scale * item.inverse_ds_unit * pair.ds, query, 128 + column0, p.key_dim);
        },
        [&](int half, int64_t at, bool there) {
          float unit = p.alpha * item.unit * item.ds_unit;
          store_row(g.dk + at * p.key_dim, dk[0], half, unit, 0, p.key_dim, there);
          store_row(g.dk + at * p.key_dim, dk[1], half, unit, 128, p.key_dim, there);
        });
    __syncwarp();
    release(shared.item_empty[turn % 2]);
  }
  shared.ds_empty[count % 2].wait(count / 2 & 1 ^ 1);
  if (thread_index() % 128 == 0) shared.out[count % 2].sums = nullptr;
  __syncwarp();
  release(shared.ds_full[count % 2]);
}

__device__ __forceinline__ void add_four(float* to, float x, float y, float z, float w) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

// Deterministic: a thread that waits for the turns of tiles of dQ, and one that announces the next after each. Both wait for memory, so
// they are not of the warpgroup that adds.
template <typename T>
__device__ __forceinline__ void await_turns(WideShared<T>& shared) {
  for (uint32_t count = 0;; ++count) {
    int slot = count % 2;
    shared.ds_full[slot].wait(count / 2 & 1);
    const Tile& out = shared.out[slot];
    if (!out.sums) return;
    const int *turns = out.turns, turn = out.turn;
    for (int done = 0; done < turn;) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(turns) : "memory");
    shared.turn_come[slot].arrive();
  }
}
template <typename T>
__device__ __forceinline__ void announce_turns(WideShared<T>& shared) {
  for (uint32_t count = 0;; ++count) {
    int slot = count % 2;
    shared.added[slot].wait(count / 2 & 1);
    int* turns = shared.turns[slot];
    if (!turns) return;
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turns) : "memory");
    shared.announced[slot].arrive();
  }
}

// The warpgroup of dQ = dS K, added to its sums, a half of the columns at a time.
template <typename T>
__device__ __forceinline__ void add_dq(WideShared<T>& shared, bool deterministic) {
  using S = Shape<256>;
  for (uint32_t count = 0;; ++count) {
    int slot = count % 2, parity = count / 2 & 1;
    auto announce = [&](int* turns) {
      shared.announced[slot].wait(parity ^ 1);
      if (thread_index() % 128 == 0) shared.turns[slot] = turns;
      __syncwarp();
      release(shared.added[slot]);
    };
    shared.ds_full[slot].wait(parity);
    const Tile& out = shared.out[slot];
    float* sums = out.sums;
    if (!sums) {
      if (deterministic) announce(nullptr);
      return;
    }
    bool last = out.last, first = deterministic && out.turn == 0;
    int* turns = out.turns;
    sums += thread_index() % 128 * 4;
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      float dq[64];
      uint64_t a = by_rows<128>(shared_address(shared.ds[slot]));
      uint64_t b = by_columns<128>(shared_address(shared.k) + part * 2 * 64 * 128, 64 * 128);
      wgmma_fence();
#pragma unroll
      for (int x = 0; x < 64; x += 16) wgmma<T, true>(dq, moved(a, x * 2), moved(b, x * 128), x > 0);
      wgmma_commit();
      wgmma_wait<0>(dq);
      if (part == 1) {
        release(shared.ds_empty[slot]);
        if (last) release(shared.k_empty);
      } else if (deterministic) {
        shared.turn_come[slot].wait(parity);
      }
      float* to = sums + part * S::kPart;
#pragma unroll
      for (int x = 0; x < 16; ++x) {
        if (first)
          *reinterpret_cast<float4*>(to + x * 512) = float4{dq[4 * x], dq[4 * x + 1], dq[4 * x + 2], dq[4 * x + 3]};
        else
          add_four(to + x * 512, dq[4 * x], dq[4 * x + 1], dq[4 * x + 2], dq[4 * x + 3]);
      }
    }
    if (deterministic) announce(turns);
  }
}

}  // namespace backward_sm90
}  // namespace hstu::cuda::attention
