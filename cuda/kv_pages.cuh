// Rows between jagged K and V and the pages of a cache, both ways. Bytes only, so every dtype.
#pragma once
#include <algorithm>

#include "gather_rows.cuh"
#include "jagged.cuh"

namespace hstu::cuda {

constexpr int kPageThreads = 256, kWordsAhead = 4;  // words that a lane has under way

// Sizes in words: `key` and `value` of a head of K and V, `slot` of a head in a page.
struct KvRows {
  const int64_t *seq_offsets, *page_offsets;
  const int32_t *page_table, *kv_lengths, *counts;
  int64_t rows, batch, listed, pages;
  int size, heads, key, value, slot;
};

// Of each layer, which blockIdx.y is.
constexpr int kMostLayers = 32;
template <typename Word>
struct KvLayers {
  Word *pages[kMostLayers], *k[kMostLayers], *v[kMostLayers];
};

// The rows of K and of V of a token belong to 1, 2, 4 .. 32 neighbouring lanes, as many as they have words. kAppend: row r goes to position
// kv_lengths[b] + r, and only the first counts[b] rows (all where that is null); otherwise it comes from position r, and is 0 where the
// sequence does not hold that.
template <bool kAppend, typename Word>
__global__ void __launch_bounds__(kPageThreads, 5) kv_rows_kernel(const __grid_constant__ KvLayers<Word> layers, int lanes,
                                                                  const __grid_constant__ KvRows p) {
  Word *pages = layers.pages[blockIdx.y], *k = layers.k[blockIdx.y], *v = layers.v[blockIdx.y];
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
    int keys = p.heads * p.key, all = keys + p.heads * p.value, part = p.size * p.heads * p.slot;  // words
    Word* slots = pages + (there ? (page * 2 * p.size + position % p.size) * p.heads * p.slot : 0);
    for (int first = lane; first < all; first += kWordsAhead * lanes) {
      Word moved[kWordsAhead], *jagged[kWordsAhead], *slot[kWordsAhead];
#pragma unroll
      for (int n = 0; n < kWordsAhead; ++n) {
        int i = first + n * lanes, words = i < keys ? p.key : p.value, at = i < keys ? i : i - keys;
        if (i >= all) continue;
        jagged[n] = (i < keys ? k : v) + t * p.heads * words + at;
        slot[n] = slots + (i < keys ? 0 : part) + (words == p.slot ? at : at / words * p.slot + at % words);
        moved[n] = kAppend ? *jagged[n] : there ? *slot[n] : Word{};
      }
#pragma unroll
      for (int n = 0; n < kWordsAhead; ++n)
        if (first + n * lanes < all) *(kAppend ? slot[n] : jagged[n]) = moved[n];
    }
  }
}

// Under HSTU_DEBUG=1 alone, for it waits: throws where a token that is written or read has no page in the tensor, or a page is written twice.
void check_pages(const char* op, bool append, const Tensor& kv_pages, const Tensor& seq_offsets, const Tensor& page_table,
                 const Tensor& page_offsets, const Tensor& kv_lengths, const Tensor* counts, Stream stream);

template <bool kAppend>
void move_kv_rows(const char* op, const TensorList& kv_pages, const TensorList& k, const TensorList& v, const Tensor& seq_offsets,
                  const Tensor& page_table, const Tensor& page_offsets, const Tensor& kv_lengths, const Tensor* counts, Stream stream) {
  size_t layers = kv_pages.items.size();
  HSTU_CHECK(k.items.size() == layers && v.items.size() == layers, kInvalidArgument, op, ": pages of ", layers, " layers, K of ",
             k.items.size(), ", V of ", v.items.size());
  if (layers == 0) return;
  const Tensor &pages = kv_pages.items[0], &keys = k.items[0], &values = v.items[0];
  check_offsets(op, "seq_offsets", seq_offsets, keys.shape[0], stream);
  if (debugging()) check_pages(op, kAppend, pages, seq_offsets, page_table, page_offsets, kv_lengths, counts, stream);
  int64_t key = row_bytes(keys, 2), value = row_bytes(values, 2), slot = row_bytes(pages, 4), heads = keys.shape[1];
  if (keys.shape[0] == 0 || heads == 0) return;
  uintptr_t bits = uintptr_t(key | value | slot);
  for (const TensorList* list : {&kv_pages, &k, &v})
    for (const Tensor& each : list->items) bits |= reinterpret_cast<uintptr_t>(each.data);
  auto run = [&](auto word) {
    using Word = decltype(word);
    int64_t bytes = sizeof(Word);
    KvRows rows{seq_offsets.as<int64_t>(), page_offsets.as<int64_t>(), page_table.as<int32_t>(), kv_lengths.as<int32_t>(),
                data_or_null<int32_t>(counts), keys.shape[0], seq_offsets.size() - 1, page_table.size(), pages.shape[0],
                int(pages.shape[2]), int(heads), int(key / bytes), int(value / bytes), int(slot / bytes)};
    int lanes = 1;
    while (lanes < 32 && lanes < rows.heads * rows.slot) lanes *= 2;
    for (size_t first = 0; first < layers; first += kMostLayers) {
      KvLayers<Word> some{};
      size_t count = std::min<size_t>(kMostLayers, layers - first);
      for (size_t i = 0; i < count; ++i) {
        some.pages[i] = kv_pages.items[first + i].as<Word>();
        some.k[i] = k.items[first + i].as<Word>(), some.v[i] = v.items[first + i].as<Word>();
      }
      dim3 blocks = blocks_for(rows.rows, kPageThreads / lanes, 1 << 20);
      blocks.y = unsigned(count);
      launch(kv_rows_kernel<kAppend, Word>, blocks, kPageThreads, 0, stream, some, lanes, rows);
    }
  };
  if (bits % 16 == 0) run(uint4{});
  else if (bits % 8 == 0) run(uint2{});
  else if (bits % 4 == 0) run(0u);
  else run(static_cast<unsigned short>(0));
}

}  // namespace hstu::cuda
