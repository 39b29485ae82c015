#include "map.cuh"

namespace hstu::cuda {
namespace {

// Element i has word i % 4 of Philox block offset + i / 4: a thread with 4 neighbours draws one block for them.
template <typename T>
struct RandomUniform {
  T* x;
  float scale;
  uint64_t seed, offset;
  template <int kN>
  __device__ void at(int64_t i) const {
    Vector<T, kN> drawn;
    Philox4 random = philox4x32(seed, offset + uint64_t(i) / 4);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      int k = kN == 4 ? j : int(i % 4);
      uint32_t word = k == 0 ? random.word[0] : k == 1 ? random.word[1] : k == 2 ? random.word[2] : random.word[3];
      drawn.at[j] = from_float<T>(scale * float(signed_24(word)));
    }
    store(x + i, drawn);
  }
};

}  // namespace

void random_uniform(Tensor& x, double bound, int64_t seed, int64_t offset, Stream stream) {
  pick_dtype("random_uniform", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    RandomUniform<T> fn{x.as<T>(), float(bound) * 0x1p-23f, uint64_t(seed), uint64_t(offset)};
    map<4>(x.size(), aligned<4>(fn.x), fn, stream);
  });
}

}  // namespace hstu::cuda
