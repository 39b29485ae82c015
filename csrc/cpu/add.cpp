#include "../dispatch.h"
#include "../ops.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

template <typename T>
HSTU_CLONES void add_rows(T* y, const T* a, const T* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = a[i] + b[i];
}
template void add_rows<float>(float*, const float*, const float*, int64_t);
template void add_rows<double>(double*, const double*, const double*, int64_t);

}  // namespace

void add(Tensor& y, const Tensor& a, const Tensor& b, Stream) {
  pick_float("add", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_blocks(y.size(), 1 << 14, [&](int64_t begin, int64_t end) {
      add_rows(y.as<T>() + begin, a.as<T>() + begin, b.as<T>() + begin, end - begin);
    });
  });
}

}  // namespace hstu::cpu
