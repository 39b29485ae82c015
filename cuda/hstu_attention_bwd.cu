// HSTU attention, backward: dQ with the table gradients by tiles of queries, dK and dV by tiles of keys. Scores are computed again in
// both: seven products instead of the five that one pass with atomic dQ would take, and the same bits from run to run.
#include "hstu_attention.cuh"
#include "hstu_attention_bias.cuh"

namespace hstu::cuda {
namespace attention {
namespace {

template <typename T>
constexpr int kQueries = kKeys<T>;  // query rows of a tile

// What a call has beside its inputs. lse and delta are float32 [Tq, H], softmax only.
template <typename T>
struct Gradients {
  T *dq, *dk, *dv;
  const T* dout;
  const float *lse, *delta;
  float *pos_sums, *time_sums;  // [H, copies, P], [H, copies, last_bucket + 1]; null where the table has no gradient
};

template <typename T>
__device__ __forceinline__ const T* row_of(const T* data, const Call<T>& p, int64_t row, int head, int dim) {
  return data + (row * p.heads + head) * dim;
}

// A weight and the gradient of its score from the score and the gradient of the (dropped) weight.
struct Pair {
  float weight, ds;
};
template <typename T, bool kSoftmax>
__device__ __forceinline__ Pair pair_of(float score, float dweight, bool keep, float keep_scale, float lse, float delta) {
  if constexpr (kSoftmax) {
    float weight = exponential<T>(score - lse), factor = keep ? keep_scale : 0.f;
    return {weight * factor, weight * (dweight * factor - delta)};
  } else {
    float sigmoid = kIsHalf<T> ? __fdividef(1.f, 1.f + __expf(-score)) : 1.f / (1.f + expf(-score)), weight = score * sigmoid;
    return {weight, dweight * fmaf(weight, 1.f - sigmoid, sigmoid)};
  }
}

// delta = <dout, out> and lse as float32, [Tq, H]: a warp a row and head.
template <typename T>
__global__ void __launch_bounds__(256) prepare_softmax_kernel(float* delta, float* lse, const T* dout, const T* out, const float* exact,
                                                              const T* rounded, int64_t rows, int dim) {
  int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  float sum = 0;
  for (int x = threadIdx.x % 32; x < dim; x += 32) sum = fmaf(to_float(dout[row * dim + x]), to_float(out[row * dim + x]), sum);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[row] = sum, lse[row] = exact ? exact[row] : to_float(rounded[row]);
}

// ---- dQ and the tables ---------------------------------------------------------------------------------------------------------

template <typename T, int kDim>
struct SharedQueries {
  static constexpr int kTile = kQueries<T>, kStep = kPitch<T, kDim>, kWarps = kTile / 16;
  alignas(16) T q[kTile * kStep];
  alignas(16) T dout[kTile * kStep];
  union {
    struct {
      alignas(16) T k[kTile * kStep];
      union {
        alignas(16) T v[kTile * kStep];
        float ds[kTile][kTile + 1];  // once V has been read
      };
    };
    Slab<kDim> slabs[kWarps];  // after the last tile
  };
  Rows<T> keys, values;
  SeenKeys<kTile, kWarps> seen;
};
template <typename T, int kDim>
struct SharedQueriesWithBias : SharedQueries<T, kDim> {
  BiasTile<kQueries<T>, kQueries<T>, 1> bias;
  float diagonal[2 * kQueries<T>], own[kQueries<T> / 16];
  float time_sums[kQueries<T> / 16][kTimeThresholds + 1][kTimeColumns];
};

// A block owns tiles of queries (64, float32: 32) of one head: those whose number is `copy` modulo `copies`; a warp owns 16 rows. It walks
// the key tiles its rows see, recomputes scores, forms dS in registers and adds dS K. Row scales and alpha are applied at the end.
// For the position table dS passes through shared memory, in V's place, and a thread sums a diagonal; for the time table a lane sums
// runs of equal buckets, which are long where times are sorted. Both go to sums of this block alone, `copies` of them a head, so that
// scratch stays bounded and a second kernel adds them up in order.
template <typename T, int kDim, Mode kMode>
__global__ void __launch_bounds__(2 * kQueries<T>) hstu_attention_dq_kernel(const Call<T> p, const Gradients<T> g, int tiles, int copies) {
  constexpr int kTile = kQueries<T>, kN = kTile / 8, kX = kDim / 8, kThreads = 2 * kTile, kWarps = kTile / 16;
  constexpr bool kSoftmax = kMode == Mode::kSoftmax, kBias = kMode != Mode::kSilu;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<std::conditional_t<kBias, SharedQueriesWithBias<T, kDim>, SharedQueries<T, kDim>>*>(memory);
  int head = int(blockIdx.x % p.heads), copy = int(blockIdx.x / p.heads);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = warp * 16 + lane / 4, column0 = lane % 4 * 2;
  float *pos_sums = nullptr, *time_sums = nullptr;
  if constexpr (kBias) {
    if (g.pos_sums) pos_sums = g.pos_sums + (int64_t(head) * copies + copy) * p.positions;
    if (g.time_sums) time_sums = g.time_sums + (int64_t(head) * copies + copy) * (p.last_bucket + 1);
    shared.bias.template stage_table<kThreads>(p, head);
    for (int x = threadIdx.x; time_sums && x < kWarps * (kTimeThresholds + 1) * kTimeColumns; x += kThreads)
      (&shared.time_sums[0][0][0])[x] = 0;
  }

  for (int64_t item = copy; item < int64_t(p.sequences) * tiles; item += copies) {
    Sequence s = sequence_of(p, int(item / tiles));
    int first = (tiles - 1 - int(item % tiles)) * kTile, i0 = s.shift + first, rows = min(kTile, s.queries - first);
    if (rows <= 0) continue;
    int64_t query = s.query + first;
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.keys = rows_of(p, s, head, p.k, p.key_dim, false);
      shared.values = rows_of(p, s, head, p.v, p.value_dim, true);
    }
    shared.seen.stage(p, s, i0, rows);
    if constexpr (kBias) shared.bias.template stage_queries<kThreads>(p, s, i0);
    load_tile<kTile, kDim, kThreads>(shared.q, rows, p.key_dim, p.vector_keys,
                                     [&](int r) { return row_of(p.q, p, query + r, head, p.key_dim); });
    load_tile<kTile, kDim, kThreads>(shared.dout, rows, p.value_dim, p.vector_values,
                                     [&](int r) { return row_of(g.dout, p, query + r, head, p.value_dim); });
    copy_async_commit();
    __syncthreads();
    KeyTiles key_tiles = shared.seen.tiles(kTile);

    float sums[1][kX][4] = {}, scale[2], lse[2] = {}, delta[2] = {}, own_sum = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t row = query + min(row0 + 8 * half, rows - 1);
      scale[half] = kSoftmax ? 1.f : p.scales ? p.scales[row] : p.scale;
      if (kSoftmax) lse[half] = g.lse[row * p.heads + head], delta[half] = g.delta[row * p.heads + head];
    }
    TimeRun run;
    for (int n = key_tiles.from(0); n < key_tiles.last; n = key_tiles.from(n + 1)) {
      int j0 = n * kTile;
      __syncthreads();
      load_tile<kTile, kDim, kThreads>(shared.k, s.history - j0, p.key_dim, p.vector_keys, [&](int c) { return shared.keys.at(j0 + c); });
      load_tile<kTile, kDim, kThreads>(shared.v, s.history - j0, p.value_dim, p.vector_values,
                                       [&](int c) { return shared.values.at(j0 + c); });
      copy_async_commit();
      if constexpr (kBias) {
        shared.bias.template stage_keys<kThreads>(p, s, 0, j0);
        shared.bias.template stage_positions<kThreads>(p, s, head, i0, 0, j0);
      }
      copy_async_wait<0>();
      __syncthreads();
      bool any = shared.seen.any[warp].any(j0, j0 + kTile), all = shared.seen.all[warp].all(j0, j0 + kTile);
      uint32_t keep[2] = {~0u, ~0u};
      if (kSoftmax && any)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          keep[half] = kept_columns<kN>(p, s.index, head, [&](int c) { return int2{i0 + row0 + 8 * half, j0 + c}; });
      float w[1][kN][4] = {}, ds[1][kN][4] = {};
      if (any) {
        multiply_rows<T, kDim>(w, shared.q + warp * 16 * kPitch<T, kDim>, shared.k);
        multiply_rows<T, kDim>(ds, shared.dout + warp * 16 * kPitch<T, kDim>, shared.v);
      }
      if (kBias && pos_sums) __syncthreads();  // dS takes V's place
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int r = row0 + 8 * half;
        VisibleKeys seen = shared.seen.row[r];
#pragma unroll
        for (int x = 0; x < kN; ++x)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            int c = 8 * x + column0 + e, bucket = -1;
            float& gradient = ds[0][x][2 * half + e];
            if (any) {
              float score = p.alpha * w[0][x][2 * half + e];
              if constexpr (kBias) score = shared.bias.at(score, p, s, i0, 0, j0, r, c, bucket);
              bool hidden = !all && !seen.has(j0 + c), keeps = keep[half] >> (2 * x + e) & 1;
              gradient = hidden ? 0.f : pair_of<T, kSoftmax>(score, gradient, keeps, p.keep_scale, lse[half], delta[half]).ds;
              if constexpr (kBias)
                if (time_sums) run.add(shared.time_sums[warp], hidden ? run.bucket : bucket, scale[half] * gradient);
            }
            if constexpr (kBias)
              if (pos_sums) shared.ds[r][c] = scale[half] * gradient;
          }
        if constexpr (kBias)
          if (time_sums && any) run.add(shared.time_sums[warp], -1, 0.f);
      }
      if constexpr (kBias)
        if (pos_sums) {
          __syncthreads();
          add_positions<kTile, kThreads>(pos_sums, shared.ds, shared.diagonal, p.positions, min(max(s.history - i0, 0), kTile),
                                         min(i0, s.history) - j0 - (kTile - 1));
        }
      if (any) multiply_weights<T, kDim>(sums, ds, shared.k);
    }
    copy_async_wait<0>();
    __syncthreads();

    Slab<kDim>& slab = shared.slabs[warp];
    fill_slab<kDim>(slab, sums[0]);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      int r = row0 + 8 * half, i = i0 + r, own = shared.seen.row[r].own, count = r < rows ? i + 1 - own : 0;
      float *row = slab[lane / 4 + 8 * half], row_scale = half ? scale[1] : scale[0];
#pragma unroll 1
      for (int x = 0, longest = __reduce_max_sync(kFullWarp, count); x < longest; ++x) {
        bool active = x < count;
        int j = active ? own + x : 0, bucket = -1;
        const T *key = active ? shared.keys.at(j) : nullptr, *value = active ? shared.values.at(j) : nullptr;
        float score = p.alpha * quad_dot(shared.q + r * kPitch<T, kDim>, key, p.key_dim, active);
        float dweight = quad_dot(shared.dout + r * kPitch<T, kDim>, value, p.value_dim, active), gradient = 0;
        if (active) {
          if constexpr (kBias) score = shared.bias.own(score, p, s, head, shared.bias.query_time[r], j, bucket);
          bool keeps = !p.dropout || kept(p, s.index, head, i, j);
          gradient = pair_of<T, kSoftmax>(score, dweight, keeps, p.keep_scale, half ? lse[1] : lse[0], half ? delta[1] : delta[0]).ds;
          add_row(row, 1.f, gradient, key, p.key_dim);
        }
        float once = lane % 4 == 0 ? row_scale * gradient : 0.f;
        own_sum += once;
        if constexpr (kBias)
          if (time_sums) run.add(shared.time_sums[warp], active && lane % 4 == 0 ? bucket : run.bucket, once);
      }
      if constexpr (kBias)
        if (time_sums) run.add(shared.time_sums[warp], -1, 0.f);
      if (lane % 4 == 0) row[kDim] = p.alpha * row_scale;
    }
    store_slab<kDim>(g.dq + ((query + warp * 16) * p.heads + head) * p.key_dim, int64_t(p.heads) * p.key_dim, slab, min(rows - warp * 16, 16),
                     p.key_dim);
    if constexpr (kBias) {
      own_sum = warp_sum(own_sum);
      if (lane == 0) shared.own[warp] = own_sum;
      __syncthreads();
      if (pos_sums && threadIdx.x == 0)
        for (int w = 0; w < kWarps; ++w) pos_sums[0] += shared.own[w];
      for (int x = threadIdx.x; time_sums && x <= p.last_bucket; x += kThreads) {
        float sum = 0;
        for (int w = 0; w < kWarps; ++w)
          for (int column = 0; column < kTimeColumns; ++column) {
            sum += shared.time_sums[w][x][column];
            shared.time_sums[w][x][column] = 0;
          }
        time_sums[x] += sum;
      }
    }
  }
}

// ---- dK and dV -----------------------------------------------------------------------------------------------------------------

// With 256 columns the sums of both do not fit in a warp's registers: then half of the warps own dV, half dK, and both compute scores.
template <int kDim>
constexpr bool kSplit = kDim == 256;
template <typename T, int kDim>
constexpr int kKeyThreads = 2 * kKeys<T> * (kSplit<kDim> ? 2 : 1);

// How many queries of a tile have their scores in registers at once.
template <typename T, int kDim>
constexpr int kStep = kIsHalf<T> && kDim >= 128 ? 32 : kKeys<T>;

template <typename T, int kDim>
struct SharedKeys {
  static constexpr int kTile = kKeys<T>, kStep = kPitch<T, kDim>;
  union {
    struct {
      alignas(16) T q[kTile * kStep];
      alignas(16) T dout[kTile * kStep];
      alignas(16) T k[kTile * kStep];
      alignas(16) T v[kTile * kStep];
    };
    Slab<kDim> slabs[2][kTile / 16];  // of dK and dV, after the last tile
  };
  VisibleKeys seen[kTile];
  float scale[kTile], lse[kTile], delta[kTile], most[33];
};
template <typename T, int kDim>
struct SharedKeysWithBias : SharedKeys<T, kDim> {
  BiasTile<kKeys<T>, kKeys<T>, 1> bias;
};

// A block owns a tile of keys (64, float32: 32) of one head of one sequence, a warp 16 of them. It walks the tiles of queries that see any
// of its keys, recomputes the scores transposed (rows are keys), and adds P^T dO and dS^T Q from registers. Row scales are divided by
// the sequence's largest, which is applied at the end, so that float16 weights stay normal numbers. Targets' own groups come last, a
// quad a key, in float32.
template <typename T, int kDim, Mode kMode>
__global__ void __launch_bounds__(kKeyThreads<T, kDim>) hstu_attention_dkv_kernel(const Call<T> p, const Gradients<T> g, int tiles) {
  constexpr int kTile = kKeys<T>, kColumns = kStep<T, kDim>, kN = kColumns / 8, kX = kDim / 8, kThreads = kKeyThreads<T, kDim>;
  constexpr bool kSoftmax = kMode == Mode::kSoftmax, kBias = kMode != Mode::kSilu;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<std::conditional_t<kBias, SharedKeysWithBias<T, kDim>, SharedKeys<T, kDim>>*>(memory);
  int j0 = int(blockIdx.x % tiles) * kTile, head = int(blockIdx.x / tiles % p.heads);
  Sequence s = sequence_of(p, int(blockIdx.x / tiles / p.heads));
  if (j0 >= s.length) return;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, key_warp = warp % (kTile / 16), row0 = key_warp * 16 + lane / 4;
  bool wants_dv = !kSplit<kDim> || warp < kTile / 16, wants_dk = !kSplit<kDim> || warp >= kTile / 16;

  load_tile<kTile, kDim, kThreads>(shared.k, s.history - j0, p.key_dim, p.vector_keys,
                                   [&](int c) { return row_of(p.k, p, s.key + j0 + c, head, p.key_dim); });
  load_tile<kTile, kDim, kThreads>(shared.v, s.history - j0, p.value_dim, p.vector_values,
                                   [&](int c) { return row_of(p.v, p, s.key + j0 + c, head, p.value_dim); });
  copy_async_commit();
  float largest = 1;
  if (!kSoftmax) largest = p.scale;
  if (!kSoftmax && p.scales) {
    float most = 0;
    for (int r = threadIdx.x; r < s.queries; r += kThreads) most = fmaxf(most, fabsf(p.scales[s.query + r]));
    most = warp_max(most);
    if (lane == 0) shared.most[warp] = most;
    __syncthreads();
    for (int w = 0; w < kThreads / 32; ++w) most = fmaxf(most, shared.most[w]);
    largest = most > 0 ? most : 1;
  }
  if constexpr (kBias) {
    shared.bias.template stage_table<kThreads>(p, head);
    __syncthreads();
    shared.bias.template stage_keys<kThreads>(p, s, 0, j0);
  }

  float sums[kSplit<kDim> ? 1 : 2][1][kX][4] = {};
  auto &dk = sums[0], &dv = sums[kSplit<kDim> ? 0 : 1];
  // Without rows that look ahead no query before the first key sees any.
  int start = p.causal && !p.contextual_full ? max(j0 - s.shift, 0) / kTile * kTile : 0;
  for (int first = start; j0 < s.history && first < s.queries; first += kTile) {
    int i0 = s.shift + first, rows = min(kTile, s.queries - first);
    VisibleKeys seen{0, 0, 0, 0};
    if (int(threadIdx.x) < rows) seen = visible_keys(p, s, i0 + int(threadIdx.x));
    bool any = __syncthreads_or(seen.any(j0, j0 + kTile));
    bool all = __syncthreads_and(threadIdx.x >= kTile || seen.all(j0, j0 + kTile));
    if (!any) continue;
    int64_t query = s.query + first;
    load_tile<kTile, kDim, kThreads>(shared.q, rows, p.key_dim, p.vector_keys,
                                     [&](int r) { return row_of(p.q, p, query + r, head, p.key_dim); });
    load_tile<kTile, kDim, kThreads>(shared.dout, rows, p.value_dim, p.vector_values,
                                     [&](int r) { return row_of(g.dout, p, query + r, head, p.value_dim); });
    copy_async_commit();
    if (threadIdx.x < kTile) {
      int r = threadIdx.x;
      int64_t row = query + min(r, rows - 1);
      shared.seen[r] = seen;
      shared.scale[r] = !kSoftmax && p.scales ? p.scales[row] / largest : 1.f;
      if (kSoftmax) shared.lse[r] = g.lse[row * p.heads + head], shared.delta[r] = g.delta[row * p.heads + head];
    }
    if constexpr (kBias) {
      shared.bias.template stage_queries<kThreads>(p, s, i0);
      shared.bias.template stage_positions<kThreads>(p, s, head, i0, 0, j0);
    }
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int r0 = 0; r0 < kTile; r0 += kColumns) {
      uint32_t keep[2] = {~0u, ~0u};
      if constexpr (kSoftmax)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          keep[half] = kept_columns<kN>(p, s.index, head, [&](int r) { return int2{i0 + r0 + r, j0 + row0 + 8 * half}; });
      float w[1][kN][4] = {}, ds[1][kN][4] = {};
      multiply_rows<T, kDim>(w, shared.k + key_warp * 16 * kPitch<T, kDim>, shared.q + r0 * kPitch<T, kDim>);
      if (wants_dk) multiply_rows<T, kDim>(ds, shared.v + key_warp * 16 * kPitch<T, kDim>, shared.dout + r0 * kPitch<T, kDim>);
#pragma unroll
      for (int x = 0; x < kN; ++x)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          int r = r0 + 8 * x + lane % 4 * 2 + e, bucket;
          VisibleKeys row = shared.seen[r];
          float scale = shared.scale[r], lse = kSoftmax ? shared.lse[r] : 0.f, delta = kSoftmax ? shared.delta[r] : 0.f;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            int c = row0 + 8 * half;
            float &weight = w[0][x][2 * half + e], &gradient = ds[0][x][2 * half + e], score = p.alpha * weight;
            if constexpr (kBias) score = shared.bias.at(score, p, s, i0, 0, j0, r, c, bucket);
            Pair pair = pair_of<T, kSoftmax>(score, gradient, keep[half] >> (2 * x + e) & 1, p.keep_scale, lse, delta);
            bool hidden = !all && !row.has(j0 + c);
            weight = hidden ? 0.f : scale * pair.weight;
            gradient = hidden ? 0.f : scale * pair.ds;
          }
        }
      if (wants_dv) multiply_weights<T, kDim>(dv, w, shared.dout + r0 * kPitch<T, kDim>);
      if (wants_dk) multiply_weights<T, kDim>(dk, ds, shared.q + r0 * kPitch<T, kDim>);
    }
  }
  copy_async_wait<0>();
  __syncthreads();

  Slab<kDim>&dk_slab = shared.slabs[0][key_warp], &dv_slab = shared.slabs[1][key_warp];
  if (wants_dk) fill_slab<kDim>(dk_slab, dk[0]);
  if (wants_dv) fill_slab<kDim>(dv_slab, dv[0]);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    int at = lane / 4 + 8 * half, j = j0 + row0 + 8 * half, count = 0, from = max(j, s.shift);
    if (j >= s.history && j < s.length) {
      int64_t end = int64_t(j) - (j - s.history) % p.group + p.group;
      count = max(int(min(end, int64_t(s.length))) - from, 0);
    }
#pragma unroll 1
    for (int x = 0, longest = __reduce_max_sync(kFullWarp, count); x < longest; ++x) {
      bool active = x < count;
      int i = active ? from + x : s.shift, bucket;
      int64_t row = s.query + i - s.shift;
      const T *query = row_of(p.q, p, row, head, p.key_dim), *dout = row_of(g.dout, p, row, head, p.value_dim);
      float score = p.alpha * quad_dot(query, row_of(p.k, p, s.key + j, head, p.key_dim), p.key_dim, active);
      float dweight = quad_dot(dout, row_of(p.v, p, s.key + j, head, p.value_dim), p.value_dim, active);
      if (!active) continue;
      if constexpr (kBias) score = shared.bias.own(score, p, s, head, p.last_bucket >= 0 ? p.query_time[row] : 0, j, bucket);
      bool keeps = !p.dropout || kept(p, s.index, head, i, j);
      float lse = kSoftmax ? g.lse[row * p.heads + head] : 0.f, delta = kSoftmax ? g.delta[row * p.heads + head] : 0.f;
      Pair pair = pair_of<T, kSoftmax>(score, dweight, keeps, p.keep_scale, lse, delta);
      float scale = !kSoftmax && p.scales ? p.scales[row] / largest : 1.f;
      if (wants_dv) add_row(dv_slab[at], 1.f, scale * pair.weight, dout, p.value_dim);
      if (wants_dk) add_row(dk_slab[at], 1.f, scale * pair.ds, query, p.key_dim);
    }
    if (lane % 4 == 0) {
      if (wants_dk) dk_slab[at][kDim] = p.alpha * largest;
      if (wants_dv) dv_slab[at][kDim] = largest;
    }
  }
  int first = j0 + key_warp * 16, rows = min(s.length - first, 16);
  int64_t at = (s.key + first) * p.heads + head;
  if (wants_dk) store_slab<kDim>(g.dk + at * p.key_dim, int64_t(p.heads) * p.key_dim, dk_slab, rows, p.key_dim);
  if (wants_dv) store_slab<kDim>(g.dv + at * p.value_dim, int64_t(p.heads) * p.value_dim, dv_slab, rows, p.value_dim);
}

// ---- Launches ------------------------------------------------------------------------------------------------------------------

template <typename T, int kDim, Mode kMode>
void run(const Call<T>& p, const Gradients<T>& g, int64_t longest, int64_t copies, Stream stream) {
  constexpr bool kBias = kMode != Mode::kSilu;
  int64_t query_tiles = ceil_div(longest, kQueries<T>), key_tiles = ceil_div(int64_t(p.max_seq_len), kKeys<T>);
  int64_t key_blocks = key_tiles * p.heads * p.sequences, query_blocks = copies * p.heads;
  HSTU_CHECK(key_blocks <= INT_MAX && query_blocks <= INT_MAX, kInvalidArgument, "hstu_attention_backward: ", p.sequences, " sequences of ",
             p.max_seq_len, " rows are too many for one call");
  launch(hstu_attention_dq_kernel<T, kDim, kMode>, dim3(unsigned(query_blocks)), dim3(2 * kQueries<T>),
         kBias ? sizeof(SharedQueriesWithBias<T, kDim>) : sizeof(SharedQueries<T, kDim>), stream, p, g, int(query_tiles), int(copies));
  launch(hstu_attention_dkv_kernel<T, kDim, kMode>, dim3(unsigned(key_blocks)), dim3(kKeyThreads<T, kDim>),
         kBias ? sizeof(SharedKeysWithBias<T, kDim>) : sizeof(SharedKeys<T, kDim>), stream, p, g, int(key_tiles));
}

constexpr int64_t kTableScratch = 1 << 24;  // floats for the blocks' own table sums

}  // namespace
}  // namespace attention

void hstu_attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, Tensor* dpos_w, Tensor* dtime_w, const Tensor& dout, const Tensor& q,
                             const Tensor& k, const Tensor& v, const Tensor* out, const Tensor* lse, const Tensor& seq_offsets,
                             const Tensor* q_offsets, const Tensor* num_targets, const Tensor* contextual_lengths, const Tensor* pos_w,
                             const Tensor* time_w, const Tensor* query_time, const Tensor* key_time, const Tensor* scales,
                             int64_t max_seq_len, int contextual, int max_attn_len, int min_full_attn_seq_len, int target_group_size,
                             bool causal, bool contextual_full, AttentionActivation activation, double alpha, double scale,
                             double dropout, int64_t seed, int64_t offset, bool, Stream stream) {
  using namespace attention;
  bool softmax = activation == AttentionActivation::kSoftmax;
  HSTU_CHECK(!softmax || (out && lse), kInvalidArgument, "hstu_attention_backward: softmax wants out and lse");
  int64_t longest = std::min(max_seq_len, q.shape[0]), rows = q.shape[0] * q.shape[1];
  pick_dtype("hstu_attention_backward", q.dtype, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call = call_of<T>(q, k, v, seq_offsets, q_offsets, num_targets, contextual_lengths, pos_w, time_w, query_time, key_time, scales,
                              max_seq_len, contextual, max_attn_len, min_full_attn_seq_len, target_group_size, causal, contextual_full,
                              alpha, scale, dropout, seed, offset);
    call.vector_values = call.vector_values && is_vector(dout.as<T>(), v.shape[2]);
    int64_t items = ceil_div(longest, kQueries<T>) * call.sequences, copies = items;
    int64_t entries = (dpos_w ? call.positions : 0) + (dtime_w ? call.last_bucket + 1 : 0);
    if (entries > 0) copies = std::min(items, std::max<int64_t>(1, kTableScratch / (entries * call.heads)));
    Scratch<float> pos_sums(dpos_w ? call.heads * copies * call.positions : 0, stream);
    Scratch<float> time_sums(dtime_w ? call.heads * copies * (call.last_bucket + 1) : 0, stream);
    Scratch<float> delta(softmax ? rows : 0, stream), exact_lse(softmax ? rows : 0, stream);
    if (copies > 0 && dpos_w) pos_sums.zero();
    if (copies > 0 && dtime_w) time_sums.zero();
    if (softmax) {
      bool exact = lse->dtype == Dtype::kFloat32;
      launch(prepare_softmax_kernel<T>, dim3(unsigned(ceil_div(rows, 8))), dim3(256), 0, stream, delta.get(), exact_lse.get(), dout.as<T>(),
             out->as<T>(), exact ? lse->as<float>() : nullptr, exact ? nullptr : lse->as<T>(), rows, int(v.shape[2]));
    }
    Gradients<T> gradients{dq.as<T>(), dk.as<T>(), dv.as<T>(), dout.as<T>(), exact_lse, delta, pos_sums, time_sums};
    pick_dim(q.shape[2], v.shape[2], [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      if (softmax) run<T, kDim, Mode::kSoftmax>(call, gradients, longest, copies, stream);
      else if (pos_w || time_w || !kPlain<T, kDim>) run<T, kDim, Mode::kSiluBias>(call, gradients, longest, copies, stream);
      else if constexpr (kPlain<T, kDim>) run<T, kDim, Mode::kSilu>(call, gradients, longest, copies, stream);
    });
    if (dpos_w) reduce_table(*dpos_w, pos_sums, copies, call.heads, call.positions, stream);
    if (dtime_w) reduce_table(*dtime_w, time_sums, copies, call.heads, call.last_bucket + 1, stream);
  });
}

}  // namespace hstu::cuda
