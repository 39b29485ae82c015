#include <algorithm>
#include <cmath>

#include "../dispatch.h"
#include "../ops.h"
#include "scratch.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kBlock = 1 << 14;
constexpr int kLanes = 16;

template <typename T>
HSTU_CLONES double sum_of_squares(const T* x, int64_t n) {
  double sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] += double(x[i + lane]) * double(x[i + lane]);
  for (int lane = 0; i < n; ++i, ++lane) sum[lane] += double(x[i]) * double(x[i]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  return sum[0];
}
template double sum_of_squares<float>(const float*, int64_t);
template double sum_of_squares<double>(const double*, int64_t);

template <typename T>
HSTU_CLONES void scale(T* x, int64_t n, T factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}
template void scale<float>(float*, int64_t, float);
template void scale<double>(double*, int64_t, double);

}  // namespace

// Squares are summed in double by fixed blocks of each tensor, the blocks' sums in order.
void global_norm_clip(Tensor& norm, TensorList grads, double max_norm, Stream) {
  struct Block {
    size_t tensor;
    int64_t begin, count;
  };
  std::vector<Block> blocks;
  for (size_t tensor = 0; tensor < grads.items.size(); ++tensor)
    for (int64_t size = grads.items[tensor].size(), begin = 0; begin < size; begin += kBlock)
      blocks.push_back({tensor, begin, std::min(kBlock, size - begin)});
  pick_float("global_norm_clip", norm.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t count = int64_t(blocks.size());
    Scratch<double> sums(count);
    parallel_for(count, [&](int64_t i) {
      sums[i] = sum_of_squares<T>(grads.items[blocks[i].tensor].as<T>() + blocks[i].begin, blocks[i].count);
    });
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += sums[i];
    total = std::sqrt(total);
    *norm.as<T>() = T(total);
    double factor = max_norm / (total + 1e-6);
    if (!std::isfinite(total) || factor >= 1) return;
    parallel_for(count, [&](int64_t i) {
      scale<T>(grads.items[blocks[i].tensor].as<T>() + blocks[i].begin, blocks[i].count, T(factor));
    });
  });
}

}  // namespace hstu::cpu
