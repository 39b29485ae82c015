#include "group_by.cuh"
#include "sampled_softmax_loss.cuh"

namespace hstu::cuda {
namespace {

constexpr int kStrips = 4;         // strips of 32 vectors of a row that a warp keeps in registers
constexpr int64_t kChunk = 512;    // pairs of a partial sum of an item's gradient

// A warp owns a packed row i and its pairs i (R + 1) + element. It scores the row again (its maximum and sum come with that) and writes
// each pair's item and coefficient: the gradient of its logit, less the factor that all share. Rows beyond the packed ones name no item.
template <typename T, int kVector>
__global__ void __launch_bounds__(kRowThreads) make_pairs(int64_t* ids, float* coefficients, int64_t rows, SampledInputs<T> in) {
  const int lane = threadIdx.x % 32;
  const int64_t i = int64_t(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32, pairs = in.negatives.count + 1;
  if (i >= rows) return;
  ids += i * pairs;
  coefficients += i * pairs;
  if (i >= in.totals->count) {
    for (int64_t e = lane; e < pairs; e += 32) ids[e] = -1;
    return;
  }
  int64_t position = in.positions[i];
  float positive;
  RowSum row = score_row<kVector>(in, position, positive, [&](int64_t e, int32_t item, float logit) {
    ids[e] = item;
    coefficients[e] = logit;
  });
  float weight = weight_of(in.weights, position), inverse = 1.f / (expf(positive - row.maximum) + row.others);
  int64_t positive_id = in.positive_ids[position];
  for (int64_t e = lane; e < pairs; e += 32) {  // the elements that this lane wrote
    float p = expf(coefficients[e] - row.maximum) * inverse;
    if (e == 0) p = -row.others * inverse;  // 1 - p of the positive is the sum of the others: no cancellation
    else if (ids[e] == positive_id) p = 0.f;
    coefficients[e] = weight * p;
  }
}

// dquery: a warp owns a packed row and kStrips strips of columns (grid y), lanes along the columns, and adds up the items' rows pair by
// pair.
template <typename T, int kPair>
__global__ void __launch_bounds__(kRowThreads) sum_items(T* dquery, const int64_t* ids, const float* coefficients, const float* dloss,
                                                         float temperature, SampledInputs<T> in) {
  constexpr int kStrip = 32 * kPair;
  const int lane = threadIdx.x % 32, dims = int(in.dims);
  const int begin = blockIdx.y * kStrips * kStrip + lane * kPair;  // this lane's first column
  const int64_t i = int64_t(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32, pairs = in.negatives.count + 1;
  if (i >= in.totals->count) return;
  float sums[kStrips][kPair] = {};
  for (int64_t first = 0; first < pairs; first += 32) {
    int64_t e = first + lane;
    int32_t item = e < pairs ? int32_t(ids[i * pairs + e]) : 0;
    float coefficient = e < pairs ? coefficients[i * pairs + e] * factor_of(in.factors, item) : 0.f;
    int count = int(min(int64_t(32), pairs - first));
#pragma unroll 4
    for (int n = 0; n < count; ++n) {
      float c = __shfl_sync(kFullWarp, coefficient, n);
      const T* from = in.table + int64_t(__shfl_sync(kFullWarp, item, n)) * dims + begin;
#pragma unroll
      for (int s = 0; s < kStrips; ++s)
        if (begin + s * kStrip < dims) {
          float x[kPair];
          load_vector(x, from + s * kStrip);
#pragma unroll
          for (int p = 0; p < kPair; ++p) sums[s][p] = fmaf(c, x[p], sums[s][p]);
        }
    }
  }
  float gain = gradient_scale(dloss, in.totals, temperature);
  T* out = dquery + int64_t(in.positions[i]) * dims + begin;
#pragma unroll
  for (int s = 0; s < kStrips; ++s)
#pragma unroll
    for (int p = 0; p < kPair; ++p)
      if (begin + s * kStrip + p < dims) out[s * kStrip + p] = from_float<T>(sums[s][p] * gain);
}

// Pairs in order of item: a warp owns kChunk of them and kStrips strips of columns (grid y), and writes the sum of each run of one item
// in its chunk. Chunk w's run of item i goes to row w + i of `partials`: from run to run one of the two grows and none shrinks, so no two
// share a row, and the rows of an item are neighbours.
template <typename T, int kPair>
__global__ void __launch_bounds__(kRowThreads) sum_runs(float* partials, const uint32_t* order, const int64_t* starts, const int64_t* ids,
                                                        const float* coefficients, const T* query, const int32_t* positions, int64_t items,
                                                        uint32_t pairs, int dims) {
  constexpr int kStrip = 32 * kPair, kAhead = 4;
  const int lane = threadIdx.x % 32;
  const int64_t chunk = int64_t(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  const int begin = blockIdx.y * kStrips * kStrip + lane * kPair;  // this lane's first column
  const int64_t stop = min((chunk + 1) * kChunk, starts[items]);
  int32_t current = -1;
  float sums[kStrips][kPair];
  auto write = [&] {
    if (current < 0) return;
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int p = 0; p < kPair; ++p) {
        int column = begin + s * kStrip + p;
        if (column < dims) partials[(chunk + current) * dims + column] = sums[s][p];
      }
  };
  for (int64_t first = chunk * kChunk; first < stop; first += 32) {
    bool here = first + lane < stop;
    uint32_t pair = here ? order[first + lane] : order[first];
    int32_t item = here ? int32_t(ids[pair]) : -1, position = positions[pair / pairs];
    float coefficient = coefficients[pair];
    for (int n = 0; n < 32; n += kAhead) {
      float x[kAhead][kStrips][kPair];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const T* from = query + int64_t(__shfl_sync(kFullWarp, position, n + a)) * dims;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          if (begin + s * kStrip < dims) {
            load_vector(x[a][s], from + begin + s * kStrip);
          } else {
#pragma unroll
            for (int p = 0; p < kPair; ++p) x[a][s][p] = 0.f;
          }
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        int32_t next = __shfl_sync(kFullWarp, item, n + a);
        float c = __shfl_sync(kFullWarp, coefficient, n + a);
        if (next < 0) continue;  // past the end; the same for all lanes
        if (next != current) {
          write();
          current = next;
#pragma unroll
          for (int s = 0; s < kStrips; ++s)
#pragma unroll
            for (int p = 0; p < kPair; ++p) sums[s][p] = 0.f;
        }
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
#pragma unroll
          for (int p = 0; p < kPair; ++p) sums[s][p] = fmaf(c, x[a][s][p], sums[s][p]);
      }
    }
  }
  write();
}

// The rows of `partials` that sum_runs wrote for an item.
struct ChunkPartials {
  float* partials;
  const int64_t* starts;
  int64_t dims;

  __device__ PartialRows operator()(int64_t item) const {
    int64_t begin = starts[item], end = starts[item + 1];
    if (begin == end) return {nullptr, 0, 0};
    int64_t first = begin / kChunk, last = (end - 1) / kChunk;
    return {partials + (first + item) * dims, dims, last - first + 1};
  }
};

}  // namespace

void sampled_softmax_loss_backward(Tensor& dquery, Tensor& dtable, const Tensor& dloss, const Tensor&, const Tensor& query,
                                   const Tensor& table, const Tensor& positive_ids, const Tensor* weights,
                                   const Tensor* negative_ids, int num_negatives, int first_id, bool normalize_items,
                                   double temperature, double eps, int64_t seed, int64_t offset, const Tensor* base,
                                   Stream stream) {
  constexpr char kOp[] = "sampled_softmax_loss_backward";
  pick_dtype(kOp, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t items = table.rows(), dims = table.cols(), each = int64_t(num_negatives) + 1;
    LossRows rows(kOp, query, table, weights, stream);
    HSTU_CHECK(rows.total <= INT32_MAX / each, kInvalidArgument, kOp, ": at most 2^31 - 1 pairs of position and item, got ", rows.total,
               " x ", each);
    int64_t pairs = rows.total * each, chunks = ceil_div(pairs, kChunk);
    NormFactors<T> norms(table, normalize_items, eps, stream);
    Scratch<int64_t> ids(pairs, stream);
    Scratch<float> coefficients(pairs, stream), partials((chunks + items) * dims, stream);
    SampledInputs<T> in{query.as<T>(), table.as<T>(), norms.factors, positive_ids.as<int64_t>(), rows.weights, rows.positions, rows.totals,
                        dims, float(1 / temperature), Negatives(negative_ids, num_negatives, first_id, items, seed, offset, base)};
    fill(dquery.data, 0, dquery.bytes(), stream);  // of positions that do not count
    unsigned row_blocks = unsigned(ceil_div(rows.total, kRowThreads / 32));
    pick_vector<T>(dims, in.query, in.table, [&](auto vector) {
      launch(make_pairs<T, vector()>, row_blocks, kRowThreads, 0, stream, ids.get(), coefficients.get(), rows.total, in);
    });
    Groups by_item = group_by_id(ids, pairs, items, stream);
    pick_vector<T>(dims, in.query, in.table, [&](auto vector) {
      constexpr int kPair = vector() == 1 ? 1 : 2;
      unsigned strips = unsigned(ceil_div(dims, kStrips * 32 * kPair));
      launch(sum_items<T, kPair>, dim3(row_blocks, strips), kRowThreads, 0, stream, dquery.as<T>(), ids.get(), coefficients.get(),
             dloss.as<float>(), float(temperature), in);
      launch(sum_runs<T, kPair>, dim3(unsigned(ceil_div(chunks, kRowThreads / 32)), strips), kRowThreads, 0, stream, partials.get(),
             by_item.order.get(), by_item.starts.get(), ids.get(), coefficients.get(), in.query, in.positions, items, uint32_t(each),
             int(dims));
    });
    launch(finish_table<T, ChunkPartials>, unsigned(ceil_div(items, 8)), 256, 0, stream, dtable.as<T>(),
           ChunkPartials{partials, by_item.starts, dims}, in.table, items, dims, dloss.as<float>(), in.totals, float(temperature),
           normalize_items, float(eps));
  });
}

}  // namespace hstu::cuda
