#include "map.cuh"

namespace hstu::cuda {
namespace {

// Element i has word i % 4 of Philox block offset + i / 4: a thread with 4 neighbours draws one block for them.
template <typename T>
struct Dropout {
  T* y;
  const T* x;
  uint64_t seed;
  DrawOffset offset;
  uint32_t threshold;
  float scale;
  template <int kN>
  __device__ void at(int64_t i) const {
    Vector<T, kN> vx = load<kN>(x + i), vy;
    Philox4 random = philox4x32(seed, offset + uint64_t(i) / 4);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      int k = kN == 4 ? j : int(i % 4);
      uint32_t word = k == 0 ? random.word[0] : k == 1 ? random.word[1] : k == 2 ? random.word[2] : random.word[3];
      vy.at[j] = from_float<T>(word >= threshold ? to_float(vx.at[j]) * scale : 0.f);
    }
    store(y + i, vy);
  }
};

}  // namespace

void dropout(Tensor& y, const Tensor& x, double p, int64_t seed, int64_t offset, const Tensor* base, Stream stream) {
  HSTU_CHECK(p >= 0 && p < 1, kInvalidArgument, "dropout: p must be in [0, 1), got ", p);
  pick_dtype("dropout", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    DrawOffset begins{uint64_t(offset), data_or_null<int64_t>(base)};
    Dropout<T> fn{y.as<T>(), x.as<T>(), uint64_t(seed), begins, dropout_threshold(p), float(1.0 / (1.0 - p))};
    map<4>(x.size(), aligned<4>(fn.y) && aligned<4>(fn.x), fn, stream);
  });
}

}  // namespace hstu::cuda
