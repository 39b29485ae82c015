#include <algorithm>
#include <cstring>

#include "../dispatch.h"
#include "../ops.h"
#include "group_by.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kTask = 1 << 14;  // elements that a task makes

template <typename T>
HSTU_CLONES void add_row(T* y, const T* row, int64_t d) {
  for (int64_t j = 0; j < d; ++j) y[j] += row[j];
}
template void add_row<float>(float*, const float*, int64_t);
template void add_row<double>(double*, const double*, int64_t);

}  // namespace

void embedding_sum(Tensor& y, TensorList tables, TensorList ids, Stream) {
  HSTU_CHECK(tables.items.size() == ids.items.size(), kInvalidArgument, "embedding_sum: ", tables.items.size(), " tables, ids of ",
             ids.items.size());
  pick_float("embedding_sum", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = y.rows(), d = y.cols();
    for (size_t n = 0; n < ids.items.size(); ++n)
      check_ids("embedding_sum", message("ids[", n, "]").c_str(), ids.items[n].as<int64_t>(), rows, -1, tables.items[n].rows() - 1);
    parallel_blocks(rows, std::max<int64_t>(1, kTask / std::max<int64_t>(d, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        T* to = y.as<T>() + t * d;
        bool first = true;
        for (size_t n = 0; n < ids.items.size(); ++n) {
          int64_t id = ids.items[n].as<int64_t>()[t];
          if (id < 0) continue;
          const T* row = tables.items[n].as<T>() + id * d;
          if (first)
            std::memcpy(to, row, size_t(d) * sizeof(T));
          else
            add_row<T>(to, row, d);
          first = false;
        }
        if (first) std::memset(to, 0, size_t(d) * sizeof(T));
      }
    });
  });
}

}  // namespace hstu::cpu
