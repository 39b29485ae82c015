#include <algorithm>
#include <cstring>
#include <vector>

#include "../dispatch.h"
#include "../ops.h"
#include "group_by.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kTask = 1 << 14;  // elements that a task copies
constexpr int64_t kTableRows = 64;  // rows of dtable a task owns
constexpr int64_t kChunk = 1024;    // rows of dy in one partial sum of a row of dtable
constexpr int64_t kAhead = 8;       // rows of dy between the prefetch and the addition

// sum = the rows of dy at positions[0 .. count), count >= 1, in this order.
template <typename T>
HSTU_CLONES void sum_rows(T* sum, const T* dy, const uint32_t* positions, int64_t count, int64_t d) {
  for (int64_t k = 0; k < count; ++k) {
    const T* row = dy + positions[k] * d;
    if (k + kAhead < count)
      for (int64_t j = 0; j < d; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(dy + positions[k + kAhead] * d + j);
    if (k == 0)
      for (int64_t j = 0; j < d; ++j) sum[j] = row[j];
    else
      for (int64_t j = 0; j < d; ++j) sum[j] += row[j];
  }
}
template void sum_rows<float>(float*, const float*, const uint32_t*, int64_t, int64_t);
template void sum_rows<double>(double*, const double*, const uint32_t*, int64_t, int64_t);

template <typename T>
HSTU_CLONES void add_into(T* sum, const T* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) sum[j] += x[j];
}
template void add_into<float>(float*, const float*, int64_t);
template void add_into<double>(double*, const double*, int64_t);

}  // namespace

void embedding(TensorList y, TensorList tables, const Tensor& ids, Stream) {
  HSTU_CHECK(tables.items.size() == y.items.size() && !y.items.empty(), kInvalidArgument, "embedding: ", tables.items.size(), " tables, ",
             y.items.size(), " outputs");
  const int64_t *id = ids.as<int64_t>(), count = ids.size();
  check_ids("embedding", "ids", id, count, 0, tables.items[0].rows() - 1);
  for (size_t n = 0; n < y.items.size(); ++n)
    pick_float("embedding", y.items[n].dtype, [&](auto zero) {
      using T = decltype(zero);
      int64_t d = tables.items[n].cols();
      T *to = y.items[n].as<T>(), *table = tables.items[n].as<T>();
      parallel_blocks(count, std::max<int64_t>(1, kTask / std::max<int64_t>(d, 1)), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) std::memcpy(to + t * d, table + id[t] * d, size_t(d) * sizeof(T));
      });
    });
}

// A task owns kTableRows rows of dtable and adds to each the rows of dy that its id stands at. An id that stands at more than
// kChunk positions is summed in chunks of kChunk beforehand, so that one id may take every position and all threads still share.
void embedding_backward(Tensor& dtable, const Tensor& dy, const Tensor& ids, Stream) {
  pick_float("embedding_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = dtable.rows(), d = dtable.cols();
    check_ids("embedding_backward", "ids", ids.as<int64_t>(), ids.size(), 0, rows - 1);
    Groups groups = group_by_id(ids.as<int64_t>(), ids.size(), rows);
    const int64_t* starts = groups.starts;
    struct Chunk {
      int64_t row, begin;
    };
    std::vector<Chunk> chunks;  // of ids with more than kChunk positions, by row
    for (int64_t i = 0; i < rows; ++i)
      if (starts[i + 1] - starts[i] > kChunk)
        for (int64_t k = starts[i]; k < starts[i + 1]; k += kChunk) chunks.push_back({i, k});
    Scratch<T> partial(int64_t(chunks.size()) * d);
    parallel_for(int64_t(chunks.size()), [&](int64_t c) {
      int64_t count = std::min(kChunk, starts[chunks[c].row + 1] - chunks[c].begin);
      sum_rows<T>(partial + c * d, dy.as<T>(), groups.order + chunks[c].begin, count, d);
    });
    parallel_blocks(rows, kTableRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin, next; i < end; i = next) {
        T* sum = dtable.as<T>() + i * d;
        int64_t count = starts[i + 1] - starts[i];
        next = i + 1;
        if (count == 0) {
          while (next < end && starts[next + 1] == starts[i]) ++next;
          std::memset(sum, 0, size_t((next - i) * d) * sizeof(T));
        } else if (count <= kChunk) {
          sum_rows<T>(sum, dy.as<T>(), groups.order + starts[i], count, d);
        } else {
          auto chunk = std::lower_bound(chunks.begin(), chunks.end(), i, [](const Chunk& a, int64_t row) { return a.row < row; });
          const T* part = partial + (chunk - chunks.begin()) * d;
          std::memcpy(sum, part, size_t(d) * sizeof(T));
          for (int64_t c = 1; c < (count + kChunk - 1) / kChunk; ++c) add_into<T>(sum, part + c * d, d);
        }
      }
    });
  });
}

}  // namespace hstu::cpu
