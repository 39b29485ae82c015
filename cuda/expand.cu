#include "gather_rows.cuh"
#include "jagged.cuh"
#include "packed.cuh"

namespace hstu::cuda {
namespace {

struct OfRequest {
  const char* x;
  const int64_t* offsets;
  int64_t batch, bytes;
  __device__ const char* operator()(int64_t m) const { return x + sequence_of(offsets, batch, m) * bytes; }
};

// A warp owns 32 kN columns of one request and adds its candidates' rows in order, which is the contract; rows are loaded kAhead at a
// time, for the addition waits for memory alone.
constexpr int kWarps = 4, kAhead = 16;
template <typename T, int kN>
__global__ void __launch_bounds__(kWarps * 32, 8) sum_rows(T* dx, const T* dy, const int64_t* offsets, int64_t requests, int64_t cols,
                                                        int64_t strips) {
  int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, b = warp / strips;
  int64_t column = (warp % strips * 32 + threadIdx.x % 32) * kN;
  if (b >= requests || column >= cols) return;
  int64_t m = offsets[b], end = offsets[b + 1];
  float sum[kN] = {};
  for (; m + kAhead <= end; m += kAhead) {
    Vector<T, kN> row[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) row[i] = load<kN>(dy + (m + i) * cols + column);
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) sum[j] += to_float(row[i].at[j]);
  }
  for (; m < end; ++m) {
    Vector<T, kN> row = load<kN>(dy + m * cols + column);
#pragma unroll
    for (int j = 0; j < kN; ++j) sum[j] += to_float(row.at[j]);
  }
  Vector<T, kN> result;
#pragma unroll
  for (int j = 0; j < kN; ++j) result.at[j] = from_float<T>(sum[j]);
  store(dx + b * cols + column, result);
}

}  // namespace

void expand(Tensor& y, const Tensor& x, const Tensor& offsets, Stream stream) {
  check_offsets("expand", "offsets", offsets, y.shape[0], stream);
  OfRequest source{x.as<char>(), offsets.as<int64_t>(), x.shape[0], row_bytes(x)};
  gather_rows(y.data, y.shape[0], source.bytes, source, {x.data}, 0, stream);
}

void expand_backward(Tensor& dx, const Tensor& dy, const Tensor& offsets, Stream stream) {
  check_offsets("expand_backward", "offsets", offsets, dy.shape[0], stream);
  pick_dtype("expand_backward", dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t requests = dx.shape[0], cols = row_bytes(dx) / int64_t(sizeof(T));
    pick_width<T>(cols, {dx.as<T>(), dy.as<T>()}, [&](auto kN) {
      int64_t strips = ceil_div(cols, 32 * kN);
      launch(sum_rows<T, kN>, unsigned(ceil_div(requests * strips, kWarps)), kWarps * 32, 0, stream, dx.as<T>(), dy.as<T>(),
             offsets.as<int64_t>(), requests, cols, strips);
    });
  });
}

}  // namespace hstu::cuda
