#include "../ops.h"
#include "jagged.h"

namespace hstu::cpu {
namespace {

// kBytes: the row size where it is known, so that copying an id or a time is one load and one store; 0 = `bytes`.
template <int kBytes>
void unzip(char* a, char* b, const char* y, int64_t rows, int64_t bytes) {
  const int64_t n = kBytes ? kBytes : bytes;
  for (int64_t t = 0; t < rows; ++t) {
    std::memcpy(a + t * n, y + 2 * t * n, n);
    std::memcpy(b + t * n, y + (2 * t + 1) * n, n);
  }
}

}  // namespace

void deinterleave(Tensor& a, Tensor& b, const Tensor& y, Stream) {
  int64_t bytes = row_bytes(a);
  auto* copy = bytes == 2 ? unzip<2> : bytes == 4 ? unzip<4> : bytes == 8 ? unzip<8> : unzip<0>;
  parallel_blocks(a.shape[0], row_grain(2 * bytes), [&](int64_t begin, int64_t end) {
    copy(a.as<char>() + begin * bytes, b.as<char>() + begin * bytes, y.as<char>() + 2 * begin * bytes, end - begin, bytes);
  });
}

}  // namespace hstu::cpu
