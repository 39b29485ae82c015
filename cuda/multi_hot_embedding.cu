#include "column_sums.cuh"
#include "debug.cuh"
#include "map.cuh"

namespace hstu::cuda {
namespace {

template <typename T>
struct Lookup {
  T* y;
  const T *table, *pending;
  const int64_t* actions;
  int64_t d, width;
  template <int kN>
  __device__ void at(int64_t i) const {
    int64_t t = i / width, column = i - t * width, action = actions[t];
    const T* source = action < 0 ? pending : action >> (column / d) & 1 ? table : nullptr;
    Vector<T, kN> row = {};
    if (source) row = load<kN>(source + column);
    store(y + i, row);
  }
};

// A block owns kSumColumns columns of dy, a warp of it every kSumLanes-th row of the block's. out [blocks, {known, pending}, width].
template <typename T>
__global__ void __launch_bounds__(kSumColumns * kSumLanes)
    sum_actions(float* out, const T* dy, const int64_t* actions, int64_t rows, int64_t rows_per_block, int64_t d, int64_t width) {
  __shared__ float sums[2][kSumLanes][kSumColumns];
  int64_t column = int64_t(blockIdx.x) * kSumColumns + threadIdx.x;
  int64_t begin = int64_t(blockIdx.y) * rows_per_block, end = min(begin + rows_per_block, rows);
  float known = 0.f, pending = 0.f;
  if (column < width) {
    int64_t feature = column / d;
#pragma unroll 4
    for (int64_t row = begin + threadIdx.y; row < end; row += kSumLanes) {
      int64_t action = actions[row];
      float value = to_float(dy[row * width + column]);
      if (action < 0) pending += value;
      else if (action >> feature & 1) known += value;
    }
  }
  sums[0][threadIdx.y][threadIdx.x] = known;
  sums[1][threadIdx.y][threadIdx.x] = pending;
  __syncthreads();
  if (threadIdx.y > 1 || column >= width) return;
  float total = 0.f;
  for (int lane = 0; lane < kSumLanes; ++lane) total += sums[threadIdx.y][lane][threadIdx.x];
  out[(int64_t(blockIdx.y) * 2 + threadIdx.y) * width + column] = total;
}

void check_actions(const char* op, const Tensor& actions, int64_t features, bool pending, Stream stream) {
  if (!debugging()) return;
  std::vector<int64_t> values = values_of<int64_t>(actions, stream);
  for (size_t t = 0; t < values.size(); ++t) {
    HSTU_CHECK(pending || values[t] >= 0, kInvalidArgument, op, ": actions[", t, "] = ", values[t],
               " is negative (not known), but there is no pending row");
    HSTU_CHECK(values[t] < 0 || (values[t] >> features) == 0, kInvalidArgument, op, ": actions[", t, "] = ", values[t],
               " has a bit at or above the table's ", features, " rows");
  }
}

}  // namespace

void multi_hot_embedding(Tensor& y, const Tensor& table, const Tensor& actions, const Tensor* pending, Stream stream) {
  check_actions("multi_hot_embedding", actions, table.rows(), pending != nullptr, stream);
  pick_dtype("multi_hot_embedding", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    Lookup<T> fn{y.as<T>(), table.as<T>(), data_or_null<T>(pending), actions.as<int64_t>(), table.cols(), table.size()};
    pick_width<T>(fn.d, {fn.y, fn.table, fn.pending}, [&](auto kN) { map<kN>(y.size(), true, fn, stream); });
  });
}

void multi_hot_embedding_backward(Tensor& dtable, Tensor* dpending, const Tensor& dy, const Tensor& actions, Stream stream) {
  check_actions("multi_hot_embedding_backward", actions, dtable.rows(), true, stream);
  pick_dtype("multi_hot_embedding_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = actions.size(), width = dtable.size(), rows_per_block = std::max<int64_t>(64, ceil_div(rows, 512));
    int64_t blocks = std::max<int64_t>(1, ceil_div(rows, rows_per_block));
    Scratch<float> partial(blocks * 2 * width, stream);
    launch(sum_actions<T>, dim3(unsigned(ceil_div(width, kSumColumns)), unsigned(blocks)), dim3(kSumColumns, kSumLanes), 0, stream,
           partial.get(), dy.as<T>(), actions.as<int64_t>(), rows, rows_per_block, dtable.cols(), width);
    add_partials<T>(dtable.as<T>(), partial, 2 * width, blocks, width, stream);
    if (dpending) add_partials<T>(dpending->as<T>(), partial + width, 2 * width, blocks, width, stream);
  });
}

}  // namespace hstu::cuda
