// The head of a ranker in two kernels where its rows are of a 16-bit type: the products of rows and of states at once, then all that is
// row by row. Elsewhere, and in training, it is the ops that it stands for, whose bits are these.
#include "gather_rows.cuh"
#include "gemm.cuh"
#include "group_by.cuh"
#include "jagged.cuh"
#include "mma.cuh"
#include "norm.cuh"

namespace hstu::cuda {
namespace {

// y = x[rows] w + bias.  x [available, d] 16-bit, w [d, hidden], bias [hidden] or null, y [count, hidden].
struct GatheredProduct {
  const int64_t* rows;
  const float *w, *bias;
  float* y;
  int64_t count;
};

// The part of a launch that a block has: tiles of kRows rows by kColumns columns, those of `second` behind those of `first`.
template <int kRows, int kColumns>
struct ProductTile {
  const GatheredProduct& p;
  int64_t row;
  int column;
  __device__ __forceinline__ ProductTile(const GatheredProduct& first, const GatheredProduct& second, int across)
      : p(blockIdx.x / across < tiles(first) ? first : second),
        row((blockIdx.x / across - (blockIdx.x / across < tiles(first) ? 0 : tiles(first))) * kRows),
        column(int(blockIdx.x) % across * kColumns) {}
  static __host__ __device__ int64_t tiles(const GatheredProduct& p) { return (p.count + kRows - 1) / kRows; }

  // Where row r of the tile is read, null where there is none; `wrong` where its id is no row of x: the row becomes NaN.
  template <typename T>
  __device__ __forceinline__ const T* source(int r, const T* x, int64_t available, int d, bool& wrong) const {
    int64_t id = row + r < p.count ? p.rows[row + r] : 0;
    wrong = id < 0 || id >= available;
    return row + r < p.count && !wrong ? x + id * d : nullptr;
  }
  // Two neighbouring columns of row r.
  __device__ __forceinline__ void store(int r, int at, int hidden, float a, float b, bool wrong) const {
    if (row + r >= p.count || at >= hidden) return;
    float2 v{a, b};
    if (p.bias) v.x += p.bias[at], v.y += p.bias[at + 1];
    if (wrong) v.x = v.y = __int_as_float(0x7fc00000);
    *reinterpret_cast<float2*>(p.y + (row + r) * hidden + at) = v;
  }
};

// kMany: tiles of 64 x 64, of which the splits of w are made half as often. Else of 32 x 32: more blocks, each done sooner.
template <bool kMany>
struct HeadShape {
  static constexpr int kRows = kMany ? 64 : 32, kColumns = kRows, kWarpRows = 32, kWarpColumns = kMany ? 32 : 16;
  static constexpr int kDepth = kMany ? 32 : 64, kStages = kMany ? 4 : 3, kBlocks = kMany ? 3 : 5;
  static constexpr int kWarpsAcross = kColumns / kWarpColumns, kThreads = 32 * kWarpsAcross * (kRows / kWarpRows);
  static constexpr int kAStride = kDepth + 8, kBStride = kColumns + 8;  // rows of a fragment fall on different banks
  static constexpr int kABytes = kRows * kAStride * 2, kBytes = kABytes + kDepth * kBStride * 4;
  using Tile = ProductTile<kRows, kColumns>;
};

// An element is the chain of float32 products of gemm_kernel: a 16-bit value is a tf32 value, so of the three products of 3xTF32 the one
// with its low part is 0 and left out.
template <typename T, bool kMany>
__global__ void __launch_bounds__(HeadShape<kMany>::kThreads, HeadShape<kMany>::kBlocks)
    gathered_products_kernel(const __grid_constant__ GatheredProduct first, const __grid_constant__ GatheredProduct second, const T* x,
                             int64_t available, int d, int hidden) {
  using S = HeadShape<kMany>;
  constexpr int kM = S::kWarpRows / 16, kN = S::kWarpColumns / 8;
  extern __shared__ __align__(128) unsigned char head_shared[];
  __shared__ bool wrong[S::kRows];
  typename S::Tile tile(first, second, (hidden + S::kColumns - 1) / S::kColumns);
  // This thread's part of the copies: 16 bytes of every kRowsA-th row of A, of every kRowsB-th row of B, from its own on.
  constexpr int kAcrossA = S::kDepth / 8, kAcrossB = S::kColumns / 4, kRowsA = S::kThreads / kAcrossA, kRowsB = S::kThreads / kAcrossB;
  int a_row = threadIdx.x / kAcrossA, a_column = threadIdx.x % kAcrossA * 8;
  int b_row = threadIdx.x / kAcrossB, b_column = threadIdx.x % kAcrossB * 4;
  const T* from[S::kRows / kRowsA];
#pragma unroll
  for (int i = 0; i < S::kRows / kRowsA; ++i) {
    bool none;
    from[i] = tile.source(a_row + i * kRowsA, x, available, d, none);
    if (a_column == 0) wrong[a_row + i * kRowsA] = none;
  }
  const float* w = tile.p.w + int64_t(b_row) * hidden + tile.column + b_column;
  int steps = (d + S::kDepth - 1) / S::kDepth, b_end = tile.column + b_column < hidden ? d - b_row : 0;
  auto fetch = [&](int step) {
    if (step < steps) {
      uint32_t stage = shared_address(head_shared + step % S::kStages * S::kBytes);
      int k0 = step * S::kDepth;
#pragma unroll
      for (int i = 0; i < S::kRows / kRowsA; ++i) {
        bool there = from[i] && k0 + a_column < d;
        copy_async<16>(stage + ((a_row + i * kRowsA) * S::kAStride + a_column) * 2, there ? from[i] + k0 + a_column : x, there ? 16 : 0);
      }
      const float* next = w + int64_t(k0) * hidden;
#pragma unroll
      for (int i = 0; i < S::kDepth / kRowsB; ++i, next += kRowsB * hidden) {
        bool there = k0 + i * kRowsB < b_end;
        copy_async<16>(stage + S::kABytes + ((b_row + i * kRowsB) * S::kBStride + b_column) * 4, there ? next : tile.p.w, there ? 16 : 0);
      }
    }
    copy_async_commit();  // an empty group at the end keeps the count of pending ones right
  };

  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int warp_m = warp / S::kWarpsAcross * S::kWarpRows, warp_n = warp % S::kWarpsAcross * S::kWarpColumns;
  float c[kM][kN][4] = {};
  for (int step = 0; step < S::kStages - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<S::kStages - 2>();
    __syncthreads();
    fetch(step + S::kStages - 1);
    const unsigned char* stage = head_shared + step % S::kStages * S::kBytes;
    const T* a = reinterpret_cast<const T*>(stage) + (warp_m + g) * S::kAStride + t;
    const float* b = reinterpret_cast<const float*>(stage + S::kABytes) + t * S::kBStride + warp_n + g;
#pragma unroll 4
    for (int k = 0; k < S::kDepth; k += 8) {
      Tf32Pair pairs[kN][2];
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) pairs[j][e] = split_tf32_once(b[(k + e * 4) * S::kBStride + j * 8]);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        uint32_t exact[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) exact[e] = __float_as_uint(to_float(a[(i * 16 + e % 2 * 8) * S::kAStride + k + e / 2 * 4]));
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          float sum[4] = {0.f, 0.f, 0.f, 0.f};
          mma_m16n8k8_tf32(sum, exact, pairs[j][0].low, pairs[j][1].low);
          mma_m16n8k8_tf32(sum, exact, pairs[j][0].high, pairs[j][1].high);
#pragma unroll
          for (int e = 0; e < 4; ++e) c[i][j][e] = __fadd_rn(c[i][j][e], sum[e]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = warp_m + i * 16 + half * 8 + g;
        tile.store(row, tile.column + warp_n + j * 8 + 2 * t, hidden, c[i][j][2 * half], c[i][j][2 * half + 1], wrong[row]);
      }
}

constexpr int kManyTiles = 100;  // of 64 x 64: measured

// What follows z: z + states, x sigmoid(LN(x)), and the last product; sums as row_statistics and narrow_gemm_kernel take them.
struct Tail {
  const float *z, *states, *norm_weight, *norm_bias, *w, *bias;
  const int64_t* groups;
  float* y;
  int64_t rows, requests;
  int hidden, tasks;
  float eps;
};
constexpr int kMostTasks = 4, kMostHidden = 1024, kPieces = kMostHidden / 128;

// A warp owns a row, a lane four columns of every 128. The parameters come to shared memory meanwhile: norm_weight, norm_bias, w by tasks.
__global__ void __launch_bounds__(256) head_tail_kernel(const __grid_constant__ Tail p) {
  extern __shared__ __align__(16) float parameters[];
  int lane = threadIdx.x % 32, n = p.hidden;
  for (int j = threadIdx.x * 4; j < n; j += 1024) {
    copy_async<16>(shared_address(parameters + j), p.norm_weight + j);
    copy_async<16>(shared_address(parameters + n + j), p.norm_bias + j);
  }
  for (int i = threadIdx.x; i < n * p.tasks; i += 256)
    copy_async<4>(shared_address(parameters + (2 + i % p.tasks) * n + i / p.tasks), p.w + i);
  copy_async_commit();
  int64_t row = min(int64_t(blockIdx.x) * 8 + threadIdx.x / 32, p.rows - 1);
  RowTeam team{lane, 32, 8, 0};
  float x[kPieces][4], sum = 0.f, squares = 0.f;
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
    if (int j = lane * 4 + i * 128; j < n) load(x[i], p.z + row * n + j);
  const float* state = p.states + sequence_by_warp(p.groups, p.requests, row) * n;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    int j = lane * 4 + i * 128;
    if (j >= n) break;
    float more[4];
    load(more, state + j);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[i][e] += more[e], sum += x[i][e];
  }
  float mean = row_sum(sum, team) / float(n);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (lane * 4 + i * 128 >= n) break;
#pragma unroll
    for (int e = 0; e < 4; ++e) squares += (x[i][e] - mean) * (x[i][e] - mean);
  }
  float rstd = 1.f / sqrtf(row_sum(squares, team) / float(n) + p.eps), sums[kMostTasks] = {};
  copy_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    int j = lane * 4 + i * 128;
    if (j >= n) break;
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = (x[i][e] - mean) * rstd;
    scale_and_shift(v, parameters, parameters + n, j);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[i][e] = __fmul_rn(x[i][e], sigmoid(v[e]));
#pragma unroll
    for (int k = 0; k < kMostTasks; ++k) {
      if (k >= p.tasks) break;
      load(v, parameters + (2 + k) * n + j);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[k] = fmaf(x[i][e], v[e], sums[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kMostTasks; ++k) {
    float total = warp_sum(sums[k]);
    if (lane == k && k < p.tasks && row == int64_t(blockIdx.x) * 8 + threadIdx.x / 32) p.y[row * p.tasks + k] = total + p.bias[k];
  }
}

Tensor float_rows(float* data, int64_t rows, int64_t cols, Device device) {
  return Tensor{data, Dtype::kFloat32, device, 2, {rows, cols}, {cols, 1}};
}

}  // namespace

void ranker_head(Tensor& y, Tensor* states, const Tensor* known, const Tensor& x, const Tensor& rows, const Tensor* last,
                 const Tensor& groups, const Tensor& state_weight, const Tensor& w, const Tensor& bias, const Tensor& norm_weight,
                 const Tensor& norm_bias, const Tensor& w_out, const Tensor& bias_out, double eps, Stream stream) {
  HSTU_CHECK(!states == !last && !states != !known, kInvalidArgument, "ranker_head: states and last go together, or known is given");
  HSTU_CHECK(y.dtype == Dtype::kFloat32, kDtype, "ranker_head: y must be float32 on CUDA, got ", name_of(y.dtype));
  int64_t m = rows.size(), requests = groups.size() - 1, d = x.cols(), hidden = w.cols(), tasks = w_out.cols();
  const Tensor& state = states ? *states : *known;
  check_offsets("ranker_head", "groups", groups, m, stream);
  check_ids("ranker_head", "rows", rows.as<int64_t>(), m, 0, x.rows() - 1, stream);
  if (last) check_ids("ranker_head", "last", last->as<int64_t>(), requests, 0, x.rows() - 1, stream);
  if (m == 0 && !states) return;
  Scratch<float> z(m * hidden, stream);
  auto whole = [&](const Tensor& tensor) { return aligned(tensor.as<float>(), hidden); };
  bool fits = size_of(x.dtype) == 2 && d % 8 == 0 && d > 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && hidden > 4 &&
              hidden <= kMostHidden && tasks <= kMostTasks && whole(state) && whole(state_weight) && whole(w) && whole(bias) &&
              whole(norm_weight) && whole(norm_bias);
  if (!fits) {
    auto gather = [&](Tensor to, const Tensor& ids) {
      Scratch<char> own(to.dtype == x.dtype ? 0 : ids.size() * d * size_of(x.dtype), stream);
      Tensor taken = to;
      if (to.dtype != x.dtype) taken.data = own, taken.dtype = x.dtype;
      embedding({{taken}}, {{x}}, ids, stream);
      if (to.dtype != x.dtype) cast({{to}}, {{taken}}, stream);
    };
    if (last) {
      Scratch<float> ends(requests * d, stream);
      Tensor taken = float_rows(ends, requests, d, x.device);
      gather(taken, *last);
      linear(*states, nullptr, taken, state_weight, nullptr, nullptr, Activation::kNone, stream);
    }
    Scratch<float> items(m * d, stream), each(m * hidden, stream);
    Tensor taken = float_rows(items, m, d, x.device), more = float_rows(each, m, hidden, x.device);
    Tensor sum = float_rows(z, m, hidden, x.device);
    gather(taken, rows);
    expand(more, state, groups, stream);
    linear(sum, nullptr, taken, w, &bias, &more, Activation::kNone, stream);
    swish_layer_norm(more, sum, &norm_weight, &norm_bias, eps, stream);
    linear(y, nullptr, more, w_out, &bias_out, nullptr, Activation::kNone, stream);
    return;
  }
  GatheredProduct first{rows.as<int64_t>(), w.as<float>(), bias.as<float>(), z, m};
  GatheredProduct second{data_or_null<int64_t>(last), state_weight.as<float>(), nullptr, state.as<float>(), last ? requests : 0};
  pick_dtype("ranker_head", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto run = [&](auto kMany) {
      using S = HeadShape<kMany()>;
      int64_t tiles = (S::Tile::tiles(first) + S::Tile::tiles(second)) * ceil_div(hidden, S::kColumns);
      if (kMany && tiles < kManyTiles) return false;
      launch(gathered_products_kernel<T, kMany()>, dim3(unsigned(tiles)), dim3(S::kThreads), S::kStages * S::kBytes, stream, first, second,
             x.as<T>(), x.rows(), int(d), int(hidden));
      return true;
    };
    if constexpr (sizeof(T) == 2) run(std::true_type{}) || run(std::false_type{});
  });
  Tail tail{z, state.as<float>(), norm_weight.as<float>(), norm_bias.as<float>(), w_out.as<float>(), bias_out.as<float>(),
            groups.as<int64_t>(), y.as<float>(), m, requests, int(hidden), int(tasks), float(eps)};
  size_t shared = size_t((2 + tasks) * hidden) * sizeof(float);
  launch(head_tail_kernel, dim3(unsigned(ceil_div(m, 8))), dim3(256), shared, stream, tail);
}

}  // namespace hstu::cuda
