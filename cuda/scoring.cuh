// Scores of rows against rows, a tile at a time, kept in registers: what the ops share that look at every score once. A score is one
// chain over the dims, in slices of fixed width counted from dim 0, wherever its row and column stand: it does not depend on batch-mates.
#pragma once
#include "common.cuh"
#include "mma.cuh"

namespace hstu::cuda {

constexpr int kOwned = 64;  // rows of a tile: what a block keeps
constexpr int kMet = 128;   // columns of a tile: what it meets at a time

// Row i of a list: data[positions ? positions[i] : i], `dims` long. Rows outside 0 .. count - 1 count as zeros.
template <typename T>
struct RowList {
  const T* data;
  const int32_t* positions;
  int64_t count, dims;

  __device__ const T* row(int64_t i) const {
    return i < count ? data + (positions ? int64_t(positions[i]) : i) * dims : nullptr;
  }
};

// Whether rows of `dims` can be read 16 bytes at a time.
template <typename T>
bool wide_rows(int64_t dims, const void* a, const void* b) {
  uintptr_t address = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  return dims * sizeof(T) % 16 == 0 && address % 16 == 0;
}

// The scores of kOwned rows against kMet others, held by a block of kThreads. float32: plain FMA; warp w owns rows 8 w .. 8 w + 7, lane l
// the columns l, l + 32, l + 64, l + 96, so that a warp's reads of its rows are broadcasts. bfloat16, float16: m16n8k16 with float32
// accumulators; warp w owns rows 16 w .. 16 w + 15 and all columns as 16 fragments. Either way the lanes that share a row are
// kRowLanes neighbours of one warp, so row reductions never leave it. Shared memory: one slice of 128 bytes of every row, rows 144
// bytes apart, which keeps both float4 reads along k and ldmatrix free of bank conflicts.
template <typename T>
struct ScoreTile {
  static constexpr bool kMatrix = sizeof(T) == 2;
  static constexpr int kThreads = kMatrix ? 128 : 256;
  static constexpr int kRows = kMatrix ? 2 : 8, kCols = kMatrix ? 32 : 4;  // a thread's share
  static constexpr int kRowLanes = kMatrix ? 4 : 32;
  static constexpr int kDepth = 128 / sizeof(T), kStride = 144 / sizeof(T), kVector = 16 / sizeof(T);

  struct Shared {
    alignas(16) T owned[kOwned * kStride];
    alignas(16) T met[kMet * kStride];
  };

  static __device__ __forceinline__ int row(int i) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return kMatrix ? warp * 16 + lane / 4 + 8 * i : warp * 8 + i;
  }
  static __device__ __forceinline__ int col(int j) {
    int lane = threadIdx.x % 32;
    return kMatrix ? j / 2 * 8 + lane % 4 * 2 + j % 2 : lane + 32 * j;
  }
  __device__ __forceinline__ float& at(int i, int j) {
    if constexpr (kMatrix) return sums[j / 2][i * 2 + j % 2];
    else return sums[i][j];
  }
  static __device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int lane = kRowLanes / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullWarp, x, lane);
    return x;
  }
  static __device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int lane = kRowLanes / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, lane));
    return x;
  }

  // All threads of the block call it; they may still be reading `shared` of the tile before.
  __device__ void multiply(Shared& shared, const RowList<T>& owned, int64_t owned_first, const RowList<T>& met, int64_t met_first,
                           bool wide) {
#pragma unroll
    for (int i = 0; i < (kMatrix ? 16 : 8); ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = 0.f;
    for (int64_t k = 0; k < owned.dims; k += kDepth) {
      __syncthreads();
      load_slice<kOwned>(shared.owned, owned, owned_first, k, wide);
      load_slice<kMet>(shared.met, met, met_first, k, wide);
      __syncthreads();
      if constexpr (kMatrix) add_slice_matrix(shared);
      else add_slice(shared);
    }
  }

  float sums[kMatrix ? 16 : 8][4];

 private:
  template <int kCount>
  static __device__ __forceinline__ void load_slice(T* to, const RowList<T>& rows, int64_t first, int64_t k, bool wide) {
    for (int piece = threadIdx.x; piece < kCount * 8; piece += kThreads) {
      int i = piece / 8;
      int64_t begin = k + piece % 8 * kVector;
      const T* from = rows.row(first + i);
      alignas(16) T values[kVector];
      if (wide && from && begin < rows.dims) {
        *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(from + begin);
      } else {
#pragma unroll
        for (int n = 0; n < kVector; ++n) values[n] = from && begin + n < rows.dims ? from[begin + n] : from_float<T>(0.f);
      }
      *reinterpret_cast<uint4*>(to + i * kStride + piece % 8 * kVector) = *reinterpret_cast<const uint4*>(values);
    }
  }

  __device__ __forceinline__ void add_slice(const Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int k = 0; k < kDepth; k += 4) {
      float4 b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = *reinterpret_cast<const float4*>(shared.met + (lane + 32 * j) * kStride + k);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float4 a = *reinterpret_cast<const float4*>(shared.owned + (warp * 8 + i) * kStride + k);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[i][j] = fmaf(a.x, b[j].x, sums[i][j]);
          sums[i][j] = fmaf(a.y, b[j].y, sums[i][j]);
          sums[i][j] = fmaf(a.z, b[j].z, sums[i][j]);
          sums[i][j] = fmaf(a.w, b[j].w, sums[i][j]);
        }
      }
    }
  }

  __device__ __forceinline__ void add_slice_matrix(const Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t owned = shared_address(shared.owned + (warp * 16 + lane % 16) * kStride + lane / 16 * 8);
    const uint32_t met = shared_address(shared.met + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8);
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[4];
      load_matrices(a, owned + k * sizeof(T));
#pragma unroll
      for (int n = 0; n < 16; n += 2) {
        uint32_t b[4];  // both halves of k of columns 8 n .. 8 n + 7, then of the next eight
        load_matrices(b, met + (n * 8 * kStride + k) * sizeof(T));
        mma_m16n8k16<T>(sums[n], a, b[0], b[1]);
        mma_m16n8k16<T>(sums[n + 1], a, b[2], b[3]);
      }
    }
  }
};

}  // namespace hstu::cuda
