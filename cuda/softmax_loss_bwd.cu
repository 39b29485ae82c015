#include "softmax_loss.cuh"

namespace hstu::cuda {
namespace {

constexpr int kSlice = 32;  // met rows of a step of the second product

// Shared memory of a block of sum_gradients.
template <typename T>
struct GradientShared {
  static constexpr int kColumns = ScoreTile<T>::kThreads / 2;  // of the gradient: 64 for each four warps
  static constexpr int kCoefficientStride = kMet + 4, kMetStride = kColumns + 8;  // fragments are read without bank conflicts
  union {
    typename ScoreTile<T>::Shared slices;               // for the scores,
    float coefficients[kOwned * kCoefficientStride];    // then made of them
  };
  float met[kSlice * kMetStride];
  float lse[kMet], weight[kMet], others[kMet], factor[kMet];  // of the rows' or columns' queries and items
  int32_t positive[kMet];
};

// A block owns kOwned rows, packed queries or (kByItem) items, and kColumns of their gradient's columns (grid y), and meets the other
// side tile by tile: scores again, from them coefficients (the gradient of a score, less what is constant along an owned row or
// everywhere), and with these the sum of the met rows, on the tensor cores in 3xTF32 for float32, else in TF32, where the met rows are
// exact. Warp w owns rows 16 (w % 4) .. + 15 and columns 64 (w / 4) .. + 63 of the sum. By query: writes dquery and others [packed
// rows], the sum of the probabilities of the items that are not the positive, which is the positive's coefficient but for its sign: no
// cancellation. By item: reads `others`; the queries are cut in gridDim.z ranges that depend on their packed number alone, and range z
// writes partials[z, item].
// The tile leaves room for two blocks an SM (three where a block is 128 threads). d above kColumns pays for the scores once more for
// each further kColumns.
template <typename T, bool kByItem>
__global__ void __launch_bounds__(ScoreTile<T>::kThreads, 256 / ScoreTile<T>::kThreads + 1)
    sum_gradients(T* dquery, float* partials, float* others, const float* lse, const float* dloss, float temperature, SoftmaxInputs<T> in) {
  using Tile = ScoreTile<T>;
  using Shared = GradientShared<T>;
  constexpr int kColumns = Shared::kColumns, kCoefficientStride = Shared::kCoefficientStride, kMetStride = Shared::kMetStride;
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const RowList<T> queries = in.query_rows(), items = in.item_rows();
  const RowList<T> owned = kByItem ? items : queries, met = kByItem ? queries : items;
  const int64_t first = int64_t(blockIdx.x) * kOwned;
  const int tiles = int((met.count + kMet - 1) / kMet), last = int(int64_t(tiles) * (blockIdx.z + 1) / gridDim.z);
  const int column = blockIdx.y * kColumns, dims = int(in.dims), item_count = int(items.count);
  if (first >= owned.count) return;

  // Queries outside the packed ones have probability 0 everywhere.
  auto stage_query = [&](int to, int64_t at) {
    bool here = at < queries.count;
    int64_t position = here ? in.positions[at] : 0;
    shared.lse[to] = here ? lse[position] : INFINITY;
    shared.weight[to] = here ? weight_of(in.weights, position) : 0.f;
    shared.positive[to] = here ? in.positive(position) : -1;
    shared.others[to] = kByItem && here ? others[at] : 0.f;  // by query it grows tile by tile
  };
  auto stage_item = [&](int to, int64_t at) { shared.factor[to] = at < items.count ? factor_of(in.factors, at) : 0.f; };

  if (threadIdx.x < kOwned) {
    if (kByItem) stage_item(threadIdx.x, first + threadIdx.x);
    else stage_query(threadIdx.x, first + threadIdx.x);
  }
  float gradient[8][4] = {};
  Tile tile;
  for (int turn = int(int64_t(tiles) * blockIdx.z / gridDim.z); turn < last; ++turn) {
    const int64_t met_first = int64_t(turn) * kMet;
    tile.multiply(shared.slices, owned, first, met, met_first, in.wide);
    __syncthreads();  // slices have been read, and all of the tile before
    if (threadIdx.x < kMet) {
      if (kByItem) stage_query(threadIdx.x, met_first + threadIdx.x);
      else stage_item(threadIdx.x, met_first + threadIdx.x);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      float row_others = 0.f;
#pragma unroll
      for (int j = 0; j < Tile::kCols; ++j) {
        int row = Tile::row(i), col = Tile::col(j), q = kByItem ? col : row, n = kByItem ? row : col;
        int32_t item = int32_t(kByItem ? first : met_first) + (kByItem ? row : col);
        float factor = shared.factor[n], p = expf(tile.at(i, j) * factor * in.scale - shared.lse[q]);
        float coefficient;
        if (kByItem) {
          coefficient = shared.weight[q] * (item == shared.positive[q] ? -shared.others[q] : p);
        } else {
          if (item >= item_count || item == shared.positive[q]) p = 0.f;
          row_others += p;
          coefficient = p * factor;
        }
        shared.coefficients[row * kCoefficientStride + col] = coefficient;
      }
      if (!kByItem) {
        row_others = Tile::row_sum(row_others);
        if (lane % Tile::kRowLanes == 0) shared.others[Tile::row(i)] += row_others;
      }
    }

    for (int slice = 0; slice < kMet && met_first + slice < met.count; slice += kSlice) {
      __syncthreads();
      for (int at = threadIdx.x; at < kSlice * kColumns; at += Tile::kThreads) {
        int k = at / kColumns, c = at % kColumns;
        const T* from = met.row(met_first + slice + k);
        shared.met[k * kMetStride + c] = from && column + c < dims ? to_float(from[column + c]) : 0.f;
      }
      __syncthreads();
      const float* a_from = shared.coefficients + (warp % 4 * 16 + lane / 4) * kCoefficientStride + slice + lane % 4;
      const float* b_from = shared.met + lane % 4 * kMetStride + warp / 4 * 64 + lane / 4;
#pragma unroll 1
      for (int k = 0; k < kSlice; k += 8) {
        uint32_t a_high[4], a_low[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          Tf32Pair a = split_tf32(a_from[n % 2 * 8 * kCoefficientStride + k + n / 2 * 4]);
          a_high[n] = a.high, a_low[n] = a.low;
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          float b0 = b_from[k * kMetStride + n * 8], b1 = b_from[(k + 4) * kMetStride + n * 8];
          if constexpr (Tile::kMatrix) mma_m16n8k8_tf32(gradient[n], a_high, __float_as_uint(b0), __float_as_uint(b1));
          else mma_m16n8k8_3xtf32(gradient[n], a_high, a_low, split_tf32(b0), split_tf32(b1));
        }
      }
    }
  }

  if (!kByItem) {
    __syncthreads();
    if (blockIdx.y == 0 && threadIdx.x < kOwned && first + threadIdx.x < queries.count)
      others[first + threadIdx.x] = shared.others[threadIdx.x];
  }
  const float gain = kByItem ? 1.f : gradient_scale(dloss, in.totals, temperature);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = warp % 4 * 16 + half * 8 + lane / 4;
    int64_t at = first + row;
    if (at >= owned.count) continue;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      int c = column + warp / 4 * 64 + n / 2 * 8 + lane % 4 * 2 + n % 2;
      if (c >= dims) continue;
      float sum = gradient[n / 2][half * 2 + n % 2];
      if (kByItem) {
        partials[(blockIdx.z * items.count + at) * dims + c] = sum;
      } else {
        int32_t positive = shared.positive[row];
        float x = positive < 0 ? NAN : factor_of(in.factors, positive) * to_float(items.row(positive)[c]);
        dquery[int64_t(in.positions[at]) * dims + c] = from_float<T>((sum - shared.others[row] * x) * shared.weight[row] * gain);
      }
    }
  }
}

// partials [ranges, items, dims] of the items from first_id on; the rows below get no gradient.
struct RangePartials {
  float* partials;
  int64_t first_id, items, dims, ranges;

  __device__ PartialRows operator()(int64_t id) const {
    if (id < first_id) return {nullptr, 0, 0};
    return {partials + (id - first_id) * dims, items * dims, ranges};
  }
};

}  // namespace

void softmax_loss_backward(Tensor& dquery, Tensor& dtable, const Tensor& dloss, const Tensor& lse, const Tensor& query,
                           const Tensor& table, const Tensor& positive_ids, const Tensor* weights, int first_id,
                           bool normalize_items, double temperature, double eps, Stream stream) {
  constexpr char kOp[] = "softmax_loss_backward";
  pick_dtype(kOp, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kThreads = ScoreTile<T>::kThreads;
    constexpr int64_t kBlocks = 256, kMostRanges = 32;  // blocks wanted; it fills the larger devices
    LossRows rows(kOp, query, table, weights, stream);
    NormFactors<T> norms(table, normalize_items, eps, stream);
    SoftmaxInputs<T> in(rows, query, table, positive_ids, norms.factors, first_id, temperature);
    unsigned query_blocks = unsigned(ceil_div(rows.total, kOwned)), item_blocks = unsigned(ceil_div(in.items, kOwned));
    unsigned columns = unsigned(ceil_div(in.dims, GradientShared<T>::kColumns));
    int64_t ranges = std::clamp<int64_t>(kBlocks / std::max<int64_t>(1, int64_t(item_blocks) * columns), 1, kMostRanges);
    Scratch<float> others(rows.total, stream), partials(ranges * in.items * in.dims, stream);
    fill(dquery.data, 0, dquery.bytes(), stream);  // of positions that do not count
    launch(sum_gradients<T, false>, dim3(query_blocks, columns), kThreads, sizeof(GradientShared<T>), stream, dquery.as<T>(),
           static_cast<float*>(nullptr), others.get(), lse.as<float>(), dloss.as<float>(), float(temperature), in);
    launch(sum_gradients<T, true>, dim3(item_blocks, columns, unsigned(ranges)), kThreads, sizeof(GradientShared<T>), stream,
           static_cast<T*>(nullptr), partials.get(), others.get(), lse.as<float>(), dloss.as<float>(), float(temperature), in);
    launch(finish_table<T, RangePartials>, unsigned(ceil_div(table.rows(), 8)), 256, 0, stream, dtable.as<T>(),
           RangePartials{partials, first_id, in.items, in.dims, ranges}, table.as<T>(), table.rows(), in.dims, dloss.as<float>(), in.totals,
           float(temperature), normalize_items, float(eps));
  });
}

}  // namespace hstu::cuda
