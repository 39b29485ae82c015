// Launches of the Hopper products; the kernel stands in gemm_sm90.cuh, who takes it in gemm_choice.cuh.
#include <algorithm>
#include <climits>

#include "gemm_choice.cuh"
#include "gemm_sm90.cuh"
#include "sm90/device.cuh"

namespace hstu::cuda {
namespace dense_sm90 {
namespace {

// c = the sum of `splits` matrices of `size` elements, in order; four elements a thread.
template <typename T>
__global__ void __launch_bounds__(256) add_splits_kernel(T* c, const float* partial, int64_t size, int splits) {
  int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (i >= size) return;
  float sum[4], more[4];
  load(sum, partial + i);
  for (int split = 1; split < splits; ++split) {
    load(more, partial + split * size + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += more[e];
  }
  uint2 bits{pack_pair<T>(sum[0], sum[1]), pack_pair<T>(sum[2], sum[3])};
  *reinterpret_cast<uint2*>(c + i) = bits;
}

// Steps of one split of a weight gradient: what makes all splits' tiles end soonest on 66 clusters, in units of a step's time; a tile costs
// three steps more, a partial sum of m n floats as much as its way to memory and back. At most 32768 rows, for the tensor core truncates
// as it adds. The shape alone decides.
int share_of(int64_t tiles, int64_t steps, int64_t size) {
  constexpr int64_t kClusters = 66, kMostSteps = 32768 / kDepth, kMostSplits = 64;
  double best = 0;
  int64_t share = steps;
  for (int64_t splits = ceil_div(steps, kMostSteps), last = std::max(splits, kMostSplits); splits <= std::min(last, steps); ++splits) {
    int64_t each = ceil_div(steps, splits);
    double time = double(ceil_div(tiles * ceil_div(steps, each), kClusters)) * double(each + 3) + 3e-6 * double(size * splits);
    if (best == 0 || time < best) best = time, share = each;
  }
  return int(share);
}

template <typename T, bool kATransposed, bool kBTransposed, bool kTurns, typename Epilogue>
void run(const Epilogue& output, const T* a, const T* b, const T* residual, Walk walk, int64_t k, Stream stream) {
  using S = Shape<kTurns>;
  int64_t m = walk.m, n = walk.n;
  CUtensorMap a_map = kATransposed ? tensor_map<T, kDepth>(a, k, 1, int(m), kDepth) : tensor_map<T, kDepth>(a, m, 1, int(k), S::kRows);
  CUtensorMap b_map =
      kBTransposed ? tensor_map<T, kDepth>(b, n, 1, int(k), kColumns / kBlocks) : tensor_map<T, kDepth>(b, k, 1, int(n), kDepth);
  launch_clusters(gemm_sm90_kernel<T, kATransposed, kBTransposed, kTurns, Epilogue>, kBlocks, walk.items, S::kThreads,
                  sizeof(Shared<kTurns>), stream, a_map, b_map, residual ? tensor_map<T, kDepth>(residual, m, 1, int(n), S::kRows) : a_map,
                  output, walk);
}

// `rows` of a tile of C.
Walk make_walk(int64_t m, int64_t n, int64_t k, int rows) {
  Walk walk;
  walk.m = m, walk.n = n;
  walk.pairs = int(ceil_div(m, kBlocks * rows)), walk.across = int(ceil_div(n, kColumns));
  constexpr int64_t kPanelBytes = 32 << 20;
  walk.panel = int(std::clamp<int64_t>(kPanelBytes / (kColumns * k * 2), 1, walk.across));
  walk.steps = walk.share = int(ceil_div(k, kDepth));
  walk.items = walk.pairs * walk.across;
  return walk;
}

template <typename T>
bool fits(Matrix<T> x, int64_t rows) {
  return rows > 0 && rows <= INT_MAX / 2 && x.stride > 0 && x.stride <= INT_MAX / 2 && aligned(x.data, x.stride);
}

template <typename T>
bool takes(const GemmOutput<T>& output, int64_t n) {
  return output.activation != Activation::kGelu && aligned(output.parts) && aligned(output.bias, n) && aligned(output.residual, n) &&
         aligned(output.z, n) && n % 8 == 0;
}

template <typename T>
bool runs() {
  return !linear_asked_for_mma() && runs_hopper(reinterpret_cast<const void*>(gemm_sm90_kernel<T, false, false, true, Output<T>>));
}

bool few(int64_t m, int64_t n) { return ceil_div(m, 64) * ceil_div(n, kColumns) <= INT_MAX / 2; }  // tiles

}  // namespace
}  // namespace dense_sm90

// An operand's rows stand one after another: its stride is its width.
template <typename T>
bool gemm_on_hopper(const GemmOutput<T>& output, Matrix<T> a, Matrix<T> b, bool b_transposed, int64_t m, int64_t n, int64_t k,
                    Stream stream) {
  using namespace dense_sm90;
  bool wide =
      fits(a, m) && a.stride == k && fits(b, b_transposed ? n : k) && b.stride == (b_transposed ? k : n) && few(m, n) && takes(output, n);
  if (!wide || !runs<T>()) return false;
  pick<0, 1>("b_transposed", b_transposed, [&](auto kBTransposed) {
    run<T, false, kBTransposed, true>(Output<T>(output), a.data, b.data, output.residual, make_walk(m, n, k, Shape<true>::kRows), k,
                                      stream);
  });
  return true;
}

template <typename T>
bool weight_gradient_on_hopper(T* c, Matrix<T> a, Matrix<T> b, int64_t m, int64_t n, int64_t rows, Stream stream) {
  using namespace dense_sm90;
  bool wide = fits(a, rows) && a.stride == m && fits(b, rows) && b.stride == n && aligned(c, n) && few(m, n);
  if (!wide || !runs<T>()) return false;
  Walk walk = make_walk(m, n, rows, Shape<false>::kRows);
  walk.panel = walk.across;
  walk.share = share_of(walk.items, walk.steps, m * n);
  int splits = int(ceil_div(walk.steps, walk.share));
  walk.items *= splits;
  Scratch<float> partial(splits * m * n, stream);
  run<T, true, false, false>(PartialOutput{partial}, a.data, b.data, nullptr, walk, rows, stream);
  launch(add_splits_kernel<T>, dim3(unsigned(ceil_div(m * n, 1024))), dim3(256), 0, stream, c, partial.get(), m * n, splits);
  return true;
}

#define HSTU_INSTANTIATE(T)                                                                                             \
  template bool gemm_on_hopper<T>(const GemmOutput<T>&, Matrix<T>, Matrix<T>, bool, int64_t, int64_t, int64_t, Stream); \
  template bool weight_gradient_on_hopper<T>(T*, Matrix<T>, Matrix<T>, int64_t, int64_t, int64_t, Stream);
HSTU_INSTANTIATE(__nv_bfloat16)
HSTU_INSTANTIATE(__half)
#undef HSTU_INSTANTIATE

}  // namespace hstu::cuda
