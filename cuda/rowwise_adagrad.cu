#include "group_by.cuh"
#include "packed.cuh"

namespace hstu::cuda {
namespace {

constexpr int kWarps = 4, kWindow = 32;

// Gradients sorted by row are cut in windows of kWindow; a warp owns 32 kN columns of one window and adds up each run of one row in it:
// partial[k] is the sum of the run that begins at sorted position k. One row may so take every position.
template <typename T, int kN>
__global__ void __launch_bounds__(kWarps * 32, 8) sum_runs(float* partial, const T* grads, const uint32_t* keys, const uint32_t* order,
                                                           int64_t count, int64_t d, int64_t strips) {
  int lane = threadIdx.x % 32;
  int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, begin = warp / strips * kWindow;
  int64_t column = (warp % strips * 32 + lane) * kN;
  if (begin >= count) return;
  int here = count - begin < kWindow ? int(count - begin) : kWindow;
  uint32_t key = lane < here ? keys[begin + lane] : 0, position = lane < here ? order[begin + lane] : 0;
  uint32_t next = __shfl_down_sync(kFullWarp, key, 1);
  unsigned ends = __ballot_sync(kFullWarp, lane == here - 1 || key != next);
  float sum[kN] = {};
  int first = 0;
#pragma unroll 8
  for (int i = 0; i < here; ++i) {
    int64_t t = __shfl_sync(kFullWarp, position, i);
    if (column < d) {
      Vector<T, kN> row = load<kN>(grads + t * d + column);
#pragma unroll
      for (int j = 0; j < kN; ++j) sum[j] += to_float(row.at[j]);
    }
    if (!(ends >> i & 1)) continue;
    Vector<float, kN> result;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      result.at[j] = sum[j];
      sum[j] = 0.f;
    }
    if (column < d) store(partial + (begin + first) * d + column, result);
    first = i + 1;
  }
}

// A warp owns the row whose run begins at its sorted position, if one does: adds the run's pieces, window by window, into the first of
// them, then steps. Ids that are no row have key `rows` and are left out.
template <typename T, int kN>
__global__ void __launch_bounds__(kWarps * 32, 8) step_rows(T* table, float* accumulator, float* partial, const uint32_t* keys,
                                                            int64_t count, int64_t rows, int64_t d, float lr, float eps) {
  int lane = threadIdx.x % 32;
  int64_t begin = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (begin >= count) return;
  uint32_t key = keys[begin];
  if (key >= rows || (begin > 0 && keys[begin - 1] == key)) return;
  float squares = 0.f;
  for (int64_t column = lane * kN; column < d; column += 32 * kN) {
    Vector<float, kN> g = load<kN>(partial + begin * d + column);
    for (int64_t piece = (begin / kWindow + 1) * kWindow; piece < count && keys[piece] == key; piece += kWindow) {
      Vector<float, kN> more = load<kN>(partial + piece * d + column);
#pragma unroll
      for (int j = 0; j < kN; ++j) g.at[j] += more.at[j];
    }
    store(partial + begin * d + column, g);
#pragma unroll
    for (int j = 0; j < kN; ++j) squares = fmaf(g.at[j], g.at[j], squares);
  }
  float sum = lane == 0 ? accumulator[key] : 0.f;
  sum = __shfl_sync(kFullWarp, sum, 0) + warp_sum(squares) / float(d);
  if (lane == 0) accumulator[key] = sum;
  float factor = lr / (sqrtf(sum) + eps);
  T* row = table + int64_t(key) * d;
  for (int64_t column = lane * kN; column < d; column += 32 * kN) {
    Vector<float, kN> g = load<kN>(partial + begin * d + column);
    Vector<T, kN> x = load<kN>(row + column);
#pragma unroll
    for (int j = 0; j < kN; ++j) x.at[j] = from_float<T>(to_float(x.at[j]) - factor * g.at[j]);
    store(row + column, x);
  }
}

}  // namespace

void rowwise_adagrad(Tensor& table, Tensor& accumulator, const Tensor& grads, const Tensor& ids, double lr, double eps, Stream stream) {
  pick_dtype("rowwise_adagrad", table.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = table.rows(), d = table.cols(), count = ids.size();
    check_ids("rowwise_adagrad", "ids", ids.as<int64_t>(), count, 0, rows - 1, stream);
    if (count == 0 || d == 0) return;
    SortedIds sorted(ids.as<int64_t>(), count, rows, stream);
    Scratch<float> partial(count * d, stream);
    const uint32_t *keys = sorted.keys, *order = sorted.order;
    pick_width<T>(d, {table.as<T>(), grads.as<T>()}, [&](auto kN) {
      int64_t strips = ceil_div(d, 32 * kN);
      launch(sum_runs<T, kN>, unsigned(ceil_div(ceil_div(count, kWindow) * strips, kWarps)), kWarps * 32, 0, stream, partial.get(),
             grads.as<T>(), keys, order, count, d, strips);
      launch(step_rows<T, kN>, unsigned(ceil_div(count, kWarps)), kWarps * 32, 0, stream, table.as<T>(), accumulator.as<float>(),
             partial.get(), keys, count, rows, d, float(lr), float(eps));
    });
  });
}

}  // namespace hstu::cuda
