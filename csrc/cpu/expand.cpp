#include "../dispatch.h"
#include "../ops.h"
#include "jagged.h"

namespace hstu::cpu {
namespace {

template <typename T>
HSTU_CLONES void sum_rows(T* sum, const T* x, int64_t rows, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j) sum[j] = T(0);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) sum[j] += x[i * cols + j];
}
template void sum_rows<float>(float*, const float*, int64_t, int64_t);
template void sum_rows<double>(double*, const double*, int64_t, int64_t);

}  // namespace

void expand(Tensor& y, const Tensor& x, const Tensor& offsets, Stream) {
  const int64_t* first = check_offsets("expand", "offsets", offsets, y.shape[0]);
  int64_t bytes = row_bytes(x);
  parallel_jagged(first, x.shape[0], row_grain(bytes), [&](int64_t request, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) std::memcpy(y.as<char>() + m * bytes, x.as<char>() + request * bytes, bytes);
  });
}

void expand_backward(Tensor& dx, const Tensor& dy, const Tensor& offsets, Stream) {
  const int64_t* first = check_offsets("expand_backward", "offsets", offsets, dy.shape[0]);
  pick_float("expand_backward", dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t cols = row_bytes(dx) / int64_t(sizeof(T));
    parallel_blocks(dx.shape[0], 4, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        sum_rows<T>(dx.as<T>() + b * cols, dy.as<T>() + first[b] * cols, first[b + 1] - first[b], cols);
    });
  });
}

}  // namespace hstu::cpu
