#include "map.cuh"

namespace hstu::cuda {
namespace {

// Element i has word i % 4 of Philox block offset + i / 4: a thread with 4 neighbours draws one block for them.
struct RandomIds {
  int64_t *ids, low, range;
  uint64_t seed, offset;
  template <int kN>
  __device__ void at(int64_t i) const {
    Vector<int64_t, kN> drawn;
    Philox4 random = philox4x32(seed, offset + uint64_t(i) / 4);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      int k = kN == 4 ? j : int(i % 4);
      uint32_t word = k == 0 ? random.word[0] : k == 1 ? random.word[1] : k == 2 ? random.word[2] : random.word[3];
      drawn.at[j] = random_id(word, low, range);
    }
    store(ids + i, drawn);
  }
};

}  // namespace

void random_ids(Tensor& ids, int64_t low, int64_t high, int64_t seed, int64_t offset, Stream stream) {
  RandomIds fn{ids.as<int64_t>(), low, high - low, uint64_t(seed), uint64_t(offset)};
  map<4>(ids.size(), aligned<4>(fn.ids), fn, stream);
}

}  // namespace hstu::cuda
