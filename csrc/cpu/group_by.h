// Occurrences grouped by id: what an op that scatters by id sums over, in order of position.
#pragma once
#include <cstdint>

#include "scratch.h"

namespace hstu::cpu {

// CSR form: order[starts[i]] .. order[starts[i + 1] - 1] are the positions t with ids[t] = i, ascending. Ids must be in
// 0 .. num_rows - 1 (check_ids); count < 2^32.
struct Groups {
  Groups(const int64_t* ids, int64_t count, int64_t num_rows);
  Scratch<int64_t> starts;  // [num_rows + 1]
  Scratch<uint32_t> order;  // [count]
};

inline Groups group_by_id(const int64_t* ids, int64_t count, int64_t num_rows) { return Groups(ids, count, num_rows); }

// Throws "op: name[12] = 99 is outside low..high" for the first id outside low .. high (both legal).
void check_ids(const char* op, const char* name, const int64_t* ids, int64_t count, int64_t low, int64_t high);

}  // namespace hstu::cpu
