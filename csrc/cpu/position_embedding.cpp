#include <algorithm>
#include <cstring>

#include "../dispatch.h"
#include "../ops.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kTask = 1 << 14;  // elements a task takes
constexpr int64_t kPositions = 4;   // rows of dtable a task owns

template <typename T>
HSTU_CLONES void scale_and_add(T* y, const T* x, const T* p, T scale, int64_t n) {
  for (int64_t j = 0; j < n; ++j) y[j] = scale * x[j] + p[j];
}
template void scale_and_add<float>(float*, const float*, const float*, float, int64_t);
template void scale_and_add<double>(double*, const double*, const double*, double, int64_t);

template <typename T>
HSTU_CLONES void scale_row(T* y, const T* x, T scale, int64_t n) {
  for (int64_t j = 0; j < n; ++j) y[j] = scale * x[j];
}
template void scale_row<float>(float*, const float*, float, int64_t);
template void scale_row<double>(double*, const double*, double, int64_t);

template <typename T>
HSTU_CLONES void add_into(T* sum, const T* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) sum[j] += x[j];
}
template void add_into<float>(float*, const float*, int64_t);
template void add_into<double>(double*, const double*, int64_t);

void check_offsets(const char* op, const Tensor& seq_offsets, int64_t tokens, int64_t positions) {
  const int64_t* offsets = seq_offsets.as<int64_t>();
  int64_t sequences = seq_offsets.size() - 1;
  HSTU_CHECK(sequences >= 0 && offsets[0] == 0 && offsets[sequences] == tokens, kInvalidArgument, op,
             ": seq_offsets must run from 0 to the ", tokens, " rows of x");
  for (int64_t b = 0; b < sequences; ++b) {
    int64_t length = offsets[b + 1] - offsets[b];
    HSTU_CHECK(length >= 0, kInvalidArgument, op, ": seq_offsets[", b + 1, "] = ", offsets[b + 1], " is below seq_offsets[", b,
               "] = ", offsets[b]);
    HSTU_CHECK(length <= positions, kInvalidArgument, op, ": sequence ", b, " has ", length, " rows, table has ", positions);
  }
}

int64_t rows_a_task(int64_t d) { return std::max<int64_t>(1, kTask / std::max<int64_t>(d, 1)); }

}  // namespace

void position_embedding(Tensor& y, const Tensor& x, const Tensor& table, const Tensor& seq_offsets, const Tensor* ids,
                        double scale, Stream) {
  pick_float("position_embedding", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t d = x.cols(), tokens = x.rows(), sequences = seq_offsets.size() - 1;
    check_offsets("position_embedding", seq_offsets, tokens, table.rows());
    const int64_t* offsets = seq_offsets.as<int64_t>();
    const int64_t* id = data_or_null<int64_t>(ids);
    parallel_blocks(tokens, rows_a_task(d), [&](int64_t begin, int64_t end) {
      int64_t b = std::upper_bound(offsets, offsets + sequences + 1, begin) - offsets - 1;
      for (int64_t t = begin; t < end; ++t) {
        while (t >= offsets[b + 1]) ++b;
        T* result = y.as<T>() + t * d;
        if (id && id[t] == 0)
          std::memset(result, 0, size_t(d) * sizeof(T));
        else
          scale_and_add<T>(result, x.as<T>() + t * d, table.as<T>() + (t - offsets[b]) * d, T(scale), d);
      }
    });
  });
}

// A task owns kPositions rows of dtable and walks the sequences in order: what it reads of each is contiguous.
void position_embedding_backward(Tensor& dx, Tensor& dtable, const Tensor& dy, const Tensor& seq_offsets, const Tensor* ids,
                                 double scale, Stream) {
  pick_float("position_embedding_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t d = dy.cols(), tokens = dy.rows(), sequences = seq_offsets.size() - 1;
    check_offsets("position_embedding_backward", seq_offsets, tokens, dtable.rows());
    const int64_t* offsets = seq_offsets.as<int64_t>();
    const int64_t* id = data_or_null<int64_t>(ids);
    parallel_blocks(tokens, rows_a_task(d), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        T* result = dx.as<T>() + t * d;
        if (id && id[t] == 0)
          std::memset(result, 0, size_t(d) * sizeof(T));
        else
          scale_row<T>(result, dy.as<T>() + t * d, T(scale), d);
      }
    });
    parallel_blocks(dtable.rows(), kPositions, [&](int64_t begin, int64_t end) {
      std::memset(dtable.as<T>() + begin * d, 0, size_t((end - begin) * d) * sizeof(T));
      for (int64_t b = 0; b < sequences; ++b)
        for (int64_t t = offsets[b] + begin; t < std::min(offsets[b] + end, offsets[b + 1]); ++t)
          if (!id || id[t] != 0) add_into<T>(dtable.as<T>() + (t - offsets[b]) * d, dy.as<T>() + t * d, d);
    });
  });
}

}  // namespace hstu::cpu
