#include <algorithm>
#include <cstring>

#include "../dispatch.h"
#include "../ops.h"
#include "scratch.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kTask = 1 << 14;  // elements that a task writes
constexpr int64_t kRows = 1024;     // rows of dy in one partial sum

void check_actions(const char* op, const Tensor& actions, int64_t features, bool pending) {
  const int64_t* action = actions.as<int64_t>();
  for (int64_t t = 0; t < actions.size(); ++t) {
    HSTU_CHECK(pending || action[t] >= 0, kInvalidArgument, op, ": actions[", t, "] = ", action[t],
               " is negative (not known), but there is no pending row");
    HSTU_CHECK(action[t] < 0 || (action[t] >> features) == 0, kInvalidArgument, op, ": actions[", t, "] = ", action[t],
               " has a bit at or above the table's ", features, " rows");
  }
}

template <typename T>
HSTU_CLONES void add_into(T* sum, const T* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) sum[j] += x[j];
}
template void add_into<float>(float*, const float*, int64_t);
template void add_into<double>(double*, const double*, int64_t);

}  // namespace

void multi_hot_embedding(Tensor& y, const Tensor& table, const Tensor& actions, const Tensor* pending, Stream) {
  check_actions("multi_hot_embedding", actions, table.rows(), pending != nullptr);
  pick_float("multi_hot_embedding", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t features = table.rows(), d = table.cols(), width = features * d;
    parallel_blocks(actions.size(), std::max<int64_t>(1, kTask / std::max<int64_t>(width, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        int64_t action = actions.as<int64_t>()[t];
        T* row = y.as<T>() + t * width;
        if (action < 0) {
          std::memcpy(row, pending->as<T>(), size_t(width) * sizeof(T));
          continue;
        }
        for (int64_t k = 0; k < features; ++k) {
          if (action >> k & 1)
            std::memcpy(row + k * d, table.as<T>() + k * d, size_t(d) * sizeof(T));
          else
            std::memset(row + k * d, 0, size_t(d) * sizeof(T));
        }
      }
    });
  });
}

// A task sums kRows rows of dy, those of known and of pending actions apart; the tasks' sums are added in order.
void multi_hot_embedding_backward(Tensor& dtable, Tensor* dpending, const Tensor& dy, const Tensor& actions, Stream) {
  check_actions("multi_hot_embedding_backward", actions, dtable.rows(), true);
  pick_float("multi_hot_embedding_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t features = dtable.rows(), d = dtable.cols(), width = features * d, tasks = (actions.size() + kRows - 1) / kRows;
    Scratch<T> partial(tasks * 2 * width, true);
    parallel_blocks(actions.size(), kRows, [&](int64_t begin, int64_t end) {
      T* known = partial + begin / kRows * 2 * width;
      for (int64_t t = begin; t < end; ++t) {
        int64_t action = actions.as<int64_t>()[t];
        const T* row = dy.as<T>() + t * width;
        if (action < 0) add_into<T>(known + width, row, width);
        for (int64_t k = 0; action >= 0 && k < features; ++k)
          if (action >> k & 1) add_into<T>(known + k * d, row + k * d, d);
      }
    });
    std::memset(dtable.data, 0, size_t(dtable.bytes()));
    if (dpending) std::memset(dpending->data, 0, size_t(dpending->bytes()));
    for (int64_t task = 0; task < tasks; ++task) {
      add_into<T>(dtable.as<T>(), partial + task * 2 * width, width);
      if (dpending) add_into<T>(dpending->as<T>(), partial + (task * 2 + 1) * width, width);
    }
  });
}

}  // namespace hstu::cpu
