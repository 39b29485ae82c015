// Occurrences grouped by id: what an op that scatters by id sums over, in order of position.
#pragma once
#include "common.cuh"

namespace hstu::cuda {

// Positions sorted by id, stable, on the device: keys[k] = ids[order[k]], num_rows for an id outside 0 .. num_rows - 1, so that those end
// the order. count < 2^32, num_rows < 2^32.
struct SortedIds {
  SortedIds(const int64_t* ids, int64_t count, int64_t num_rows, Stream stream);
  Scratch<uint32_t> keys, order;  // [count]
};

// CSR form, on the device: order[starts[i]] .. order[starts[i + 1] - 1] are the positions t with ids[t] = i, ascending.
// An id outside 0 .. num_rows - 1 is in no group (starts[num_rows] counts the others).
struct Groups : SortedIds {
  Groups(const int64_t* ids, int64_t count, int64_t num_rows, Stream stream);
  Scratch<int64_t> starts;  // [num_rows + 1]
};

inline Groups group_by_id(const int64_t* ids, int64_t count, int64_t num_rows, Stream stream) {
  return Groups(ids, count, num_rows, stream);
}

// Under HSTU_DEBUG=1 alone, for it waits: throws "op: name[12] = 99 is outside low..high" for the first id outside low .. high (both
// legal). Where weights are given, ids t with weights[t / ids_a_weight] = 0 may be anything.
void check_ids(const char* op, const char* name, const int64_t* ids, int64_t count, int64_t low, int64_t high, Stream stream,
               const float* weights = nullptr, int64_t ids_a_weight = 1);

}  // namespace hstu::cuda
