// The backward of norm_linear_silu on Hopper: dz is made on chip, by the product that takes it first
// (gemm_dz_sm90.cuh).
#include "gemm_dz_sm90.cuh"
#include "norm_linear_silu.cuh"

namespace hstu::cuda {

template <typename T>
bool activation_product_on_hopper(T* da, T* dz, const GemmOutput<const T>& dy, const T* z, const T* w, int64_t m, int64_t n,
                                  Stream stream) {
  return dense_sm90::gemm_dz<T>(da, dz, dy, z, w, m, n, dy.n, stream);
}

#define HSTU_INSTANTIATE(T) \
  template bool activation_product_on_hopper(T*, T*, const GemmOutput<const T>&, const T*, const T*, int64_t, int64_t, Stream);
HSTU_INSTANTIATE(__nv_bfloat16)
HSTU_INSTANTIATE(__half)
#undef HSTU_INSTANTIATE

}  // namespace hstu::cuda
