#include "kv_pages.cuh"

namespace hstu::cuda {

void kv_append(TensorList kv_pages, TensorList k, TensorList v, const Tensor& seq_offsets, const Tensor& page_table,
               const Tensor& page_offsets, const Tensor& kv_lengths, const Tensor* counts, Stream stream) {
  move_kv_rows<true>("kv_append", kv_pages, k, v, seq_offsets, page_table, page_offsets, kv_lengths, counts, stream);
}

}  // namespace hstu::cuda
