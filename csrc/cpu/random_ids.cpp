#include <algorithm>

#include "../math.h"
#include "../ops.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kLanes = 64;  // blocks of the generator that are computed side by side

// Blocks offset .. offset + kLanes - 1: their words are kept apart until the end so that the rounds vectorise.
HSTU_CLONES void draw(int64_t* ids, int64_t low, int64_t range, uint64_t seed, uint64_t offset) {
  uint32_t words[4][kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    Philox4 random = philox4x32(seed, offset + uint64_t(i));
    words[0][i] = random.word[0], words[1][i] = random.word[1], words[2][i] = random.word[2], words[3][i] = random.word[3];
  }
  for (int64_t i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) ids[4 * i + j] = random_id(words[j][i], low, range);
}

}  // namespace

void random_ids(Tensor& ids, int64_t low, int64_t high, int64_t seed, int64_t offset, Stream) {
  int64_t* out = ids.as<int64_t>();
  parallel_blocks(ids.size(), 1 << 14, [&](int64_t begin, int64_t end) {
    for (; end - begin >= 4 * kLanes; begin += 4 * kLanes)
      draw(out + begin, low, high - low, uint64_t(seed), uint64_t(offset) + uint64_t(begin / 4));
    for (; begin < end; ++begin)
      out[begin] = random_id(philox_word(uint64_t(seed), uint64_t(offset), uint64_t(begin)), low, high - low);
  });
}

}  // namespace hstu::cpu
