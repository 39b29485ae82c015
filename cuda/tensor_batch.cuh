// Lists of tensors in one launch: pointers, sizes and the partition into chunks travel as a kernel parameter.
#pragma once
#include <vector>

#include "packed.cuh"

namespace hstu::cuda {

constexpr int kBatchTensors = 64;  // four lists of them stay below 4 KB of parameters
constexpr int64_t kBatchChunk = 1 << 13;
constexpr int kBatchThreads = 256;

// Up to kBatchTensors tensors that are not empty, and tensors of the same sizes from kLists lists. Blocks first[i] .. first[i + 1] - 1
// own chunks of kBatchChunk elements of tensor i.
template <int kLists>
struct TensorBatch {
  void* data[kLists][kBatchTensors];
  int64_t size[kBatchTensors];
  int first[kBatchTensors + 1];
  int count;

  // The tensor of this block and where its chunk begins and ends.
  __device__ __forceinline__ int find(int64_t& begin, int64_t& end) const {
    int low = 0, high = count - 1;
    while (low < high) {
      int middle = (low + high) / 2;
      if (first[middle + 1] > int(blockIdx.x))
        high = middle;
      else
        low = middle + 1;
    }
    begin = (int64_t(blockIdx.x) - first[low]) * kBatchChunk;
    end = begin + kBatchChunk < size[low] ? begin + kBatchChunk : size[low];
    return low;
  }
};

// fn.at<kN>(i) for the elements begin .. end - 1 of a chunk, by all threads of its block.
template <int kN, typename Fn>
__device__ __forceinline__ void for_chunk(int64_t begin, int64_t end, bool whole, Fn&& fn) {
  int64_t i = begin;
  if (whole) {
#pragma unroll 2
    for (i += int64_t(threadIdx.x) * kN; i + kN <= end; i += kBatchThreads * kN) fn.template at<kN>(i);
    i = begin + (end - begin) / kN * kN;
  }
  for (i += threadIdx.x; i < end; i += kBatchThreads) fn.template at<1>(i);
}

inline int64_t chunks_of(const TensorList& list) {
  int64_t chunks = 0;
  for (const Tensor& tensor : list.items) chunks += ceil_div(tensor.size(), kBatchChunk);
  return chunks;
}

// fn(batch, blocks, chunks before): as many batches as the lists need.
template <int kLists, typename Fn>
void for_each_batch(const TensorList* const (&lists)[kLists], Fn&& fn) {
  constexpr int64_t kMostBlocks = int64_t(1) << 30;
  TensorBatch<kLists> batch;
  int64_t before = 0;
  batch.count = batch.first[0] = 0;
  auto flush = [&] {
    if (batch.count == 0) return;
    fn(batch, batch.first[batch.count], before);
    before += batch.first[batch.count];
    batch.count = 0;
  };
  for (size_t i = 0; i < lists[0]->items.size(); ++i) {
    int64_t size = lists[0]->items[i].size(), chunks = ceil_div(size, kBatchChunk);
    if (size == 0) continue;
    if (batch.count == kBatchTensors || batch.first[batch.count] + chunks > kMostBlocks) flush();
    for (int list = 0; list < kLists; ++list) batch.data[list][batch.count] = lists[list]->items[i].data;
    batch.size[batch.count] = size;
    batch.first[batch.count + 1] = batch.first[batch.count] + int(chunks);
    ++batch.count;
  }
  flush();
}

}  // namespace hstu::cuda
