// What the two directions of softmax_loss share: the scores of rows with every item, reduced to their log-sum-exp.
#pragma once
#include "scoring.cuh"
#include "softmax.cuh"

namespace hstu::cuda {

// What the kernels read. Items are counted from first_id: `table`, `factors` and the items of kernels begin there.
template <typename T>
struct SoftmaxInputs {
  const T *query, *table;
  const float* factors;
  const int64_t* positive_ids;
  const float* weights;
  const int32_t* positions;
  const LossTotals* totals;
  int64_t items, dims, first_id;
  float scale;  // 1 / temperature
  bool wide;

  SoftmaxInputs(const LossRows& rows, const Tensor& query, const Tensor& table, const Tensor& positive_ids, const float* factors,
                int first_id, double temperature)
      : query(query.as<T>()),
        table(table.as<T>() + first_id * table.cols()),
        factors(factors ? factors + first_id : nullptr),
        positive_ids(positive_ids.as<int64_t>()),
        weights(rows.weights),
        positions(rows.positions),
        totals(rows.totals),
        items(table.rows() - first_id),
        dims(table.cols()),
        first_id(first_id),
        scale(float(1 / temperature)),
        wide(wide_rows<T>(dims, this->query, this->table)) {}

  __device__ RowList<T> query_rows() const { return {query, positions, totals->count, dims}; }
  __device__ RowList<T> item_rows() const { return {table, nullptr, items, dims}; }
  // The positive of a position, -1 where it is no item.
  __device__ int32_t positive(int64_t position) const {
    int64_t id = positive_ids[position] - first_id;
    return id >= 0 && id < items ? int32_t(id) : -1;
  }
};

// A block owns kOwned packed rows and meets the items tile by tile; a row's log-sum-exp grows in the lanes that hold its scores and is
// merged at the end. losses [packed rows]; lse [T] by position.
template <typename T>
__global__ void __launch_bounds__(ScoreTile<T>::kThreads) score_corpus(float* losses, float* lse, SoftmaxInputs<T> in) {
  using Tile = ScoreTile<T>;
  constexpr int kWarpRows = kOwned / (Tile::kThreads / 32);
  __shared__ typename Tile::Shared shared;
  __shared__ float logits[kOwned];  // of the rows' positives; a warp reads what it wrote
  __shared__ int32_t positives[kOwned];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const RowList<T> queries = in.query_rows(), items = in.item_rows();
  const int64_t first = int64_t(blockIdx.x) * kOwned;
  if (first >= queries.count) return;

  for (int n = warp * kWarpRows; n < (warp + 1) * kWarpRows; ++n) {  // the warp's rows with their positives, lanes along the dims
    int64_t at = min(first + n, queries.count - 1);  // rows beyond the last are not read
    int32_t positive = in.positive(in.positions[at]);
    const T *query = queries.row(at), *item = items.row(max(positive, 0));
    float sum = 0.f;
    for (int64_t c = lane; c < in.dims; c += 32) sum = fmaf(to_float(query[c]), to_float(item[c]), sum);
    sum = warp_sum(sum);
    logits[n] = positive < 0 ? NAN : sum * factor_of(in.factors, positive) * in.scale;
    positives[n] = positive;
  }
  __syncwarp();
  RowSum rows[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) rows[i] = {logits[Tile::row(i)], 0.f};

  Tile tile;
  const int count = int(items.count);
  for (int item = 0; item < count; item += kMet) {
    tile.multiply(shared, queries, first, items, item, in.wide);
    float scales[Tile::kCols];
#pragma unroll
    for (int j = 0; j < Tile::kCols; ++j) {
      int n = item + Tile::col(j);
      scales[j] = n < count ? factor_of(in.factors, n) * in.scale : 0.f;
    }
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      int positive = positives[Tile::row(i)];
      float most = -INFINITY;
#pragma unroll
      for (int j = 0; j < Tile::kCols; ++j) {
        int n = item + Tile::col(j);
        float& logit = tile.at(i, j);
        logit = n < count && n != positive ? logit * scales[j] : -INFINITY;  // the positive is counted on its own
        most = fmaxf(most, logit);
      }
      if (most > rows[i].maximum) rows[i].rescale(most);
#pragma unroll
      for (int j = 0; j < Tile::kCols; ++j) rows[i].others += expf(tile.at(i, j) - rows[i].maximum);
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    rows[i].rescale(Tile::row_max(rows[i].maximum));
    rows[i].others = Tile::row_sum(rows[i].others);
    int64_t at = first + Tile::row(i);
    if (at >= queries.count || lane % Tile::kRowLanes != 0) continue;
    float positive = logits[Tile::row(i)];
    losses[at] = rows[i].loss(positive);
    lse[in.positions[at]] = rows[i].lse(positive);
  }
}

}  // namespace hstu::cuda
