// Which kernels a call of HSTU attention takes:
//   forward:  sm_90a, bfloat16 and float16, head dims that are multiples of 8: silu, softmax without a bias or dropout
//                                                                                      hstu_attention_sm90: wgmma and TMA
//   backward: the same without a bias; softmax without a bias or dropout, up to 128    hstu_attention_bwd_sm90, _bwd_wide_sm90 (above 128)
//             bfloat16, silu with a bias, above 32 up to 128, max_seq_len from 512 on (256 up to 64)  hstu_attention_bwd_sm90
//   all else (other devices, float32, other head dims)                                 hstu_attention, _bwd: mma.sync
// HSTU_ATTENTION_KERNEL=mma takes mma.sync everywhere, for comparison; =wgmma the others wherever they can run, for tests.
#pragma once
#include <cstdlib>
#include <cstring>

#include "hstu_attention_bwd.cuh"
#include "sm90/device.cuh"

namespace hstu::cuda::attention {

using sm90::processors;
using sm90::runs_hopper;

inline bool asked_for(const char* kernel) {
  const char* asked = std::getenv("HSTU_ATTENTION_KERNEL");
  return asked && std::strcmp(asked, kernel) == 0;
}

template <typename T>
bool takes_hopper(const Call<T>& p, int64_t query_rows, int64_t key_rows, const void* kernel) {
  if (asked_for("mma")) return false;
  bool fits = p.heads > 0 && p.heads <= 65535 && p.key_dim > 0 && p.value_dim > 0 && query_rows <= INT_MAX && key_rows <= INT_MAX;
  return kIsHalf<T> && p.key_piece == 16 && p.value_piece == 16 && fits && runs_hopper(kernel);
}

// False where the call is for mma.sync.
template <typename T>
bool forward_on_hopper(const Call<T>& p, bool softmax, bool deterministic, T* out, float* lse, int64_t query_rows, int64_t key_rows,
                       Stream stream);
template <typename T>
bool backward_on_hopper(const Call<T>& p, const Gradients<T>& g, Tensor* dpos_w, Tensor* dtime_w, int64_t rows, int64_t keys,
                        int64_t longest, Stream stream);

}  // namespace hstu::cuda::attention
