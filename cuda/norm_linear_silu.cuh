// norm_linear_silu: what its passes and the kernel of norm_linear_silu_sm90.cu share.
#pragma once
#include "gemm.cuh"

namespace hstu::cuda {

// da [m, n] = dz w^T and dz = dy activation'(z) [m, dy.n]; false where that is for passes of their own.
template <typename T>
bool activation_product_on_hopper(T* da, T* dz, const GemmOutput<const T>& dy, const T* z, const T* w, int64_t m, int64_t n, Stream stream);

}  // namespace hstu::cuda
