#include "../ops.h"
#include "jagged.h"

namespace hstu::cpu {

void dense_to_jagged(Tensor& x, const Tensor& y, const Tensor& seq_offsets, Stream) {
  const int64_t* offsets = check_offsets("dense_to_jagged", "seq_offsets", seq_offsets, x.shape[0]);
  int64_t length = y.shape[1], bytes = row_bytes(x);
  parallel_jagged(offsets, seq_offsets.size() - 1, row_grain(bytes), [&](int64_t sequence, int64_t begin, int64_t end) {
    int64_t start = offsets[sequence], filled = std::clamp(start + length, begin, end);
    std::memcpy(x.as<char>() + begin * bytes, y.as<char>() + (sequence * length + begin - start) * bytes, (filled - begin) * bytes);
    std::memset(x.as<char>() + filled * bytes, 0, (end - filled) * bytes);
  });
}

}  // namespace hstu::cpu
