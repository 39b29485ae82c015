// HSTU attention, backward, in one pass: a block owns a tile of keys, keeps dK and dV in registers and adds its part of dQ to float32 sums,
// in a fixed order where the call is deterministic.
#include "hstu_attention_bwd.cuh"
#include "hstu_attention_choice.cuh"

namespace hstu::cuda {
namespace attention {
namespace {

// A block takes tiles of keys of one head, one after the other; a warp owns 16 keys. For each tile of queries that sees any of the block's
// keys it recomputes the scores transposed (rows are keys), adds P^T dO and dS^T Q from registers, and leaves dS in shared
// memory; after the next barrier all warps make the tile's part of dQ from there. Q and dO of the next tile are under way meanwhile.
// dS is summed for the tables on the way: by time bucket, and along diagonals for positions. Targets' own groups come last, a quad a
// key, in float32.
// Deterministic: tiles of keys add to a row of dQ last to first, which is also the order in which they are begun, so that an item waits for
// earlier ones only. Causal tiles that begin together never wait: each comes to a row when those behind it have been there.
template <typename T, int kDim, Mode kMode, bool kSmall>
__global__ void __launch_bounds__(BackwardShape<T, kDim, kSmall>::kThreads, 1)
    hstu_attention_backward_kernel(const Call<T> p, const Gradients<T> g) {
  using S = BackwardShape<T, kDim, kSmall>;
  constexpr int kThreads = S::kThreads, kQ = S::kQueryTile, kK = S::kKeyTile, kX = kDim / 8;
  constexpr int kColumns = kIsHalf<T> && (kDim >= 128 || kMode == Mode::kSoftmax) ? 32 : kQ, kN = kColumns / 8;  // scores in registers
  constexpr bool kSoftmax = kMode == Mode::kSoftmax, kBias = kMode != Mode::kSilu;
  using WithBias = BackwardSharedWithBias<T, kDim, kSmall>;
  auto& shared = shared_as<std::conditional_t<kBias, WithBias, BackwardShared<T, kDim, kSmall>>>();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, key_warp = warp % S::kKeyWarps;
  int row0 = key_warp * 16 + lane / 4, column0 = lane % 4 * 2;
  bool wants_dv = !S::kSplit || warp < S::kKeyWarps, wants_dk = !S::kSplit || warp >= S::kKeyWarps;
  float factor = p.unit * p.alpha;
  bool wants_pos = kBias && g.pos_sums, wants_time = kBias && g.time_sums && wants_dk;
  if constexpr (kBias)
    for (int x = threadIdx.x; x < int(sizeof(shared.time_sums) / 4); x += kThreads) reinterpret_cast<int*>(shared.time_sums)[x] = 0;

  if (threadIdx.x == 0) shared.ds_there.begin(S::kWarps), shared.tile_done.begin(S::kWarps);
  unsigned step = 0;  // of all items
  int items = min(*g.tiles - g.first_tile, g.copies) * p.heads;
  for (;;) {
    __syncthreads();  // the last item's slabs have been written
    if (threadIdx.x == 0) {
      int ticket = shared.ticket = atomicAdd(g.ticket, 1);
      if (ticket < items) {
        Item<T>& item = shared.item;
        int2 tile = g.key_tiles[g.first_tile + ticket / p.heads];
        const Sequence s = item.sequence = sequence_of(p, tile.x);
        item.head = ticket % p.heads, item.tile = tile.y;
        // Without rows that look ahead no query before the first key sees any.
        item.count = tile.y * kK < s.history ? (s.queries + kQ - 1) / kQ : 0;
        item.begin = p.causal && !p.contextual_full ? max(tile.y * kK - s.shift, 0) / kQ : 0;
        item.query_tiles = g.query_tiles + int64_t(tile.x) * g.most_query_tiles;
        item.q = row_of(p.q, p, s.query, item.head, p.key_dim), item.dout = row_of(g.dout, p, s.query, item.head, p.value_dim);
        item.dq_sums = g.dq_sums + (s.query * p.heads + item.head) * kDim;
        item.turns = g.turns + (int64_t(tile.x) * p.heads + item.head) * g.most_query_tiles;
        int64_t copy = int64_t(item.head) * g.copies + ticket / p.heads;
        item.pos_sums = g.pos_sums + copy * p.positions, item.time_sums = g.time_sums + copy * (p.last_bucket + 1);
        item.units = g.units_of(p, tile.x, kSoftmax), item.inverse_gradient = 1 / item.units.gradient, item.base = first_time(p, s);
      }
    }
    __syncthreads();
    if (shared.ticket >= items) break;
    const Item<T>& item = shared.item;
    const Sequence& s = item.sequence;
    const int n = item.tile, j0 = n * kK;

    const int key_stride = p.heads * p.key_dim, value_stride = p.heads * p.value_dim, queries = s.queries;
    auto load = [&]<int kRows>(T* keys, T* values, const T* key, const T* value, int rows) {
      load_tile<kRows, kDim, kThreads>(keys, rows, p.key_dim, p.key_piece, [&](int r) { return key + r * key_stride; });
      load_tile<kRows, kDim, kThreads>(values, rows, p.value_dim, p.value_piece, [&](int r) { return value + r * value_stride; });
    };
    load.template operator()<kK>(shared.k, shared.v, row_of(p.k, p, s.key + j0, item.head, p.key_dim),
                                 row_of(p.v, p, s.key + j0, item.head, p.value_dim), s.history - j0);
    // The bias: times of this warp's keys in registers, those of queries and the table by position difference come tile by tile.
    typename decltype(WithBias::bias)::template Ahead<kThreads> ahead;
    [[maybe_unused]] TimeSpan span{};
    [[maybe_unused]] int key_time[2] = {kNoFixedTime, kNoFixedTime};
    [[maybe_unused]] TimeGradient time_gradient;
    [[maybe_unused]] float clamped = 0, own_sum = 0;
    if constexpr (kBias) {
      shared.bias.template stage_table<kThreads>(p, item.head);
      NearTime time{kNoFixedTime, kSomeUntimed};
      int j = j0 + key_warp * 16 + lane;
      bool there = p.last_bucket >= 0 && lane < 16 && j < s.history;
      if (there && j >= s.contextual) time = near_time(p.key_time[s.time + j], item.base);
      span = TimeSpan::of_warp(time, there);
      key_time[0] = __shfl_sync(kFullWarp, time.at, lane / 4), key_time[1] = __shfl_sync(kFullWarp, time.at, lane / 4 + 8);
    }

    // The tiles of queries that see this tile of keys, in order. A warp looks at 32 of them at once, a lane at one.
    struct Seen {
      int tile, turn;  // turn: tiles of keys behind this one that these queries see
      bool all;
    };
    int looked_at = item.begin - 32, found = 0;
    unsigned some_see = 0;
    auto next_seen = [&] {
      while (!some_see) {
        looked_at += 32;
        if (looked_at >= item.count) return Seen{-1, 0, false};
        int m = looked_at + lane;
        bool sees = false;
        if (m < item.count) {
          QueryTile seen = item.query_tiles[m];
          KeyTiles tiles = KeyTiles::of(seen.any, kK);
          bool before = tiles.gap >= 0 && n < tiles.gap, all = seen.all.all(j0, j0 + kK) && (m + 1) * kQ <= queries;
          sees = n < tiles.last && (before || tiles.gap < 0 || n >= tiles.resume);
          found = 2 * (tiles.last - 1 - n - (before ? tiles.resume - tiles.gap : 0)) + int(all);
        }
        some_see = __ballot_sync(kFullWarp, sees);
      }
      int first = __ffs(some_see) - 1, what = __shfl_sync(kFullWarp, found, first);
      some_see &= some_see - 1;
      return Seen{looked_at + first, what >> 1, bool(what & 1)};
    };
    auto load_queries = [&](int stage, int m) {
      load.template operator()<kQ>(shared.q[stage], shared.dout[stage], item.q + int64_t(m) * kQ * key_stride,
                                   item.dout + int64_t(m) * kQ * value_stride, queries - m * kQ);
      copy_async_commit();
    };
    float row_scale = 1, row_lse = 0, row_delta = 0;  // of the next tile, a thread a row
    auto fetch = [&](int m) {
      int first = m * kQ, r = min(first + int(threadIdx.x), s.queries - 1);
      if (threadIdx.x < kQ) {
        if (!kSoftmax && p.scales) row_scale = p.scales[s.query + r] * item.units.weight_inverse;
        if (kSoftmax) {
          row_lse = g.lse[(s.query + r) * p.heads + item.head], row_delta = g.delta[(s.query + r) * p.heads + item.head];
          if (kScalesGradient<T>) row_delta *= item.inverse_gradient;
        }
      }
      if constexpr (kBias)
        shared.bias.template fetch<kThreads>(ahead, p, item.head, min(s.shift + first, s.history) - j0 - (kK - 1),
                                             p.query_time + s.query + first, s.contextual - s.shift - first, s.queries - first);
    };
    auto commit = [&](int buffer, Seen seen) {
      if (threadIdx.x < kQ) {
        int r = seen.tile * kQ + threadIdx.x;
        if (!seen.all) shared.visible[buffer][threadIdx.x] = r < queries ? visible_keys(p, s, s.shift + r) : VisibleKeys{0, 0, 0, 0};
        shared.scale[buffer][threadIdx.x] = row_scale;
        shared.lse[buffer][threadIdx.x] = row_lse, shared.delta[buffer][threadIdx.x] = row_delta;
      }
      if constexpr (kBias) shared.bias.commit(buffer, ahead, p, item.base);
    };

    float sums[S::kSplit ? 1 : 2][1][kX][4] = {};
    auto &dk = sums[0], &dv = sums[S::kSplit ? 0 : 1];
    auto add_dq = [&](int m, int turn, int buffer) {  // once dS of the tile is known to the block
      float c[S::kPart / 8][4] = {};
      int row = warp % S::kRowGroups * 16, part = warp / S::kRowGroups * S::kPart, stride = p.heads * kDim;
      multiply_ds<T, kDim, S>(c, shared.ds[buffer], row, shared.k + part);
      bool first = g.deterministic && turn == 0;
      float* to = item.dq_sums + int64_t(m) * kQ * stride + (row + lane / 4) * stride + part + column0;
#pragma unroll
      for (int half = 0; half < 2; ++half, to += 8 * stride) {
        if (m * kQ + row + lane / 4 + 8 * half >= queries) continue;
#pragma unroll
        for (int x = 0; x < S::kPart / 8; ++x)
          if (first) *reinterpret_cast<float2*>(to + 8 * x) = float2{c[x][2 * half], c[x][2 * half + 1]};
          else add_pair(to + 8 * x, c[x][2 * half], c[x][2 * half + 1]);
      }
    };
    auto sum_positions = [&](auto& shared, int m, int buffer) {  // once dS of the tile is known to the block
      int before = s.history - s.shift - m * kQ;   // queries before the targets, which all stand at one position
      shared.diagonals[buffer].add(shared.ds[buffer], before);
      for (int c = threadIdx.x; before < kQ && c < kK; c += kThreads) {
        float sum = 0;
        for (int r = max(before, 0); r < kQ; ++r) sum += to_float(shared.ds[buffer][c * S::kPitchDs + r]);
        shared.targets[buffer][c] = sum;
      }
    };
    auto add_positions = [&](auto& shared, int m, int buffer) {  // once these sums are
      // Two diagonals that are as far from 0 come together; then targets; what lies beyond the table is kept apart.
      int i0 = s.shift + m * kQ;
      float ds_unit = item.units.weight * item.units.gradient;
      for (int x = threadIdx.x; x < kQ + kK - 1; x += kThreads) {
        int distance = i0 - j0 + x - (kK - 1), opposite = x - 2 * distance;
        float sum = shared.diagonals[buffer].at(x);
        if (distance != 0 && opposite >= 0 && opposite < kQ + kK - 1)
          sum = distance > 0 ? sum + shared.diagonals[buffer].at(opposite) : 0.f;
        if (abs(distance) >= p.positions - 1) clamped += sum;
        else if (sum != 0) atomicAdd(item.pos_sums + abs(distance), ds_unit * sum);
      }
      if (i0 + kQ <= s.history) return;
      __syncthreads();  // one thread at a time adds to an entry
      for (int c = threadIdx.x; c < kK; c += kThreads) {
        int distance = s.history - (j0 + c);
        if (distance <= 0) continue;
        if (distance >= p.positions - 1) clamped += shared.targets[buffer][c];
        else atomicAdd(item.pos_sums + distance, ds_unit * shared.targets[buffer][c]);
      }
    };

    Seen seen = next_seen(), next{-1, 0, false};
    int buffer = 0, done = -1;  // done: the tile to whose dQ all warps have added
    if (seen.tile >= 0) {
      load_queries(0, seen.tile);
      fetch(seen.tile);
      commit(0, seen);
      next = next_seen();
      if (S::kStages == 2 && next.tile >= 0) load_queries(1, next.tile), copy_async_wait<1>();
      else copy_async_wait<0>();
      if (next.tile >= 0) fetch(next.tile);
    } else copy_async_commit(), copy_async_wait<0>();  // K and V, for slabs take their place
    __syncthreads();
    for (; seen.tile >= 0; buffer ^= 1, ++step) {
      int m = seen.tile, stage = S::kStages == 2 ? buffer : 0, i0 = s.shift + m * kQ;
      bool all = seen.all, ahead_of_history = i0 + kQ > s.history;
      // One lane takes the block's turn, each time of another warp: it is late then, and the others would wait for it again and again.
      bool herald = g.deterministic && threadIdx.x == step % S::kWarps * 32;
      int turns = herald ? turns_taken(item.turns + m) : INT_MAX;  // read early: mostly it is enough
      [[maybe_unused]] TimePath path;
      [[maybe_unused]] float one = 0;
      if constexpr (kBias)
        if (p.last_bucket >= 0) {
          path = shared.bias.path(buffer, span, p.last_bucket);
          if (path.kind == TimeKind::kOne) one = shared.bias.time[path.low];
        }
#pragma unroll 1
      for (int r0 = 0; r0 < kQ; r0 += kColumns) {
        uint32_t keep[2] = {~0u, ~0u};
        if constexpr (kSoftmax)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            keep[half] = kept_columns<kN>(p, s.index, item.head, [&](int r) { return int2{i0 + r0 + r, j0 + row0 + 8 * half}; });
        float w[1][kN][4] = {}, ds[1][kN][4] = {}, inverse_gradient = kScalesGradient<T> ? item.inverse_gradient : 1.f;
        const T *q = shared.q[stage] + r0 * kPitch<T, kDim>, *dout = shared.dout[stage] + r0 * kPitch<T, kDim>;
        multiply_rows<T, kDim>(w, shared.k + key_warp * 16 * kPitch<T, kDim>, q);
        if (wants_dk) multiply_rows<T, kDim>(ds, shared.v + key_warp * 16 * kPitch<T, kDim>, dout);
        if constexpr (kBias) {
          // Scores on one diagonal share their position term, and the time term where the tile has one bucket.
          float diagonals[kN + 1][2];
          const float* corner = &shared.bias.pos[buffer][r0 + column0 - row0 + kK - 1];
#pragma unroll
          for (int x = 0; x <= kN; ++x)
#pragma unroll
            for (int e = 0; e < 2; ++e) diagonals[x][e] = (p.positions ? corner[8 * (x - 1) + e] : 0.f) + one;
          path.pick([&](auto kind) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float bias[kN][2];
#pragma unroll
              for (int x = 0; x < kN; ++x)
#pragma unroll
                for (int e = 0; e < 2; ++e) bias[x][e] = diagonals[x + 1 - half][e];
              if (p.positions && ahead_of_history) [[unlikely]] {
                const float* key = &shared.bias.pos[buffer][kK - 1 - row0 - 8 * half];
                int last = max(s.history - i0, 0);
#pragma unroll
                for (int x = 0; x < kN; ++x)
#pragma unroll
                  for (int e = 0; e < 2; ++e) bias[x][e] = one + key[min(r0 + 8 * x + column0 + e, last)];
              }
              shared.bias.template add_time<decltype(kind)::value>(bias, path, buffer, key_time[half], r0 + column0, [&](int r) {
                return time_term(p, item.head, exact_bucket(p, s, i0 + r, j0 + row0 + 8 * half));
              });
#pragma unroll
              for (int x = 0; x < kN; ++x)
#pragma unroll
                for (int e = 0; e < 2; ++e) w[0][x][2 * half + e] = fmaf(factor, w[0][x][2 * half + e], bias[x][e]);
            }
          });
        }
#pragma unroll
        for (int x = 0; x < kN; ++x)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            int r = r0 + 8 * x + column0 + e;
            float lse = kSoftmax ? shared.lse[buffer][r] : 0.f, delta = kSoftmax ? shared.delta[buffer][r] : 0.f;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float &weight = w[0][x][2 * half + e], &gradient = ds[0][x][2 * half + e];
              if (kScalesGradient<T>) gradient *= inverse_gradient;
              bool keeps = keep[half] >> (2 * x + e) & 1;
              Pair pair = pair_of<T, kSoftmax>(kBias ? weight : factor * weight, gradient, keeps, p.keep_scale, lse, delta);
              weight = pair.weight, gradient = pair.ds;
            }
          }
        if (!kSoftmax && p.scales)
#pragma unroll
          for (int x = 0; x < kN; ++x)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float scale = shared.scale[buffer][r0 + 8 * x + column0 + e];
              w[0][x][e] *= scale, w[0][x][2 + e] *= scale, ds[0][x][e] *= scale, ds[0][x][2 + e] *= scale;
            }
        if (!all)
#pragma unroll
          for (int x = 0; x < kN; ++x)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              VisibleKeys row = shared.visible[buffer][r0 + 8 * x + column0 + e];
              if (!row.has(j0 + row0)) w[0][x][e] = ds[0][x][e] = 0.f;
              if (!row.has(j0 + row0 + 8)) w[0][x][2 + e] = ds[0][x][2 + e] = 0.f;
            }
        if (wants_dk) {
#pragma unroll
          for (int x = 0; x < kN; ++x)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              T* at = shared.ds[buffer] + (row0 + 8 * half) * S::kPitchDs + r0 + 8 * x + column0;
              if constexpr (kIsHalf<T>) *reinterpret_cast<uint32_t*>(at) = pack_pair<T>(ds[0][x][2 * half], ds[0][x][2 * half + 1]);
              else *reinterpret_cast<float2*>(at) = float2{ds[0][x][2 * half], ds[0][x][2 * half + 1]};
            }
        }
        if (r0 == kQ - kColumns) {
          if (herald) wait_for_turn(item.turns + m, turns, seen.turn);
          shared.ds_there.arrive();
        }
        if (wants_dv) multiply_weights<T, kDim>(dv, w, dout);
        if (wants_dk) multiply_weights<T, kDim>(dk, ds, q);
        if constexpr (kBias) {
          if (wants_time)
            time_gradient.add(shared.time_sums[key_warp], shared.bias, path, p.last_bucket, buffer, key_time, r0 + column0, ds[0],
                              [&](int r, int half) { return exact_bucket(p, s, i0 + r, j0 + row0 + 8 * half); });
        }
      }
      if (next.tile >= 0) commit(buffer ^ 1, next);
      copy_async_wait<0>();
      shared.tile_done.arrive();
      Seen later = next.tile >= 0 ? next_seen() : Seen{-1, 0, false};
      shared.ds_there.wait(step & 1);
      if (herald && done >= 0) announce(item.turns + done);
      add_dq(m, seen.turn, buffer);
      if constexpr (kBias)
        if (wants_pos) sum_positions(shared, m, buffer);
      shared.tile_done.wait(step & 1);  // the next tile is there, nobody reads this one any more
      if (S::kStages == 2 && later.tile >= 0) load_queries(stage, later.tile);
      if (S::kStages == 1 && next.tile >= 0) {
        load_queries(0, next.tile), copy_async_wait<0>();
        __syncthreads();
      }
      if (later.tile >= 0) fetch(later.tile);
      if constexpr (kBias)
        if (wants_pos && done >= 0) add_positions(shared, done, buffer ^ 1);
      done = m, seen = next, next = later;
    }
    __syncthreads();
    if (g.deterministic && threadIdx.x == 0 && done >= 0) announce(item.turns + done);
    if constexpr (kBias)
      if (wants_pos && done >= 0) add_positions(shared, done, buffer ^ 1);

    Slab<kDim>&dk_slab = shared.slabs[0][warp], &dv_slab = shared.slabs[S::kSplit ? 0 : 1][warp];
    if (wants_dk) fill_slab<kDim>(dk_slab, dk[0]);
    if (wants_dv) fill_slab<kDim>(dv_slab, dv[0]);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      int at = lane / 4 + 8 * half, j = j0 + row0 + 8 * half, own = 0, from = max(j, s.shift);
      if (j >= s.history && j < s.length) {
        int64_t end = int64_t(j) - (j - s.history) % p.group + p.group;
        own = max(int(min(end, int64_t(s.length))) - from, 0);
      }
#pragma unroll 1
      for (int x = 0, longest = __reduce_max_sync(kFullWarp, own); x < longest; ++x) {
        bool active = x < own;
        int i = active ? from + x : s.shift, bucket = -1;
        int64_t row = s.query + i - s.shift;
        const T *query = row_of(p.q, p, row, item.head, p.key_dim), *dout = row_of(g.dout, p, row, item.head, p.value_dim);
        float score = factor * quad_dot(query, row_of(p.k, p, s.key + j, item.head, p.key_dim), p.key_dim, active);
        float dweight = quad_dot(dout, row_of(p.v, p, s.key + j, item.head, p.value_dim), p.value_dim, active) * item.inverse_gradient;
        float ds = 0;
        if (active) {
          if constexpr (kBias) score += own_bias(p, s, item.head, row, j, bucket);
          bool keeps = !p.dropout || kept(p, s.index, item.head, i, j);
          float lse = kSoftmax ? g.lse[row * p.heads + item.head] : 0.f;
          float delta = kSoftmax ? g.delta[row * p.heads + item.head] * item.inverse_gradient : 0.f;
          Pair pair = pair_of<T, kSoftmax>(score, dweight, keeps, p.keep_scale, lse, delta);
          float scale = !kSoftmax && p.scales ? p.scales[row] * item.units.weight_inverse : 1.f;
          ds = scale * pair.ds;
          if (wants_dv) add_row(dv_slab[at], 1.f, scale * pair.weight, dout, p.value_dim);
          if (wants_dk) add_row(dk_slab[at], 1.f, ds, query, p.key_dim);
        }
        if constexpr (kBias) {
          if (lane % 4 == 0) own_sum += ds;
          if (wants_time)
            for (int quad = 0; quad < 8; ++quad) {
              float value = __shfl_sync(kFullWarp, ds, 4 * quad);
              int where = __shfl_sync(kFullWarp, bucket, 4 * quad);
              if (lane == 0 && where >= 0) shared.time_sums[key_warp].sum[where] += value;
            }
        }
      }
      if (lane % 4 == 0) {
        if (wants_dk) dk_slab[at][kDim] = p.alpha * item.units.weight * item.units.gradient;
        if (wants_dv) dv_slab[at][kDim] = item.units.weight;
      }
    }
    int first = j0 + key_warp * 16, rows = min(s.length - first, 16);
    int64_t at = (s.key + first) * p.heads + item.head;
    if (wants_dk) store_slab<kDim>(g.dk + at * p.key_dim, int64_t(p.heads) * p.key_dim, dk_slab, rows, p.key_dim);
    if (wants_dv) store_slab<kDim>(g.dv + at * p.value_dim, int64_t(p.heads) * p.value_dim, dv_slab, rows, p.value_dim);
    if constexpr (kBias) {
      if (wants_time) time_gradient.flush(shared.time_sums[key_warp]);
      own_sum = warp_sum(own_sum), clamped = warp_sum(clamped);
      if (wants_dk && lane == 0) shared.own[key_warp] = own_sum;
      if (lane == 0) shared.clamped[warp] = clamped;
      __syncthreads();
      if (wants_pos && threadIdx.x == 0) {
        float own = 0, beyond = 0;
        for (int w = 0; w < S::kWarps; ++w) beyond += shared.clamped[w];
        for (int w = 0; w < S::kKeyWarps; ++w) own += shared.own[w];
        atomicAdd(item.pos_sums, item.units.weight * item.units.gradient * own);
        atomicAdd(item.pos_sums + p.positions - 1, item.units.weight * item.units.gradient * beyond);
      }
      for (int x = threadIdx.x; g.time_sums && x <= p.last_bucket; x += kThreads) {
        float sum = 0;
        for (int w = 0; w < S::kKeyWarps; ++w) sum += shared.time_sums[w].sum[x], shared.time_sums[w].sum[x] = 0;
        item.time_sums[x] += item.units.weight * item.units.gradient * sum;
      }
    }
  }
}

constexpr int64_t kTableScratch = 1 << 26;  // floats for private sums of the tables
constexpr int64_t kGroupTokens = 1 << 14;   // whose Q, dO and sums of dQ stay in the L2 cache

template <typename T, int kDim, Mode kMode, bool kSmall = false>
void launch_backward(const Call<T>& p, Gradients<T> g, Tensor* dpos_w, Tensor* dtime_w, int64_t rows, int64_t keys, int64_t longest,
                     Stream stream) {
  using S = BackwardShape<T, kDim, kSmall>;
  constexpr bool kBias = kMode != Mode::kSilu, kSoftmax = kMode == Mode::kSoftmax, kHasSmall = kHasSmallBackward<T, kDim> && !kSmall;
  constexpr size_t shared = kBias ? sizeof(BackwardSharedWithBias<T, kDim, kSmall>) : sizeof(BackwardShared<T, kDim, kSmall>);
  constexpr bool kLarge = kIsHalf<T> && kDim == 128, kMedium = kHasSmall || (!kIsHalf<T> && kDim == 256);
  static_assert(shared <= (kHasSmall && kLarge ? kHopperShared : kMedium ? kAmpereShared : kLeastShared));
  if constexpr (kHasSmall)
    if (shared > shared_limit()) return launch_backward<T, kDim, kMode, true>(p, g, dpos_w, dtime_w, rows, keys, longest, stream);
  int64_t tiles = ceil_div(longest, S::kQueryTile), query_tiles = tiles * p.sequences;
  int64_t key_tiles = std::min(ceil_div(int64_t(p.max_seq_len), S::kKeyTile) * p.sequences, keys / S::kKeyTile + p.sequences);
  // With room for the tickets of blocks that find nothing left.
  HSTU_CHECK(query_tiles <= INT_MAX - 4 && key_tiles * p.heads <= INT_MAX - (1 << 20), kInvalidArgument, "hstu_attention_backward: ",
             p.sequences, " sequences of ", p.max_seq_len, " rows are too many for one call");
  auto kernel = hstu_attention_backward_kernel<T, kDim, kMode, kSmall>;
  // Which items a block gets depends on time, so for the same bits each has its own sums of the tables; where all these would be too large,
  // a launch has a part of the tiles.
  int64_t entries = ((dpos_w ? p.positions : 0) + (dtime_w ? p.last_bucket + 1 : 0)) * int64_t(p.heads);
  g.copies = int(entries ? std::clamp<int64_t>(kTableScratch / entries, 1, std::max<int64_t>(key_tiles, 1)) : key_tiles);
  int64_t blocks = std::min(resident_blocks(kernel, S::kThreads, shared), int64_t(g.copies) * p.heads), sums = int64_t(g.copies) * p.heads;

  Scratch<float> pos_sums(dpos_w ? sums * p.positions : 0, stream), time_sums(dtime_w ? sums * (p.last_bucket + 1) : 0, stream);
  Scratch<float> dq_sums(rows * p.heads * kDim, stream);
  Scratch<QueryTile> seen(query_tiles, stream);
  Scratch<int> turns(query_tiles * p.heads + 2, stream);
  Scratch<int2> key_list(key_tiles, stream);
  Scratch<Largest> largest(p.scales || kScalesGradient<T> ? p.sequences : 0, stream);
  if (largest && p.sequences > 0) largest.zero();
  if (!g.deterministic && rows > 0) dq_sums.zero();
  g.pos_sums = pos_sums, g.time_sums = time_sums, g.dq_sums = dq_sums, g.query_tiles = seen, g.turns = turns + 2, g.tiles = turns;
  g.ticket = turns + 1, g.key_tiles = key_list, g.largest = largest, g.most_query_tiles = int(tiles);
  for (g.group = 32; g.group > 1 && g.group * int64_t(p.max_seq_len) > kGroupTokens;) g.group /= 2;
  if (kScalesGradient<T>) launch(largest_kernel<T>, dim3(unsigned(p.sequences), 8), dim3(256), 0, stream, p, g);
  launch(prepare_kernel<T, S::kQueryTile, S::kKeyTile>, dim3(unsigned(ceil_div(query_tiles, 4) + 1)), dim3(128), 0, stream, p, g);
  do {
    if (blocks > 0 && dpos_w) pos_sums.zero();
    if (blocks > 0 && dtime_w) time_sums.zero();
    if (g.first_tile > 0) CUDA_CHECK(cudaMemsetAsync(g.ticket, 0, sizeof(int), handle_of(stream)));
    launch(kernel, dim3(unsigned(blocks)), dim3(S::kThreads), shared, stream, p, g);
    if (dpos_w) reduce_table(*dpos_w, pos_sums, g.copies, p.heads, p.positions, g.first_tile > 0, stream);
    if (dtime_w) reduce_table(*dtime_w, time_sums, g.copies, p.heads, p.last_bucket + 1, g.first_tile > 0, stream);
    g.first_tile += g.copies;
  } while (g.first_tile < key_tiles);
  launch(dq_kernel<T, kDim, kSoftmax, S::kQueryTile, S::kKeyTile>, dim3(unsigned(query_tiles)), dim3(256), 0, stream, p, g);
}

}  // namespace
}  // namespace attention

void hstu_attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, Tensor* dpos_w, Tensor* dtime_w, const Tensor& dout, const Tensor& q,
                             const Tensor& k, const Tensor& v, const Tensor* out, const Tensor* lse, const Tensor& seq_offsets,
                             const Tensor* q_offsets, const Tensor* num_targets, const Tensor* contextual_lengths, const Tensor* pos_w,
                             const Tensor* time_w, const Tensor* query_time, const Tensor* key_time, const Tensor* scales,
                             int64_t max_seq_len, int contextual, int max_attn_len, int min_full_attn_seq_len, int target_group_size,
                             bool causal, bool contextual_full, AttentionActivation activation, double alpha, double scale,
                             double dropout, int64_t seed, int64_t offset, bool deterministic, Stream stream) {
  using namespace attention;
  bool softmax = activation == AttentionActivation::kSoftmax;
  HSTU_CHECK(!softmax || (out && lse), kInvalidArgument, "hstu_attention_backward: softmax wants out and lse");
  check_geometry("hstu_attention_backward", {q, k, seq_offsets, q_offsets, num_targets, contextual_lengths, key_time}, max_seq_len, stream);
  int64_t longest = std::min(max_seq_len, q.shape[0]), rows = q.shape[0];
  pick_dtype("hstu_attention_backward", q.dtype, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call = call_of<T>(q, k, v, seq_offsets, q_offsets, num_targets, contextual_lengths, pos_w, time_w, query_time, key_time, scales,
                              max_seq_len, contextual, max_attn_len, min_full_attn_seq_len, target_group_size, causal, contextual_full,
                              softmax, alpha, scale, dropout, seed, offset);
    call.value_piece = std::min(call.value_piece, piece_of(dout.as<T>(), v.shape[2]));
    Gradients<T> gradients{dq.as<T>(), dk.as<T>(), dv.as<T>(), dout.as<T>()};
    gradients.deterministic = deterministic;
    Scratch<float> delta(softmax ? rows * q.shape[1] : 0, stream);
    if (softmax) {
      gradients.lse = lse->as<float>(), gradients.delta = delta;
      launch(delta_kernel<T>, dim3(unsigned(ceil_div(rows * q.shape[1], 8))), dim3(256), 0, stream, delta.get(), dout.as<T>(), out->as<T>(),
             rows * q.shape[1], int(v.shape[2]));
    }
    if constexpr (kIsHalf<T>)
      if (backward_on_hopper(call, gradients, dpos_w, dtime_w, rows, k.shape[0], longest, stream)) return;
    pick_dim(q.shape[2], v.shape[2], [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      pick_mode<T, kDim>(softmax, pos_w || time_w, [&](auto mode) {
        launch_backward<T, kDim, decltype(mode)::value>(call, gradients, dpos_w, dtime_w, rows, k.shape[0], longest, stream);
      });
    });
  });
}

}  // namespace hstu::cuda
