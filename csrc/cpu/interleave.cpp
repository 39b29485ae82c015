#include "../ops.h"
#include "jagged.h"

namespace hstu::cpu {
namespace {

// kBytes: the row size where it is known, so that copying an id or a time is one load and one store; 0 = `bytes`.
template <int kBytes>
void zip(char* y, const char* a, const char* b, int64_t rows, int64_t bytes) {
  const int64_t n = kBytes ? kBytes : bytes;
  for (int64_t t = 0; t < rows; ++t) {
    std::memcpy(y + 2 * t * n, a + t * n, n);
    std::memcpy(y + (2 * t + 1) * n, b + t * n, n);
  }
}

}  // namespace

void interleave(Tensor& y, const Tensor& a, const Tensor& b, Stream) {
  int64_t bytes = row_bytes(a);
  auto* copy = bytes == 2 ? zip<2> : bytes == 4 ? zip<4> : bytes == 8 ? zip<8> : zip<0>;
  parallel_blocks(a.shape[0], row_grain(2 * bytes), [&](int64_t begin, int64_t end) {
    copy(y.as<char>() + 2 * begin * bytes, a.as<char>() + begin * bytes, b.as<char>() + begin * bytes, end - begin, bytes);
  });
}

}  // namespace hstu::cpu
