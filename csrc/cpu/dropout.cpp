#include "../dispatch.h"
#include "../ops.h"
#include "philox.h"
#include "threads.h"

namespace hstu::cpu {

void dropout(Tensor& y, const Tensor& x, double p, int64_t seed, int64_t offset, Stream) {
  HSTU_CHECK(p >= 0 && p < 1, kInvalidArgument, "dropout: p must be in [0, 1), got ", p);
  pick_float("dropout", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_blocks(x.size(), 1 << 14, [&](int64_t begin, int64_t end) {
      dropout_elements<T>(y.as<T>() + begin, x.as<T>() + begin, begin, end - begin, p, uint64_t(seed), uint64_t(offset));
    });
  });
}

}  // namespace hstu::cpu
