#include "../ops.h"
#include "jagged.h"
#include "scratch.h"

namespace hstu::cpu {

void split(Tensor& a, Tensor& b, const Tensor& y, const Tensor& a_offsets, const Tensor& b_offsets, Stream) {
  const int64_t* first = check_offsets("split", "a_offsets", a_offsets, a.shape[0]);
  const int64_t* second = check_offsets("split", "b_offsets", b_offsets, b.shape[0]);
  int64_t batch = a_offsets.size() - 1, bytes = row_bytes(y);
  Scratch<int64_t> sums(batch + 1);
  for (int64_t i = 0; i <= batch; ++i) sums[i] = first[i] + second[i];
  parallel_jagged(sums.get(), batch, row_grain(bytes), [&](int64_t sequence, int64_t begin, int64_t end) {
    int64_t middle = std::clamp(first[sequence + 1] + second[sequence], begin, end);  // where b's rows begin in y
    std::memcpy(a.as<char>() + (begin - second[sequence]) * bytes, y.as<char>() + begin * bytes, (middle - begin) * bytes);
    std::memcpy(b.as<char>() + (middle - first[sequence + 1]) * bytes, y.as<char>() + middle * bytes, (end - middle) * bytes);
  });
}

}  // namespace hstu::cpu
