// norm_gate_linear: what its passes and the kernel of norm_gate_linear_sm90.cu share.
#pragma once
#include "gemm.cuh"
#include "row_vector.cuh"

namespace hstu::cuda {

// What forward and backward share: the input of w, g = dropout(u LN(o)), or dropout([u, o, u LN(o)]) with concat.  u, o [T, width],
// g [T, inner].
template <typename T>
struct Gate {
  const T *u, *o, *norm_weight, *norm_bias;
  int64_t rows, width, inner;  // inner = width, or 3 width with concat
  float eps, keep_scale;       // 1 / (1 - p)
  uint32_t threshold;          // 0: no dropout
  uint64_t seed;
  DrawOffset offset;

  __host__ bool wide() const { return aligned(u, width) && aligned(o, width) && aligned(norm_weight, width) && aligned(norm_bias, width); }

  // v = dropout of elements (row, column) .. of g. Vectors begin on a multiple of four, where a Philox block does.
  template <int kCount>
  __device__ __forceinline__ void drop(float (&v)[kCount], int64_t row, int64_t column) const {
    if (threshold == 0) return;
    uint64_t index = uint64_t(row) * inner + column;
    if constexpr (kCount % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        Philox4 block = philox4x32(seed, offset + (index + i) / 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[i + e] = block.word[e] >= threshold ? v[i + e] * keep_scale : 0.f;
      }
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) v[e] = philox_word(seed, offset, index + e) >= threshold ? v[e] * keep_scale : 0.f;
    }
  }

  // Columns j .. of the three parts of a row of g, from u and o and a = LN(o) there.
  template <int kCount>
  __device__ __forceinline__ void write(T* g, int64_t row, int64_t j, const float (&gates)[kCount], const float (&attention)[kCount],
                                        const float (&a)[kCount]) const {
    float v[kCount];
    T* to = g + row * inner + j;
    if (inner > width) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) v[e] = gates[e];
      drop(v, row, j);
      store(to, v);
#pragma unroll
      for (int e = 0; e < kCount; ++e) v[e] = attention[e];
      drop(v, row, width + j);
      store(to + width, v);
    }
    gated(v, row, j, gates, a);
    store(to + inner - width, v);
  }
  template <int kCount>
  __device__ __forceinline__ void gated(float (&v)[kCount], int64_t row, int64_t j, const float (&gates)[kCount],
                                        const float (&a)[kCount]) const {
#pragma unroll
    for (int e = 0; e < kCount; ++e) v[e] = gates[e] * a[e];
    drop(v, row, inner - width + j);
  }
};

// output from dropout(u LN(o)) w, the left operand made on chip; false where the gate is for a pass of its own.
template <typename T>
bool norm_gate_linear_on_hopper(const GemmOutput<T>& output, const Gate<T>& gate, const T* w, Stream stream);

}  // namespace hstu::cuda
