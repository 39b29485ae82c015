// HSTU attention, forward: out = scale sum_j silu(alpha q k^T + bias) v, or softmax, over jagged sequences with history in pages or not.
#include <cmath>

#include "hstu_attention_choice.cuh"
#include "hstu_attention_pieces.cuh"
#include "hstu_attention_tiles.cuh"

namespace hstu::cuda {
namespace attention {
namespace {

// kSmall: tiles for 99 KB of shared memory a block. Rows keep their bits.
template <typename T, int kDim, bool kSmall>
struct ForwardShape {
  // 32 query rows a warp where their sums fit in registers: each piece of K and V read from shared memory then feeds two mma.
  static constexpr int kRowTiles = kIsHalf<T> && kDim <= (kSmall ? 64 : 128) ? 2 : 1;
  static constexpr int kWarps = (kIsHalf<T> ? 4 : 2) / (kSmall && kDim == 256 ? 2 : 1), kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps * kRowTiles;
  static constexpr int kStages = kDim <= 128 ? 2 : 1;  // tiles of K and V in shared memory at once
};
template <typename T, int kDim>
constexpr bool kHasSmallForward = kIsHalf<T> ? kDim >= 128 : kDim == 256;

// How many keys of a tile have their scores in registers at once.
template <typename T, int kDim, Mode kMode>
constexpr int kStep = kIsHalf<T> && (kDim == 128 || kMode == Mode::kSoftmax) ? 32 : kKeys<T>;

template <typename T, int kDim, bool kSmall>
struct Shared {
  using S = ForwardShape<T, kDim, kSmall>;
  static constexpr int kSize = kKeys<T> * kPitch<T, kDim>;
  alignas(16) T q[S::kRows * kPitch<T, kDim>];
  union {
    struct {
      alignas(16) T k[S::kStages][kSize];
      alignas(16) T v[S::kStages][kSize];
    };
    Slab<kDim> slabs[S::kWarps];  // after the last tile
  };
  Rows<T> keys, values;
  SeenKeys<S::kRows, S::kWarps> seen;
};
template <typename T, int kDim, bool kSmall>
struct SharedWithBias : Shared<T, kDim, kSmall> {
  BiasPieces<Shared<T, kDim, kSmall>::S::kRows, kKeys<T>> bias;
};

// A block owns kRows query rows of one head of one sequence, a warp 16 or 32 of them, a quad of lanes a row (accumulator layout). It
// walks the key tiles that any of its rows sees, in ascending order: scores by mma (float32: 3xTF32), bias, activation and mask in
// registers, weights times values by mma with the weights still in registers. The next tile is under way while this one is computed
// with. A tile that no row of a warp sees is skipped, one that all see is not masked. Targets' own groups come last, in float32, a quad
// a row. Blocks of late rows, which see most, start first.
// A row's bits depend on the order of its keys and the 64-key (float32: 32-key) tiles counted from key 0 alone: the products of other
// rows, hidden keys and skipped tiles add exact zeros, and all ways to a time bucket give the same bucket.
template <typename T, int kDim, Mode kMode, bool kSmall>
__global__ void __launch_bounds__(ForwardShape<T, kDim, kSmall>::kThreads, 2)
    hstu_attention_kernel(const Call<T> p, T* out, float* lse, int tiles) {
  using S = ForwardShape<T, kDim, kSmall>;
  constexpr int kM = S::kRowTiles, kX = kDim / 8, kThreads = S::kThreads, kTile = kKeys<T>, kEach = 16 * kM, kRows = S::kRows;
  constexpr int kColumns = kStep<T, kDim, kMode>, kN = kColumns / 8, kPrefetch = S::kStages - 1;
  constexpr bool kSoftmax = kMode == Mode::kSoftmax, kBias = kMode != Mode::kSilu;
  constexpr bool kDiagonals = !kSoftmax || kDim < 128;  // else hundreds of bytes are spilled
  extern __shared__ __align__(16) unsigned char memory[];
  using WithBias = SharedWithBias<T, kDim, kSmall>;
  auto& shared = *reinterpret_cast<std::conditional_t<kBias, WithBias, Shared<T, kDim, kSmall>>*>(memory);

  int tile = tiles - 1 - int(blockIdx.x % tiles), head = int(blockIdx.x / tiles % p.heads);
  Sequence s = sequence_of(p, int(blockIdx.x / tiles / p.heads));
  int first = tile * kRows, i0 = s.shift + first, rows = min(kRows, s.queries - first);
  if (rows <= 0) return;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = warp * kEach + lane / 4, column0 = lane % 4 * 2;
  int64_t query = s.query + first;
  float factor = p.unit * p.alpha;

  const T* first_query = p.q + (query * p.heads + head) * p.key_dim;
  load_tile<kRows, kDim, kThreads>(shared.q, rows, p.key_dim, p.key_piece, first_query, p.heads * p.key_dim);
  copy_async_commit();
  shared.seen.stage(p, s, i0, rows);
  if (threadIdx.x == 0) {
    shared.keys = rows_of(p, s, head, p.k, p.key_dim, false);
    shared.values = rows_of(p, s, head, p.v, p.value_dim, true);
  }
  // The bias: keys' times and the table by position difference come tile by tile.
  typename decltype(WithBias::bias)::template Ahead<kThreads> ahead;
  int64_t base = 0;
  float up = 1 / p.alpha;
  bool straight = !p.positions || i0 + warp * kEach + kEach - 1 <= s.history;
  if constexpr (kBias) {
    shared.bias.template stage_tables<kThreads>(p, head);
    base = first_time(p, s);
    int r = warp * kEach + lane;
    bool there = p.last_bucket >= 0 && lane < kEach && r < rows;
    NearTime time{kNoFixedTime, kSomeUntimed};
    if (there && i0 + r >= s.contextual) time = near_time(p.query_time[query + r], base);
    shared.bias.template stage_rows<kEach>(warp * kEach, there, time, shared.seen);
  }
  __syncthreads();
  KeyTiles key_tiles = shared.seen.tiles(kTile);

  auto load = [&](int stage, int j0) {
    T *k = shared.k[stage], *v = shared.v[stage];
    int valid = s.history - j0;
    if (j0 < s.paged) {
      int last = s.history - 1;  // whose page is there
      load_tile<kTile, kDim, kThreads>(k, valid, p.key_dim, p.key_piece, [&](int c) { return shared.keys.at(min(j0 + c, last)); });
      load_tile<kTile, kDim, kThreads>(v, valid, p.value_dim, p.value_piece, [&](int c) { return shared.values.at(min(j0 + c, last)); });
    } else {
      int key_stride = p.heads * p.key_dim, value_stride = p.heads * p.value_dim;
      const T *key = shared.keys.jagged + int64_t(j0 - s.paged) * key_stride;
      const T *value = shared.values.jagged + int64_t(j0 - s.paged) * value_stride;
      load_tile<kTile, kDim, kThreads>(k, valid, p.key_dim, p.key_piece, key, key_stride);
      load_tile<kTile, kDim, kThreads>(v, valid, p.value_dim, p.value_piece, value, value_stride);
    }
    copy_async_commit();
  };
  auto fetch = [&](int j0) {
    if constexpr (kBias)
      shared.bias.template fetch<kThreads>(ahead, p, head, min(i0, s.history) - j0 + kRows - 1, p.key_time + s.time + j0,
                                           s.contextual - j0, s.history - j0);
  };
  float sums[kM][kX][4] = {}, most[kM][2], total[kM][2] = {};
#pragma unroll
  for (int m = 0; m < kM; ++m) most[m][0] = most[m][1] = -kInfinity;

  // Each tile is brought while the one before is computed with; before the first (n = -1) there is nothing to compute.
  for (int n = -1, next = key_tiles.from(0), stage = 1;; n = next, next = key_tiles.from(n + 1), stage ^= 1) {
    int j0 = n * kTile, buffer = stage & kPrefetch;
    bool more = next < key_tiles.last;
    if (!kPrefetch && n >= 0) {
      __syncthreads();
      load(0, j0);
    }
    if (n >= 0) copy_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody reads the last one any more
    if (more) {
      if (kPrefetch) load(buffer ^ 1, next * kTile);
      fetch(next * kTile);
    }
    VisibleKeys some = shared.seen.any[warp], every = shared.seen.all[warp];
    bool any = n >= 0 && some.any(j0, j0 + kTile), all = every.all(j0, j0 + kTile);
#pragma unroll 1
    for (int c0 = 0; any && c0 < kTile; c0 += kColumns) {
      uint32_t keep[kM][2];  // before the scores take registers
      if constexpr (kSoftmax)
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r)
          keep[r / 2][r % 2] = kept_columns<kN>(p, s.index, head, [&](int c) { return int2{i0 + row0 + 8 * r, j0 + c0 + c}; });
      float w[kM][kN][4];
      [[maybe_unused]] Pieces pieces;
      [[maybe_unused]] auto look = [&] {
        if constexpr (kBias) pieces = shared.bias.template look<kM, kN>(stage, warp * kM, c0, j0, p.last_bucket);
      };
      const T *queries = shared.q + warp * kEach * kPitch<T, kDim>, *keys = shared.k[buffer] + c0 * kPitch<T, kDim>;
      if constexpr (!kBias) {
        const float zero[4] = {};
        multiply_rows<T, kDim>(w, queries, keys, [&](int, int) { return zero; });
      } else if (kDiagonals && straight) {  // fragments on one diagonal begin alike
        auto starts = shared.bias.template starts<kM, kN>(stage, row0, c0 + column0);
        multiply_rows<T, kDim>(w, queries, keys, [&](int m, int n) { return starts.of(m, n); });
        look();
      } else {  // targets stand at one position
        shared.bias.begin(w, stage, row0, c0 + column0, max(s.history - i0, 0));
        multiply_rows<T, kDim>(w, queries, keys);
        look();
      }
      if constexpr (!kBias) {
#pragma unroll
        for (int y = 0; y < 4 * kM * kN; ++y) w[y / (4 * kN)][y / 4 % kN][y % 4] *= factor;
      } else if (!pieces.far) {
        shared.bias.add_times(w, pieces, factor, stage, row0, c0 + column0);
      } else {
#pragma unroll 1
        for (int y = 0; y < 4 * kM * kN; ++y) {
          int r = row0 + y / (4 * kN) * 16 + y / 2 % 2 * 8, c = c0 + column0 + y / 4 % kN * 8 + y % 2;
          float term = time_term(p, head, exact_bucket(p, s, i0 + r, j0 + c));
#pragma unroll
          for (int x = 0; x < 4 * kM * kN; ++x) {
            float& score = w[x / (4 * kN)][x / 4 % kN][x % 4];
            score = x == y ? fmaf(factor, score, term) : score;
          }
        }
      }
      if constexpr (!kSoftmax)
#pragma unroll
        for (int y = 0; y < 4 * kM * kN; ++y) w[y / (4 * kN)][y / 4 % kN][y % 4] = weight_of<T>(w[y / (4 * kN)][y / 4 % kN][y % 4]);
      if constexpr (kBias && !kSoftmax) {
        if (pieces.partly) shared.bias.hide(w, pieces, &shared.seen.row[row0], j0 + c0, column0);
      } else if (kSoftmax || !all)
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            int r = row0 + 16 * m + 8 * half;
            if (!all) {
              uint64_t seen = shared.seen.row[r].bits(j0 + c0) >> column0;
#pragma unroll
              for (int x = 0; x < kN; ++x)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                  if (!(uint32_t(x < 4 ? seen : seen >> 32) >> (8 * x % 32 + e) & 1)) w[m][x][2 * half + e] = kSoftmax ? -kInfinity : 0.f;
            }
            if constexpr (kSoftmax) {
              float tile_most = -kInfinity;
#pragma unroll
              for (int x = 0; x < kN; ++x) tile_most = fmaxf(tile_most, fmaxf(w[m][x][2 * half], w[m][x][2 * half + 1]));
              tile_most = fmaxf(tile_most, __shfl_xor_sync(kFullWarp, tile_most, 1));
              tile_most = fmaxf(tile_most, __shfl_xor_sync(kFullWarp, tile_most, 2));
              float now = fmaxf(most[m][half], tile_most), reference = now == -kInfinity ? 0.f : now;
              float decay = exponential<T>(most[m][half] - reference);
              most[m][half] = now, total[m][half] *= decay;
#pragma unroll
              for (int x = 0; x < kX; ++x) sums[m][x][2 * half] *= decay, sums[m][x][2 * half + 1] *= decay;
#pragma unroll
              for (int x = 0; x < kN; ++x)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                  float& weight = w[m][x][2 * half + e];
                  weight = exponential<T>(weight - reference), total[m][half] += weight;
                  if (p.dropout) weight = keep[m][half] >> (2 * x + e) & 1 ? weight : 0.f;
                }
            }
          }
      multiply_weights<T, kDim>(sums, w, shared.v[buffer] + c0 * kPitch<T, kDim>);
    }
    if (!more) break;
    if constexpr (kBias) shared.bias.commit(stage ^ 1, ahead, p, up, base);
  }
  copy_async_wait<0>();
  __syncthreads();

  Slab<kDim>& slab = shared.slabs[warp];
#pragma unroll 1
  for (int m = 0; m < kM; ++m) {
    if (m == 0) fill_slab<kDim>(slab, sums[0]);
    else fill_slab<kDim>(slab, sums[kM - 1]);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      int r = row0 + 16 * m + 8 * half, i = i0 + r, own = shared.seen.row[r].own, count = r < rows ? i + 1 - own : 0;
      float *row = slab[lane / 4 + 8 * half], row_most = 0, row_total = 0;
      if constexpr (kSoftmax) {
        row_most = half ? (m ? most[kM - 1][1] : most[0][1]) : (m ? most[kM - 1][0] : most[0][0]);
        row_total = half ? (m ? total[kM - 1][1] : total[0][1]) : (m ? total[kM - 1][0] : total[0][0]);
        row_total += __shfl_xor_sync(kFullWarp, row_total, 1);
        row_total += __shfl_xor_sync(kFullWarp, row_total, 2);
      }
#pragma unroll 1
      for (int x = 0, longest = __reduce_max_sync(kFullWarp, count); x < longest; ++x) {
        bool active = x < count;
        int j = active ? own + x : 0, bucket;
        float score = factor * quad_dot(shared.q + r * kPitch<T, kDim>, active ? shared.keys.at(j) : nullptr, p.key_dim, active);
        if (!active) continue;
        if constexpr (kBias) score += own_bias(p, s, head, query + r, j, bucket);
        float weight, decay = 1;
        if constexpr (kSoftmax) {
          float now = fmaxf(row_most, score);
          decay = exponential<T>(row_most - now), weight = exponential<T>(score - now);
          row_most = now, row_total = row_total * decay + weight;
          if (p.dropout && !kept(p, s.index, head, i, j)) weight = 0.f;
        } else {
          weight = weight_of<T>(score);
        }
        add_row(row, decay, weight, shared.values.at(j), p.value_dim);
      }
      if (r >= rows || lane % 4 > 0) continue;
      if constexpr (kSoftmax) {
        row[kDim] = row_total == 0.f ? 0.f : p.keep_scale / row_total;
        float value = row_total == 0.f ? -kInfinity : row_most + logf(row_total);
        if (lse) lse[(query + r) * p.heads + head] = value;
      } else {
        row[kDim] = p.scales ? p.scales[query + r] : p.scale;
      }
    }
    int start = warp * kEach + 16 * m;
    store_slab<kDim>(out + ((query + start) * p.heads + head) * p.value_dim, int64_t(p.heads) * p.value_dim, slab, min(rows - start, 16),
                     p.value_dim);
  }
}

template <typename T, int kDim, Mode kMode, bool kSmall = false>
void launch_forward(const Call<T>& p, T* out, float* lse, int64_t longest, Stream stream) {
  using S = ForwardShape<T, kDim, kSmall>;
  constexpr bool kBias = kMode != Mode::kSilu, kHasSmall = kHasSmallForward<T, kDim> && !kSmall;
  constexpr size_t shared = kBias ? sizeof(SharedWithBias<T, kDim, kSmall>) : sizeof(Shared<T, kDim, kSmall>);
  static_assert(shared <= (kHasSmall ? kAmpereShared : kLeastShared));
  if constexpr (kHasSmall)
    if (shared > shared_limit()) return launch_forward<T, kDim, kMode, true>(p, out, lse, longest, stream);
  int64_t tiles = ceil_div(longest, S::kRows), blocks = tiles * p.heads * p.sequences;
  HSTU_CHECK(blocks <= INT_MAX, kInvalidArgument, "hstu_attention: ", p.sequences, " sequences of ", longest,
             " rows are too many for one call");
  launch(hstu_attention_kernel<T, kDim, kMode, kSmall>, dim3(unsigned(blocks)), dim3(S::kThreads), shared, stream, p, out, lse, int(tiles));
}

}  // namespace
}  // namespace attention

void hstu_attention(Tensor& out, Tensor* lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& seq_offsets,
                    const Tensor* q_offsets, const Tensor* num_targets, const Tensor* contextual_lengths, const Tensor* pos_w,
                    const Tensor* time_w, const Tensor* query_time, const Tensor* key_time, const Tensor* scales,
                    const Tensor* kv_pages, const Tensor* page_table, const Tensor* page_offsets, const Tensor* kv_lengths,
                    const Tensor* time_offsets, int64_t max_seq_len, int contextual, int max_attn_len, int min_full_attn_seq_len,
                    int target_group_size, bool causal, bool contextual_full, AttentionActivation activation, double alpha,
                    double scale, double dropout, int64_t seed, int64_t offset, bool deterministic, Stream stream) {
  using namespace attention;
  bool softmax = activation == AttentionActivation::kSoftmax;
  check_geometry("hstu_attention",
                 {q, k, seq_offsets, q_offsets, num_targets, contextual_lengths, key_time, kv_pages, page_table, page_offsets, kv_lengths,
                  time_offsets},
                 max_seq_len, stream);
  int64_t longest = std::min(max_seq_len, q.shape[0]);
  pick_dtype("hstu_attention", q.dtype, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call = call_of<T>(q, k, v, seq_offsets, q_offsets, num_targets, contextual_lengths, pos_w, time_w, query_time, key_time, scales,
                              max_seq_len, contextual, max_attn_len, min_full_attn_seq_len, target_group_size, causal, contextual_full,
                              softmax, alpha, scale, dropout, seed, offset);
    if (kv_pages) {
      call.kv_pages = kv_pages->as<T>(), call.page_table = page_table->as<int32_t>(), call.page_offsets = page_offsets->as<int64_t>();
      call.kv_lengths = kv_lengths->as<int32_t>(), call.time_offsets = data_or_null<int64_t>(time_offsets);
      call.page_count = kv_pages->shape[0], call.page_size = int(kv_pages->shape[2]), call.page_width = int(kv_pages->shape[4]);
      int piece = piece_of(call.kv_pages, call.page_width);
      call.key_piece = std::min(call.key_piece, piece), call.value_piece = std::min(call.value_piece, piece);
    }
    float* log_sums = data_or_null<float>(lse);
    if constexpr (kIsHalf<T>)
      if (forward_on_hopper(call, softmax, deterministic, out.as<T>(), log_sums, q.shape[0], k.shape[0], stream)) return;
    pick_dim(q.shape[2], v.shape[2], [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      // Scores begin as the position's bias / alpha. Where that has no value products are nothing beside it: rows without columns have none.
      if (call.positions && std::fabs(call.alpha) < 1e-20f) call.alpha = 1, call.key_dim = 0;
      pick_mode<T, kDim>(softmax, pos_w || time_w, [&](auto mode) {
        launch_forward<T, kDim, decltype(mode)::value>(call, out.as<T>(), log_sums, longest, stream);
      });
    });
  });
}

}  // namespace hstu::cuda
