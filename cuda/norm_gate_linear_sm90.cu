// norm_gate_linear on Hopper: the gated operand is made on chip (gemm_rows_sm90.cuh) where it is at most 512 wide.
#include "gemm_rows_sm90.cuh"
#include "norm.cuh"
#include "norm_gate_linear.cuh"

namespace hstu::cuda {
namespace {

// Rows of dropout(u LN(o)).
template <typename T>
struct GateRows {
  Gate<T> gate;
  __host__ __device__ int width() const { return int(gate.width); }
  __device__ float eps() const { return gate.eps; }
  __host__ __device__ const T* normed() const { return gate.o; }
  __host__ __device__ const T* more() const { return gate.u; }
  __device__ __forceinline__ void make(float (&v)[8], int64_t row, int j, const uint4& bits) const {
    float gates[8], norm[8];
    dense_sm90::widen<T>(gates, bits);
    scale_and_shift(v, gate.norm_weight, gate.norm_bias, j);
#pragma unroll
    for (int e = 0; e < 8; ++e) norm[e] = v[e];
    gate.gated(v, row, j, gates, norm);
  }
};

}  // namespace

template <typename T>
bool norm_gate_linear_on_hopper(const GemmOutput<T>& output, const Gate<T>& gate, const T* w, Stream stream) {
  if (gate.inner != gate.width || !gate.wide()) return false;
  return dense_sm90::gemm_rows<T>(output, GateRows<T>{gate}, w, gate.rows, output.n, stream);
}

template bool norm_gate_linear_on_hopper(const GemmOutput<__nv_bfloat16>&, const Gate<__nv_bfloat16>&, const __nv_bfloat16*, Stream);
template bool norm_gate_linear_on_hopper(const GemmOutput<__half>&, const Gate<__half>&, const __half*, Stream);

}  // namespace hstu::cuda
