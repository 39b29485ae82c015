// Rows copied from where a rule says: what embedding and the jagged ops that only move rows are made of. Bytes only, so every dtype.
#pragma once
#include <initializer_list>

#include "common.cuh"

namespace hstu::cuda {

// Bytes of one index of the first `dims` dims.
inline int64_t row_bytes(const Tensor& tensor, int dims = 1) {
  int64_t bytes = size_of(tensor.dtype);
  for (int i = dims; i < tensor.rank; ++i) bytes *= tensor.shape[i];
  return bytes;
}

constexpr int kGatherThreads = 256;

// y[row] = *source(row), `padding` where that is null. A row belongs to 1, 2, 4 .. 32 neighbouring lanes, as many as it has words, so
// that rows of one id and rows of a thousand features both move in full transactions.
template <typename Word, typename Source>
__global__ void __launch_bounds__(kGatherThreads) gather_rows_kernel(Word* y, int64_t rows, int64_t words, int lanes, Word padding,
                                                                     Source source) {
  int lane = threadIdx.x % lanes, rows_a_block = kGatherThreads / lanes;
  int64_t step = int64_t(gridDim.x) * rows_a_block;
  for (int64_t row = int64_t(blockIdx.x) * rows_a_block + threadIdx.x / lanes; row < rows; row += step) {
    const Word* x = reinterpret_cast<const Word*>(source(row));
    Word* to = y + row * words;
    if (x) {
#pragma unroll 4
      for (int64_t i = lane; i < words; i += lanes) to[i] = __ldg(x + i);
    } else {
      for (int64_t i = lane; i < words; i += lanes) to[i] = padding;
    }
  }
}

// run(word): the widest word that pointers and sizes allow, of which `bits` are all bits; it holds `padding`, eight bytes that repeat an
// element's.
template <typename Fn>
void pick_word(uintptr_t bits, uint64_t padding, Fn&& run) {
  if (bits % 16 == 0)
    run(make_uint4(unsigned(padding), unsigned(padding >> 32), unsigned(padding), unsigned(padding >> 32)));
  else if (bits % 8 == 0)
    run(static_cast<unsigned long long>(padding));
  else if (bits % 4 == 0)
    run(unsigned(padding));
  else
    run(static_cast<unsigned short>(padding));
}

// How many lanes a row of so many words gets.
inline int lanes_for(int64_t words) {
  int lanes = 1;
  while (lanes < 32 && lanes < words) lanes *= 2;
  return lanes;
}

// `bytes` a row; `sources`: the bases that source(row), a const char*, points into at multiples of `bytes`.
template <typename Source>
void gather_rows(void* y, int64_t rows, int64_t bytes, Source source, std::initializer_list<const void*> sources, uint64_t padding,
                 Stream stream) {
  if (rows == 0 || bytes == 0) return;
  uintptr_t bits = reinterpret_cast<uintptr_t>(y) | uintptr_t(bytes);
  for (const void* base : sources) bits |= reinterpret_cast<uintptr_t>(base);
  pick_word(bits, padding, [&](auto word) {
    using Word = decltype(word);
    int64_t words = bytes / int64_t(sizeof(Word));
    int lanes = lanes_for(words);
    launch(gather_rows_kernel<Word, Source>, blocks_for(rows, kGatherThreads / lanes, 1 << 20), kGatherThreads, 0, stream,
           static_cast<Word*>(y), rows, words, lanes, word, source);
  });
}

}  // namespace hstu::cuda
