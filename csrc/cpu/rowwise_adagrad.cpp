#include <cmath>
#include <cstring>
#include <vector>

#include "../dispatch.h"
#include "../math.h"
#include "../ops.h"
#include "group_by.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

// Numbers the distinct ids in order of their first t, so that nothing below grows with the table: groups[t], and the id of each group.
std::vector<int64_t> number_ids(int64_t* groups, const int64_t* ids, int64_t count) {
  int64_t slots = 16;
  while (slots < 2 * count) slots *= 2;
  Scratch<int64_t> slot(slots);  // group + 1, 0 where free
  std::memset(slot.get(), 0, size_t(slots) * sizeof(int64_t));
  std::vector<int64_t> distinct;
  for (int64_t t = 0; t < count; ++t) {
    uint64_t at = hash_key(ids[t]) & uint64_t(slots - 1);
    while (slot[at] > 0 && distinct[slot[at] - 1] != ids[t]) at = (at + 1) & uint64_t(slots - 1);
    if (slot[at] == 0) {
      distinct.push_back(ids[t]);
      slot[at] = int64_t(distinct.size());
    }
    groups[t] = slot[at] - 1;
  }
  return distinct;
}

// sum = the rows of grads at positions[0 .. count), count >= 1, in this order.
template <typename T>
HSTU_CLONES void sum_rows(T* sum, const T* grads, const uint32_t* positions, int64_t count, int64_t d) {
  for (int64_t j = 0; j < d; ++j) sum[j] = grads[positions[0] * d + j];
  for (int64_t k = 1; k < count; ++k)
    for (int64_t j = 0; j < d; ++j) sum[j] += grads[positions[k] * d + j];
}
template void sum_rows<float>(float*, const float*, const uint32_t*, int64_t, int64_t);
template void sum_rows<double>(double*, const double*, const uint32_t*, int64_t, int64_t);

template <typename T>
HSTU_CLONES void step(T* row, const T* g, T factor, int64_t d) {
  for (int64_t j = 0; j < d; ++j) row[j] -= factor * g[j];
}
template void step<float>(float*, const float*, float, int64_t);
template void step<double>(double*, const double*, double, int64_t);

constexpr int64_t kGroups = 64;  // rows that a task updates
constexpr int64_t kAhead = 4;    // rows between the prefetch and the update

}  // namespace

void rowwise_adagrad(Tensor& table, Tensor& accumulator, const Tensor& grads, const Tensor& ids, double lr, double eps, Stream) {
  pick_float("rowwise_adagrad", table.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t d = table.cols(), count = ids.size();
    check_ids("rowwise_adagrad", "ids", ids.as<int64_t>(), count, 0, table.rows() - 1);
    Scratch<int64_t> groups(count);
    std::vector<int64_t> distinct = number_ids(groups, ids.as<int64_t>(), count);
    Groups by_row = group_by_id(groups, count, int64_t(distinct.size()));
    parallel_blocks(int64_t(distinct.size()), kGroups, [&](int64_t begin, int64_t end) {
      Scratch<T> g(d);
      for (int64_t group = begin; group < end; ++group) {
        int64_t row = distinct[group], start = by_row.starts[group];
        if (group + kAhead < end)
          for (int64_t j = 0; j < d; j += 64 / int64_t(sizeof(T))) {
            __builtin_prefetch(grads.as<T>() + by_row.order[by_row.starts[group + kAhead]] * d + j);
            __builtin_prefetch(table.as<T>() + distinct[group + kAhead] * d + j, 1);
          }
        sum_rows<T>(g, grads.as<T>(), by_row.order + start, by_row.starts[group + 1] - start, d);
        double squares = 0;
        for (int64_t j = 0; j < d; ++j) squares += double(g[j]) * double(g[j]);
        T& sum = accumulator.as<T>()[row];
        if (d > 0) sum += T(squares / double(d));
        step<T>(table.as<T>() + row * d, g, T(lr) / (std::sqrt(sum) + T(eps)), d);
      }
    });
  });
}

}  // namespace hstu::cpu
