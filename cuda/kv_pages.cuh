// Rows between jagged K and V and the pages of a cache, both ways. Bytes only, so every dtype.
#pragma once
#include "gather_rows.cuh"
#include "jagged.cuh"

namespace hstu::cuda {

constexpr int kPageThreads = 256;

// Sizes in words: `key` and `value` of a head of K and V, `slot` of a head in a page.
struct KvRows {
  const int64_t *seq_offsets, *page_offsets;
  const int32_t *page_table, *kv_lengths, *counts;
  int64_t rows, batch, listed, pages;
  int size, heads, key, value, slot;
};

// The rows of K and of V of a token belong to 1, 2, 4 .. 32 neighbouring lanes, as many as they have words. kAppend: row r goes to position
// kv_lengths[b] + r, and only the first counts[b] rows (all where that is null); otherwise it comes from position r, and is 0 where the
// sequence does not hold that.
template <bool kAppend, typename Word>
__global__ void __launch_bounds__(kPageThreads, 5) kv_rows_kernel(Word* pages, Word* k, Word* v, int lanes, KvRows p) {
  int lane = threadIdx.x % lanes, rows_a_block = kPageThreads / lanes;
  int64_t step = int64_t(gridDim.x) * rows_a_block;
  for (int64_t t = int64_t(blockIdx.x) * rows_a_block + threadIdx.x / lanes; t < p.rows; t += step) {
    int64_t b = lanes == 32 ? sequence_by_warp(p.seq_offsets, p.batch, t) : sequence_of(p.seq_offsets, p.batch, t);
    int64_t row = t - p.seq_offsets[b], held = p.kv_lengths[b], position = kAppend ? held + row : row;
    int64_t entry = p.page_offsets[b] + position / p.size, page = -1;
    bool listed = position >= 0 && entry >= 0 && entry < p.page_offsets[b + 1] && entry < p.listed;
    if (kAppend && p.counts && row >= p.counts[b]) continue;
    if (listed && (kAppend || row < held)) page = p.page_table[entry];
    bool there = page >= 0 && page < p.pages;
    if (kAppend && !there) continue;
    auto move = [&](Word* jagged, int words, int part) {
      jagged += t * p.heads * words;
      Word* slots = pages + (there ? ((page * 2 + part) * p.size + position % p.size) * p.heads * p.slot : 0);
#pragma unroll 4
      for (int i = lane; i < p.heads * words; i += lanes) {
        int at = words == p.slot ? i : i / words * p.slot + i % words;
        if constexpr (kAppend) slots[at] = jagged[i];
        else jagged[i] = there ? slots[at] : Word{};
      }
    };
    move(k, p.key, 0);
    move(v, p.value, 1);
  }
}

// Under HSTU_DEBUG=1 alone, for it waits: throws where a token that is written or read has no page in the tensor, or a page is written twice.
void check_pages(const char* op, bool append, const Tensor& kv_pages, const Tensor& seq_offsets, const Tensor& page_table,
                 const Tensor& page_offsets, const Tensor& kv_lengths, const Tensor* counts, Stream stream);

template <bool kAppend>
void move_kv_rows(const char* op, const Tensor& kv_pages, const Tensor& k, const Tensor& v, const Tensor& seq_offsets,
                  const Tensor& page_table, const Tensor& page_offsets, const Tensor& kv_lengths, const Tensor* counts, Stream stream) {
  check_offsets(op, "seq_offsets", seq_offsets, k.shape[0], stream);
  if (debugging()) check_pages(op, kAppend, kv_pages, seq_offsets, page_table, page_offsets, kv_lengths, counts, stream);
  int64_t key = row_bytes(k, 2), value = row_bytes(v, 2), slot = row_bytes(kv_pages, 4), heads = k.shape[1];
  if (k.shape[0] == 0 || heads == 0) return;
  uintptr_t bits = uintptr_t(key | value | slot);
  for (const void* base : {kv_pages.data, k.data, v.data}) bits |= reinterpret_cast<uintptr_t>(base);
  auto run = [&](auto word) {
    using Word = decltype(word);
    int64_t bytes = sizeof(Word);
    KvRows rows{seq_offsets.as<int64_t>(), page_offsets.as<int64_t>(), page_table.as<int32_t>(), kv_lengths.as<int32_t>(),
                data_or_null<int32_t>(counts), k.shape[0], seq_offsets.size() - 1, page_table.size(), kv_pages.shape[0],
                int(kv_pages.shape[2]), int(heads), int(key / bytes), int(value / bytes), int(slot / bytes)};
    int lanes = 1;
    while (lanes < 32 && lanes < rows.heads * rows.slot) lanes *= 2;
    launch(kv_rows_kernel<kAppend, Word>, blocks_for(rows.rows, kPageThreads / lanes, 1 << 20), kPageThreads, 0, stream,
           kv_pages.as<Word>(), k.as<Word>(), v.as<Word>(), lanes, rows);
  };
  if (bits % 16 == 0) run(uint4{});
  else if (bits % 8 == 0) run(uint2{});
  else if (bits % 4 == 0) run(0u);
  else run(static_cast<unsigned short>(0));
}

}  // namespace hstu::cuda
