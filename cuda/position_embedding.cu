#include "jagged.cuh"
#include "packed.cuh"

namespace hstu::cuda {
namespace {

constexpr int kThreads = 256, kSlices = 8;

// y[t] = scale x[t] + table[position], 0 where ids[t] = 0; without the table where `positions` is negative. A row belongs to 1, 2,
// 4 .. 32 neighbouring lanes, kN elements each a step. A position beyond the table reads nothing and becomes NaN.
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads) add_positions(T* y, const T* x, const T* table, const int64_t* offsets, const int64_t* ids,
                                                          int64_t tokens, int64_t batch, int64_t positions, int64_t d, int lanes,
                                                          float scale) {
  int rows_a_block = kThreads / lanes;
  int64_t step = int64_t(gridDim.x) * rows_a_block;
  for (int64_t t = int64_t(blockIdx.x) * rows_a_block + threadIdx.x / lanes; t < tokens; t += step) {
    bool padded = ids && ids[t] == 0;
    bool adds = positions >= 0 && !padded;
    int64_t n = adds ? t - offsets[sequence_of(offsets, batch, t)] : 0;
    bool inside = adds && n < positions;
    for (int64_t column = threadIdx.x % lanes * kN; column < d; column += lanes * kN) {
      Vector<T, kN> vx = load<kN>(x + t * d + column), vp, vy;
      if (inside) vp = load<kN>(table + n * d + column);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        float added = inside ? to_float(vp.at[j]) : adds ? __int_as_float(0x7fc00000) : 0.f;
        vy.at[j] = from_float<T>(padded ? 0.f : scale * to_float(vx.at[j]) + added);
      }
      store(y + t * d + column, vy);
    }
  }
}

// A block owns 32 kN columns of one position, a warp of it a fixed slice of the sequences, which it adds in order; the slices' sums
// are added in order at the end.
template <typename T, int kN>
__global__ void __launch_bounds__(kSlices * 32, 4) sum_positions(T* dtable, const T* dy, const int64_t* offsets, const int64_t* ids,
                                                              int64_t batch, int64_t d) {
  __shared__ Vector<float, kN> slices[kSlices][32];
  int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  int64_t n = blockIdx.x, column = (int64_t(blockIdx.y) * 32 + lane) * kN, share = (batch + kSlices - 1) / kSlices;
  int64_t end = (slice + 1) * share < batch ? (slice + 1) * share : batch;
  Vector<float, kN> sum = {};
#pragma unroll 4
  for (int64_t b = slice * share; b < end; ++b) {
    int64_t t = offsets[b] + n;
    if (t < offsets[b + 1] && column < d && !(ids && ids[t] == 0)) {
      Vector<T, kN> row = load<kN>(dy + t * d + column);
#pragma unroll
      for (int j = 0; j < kN; ++j) sum.at[j] += to_float(row.at[j]);
    }
  }
  slices[slice][lane] = sum;
  __syncthreads();
  if (slice > 0 || column >= d) return;
  Vector<T, kN> result;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    float total = 0;
    for (int s = 0; s < kSlices; ++s) total += slices[s][lane].at[j];
    result.at[j] = from_float<T>(total);
  }
  store(dtable + n * d + column, result);
}

void check_lengths(const char* op, const Tensor& seq_offsets, int64_t tokens, int64_t positions, Stream stream) {
  if (!debugging()) return;
  std::vector<int64_t> offsets = values_of<int64_t>(seq_offsets, stream);
  int64_t sequences = int64_t(offsets.size()) - 1;
  HSTU_CHECK(sequences >= 0 && offsets[0] == 0 && offsets[sequences] == tokens, kInvalidArgument, op,
             ": seq_offsets must run from 0 to the ", tokens, " rows of x");
  for (int64_t b = 0; b < sequences; ++b) {
    int64_t length = offsets[b + 1] - offsets[b];
    HSTU_CHECK(length >= 0, kInvalidArgument, op, ": seq_offsets[", b + 1, "] = ", offsets[b + 1],
               " is below seq_offsets[", b, "] = ", offsets[b]);
    HSTU_CHECK(length <= positions, kInvalidArgument, op, ": sequence ", b, " has ", length, " rows, table has ", positions);
  }
}

// Rows of d elements, kN a lane: lanes a row, a power of two.
int lanes_of(int64_t d, int kN) {
  int lanes = 1;
  while (lanes < 32 && lanes * kN < d) lanes *= 2;
  return lanes;
}

}  // namespace

void position_embedding(Tensor& y, const Tensor& x, const Tensor& table, const Tensor& seq_offsets, const Tensor* ids, double scale,
                        Stream stream) {
  pick_dtype("position_embedding", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t d = x.cols(), tokens = x.rows();
    check_lengths("position_embedding", seq_offsets, tokens, table.rows(), stream);
    pick_width<T>(d, {y.as<T>(), x.as<T>(), table.as<T>()}, [&](auto kN) {
      int lanes = lanes_of(d, kN);
      launch(add_positions<T, kN>, blocks_for(tokens, kThreads / lanes, 1 << 20), kThreads, 0, stream, y.as<T>(), x.as<T>(),
             table.as<T>(), seq_offsets.as<int64_t>(), data_or_null<int64_t>(ids), tokens, seq_offsets.size() - 1, table.rows(), d,
             lanes, float(scale));
    });
  });
}

void position_embedding_backward(Tensor& dx, Tensor& dtable, const Tensor& dy, const Tensor& seq_offsets, const Tensor* ids,
                                 double scale, Stream stream) {
  pick_dtype("position_embedding_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t d = dy.cols(), tokens = dy.rows(), batch = seq_offsets.size() - 1;
    check_lengths("position_embedding_backward", seq_offsets, tokens, dtable.rows(), stream);
    const int64_t *offsets = seq_offsets.as<int64_t>(), *id = data_or_null<int64_t>(ids);
    pick_width<T>(d, {dx.as<T>(), dy.as<T>(), dtable.as<T>()}, [&](auto kN) {
      int lanes = lanes_of(d, kN);
      launch(add_positions<T, kN>, blocks_for(tokens, kThreads / lanes, 1 << 20), kThreads, 0, stream, dx.as<T>(), dy.as<T>(),
             static_cast<const T*>(nullptr), offsets, id, tokens, batch, int64_t(-1), d, lanes, float(scale));
      launch(sum_positions<T, kN>, dim3(unsigned(dtable.rows()), unsigned(ceil_div(d, 32 * kN))), kSlices * 32, 0, stream,
             dtable.as<T>(), dy.as<T>(), offsets, id, batch, d);
    });
  });
}

}  // namespace hstu::cuda
