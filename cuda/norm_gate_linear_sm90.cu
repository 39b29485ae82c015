// norm_gate_linear on Hopper: the gated operand is made on chip where it is at most 512 wide (gemm_held_sm90.cuh).
#include "gemm_held_sm90.cuh"
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
  // Of two rows at once, `row` and the next.
  template <bool kDrops>
  __device__ __forceinline__ void make(float (&v)[8], float (&w)[8], int row, int j, const uint4& v_bits, const uint4& w_bits) const {
    float v_gates[8], w_gates[8];
    dense_sm90::widen<T>(v_gates, v_bits), dense_sm90::widen<T>(w_gates, w_bits);
    dense_sm90::scale_and_shift_both(v, w, gate.norm_weight, gate.norm_bias, j);
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] *= v_gates[e], w[e] *= w_gates[e];
    if constexpr (kDrops) gate.drop(v, row, j), gate.drop(w, row + 1, j);
  }
};

}  // namespace

template <typename T>
bool norm_gate_linear_on_hopper(const GemmOutput<T>& output, const Gate<T>& gate, const T* w, Stream stream) {
  if (gate.inner != gate.width || !gate.wide()) return false;
  if (gate.threshold > 0) return dense_sm90::gemm_held<T, true>(output, GateRows<T>{gate}, w, gate.rows, output.n, stream);
  return dense_sm90::gemm_held<T, false>(output, GateRows<T>{gate}, w, gate.rows, output.n, stream);
}

template bool norm_gate_linear_on_hopper(const GemmOutput<__nv_bfloat16>&, const Gate<__nv_bfloat16>&, const __nv_bfloat16*, Stream);
template bool norm_gate_linear_on_hopper(const GemmOutput<__half>&, const Gate<__half>&, const __half*, Stream);

}  // namespace hstu::cuda
