#include <algorithm>

#include "../dispatch.h"
#include "../math.h"
#include "../ops.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kBlock = 1 << 14;  // elements of a task, a multiple of 4
constexpr int64_t kLanes = 64;       // blocks of the generator that are computed side by side

// Blocks offset .. offset + kLanes - 1: their words are kept apart until the end so that the rounds vectorise.
template <typename T>
HSTU_CLONES void draw(T* x, T scale, uint64_t seed, uint64_t offset) {
  uint32_t words[4][kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    Philox4 random = philox4x32(seed, offset + uint64_t(i));
    words[0][i] = random.word[0], words[1][i] = random.word[1], words[2][i] = random.word[2], words[3][i] = random.word[3];
  }
  for (int64_t i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) x[4 * i + j] = scale * T(signed_24(words[j][i]));
}
template void draw<float>(float*, float, uint64_t, uint64_t);
template void draw<double>(double*, double, uint64_t, uint64_t);

}  // namespace

void random_uniform(Tensor& x, double bound, int64_t seed, int64_t offset, Stream) {
  pick_float("random_uniform", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = x.as<T>();
    T scale = T(bound) * T(0x1p-23);
    parallel_blocks(x.size(), kBlock, [&](int64_t begin, int64_t end) {
      for (; end - begin >= 4 * kLanes; begin += 4 * kLanes)
        draw<T>(out + begin, scale, uint64_t(seed), uint64_t(offset) + uint64_t(begin / 4));
      for (; begin < end; ++begin)
        out[begin] = scale * T(signed_24(philox_word(uint64_t(seed), uint64_t(offset), uint64_t(begin))));
    });
  });
}

}  // namespace hstu::cpu
