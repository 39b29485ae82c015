// Matrix products of the dense ops (kernel in gemm_kernel.cuh, instantiated in linear.cu). Every element of C is one chain over k in
// ascending order whatever the tile, so a row's bits depend neither on its neighbours nor on their number; only a weight gradient,
// which sums over rows, is split.
#pragma once
#include <climits>

#include "common.cuh"
#include "row_vector.cuh"

namespace hstu::cuda {

// Row-major, `stride` elements from row to row.
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride;
};

// Columns column .. column + width - 1 of a [rows, n] matrix, kept as a [rows, width] matrix of their own.
template <typename T>
struct ColumnPart {
  T* data = nullptr;
  int64_t column = INT64_MAX, width = 0;
  bool activated = true;
};
constexpr int kMostParts = 4;

template <typename T>
__device__ __forceinline__ ColumnPart<T> part_of(const ColumnPart<T> (&parts)[kMostParts], int64_t column) {
  ColumnPart<T> part = parts[0];
#pragma unroll
  for (int i = 1; i < kMostParts; ++i)
    if (column >= parts[i].column) part = parts[i];
  return part;
}

template <typename T>
bool aligned(const ColumnPart<T> (&parts)[kMostParts]) {
  bool all = true;
  for (const ColumnPart<T>& part : parts)
    if (part.width > 0) all = all && aligned(part.data, part.width) && part.column % kVector<T> == 0;
  return all;
}

// What becomes of C [m, n]:  z = C + bias;  part = activation(z) (z itself where the part is not activated) + residual. Float32 until
// the store. bias [n]; z and residual [m, n]; all three optional. Unused parts stay as they are made, the others ascend.
template <typename T>
struct GemmOutput {
  ColumnPart<T> parts[kMostParts];
  const T* bias = nullptr;
  const T* residual = nullptr;
  T* z = nullptr;
  Activation activation = Activation::kNone;
  int64_t n = 0;
};

// C = A B:  a [m, k];  b [k, n], or [n, k] where `b_transposed`.
template <typename T>
void gemm(const GemmOutput<T>& output, Matrix<T> a, Matrix<T> b, bool b_transposed, int64_t m, int64_t n, int64_t k, Stream stream);

// c [m, n] = A^T B, summed over `rows`:  a [rows, m], b [rows, n].
template <typename T>
void weight_gradient(T* c, Matrix<T> a, Matrix<T> b, int64_t m, int64_t n, int64_t rows, Stream stream);

template <int kCount>
__device__ __forceinline__ void activate(float (&v)[kCount], Activation activation) {
  if (activation == Activation::kSilu)
    for (float& x : v) x = silu(x);
  else if (activation == Activation::kRelu)
    for (float& x : v) x = x > 0.f ? x : 0.f;
  else if (activation == Activation::kGelu)
    for (float& x : v) x = gelu(x);
}

// 1 / (1 + exp(-x)) by the quick exp and reciprocal. Denormal numbers count as 0: exp's are lost in the sum anyway.
__device__ __forceinline__ float sigmoid_fast(float x) {
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(-x, 1.4426950408889634f)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(__fadd_rn(1.f, power)));
  return result;
}

// dy activation'(z); for 16-bit types by the quick sigmoid.
template <typename T>
__device__ __forceinline__ float through_activation(float dy, float z, Activation activation) {
  if (activation == Activation::kRelu) return z > 0.f ? dy : 0.f;
  if (activation == Activation::kGelu) return dy * gelu_derivative(z);
  if constexpr (sizeof(T) == 4) return dy * silu_derivative(z);
  float s = sigmoid_fast(z);
  return dy * (s * (1.f + z * (1.f - s)));
}

// dz = dy activation'(z), dy itself where its part is not activated. A thread owns kCount neighbours in every teams-th row of the block's;
// `lanes` threads share a row.
template <typename T, int kCount>
__global__ void __launch_bounds__(256)
    activation_backward_kernel(T* dz, const __grid_constant__ GemmOutput<const T> dy, const T* z, int64_t rows, int lanes) {
  int teams = 256 / lanes;
  int64_t step = int64_t(gridDim.x) * teams;
  for (int64_t column = int64_t(threadIdx.x) % lanes * kCount; column < dy.n; column += lanes * kCount) {
    ColumnPart<const T> part = part_of(dy.parts, column);
#pragma unroll 2
    for (int64_t row = int64_t(blockIdx.x) * teams + threadIdx.x / lanes; row < rows; row += step) {
      float gradient[kCount], before[kCount];
      load(gradient, part.data + row * part.width + column - part.column);
      if (part.activated) {
        load(before, z + row * dy.n + column);
#pragma unroll
        for (int e = 0; e < kCount; ++e) gradient[e] = through_activation<T>(gradient[e], before[e], dy.activation);
      }
      store(dz + row * dy.n + column, gradient);
    }
  }
}

// dz [rows, dy.n] from the gradients of the parts that a product was stored as, and z as it was stored.
template <typename T>
void activation_backward(T* dz, const GemmOutput<const T>& dy, const T* z, int64_t rows, Stream stream) {
  pick_vector<T>(aligned(dy.parts) && aligned(z, dy.n) && aligned(dz, dy.n), [&](auto kCount) {
    int lanes = 256;
    while (lanes > 32 && lanes / 2 * kCount >= dy.n) lanes /= 2;
    launch(activation_backward_kernel<T, kCount>, blocks_for(rows, 256 / lanes * 4), dim3(256), 0, stream, dz, dy, z, rows, lanes);
  });
}

}  // namespace hstu::cuda
