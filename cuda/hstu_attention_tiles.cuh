// What the forward and the backward by mma.sync share: tiles in shared memory, warp-level products, rows of sums on their way out.
#pragma once
#include "hstu_attention.cuh"

namespace hstu::cuda::attention {

template <typename T>
constexpr int kKeys = kIsHalf<T> ? 64 : 32;  // keys of a tile
template <typename T, int kDim>
constexpr int kPitch = kDim + 16 / int(sizeof(T));  // one 16-byte piece of padding: eight rows of a column fall into different banks

// tile [kRows, kPitch] = row(0 .. valid - 1), zero from `valid` on and from column `dim` on. Asynchronous in pieces of `piece` bytes, 16 or
// 4; piece 0 goes element by element. row(r) may be any address from `valid` on: nothing is read there.
template <int kRows, int kDim, int kThreads, int kBytes, typename T, typename Row>
__device__ __forceinline__ void load_pieces(T* tile, int valid, int dim, Row&& row) {
  constexpr int kPiece = kBytes / int(sizeof(T)), kPieces = kDim / kPiece, kWidth = kPieces < kThreads ? kPieces : kThreads;
  constexpr int kEach = kThreads / kWidth;
  static_assert(kThreads % kWidth == 0 && kPieces % kWidth == 0);
  for (int d0 = 0; d0 < kDim; d0 += kWidth * kPiece) {
    int d = d0 + threadIdx.x % kWidth * kPiece, valid_here = d < dim ? valid : 0;
#pragma unroll 4
    for (int r0 = 0; r0 < kRows; r0 += kEach) {
      int r = r0 + threadIdx.x / kWidth;
      if (kEach > kRows && r >= kRows) break;
      copy_async<kBytes>(shared_address(tile + r * kPitch<T, kDim> + d), row(r) + d, r < valid_here ? kBytes : 0);
    }
  }
}
// The same where rows stand `stride` elements apart: a row's address is one multiplication.
template <int kRows, int kDim, int kThreads, typename T>
__device__ __forceinline__ void load_whole_rows(T* tile, int valid, int dim, const T* first, int stride) {
  constexpr int kPiece = 16 / int(sizeof(T)), kPieces = kDim / kPiece, kWidth = kPieces < kThreads ? kPieces : kThreads;
  constexpr int kEach = kThreads / kWidth;
  static_assert(kThreads % kWidth == 0 && kPieces % kWidth == 0);
#pragma unroll
  for (int d0 = 0; d0 < kDim; d0 += kWidth * kPiece) {
    int row = int(threadIdx.x) / kWidth, d = d0 + int(threadIdx.x) % kWidth * kPiece, left = d < dim ? valid - row : 0;
    const T* from = first + int64_t(row) * stride + d;
    uint32_t to = shared_address(tile + row * kPitch<T, kDim> + d);
#pragma unroll(kRows / kEach > 8 ? 4 : kRows / kEach)
    for (int r = 0; r < kRows; r += kEach)
      copy_async<16>(to + r * kPitch<T, kDim> * int(sizeof(T)), from + int64_t(r) * stride, r < left ? 16 : 0);
  }
}
template <int kRows, int kDim, int kThreads, typename T, typename Row>
__device__ __forceinline__ void load_tile(T* tile, int valid, int dim, int piece, Row&& row) {
  if (piece == 16) return load_pieces<kRows, kDim, kThreads, 16>(tile, valid, dim, row);
  if constexpr (kThreads % (kDim * sizeof(T) / 4) == 0)
    if (piece == 4) return load_pieces<kRows, kDim, kThreads, 4>(tile, valid, dim, row);
#pragma unroll 8
  for (int x = threadIdx.x; x < kRows * kDim; x += kThreads) {
    int r = x / kDim, d = x % kDim;
    tile[r * kPitch<T, kDim> + d] = r < valid && d < dim ? row(r)[d] : from_float<T>(0.f);
  }
}

template <int kRows, int kDim, int kThreads, typename T>
__device__ __forceinline__ void load_tile(T* tile, int valid, int dim, int piece, const T* first, int stride) {
  if (piece == 16) return load_whole_rows<kRows, kDim, kThreads>(tile, valid, dim, first, stride);
  load_tile<kRows, kDim, kThreads>(tile, valid, dim, piece, [&](int r) { return first + int64_t(r) * stride; });
}

// c [kM][16, 8 kN] = a b^T + start: the warp's 16 kM rows of one tile against the first 8 kN rows of another, summed over kDim columns.
// start(m, n) is of c[m][n]. float32 is 3xTF32.
template <typename T, int kDim, int kM, int kN, typename Start>
__device__ __forceinline__ void multiply_rows(float (&c)[kM][kN][4], const T* a, const T* b, Start&& start) {
  constexpr int kStep = kPitch<T, kDim>;
  int lane = threadIdx.x % 32;
  if constexpr (kIsHalf<T>) {
    uint32_t a_row = shared_address(a + lane % 16 * kStep + lane / 16 * 8);
    uint32_t b_row = shared_address(b + (lane / 16 * 8 + lane % 8) * kStep + lane / 8 % 2 * 8);
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t left[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) load_matrices(left[m], a_row + (m * 16 * kStep + d) * 2);
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t right[4];
        load_matrices(right, b_row + (n * 8 * kStep + d) * 2);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma_m16n8k16<T>(c[m][n], left[m], right[0], right[1], d > 0 ? c[m][n] : start(m, n));
          mma_m16n8k16<T>(c[m][n + 1], left[m], right[2], right[3], d > 0 ? c[m][n + 1] : start(m, n + 1));
        }
      }
    }
  } else {
    static_assert(kM == 1);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[0][n][e] = start(0, n)[e];
    const float *a_row = a + lane / 4 * kStep + lane % 4, *b_row = b + lane / 4 * kStep + lane % 4;
#pragma unroll 4
    for (int d = 0; d < kDim; d += 8) {
      uint32_t high[4], low[4];
      split_tf32(high, low, a_row[d], a_row[8 * kStep + d], a_row[d + 4], a_row[8 * kStep + d + 4]);
#pragma unroll
      for (int n = 0; n < kN; ++n)
        mma_m16n8k8_3xtf32(c[0][n], high, low, split_tf32(b_row[n * 8 * kStep + d]), split_tf32(b_row[n * 8 * kStep + d + 4]));
    }
  }
}

// c += a b^T.
template <typename T, int kDim, int kM, int kN>
__device__ __forceinline__ void multiply_rows(float (&c)[kM][kN][4], const T* a, const T* b) {
  multiply_rows<T, kDim>(c, a, b, [&](int m, int n) { return c[m][n]; });
}

// c [kM][16, 8 kX] += p b: scores in registers against the first 8 kN rows of a tile, from its column `column` on. float16 and bfloat16
// round p. In float32 the keys of one product stand in the order of the accumulators: 0, 2, 4, 6, 1, 3, 5, 7.
template <typename T, int kDim, int kM, int kN, int kX>
__device__ __forceinline__ void multiply_weights(float (&c)[kM][kX][4], const float (&p)[kM][kN][4], const T* b) {
  constexpr int kStep = kPitch<T, kDim>;
  int lane = threadIdx.x % 32;
  if constexpr (kIsHalf<T>) {
    uint32_t b_row = shared_address(b + lane % 16 * kStep + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t left[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        left[m][0] = pack_pair<T>(p[m][n][0], p[m][n][1]), left[m][1] = pack_pair<T>(p[m][n][2], p[m][n][3]);
        left[m][2] = pack_pair<T>(p[m][n + 1][0], p[m][n + 1][1]), left[m][3] = pack_pair<T>(p[m][n + 1][2], p[m][n + 1][3]);
      }
#pragma unroll
      for (int x = 0; x < kX; x += 2) {
        uint32_t right[4];
        load_matrices_transposed(right, b_row + (n * 8 * kStep + x * 8) * 2);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma_m16n8k16<T>(c[m][x], left[m], right[0], right[1]);
          mma_m16n8k16<T>(c[m][x + 1], left[m], right[2], right[3]);
        }
      }
    }
  } else {
    static_assert(kM == 1);
    const float* b_row = b + lane % 4 * 2 * kStep + lane / 4;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      uint32_t high[4], low[4];
      split_tf32(high, low, p[0][n][0], p[0][n][2], p[0][n][1], p[0][n][3]);
#pragma unroll(kX > 16 ? 8 : kX)
      for (int x = 0; x < kX; ++x)
        mma_m16n8k8_3xtf32(c[0][x], high, low, split_tf32(b_row[n * 8 * kStep + x * 8]), split_tf32(b_row[(n * 8 + 1) * kStep + x * 8]));
    }
  }
}

// A warp's 16 rows of sums on their way out: in shared memory a quad adds a target's own group to its row by plain loops, and rows are
// written whole. Column kDim holds the factor of the row. Pitch 4 mod 32: a column of eight rows by four lanes meets 32 banks.
template <int kDim>
using Slab = float[16][kDim + 4];

template <int kDim>
__device__ __forceinline__ void fill_slab(Slab<kDim>& slab, const float (&sums)[kDim / 8][4]) {
  int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int x = 0; x < kDim / 8; ++x) {
    *reinterpret_cast<float2*>(&slab[row][8 * x + column]) = float2{sums[x][0], sums[x][1]};
    *reinterpret_cast<float2*>(&slab[row + 8][8 * x + column]) = float2{sums[x][2], sums[x][3]};
  }
  __syncwarp();
}
// row = decay * row + factor * x, by a quad.
template <typename T>
__device__ __forceinline__ void add_row(float* row, float decay, float factor, const T* x, int dim) {
  for (int d = threadIdx.x % 4; d < dim; d += 4) row[d] = fmaf(factor, to_float(x[d]), decay * row[d]);
}
// Rows 0 .. rows - 1 of the slab, `stride` elements apart in memory, each times its factor.
template <int kDim, typename T>
__device__ __forceinline__ void store_slab(T* out, int64_t stride, const Slab<kDim>& slab, int rows, int dim) {
  using Half = std::conditional_t<kIsHalf<T>, T, __half>;
  __syncwarp();
  int lane = threadIdx.x % 32;
  bool pieces = kIsHalf<T> && (uint64_t(dim) * sizeof(T) | reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  if (pieces)
#pragma unroll 1
    for (int x = lane; x < rows * (kDim / 8); x += 32) {
      int r = x / (kDim / 8), d = x % (kDim / 8) * 8;
      if (d >= dim) continue;
      float factor = slab[r][kDim];
      uint32_t words[4];
#pragma unroll
      for (int y = 0; y < 4; ++y) words[y] = pack_pair<Half>(factor * slab[r][d + 2 * y], factor * slab[r][d + 2 * y + 1]);
      *reinterpret_cast<uint4*>(out + r * stride + d) = uint4{words[0], words[1], words[2], words[3]};
    }
#pragma unroll 1
  for (int r = pieces ? rows : 0; r < rows; ++r) {
    float factor = slab[r][kDim];
    T* row = out + r * stride;
#pragma unroll 1
    for (int d = lane; d < dim; d += 32) row[d] = from_float<T>(factor * slab[r][d]);
  }
  __syncwarp();
}

}  // namespace hstu::cuda::attention
