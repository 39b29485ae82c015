// What the ops that move rows of jagged tensors share. They look at bytes only, so they work for every dtype.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../check.h"
#include "../tensor.h"
#include "threads.h"

namespace hstu::cpu {

// Bytes of one index of the first `dims` dims.
inline int64_t row_bytes(const Tensor& tensor, int dims = 1) {
  int64_t bytes = size_of(tensor.dtype);
  for (int i = dims; i < tensor.rank; ++i) bytes *= tensor.shape[i];
  return bytes;
}

// Rows of a fixed task: about a quarter of a megabyte, whatever the number of threads.
inline int64_t row_grain(int64_t bytes_per_row) { return std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, bytes_per_row)); }

// Throws unless `offsets` begins with 0, never decreases and ends with `rows`. Returns its values.
inline const int64_t* check_offsets(const char* op, const char* name, const Tensor& offsets, int64_t rows) {
  const int64_t* values = offsets.as<int64_t>();
  int64_t batch = offsets.size() - 1;
  HSTU_CHECK(batch >= 0, kInvalidArgument, op, ": ", name, " is empty, it must have one value more than there are sequences");
  HSTU_CHECK(values[0] == 0, kInvalidArgument, op, ": ", name, "[0] must be 0, got ", values[0]);
  for (int64_t b = 0; b < batch; ++b)
    HSTU_CHECK(values[b] <= values[b + 1], kInvalidArgument, op, ": sequence ", b, " has a negative length: ", name, "[", b,
               "] = ", values[b], ", ", name, "[", b + 1, "] = ", values[b + 1]);
  HSTU_CHECK(values[batch] == rows, kInvalidArgument, op, ": ", name, " ends with ", values[batch], " after sequence ", batch - 1,
             ", but there are ", rows, " rows");
  return values;
}

// body(sequence, begin, end) over all rows of a jagged tensor, cut at the ends of sequences and at every `grain` rows.
template <typename Body>
void parallel_jagged(const int64_t* offsets, int64_t batch, int64_t grain, Body&& body) {
  parallel_blocks(offsets[batch], grain, [&](int64_t begin, int64_t end) {
    int64_t sequence = std::upper_bound(offsets, offsets + batch + 1, begin) - offsets - 1;
    for (; begin < end; ++sequence) {
      int64_t stop = std::min(end, offsets[sequence + 1]);
      if (begin < stop) body(sequence, begin, stop);
      begin = stop;
    }
  });
}

}  // namespace hstu::cpu
