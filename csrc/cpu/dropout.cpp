#include "../dispatch.h"
#include "../math.h"
#include "../ops.h"
#include "philox.h"
#include "threads.h"

namespace hstu::cpu {

void dropout(Tensor& y, const Tensor& x, double p, int64_t seed, int64_t offset, const Tensor* base, Stream) {
  HSTU_CHECK(p >= 0 && p < 1, kInvalidArgument, "dropout: p must be in [0, 1), got ", p);
  const uint64_t begins = DrawOffset{uint64_t(offset), data_or_null<int64_t>(base)};
  pick_float("dropout", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_blocks(x.size(), 1 << 14, [&](int64_t begin, int64_t end) {
      dropout_elements<T>(y.as<T>() + begin, x.as<T>() + begin, begin, end - begin, p, uint64_t(seed), begins);
    });
  });
}

}  // namespace hstu::cpu
