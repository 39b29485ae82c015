// Which kernel a product of the dense ops takes:
//   sm_90a, bfloat16 and float16, rows of every operand and output multiples of 16 bytes    gemm_sm90: wgmma and TMA
//   all else (other devices, float32, other widths, GELU)                                   gemm_kernel: mma.sync
// Never the number of rows, so that a row has the same bits alone. HSTU_LINEAR_KERNEL=mma takes mma.sync everywhere, for comparison.
#pragma once
#include <cstdlib>
#include <cstring>

#include "gemm.cuh"

namespace hstu::cuda {

inline bool linear_asked_for_mma() {
  const char* asked = std::getenv("HSTU_LINEAR_KERNEL");
  return asked && std::strcmp(asked, "mma") == 0;
}

// False where the product is for mma.sync.
template <typename T>
bool gemm_on_hopper(const GemmOutput<T>& output, Matrix<T> a, Matrix<T> b, bool b_transposed, int64_t m, int64_t n, int64_t k,
                    Stream stream);
template <typename T>
bool weight_gradient_on_hopper(T* c, Matrix<T> a, Matrix<T> b, int64_t m, int64_t n, int64_t rows, Stream stream);
}  // namespace hstu::cuda
