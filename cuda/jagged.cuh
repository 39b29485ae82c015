// What the ops on jagged tensors share: the sequence of a row, found on the device, and the offsets' check.
#pragma once
#include "debug.cuh"

namespace hstu::cuda {

// The sequence that row t is in: the first b whose end offsets[b + 1] is above t. batch >= 1; `offsets` is a pointer or has [].
template <typename Offsets>
__device__ __forceinline__ int64_t sequence_of(const Offsets& offsets, int64_t batch, int64_t t) {
  int64_t low = 0, high = batch - 1;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (offsets[middle + 1] > t)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// The same by a whole warp, for one t: 32 sequences are looked at at a time.
__device__ __forceinline__ int64_t sequence_by_warp(const int64_t* offsets, int64_t batch, int64_t t) {
  for (int64_t first = 0;; first += 32) {
    int64_t b = first + threadIdx.x % 32;
    unsigned beyond = __ballot_sync(kFullWarp, b >= batch - 1 || offsets[b + 1] > t);
    if (beyond) return first + __ffs(beyond) - 1;
  }
}

// Under HSTU_DEBUG=1 alone, for it waits: throws unless `offsets` begins with 0, never decreases and ends with `rows`.
inline void check_offsets(const char* op, const char* name, const Tensor& offsets, int64_t rows, Stream stream) {
  int64_t batch = offsets.size() - 1;
  HSTU_CHECK(batch >= 0, kInvalidArgument, op, ": ", name, " is empty, it must have one value more than there are sequences");
  if (!debugging()) return;
  std::vector<int64_t> values = values_of<int64_t>(offsets, stream);
  HSTU_CHECK(values[0] == 0, kInvalidArgument, op, ": ", name, "[0] must be 0, got ", values[0]);
  for (int64_t b = 0; b < batch; ++b)
    HSTU_CHECK(values[b] <= values[b + 1], kInvalidArgument, op, ": sequence ", b, " has a negative length: ", name, "[", b,
               "] = ", values[b], ", ", name, "[", b + 1, "] = ", values[b + 1]);
  HSTU_CHECK(values[batch] == rows, kInvalidArgument, op, ": ", name, " ends with ", values[batch], " after sequence ", batch - 1,
             ", but there are ", rows, " rows");
}

}  // namespace hstu::cuda
