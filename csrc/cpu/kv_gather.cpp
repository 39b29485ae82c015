#include "../ops.h"
#include "kv_pages.h"

namespace hstu::cpu {

void kv_gather(Tensor& k, Tensor& v, const Tensor& kv_pages, const Tensor& seq_offsets, const Tensor& page_table,
               const Tensor& page_offsets, const Tensor& kv_lengths, Stream) {
  const int64_t* rows = check_offsets("kv_gather", "seq_offsets", seq_offsets, k.shape[0]);
  const int32_t* held = kv_lengths.as<int32_t>();
  KvPages pages("kv_gather", kv_pages, page_table, page_offsets);
  int64_t batch = seq_offsets.size() - 1;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t count = rows[b + 1] - rows[b];
    HSTU_CHECK(count <= held[b], kInvalidArgument, "kv_gather: ", count, " rows of sequence ", b, " are asked for, kv_lengths has ", held[b]);
    pages.check(b, 0, count);
  }
  int64_t key = row_bytes(k, 2), value = row_bytes(v, 2);
  parallel_jagged(rows, batch, row_grain(pages.heads * (key + value)), [&](int64_t b, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      int64_t position = t - rows[b];
      pages.copy(k.as<char>() + t * pages.heads * key, key, pages.slot(b, position, 0), pages.head_bytes, key);
      pages.copy(v.as<char>() + t * pages.heads * value, value, pages.slot(b, position, 1), pages.head_bytes, value);
    }
  });
}

}  // namespace hstu::cpu
