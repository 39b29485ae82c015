#include "../ops.h"
#include "jagged.h"

namespace hstu::cpu {

void concat(Tensor& y, Tensor& y_offsets, const Tensor& a, const Tensor& b, const Tensor& a_offsets, const Tensor& b_offsets,
            Stream) {
  const int64_t* first = check_offsets("concat", "a_offsets", a_offsets, a.shape[0]);
  const int64_t* second = check_offsets("concat", "b_offsets", b_offsets, b.shape[0]);
  int64_t batch = a_offsets.size() - 1, bytes = row_bytes(y);
  int64_t* sums = y_offsets.as<int64_t>();
  for (int64_t i = 0; i <= batch; ++i) sums[i] = first[i] + second[i];
  parallel_jagged(sums, batch, row_grain(bytes), [&](int64_t sequence, int64_t begin, int64_t end) {
    int64_t middle = std::clamp(first[sequence + 1] + second[sequence], begin, end);  // where b's rows begin in y
    std::memcpy(y.as<char>() + begin * bytes, a.as<char>() + (begin - second[sequence]) * bytes, (middle - begin) * bytes);
    std::memcpy(y.as<char>() + middle * bytes, b.as<char>() + (middle - first[sequence + 1]) * bytes, (end - middle) * bytes);
  });
}

}  // namespace hstu::cpu
