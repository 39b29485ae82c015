// The kernel behind gemm.cuh.
#pragma once
#include <algorithm>

#include "column_sums.cuh"
#include "gemm_choice.cuh"
#include "mma.cuh"

namespace hstu::cuda {

// kWide, kShort: every row of every operand and output is 16-byte aligned. kUnaligned is smaller because unaligned widths (50, 200) belong
// to the small models, whose products are short and narrow. kShort, for float32, is for few rows: 3xTF32 is a chain of latencies, which
// four times as many warps hide. An element is the same chain in all of them.
enum class Size { kUnaligned, kShort, kWide };
template <typename T, Size kSize>
struct Tile {
  static constexpr bool kWide = kSize != Size::kUnaligned;
  static constexpr bool kTall = kSize == Size::kWide && sizeof(T) == 2;
  static constexpr int kWarpRows = kTall ? 64 : kSize == Size::kShort ? 16 : 32;  // with 32 the splits of 3xTF32 find registers too
  static constexpr int kM = kSize == Size::kWide ? 128 : kSize == Size::kShort ? 32 : 64, kN = kTall ? 128 : 64;
  static constexpr int kDepth = 64 / sizeof(T);  // of k: 64 bytes a row
  static constexpr int kStages = 4;
  static constexpr int kWarpsM = kM / kWarpRows, kWarpsN = kN / 32, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kSplitsAhead = kSize == Size::kShort ? 2 : 1;  // steps of 8 at once; more, and the splits of all of them spill
  static constexpr int kMmaM = kM / kWarpsM / 16, kMmaN = kN / kWarpsN / 8;  // instructions of a warp, down and across
  static constexpr int kCopy = kWide ? 16 : 4;                               // bytes of an asynchronous copy
};

// An operand in shared memory as it lies in global memory, [kRows, kCols]. Rows are padded so that the eight rows of an ldmatrix (16-bit)
// or the 32 elements of a fragment (float32: steps of 4 banks from row to row where a row is k, of 8 where it is m or n) fall on
// different banks.
template <typename T, int kRows, int kCols>
struct SharedMatrix {
  static constexpr int kStride = kCols + (sizeof(T) == 2 || kCols > 16 ? 8 : 4);
  static constexpr int kBytes = kRows * kStride * sizeof(T);

  // The first kRows x kCols of `from`, zero from row `rows` and column `cols` on. Where a row is not even 4-byte aligned (16-bit types
  // of odd width: `pairs` is false) elements pass through registers.
  template <int kThreads, int kCopy>
  static __device__ __forceinline__ void fetch(T* to, Matrix<T> from, int rows, int cols, bool pairs) {
    constexpr int kEach = kCopy / sizeof(T), kAcross = kCols / kEach;
#pragma unroll 2
    for (int i = threadIdx.x; i < kRows * kAcross; i += kThreads) {
      int r = i / kAcross, c = i % kAcross * kEach;
      int count = r < rows ? max(0, min(cols - c, kEach)) : 0;
      const T* source = count > 0 ? from.data + r * from.stride + c : from.data;
      T* target = to + r * kStride + c;
      if (kEach == 1 || kCopy == 16 || pairs) {
        copy_async<kCopy>(shared_address(target), source, count * int(sizeof(T)));
      } else {
#pragma unroll
        for (int e = 0; e < kEach; ++e) target[e] = e < count ? source[e] : from_float<T>(0.f);
      }
    }
    static_assert(kRows * kAcross % kThreads == 0);
  }
};

// Both operands of one step along k, and C while it is being stored. A is [m, k], or [k, m] where kATransposed; B is [k, n], or [n, k]
// where kBTransposed.
template <typename T, bool kATransposed, bool kBTransposed, Size kSize>
struct Stage {
  using Shape = Tile<T, kSize>;
  using A = std::conditional_t<kATransposed, SharedMatrix<T, Shape::kDepth, Shape::kM>, SharedMatrix<T, Shape::kM, Shape::kDepth>>;
  using B = std::conditional_t<kBTransposed, SharedMatrix<T, Shape::kN, Shape::kDepth>, SharedMatrix<T, Shape::kDepth, Shape::kN>>;
  static constexpr int kBytes = A::kBytes + B::kBytes;
  static constexpr int kOutputStride = Shape::kN + 8;  // floats: rows g of a fragment fall on different banks
  static constexpr int kShared = std::max(Shape::kStages * kBytes, Shape::kM* kOutputStride * 4);

  // c += the warp's part of A B, rows m0 .. of A and columns n0 .. of B. 16-bit types by m16n8k16, float32 by 3xTF32 on m16n8k8.
  static __device__ __forceinline__ void multiply(float (&c)[Shape::kMmaM][Shape::kMmaN][4], const T* a, const T* b, int m0, int n0) {
    int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
      int r = lane % 8, down = lane / 8 % 2 * 8, across = lane / 16 * 8;
#pragma unroll
      for (int k = 0; k < Shape::kDepth; k += 16) {
        uint32_t b_registers[Shape::kMmaN / 2][4];
#pragma unroll
        for (int j = 0; j < Shape::kMmaN / 2; ++j) {
          if constexpr (kBTransposed)
            load_matrices(b_registers[j], shared_address(b + (n0 + j * 16 + across + r) * B::kStride + k + down));
          else
            load_matrices_transposed(b_registers[j], shared_address(b + (k + down + r) * B::kStride + n0 + j * 16 + across));
        }
#pragma unroll
        for (int i = 0; i < Shape::kMmaM; ++i) {
          uint32_t a_registers[4];
          if constexpr (kATransposed)
            load_matrices_transposed(a_registers, shared_address(a + (k + across + r) * A::kStride + m0 + i * 16 + down));
          else
            load_matrices(a_registers, shared_address(a + (m0 + i * 16 + down + r) * A::kStride + k + across));
#pragma unroll
          for (int j = 0; j < Shape::kMmaN; ++j)
            mma_m16n8k16<T>(c[i][j], a_registers, b_registers[j / 2][j % 2 * 2], b_registers[j / 2][j % 2 * 2 + 1]);
        }
      }
    } else {
      int g = lane / 4, t = lane % 4;
      auto a_at = [&](int m, int k) { return kATransposed ? a[k * A::kStride + m] : a[m * A::kStride + k]; };
      auto b_at = [&](int k, int n) { return kBTransposed ? b[n * B::kStride + k] : b[k * B::kStride + n]; };
#pragma unroll Shape::kSplitsAhead
      for (int k = 0; k < Shape::kDepth; k += 8) {
        Tf32Pair b_pairs[Shape::kMmaN][2];
#pragma unroll
        for (int j = 0; j < Shape::kMmaN; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) b_pairs[j][e] = split_tf32_once(b_at(k + t + e * 4, n0 + j * 8 + g));
#pragma unroll
        for (int i = 0; i < Shape::kMmaM; ++i) {
          uint32_t high[4], low[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            Tf32Pair pair = split_tf32_once(a_at(m0 + i * 16 + e % 2 * 8 + g, k + e / 2 * 4 + t));
            high[e] = pair.high, low[e] = pair.low;
          }
#pragma unroll
          for (int j = 0; j < Shape::kMmaN; ++j) mma_m16n8k8_3xtf32(c[i][j], high, low, b_pairs[j][0], b_pairs[j][1]);
        }
      }
    }
  }
};

// kCount neighbours of a row of C to their part of the output.
template <int kCount, typename T>
__device__ __forceinline__ void finish(const GemmOutput<T>& output, float (&v)[kCount], int64_t row, int64_t column) {
  float more[kCount];
  if (output.bias) {
    load(more, output.bias + column);
#pragma unroll
    for (int e = 0; e < kCount; ++e) v[e] += more[e];
  }
  if (output.z) store(output.z + row * output.n + column, v);
  ColumnPart<T> part = part_of(output.parts, column);
  if (part.activated) activate(v, output.activation);
  if (output.residual) {
    load(more, output.residual + row * output.n + column);
#pragma unroll
    for (int e = 0; e < kCount; ++e) v[e] += more[e];
  }
  store(part.data + row * part.width + column - part.column, v);
}

// Partial sums of a weight gradient: [splits, m, n].
struct PartialOutput {
  float* data;
  int64_t m, n;
};
template <int kCount>
__device__ __forceinline__ void finish(const PartialOutput& output, float (&v)[kCount], int64_t row, int64_t column) {
  store(output.data + (int64_t(blockIdx.y) * output.m + row) * output.n + column, v);
}

// C = A B on the tensor cores. A block owns a tile of C and goes along k (of blockIdx.y's share, k_per_block long) with four stages of
// asynchronous copies; a warp owns 64 x 32 of the tile (16-bit types, wide) or 32 x 32, in registers: 128 x 128 x 64 bytes keeps two
// blocks of 256 threads on an SM, each within 128 registers and 76 KiB of shared memory. Tiles of a row of tiles run side by side, so
// that A comes from L2 after the first. C passes through shared memory once more, so that the epilogue is one loop over 16-byte vectors.
template <typename T, bool kATransposed, bool kBTransposed, Size kSize, typename Output>
__global__ void __launch_bounds__((Tile<T, kSize>::kThreads), (kSize == Size::kWide ? 2 : 4))
    gemm_kernel(const __grid_constant__ Output output, Matrix<T> a, Matrix<T> b, bool a_pairs, bool b_pairs, int64_t m, int64_t n,
                int64_t k, int64_t k_per_block) {
  using Shape = Tile<T, kSize>;
  using Stage = Stage<T, kATransposed, kBTransposed, kSize>;
  extern __shared__ __align__(128) unsigned char gemm_shared[];
  uint32_t tiles_n = uint32_t((n + Shape::kN - 1) / Shape::kN);
  int64_t m0 = int64_t(blockIdx.x / tiles_n) * Shape::kM, n0 = int64_t(blockIdx.x % tiles_n) * Shape::kN;
  int64_t k_begin = int64_t(blockIdx.y) * k_per_block;
  int k_here = int(min(k - k_begin, k_per_block)), steps = (k_here + Shape::kDepth - 1) / Shape::kDepth;
  int m_here = int(min(m - m0, int64_t(Shape::kM))), n_here = int(min(n - n0, int64_t(Shape::kN)));
  a.data += kATransposed ? k_begin * a.stride + m0 : m0 * a.stride + k_begin;
  b.data += kBTransposed ? n0 * b.stride + k_begin : k_begin * b.stride + n0;

  auto a_of = [&](int slot) { return reinterpret_cast<T*>(gemm_shared + slot * Stage::kBytes); };
  auto b_of = [&](int slot) { return reinterpret_cast<T*>(gemm_shared + slot * Stage::kBytes + Stage::A::kBytes); };
  auto fetch = [&](int step) {
    if (step < steps) {
      int slot = step % Shape::kStages, k0 = step * Shape::kDepth, left = k_here - k0;
      Matrix<T> a_next{a.data + (kATransposed ? k0 * a.stride : k0), a.stride};
      Matrix<T> b_next{b.data + (kBTransposed ? k0 : k0 * b.stride), b.stride};
      Stage::A::template fetch<Shape::kThreads, Shape::kCopy>(a_of(slot), a_next, kATransposed ? left : m_here,
                                                              kATransposed ? m_here : left, a_pairs);
      Stage::B::template fetch<Shape::kThreads, Shape::kCopy>(b_of(slot), b_next, kBTransposed ? n_here : left,
                                                              kBTransposed ? left : n_here, b_pairs);
    }
    copy_async_commit();  // an empty group at the end keeps the count of pending ones right
  };

  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int warp_m = warp / Shape::kWarpsN * (Shape::kM / Shape::kWarpsM), warp_n = warp % Shape::kWarpsN * (Shape::kN / Shape::kWarpsN);
  float c[Shape::kMmaM][Shape::kMmaN][4] = {};
  for (int step = 0; step < Shape::kStages - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<Shape::kStages - 2>();
    __syncthreads();  // this step has arrived for everyone, and everyone is done with the slot that the next fetch fills
    fetch(step + Shape::kStages - 1);
    int slot = step % Shape::kStages;
    Stage::multiply(c, a_of(slot), b_of(slot), warp_m, warp_n);
  }

  copy_async_wait<0>();
  __syncthreads();
  float* tile = reinterpret_cast<float*>(gemm_shared);  // [kM, kOutputStride]
#pragma unroll
  for (int i = 0; i < Shape::kMmaM; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kMmaN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = warp_m + i * 16 + half * 8 + lane / 4, column = warp_n + j * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(tile + row * Stage::kOutputStride + column) = make_float2(c[i][j][half * 2], c[i][j][half * 2 + 1]);
      }
  __syncthreads();
  constexpr int kCount = Shape::kWide ? kVector<T> : 1, kAcross = Shape::kN / kCount;
  for (int i = threadIdx.x; i < Shape::kM * kAcross; i += Shape::kThreads) {
    int row = i / kAcross, column = i % kAcross * kCount;
    if (m0 + row >= m || n0 + column >= n) continue;
    float v[kCount];
    load(v, tile + row * Stage::kOutputStride + column);
    finish(output, v, m0 + row, n0 + column);
  }
}

constexpr int kFewTiles = 64;  // of kWide: measured; at 128 the splits of B, made twice as often, cost more
template <typename Shape>
int64_t tiles_of(int64_t m, int64_t n) {
  return ceil_div(m, Shape::kM) * ceil_div(n, Shape::kN);
}

template <typename T, bool kATransposed, bool kBTransposed, Size kSize, typename Output>
void launch_gemm(const Output& output, Matrix<T> a, Matrix<T> b, int64_t m, int64_t n, int64_t k, int64_t splits, int64_t k_per_block,
                 Stream stream) {
  using Shape = Tile<T, kSize>;
  auto pairs = [](Matrix<T> x) { return reinterpret_cast<uintptr_t>(x.data) % 4 == 0 && x.stride * sizeof(T) % 4 == 0; };
  int64_t tiles = tiles_of<Shape>(m, n);
  HSTU_CHECK(tiles <= INT_MAX && splits <= 65535, kInvalidArgument, "a product of ", m, " x ", n, " x ", k, " has too many tiles");
  launch(gemm_kernel<T, kATransposed, kBTransposed, kSize, Output>, dim3(unsigned(tiles), unsigned(splits)), dim3(Shape::kThreads),
         Stage<T, kATransposed, kBTransposed, kSize>::kShared, stream, output, a, b, pairs(a), pairs(b), m, n, k, k_per_block);
}

// C of up to kMostNarrow columns, in float32: a warp owns a row, a lane every 32nd piece of kCount elements of k.
constexpr int kMostNarrow = 4;
template <typename T, int kCount>
__global__ void __launch_bounds__(256)
    narrow_gemm_kernel(const __grid_constant__ GemmOutput<T> output, Matrix<T> a, Matrix<T> b, int64_t m, int n, int64_t k) {
  int lane = threadIdx.x % 32;
  for (int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32; row < m; row += int64_t(gridDim.x) * 8) {
    float sums[kMostNarrow] = {}, mine[1] = {};
#pragma unroll 4
    for (int64_t at = lane * kCount; at < k; at += 32 * kCount) {
      float v[kCount];
      load(v, a.data + row * a.stride + at);
#pragma unroll
      for (int e = 0; e < kCount; ++e)
#pragma unroll
        for (int j = 0; j < kMostNarrow; ++j)
          if (j < n) sums[j] = fmaf(v[e], to_float(b.data[(at + e) * b.stride + j]), sums[j]);
    }
#pragma unroll
    for (int j = 0; j < kMostNarrow; ++j) {
      float sum = warp_sum(sums[j]);
      if (lane == j) mine[0] = sum;
    }
    if (lane < n) finish(output, mine, row, lane);
  }
}

template <typename T>
void gemm(const GemmOutput<T>& output, Matrix<T> a, Matrix<T> b, bool b_transposed, int64_t m, int64_t n, int64_t k, Stream stream) {
  if (n <= kMostNarrow && !b_transposed) {
    pick_vector<T>(aligned(a.data, a.stride) && k % kVector<T> == 0, [&](auto kCount) {
      launch(narrow_gemm_kernel<T, kCount>, blocks_for(m, 8), dim3(256), 0, stream, output, a, b, m, int(n), k);
    });
    return;
  }
  if constexpr (sizeof(T) == 2)
    if (gemm_on_hopper(output, a, b, b_transposed, m, n, k, stream)) return;
  bool wide = aligned(a.data, a.stride) && aligned(b.data, b.stride) && aligned(output.parts) && aligned(output.bias, n) &&
              aligned(output.residual, n) && aligned(output.z, n);
  bool few = sizeof(T) == 4 && tiles_of<Tile<T, Size::kWide>>(m, n) < kFewTiles;
  auto run = [&](auto kBTransposed) {
    auto with = [&](auto kSize) { launch_gemm<T, false, kBTransposed, kSize()>(output, a, b, m, n, k, 1, k, stream); };
    if (!wide) return with(std::integral_constant<Size, Size::kUnaligned>{});
    if constexpr (sizeof(T) == 4)
      if (few) return with(std::integral_constant<Size, Size::kShort>{});
    with(std::integral_constant<Size, Size::kWide>{});
  };
  b_transposed ? run(std::true_type{}) : run(std::false_type{});
}

// Rows are split so that the tiles fill a large device about twice, in shares of 512 to 32768 rows (the tensor core truncates as it
// adds: a longer chain would show in float16). The split depends on the shape alone; shares are added in order.
template <typename T>
void weight_gradient(T* c, Matrix<T> a, Matrix<T> b, int64_t m, int64_t n, int64_t rows, Stream stream) {
  if constexpr (sizeof(T) == 2)
    if (weight_gradient_on_hopper(c, a, b, m, n, rows, stream)) return;
  bool wide = aligned(a.data, a.stride) && aligned(b.data, b.stride) && n % kVector<T> == 0;
  int64_t tiles = wide ? tiles_of<Tile<T, Size::kWide>>(m, n) : tiles_of<Tile<T, Size::kUnaligned>>(m, n);
  int64_t share = std::clamp<int64_t>(ceil_div(rows * tiles, 512), 512, 32768);
  share = ceil_div(share, 32) * 32;
  int64_t splits = std::max<int64_t>(1, ceil_div(rows, share));
  Scratch<float> partial(splits * m * n, stream);
  PartialOutput output{partial, m, n};
  if (wide)
    launch_gemm<T, true, false, Size::kWide>(output, a, b, m, n, rows, splits, share, stream);
  else
    launch_gemm<T, true, false, Size::kUnaligned>(output, a, b, m, n, rows, splits, share, stream);
  add_partials<T>(c, partial, m * n, splits, m * n, stream);
}

}  // namespace hstu::cuda
