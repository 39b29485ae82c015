#include "kv_pages.cuh"

namespace hstu::cuda {

void kv_gather(Tensor& k, Tensor& v, const Tensor& kv_pages, const Tensor& seq_offsets, const Tensor& page_table,
               const Tensor& page_offsets, const Tensor& kv_lengths, Stream stream) {
  move_kv_rows<false>("kv_gather", {{kv_pages}}, {{k}}, {{v}}, seq_offsets, page_table, page_offsets, kv_lengths, nullptr, stream);
}

}  // namespace hstu::cuda
