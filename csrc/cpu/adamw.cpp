#include <algorithm>
#include <cmath>

#include "../dispatch.h"
#include "../ops.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

// m = beta1 m + gain1 g; v = beta2 v + gain2 g^2; p -= rate m / (sqrt(v) inverse_root + eps) + decay p. Made in double:
// 1 - beta in float32 would lose digits.
template <typename T>
struct Step {
  T beta1, gain1, beta2, gain2, rate, inverse_root, eps, decay;
};

template <typename T>
HSTU_CLONES void update(T* __restrict p, const T* __restrict g, T* __restrict m, T* __restrict v, int64_t n, const Step<T>& step) {
  auto [beta1, gain1, beta2, gain2, rate, inverse_root, eps, decay] = step;
  for (int64_t i = 0; i < n; ++i) {
    T gradient = g[i];
    T mean = beta1 * m[i] + gain1 * gradient;
    T square = beta2 * v[i] + gain2 * (gradient * gradient);
    m[i] = mean;
    v[i] = square;
    p[i] -= rate * mean / (std::sqrt(square) * inverse_root + eps) + decay * p[i];
  }
}
template void update<float>(float*, const float*, float*, float*, int64_t, const Step<float>&);
template void update<double>(double*, const double*, double*, double*, int64_t, const Step<double>&);

constexpr int64_t kBlock = 1 << 14;

}  // namespace

// One parallel pass over fixed blocks of all tensors.
void adamw(TensorList params, TensorList grads, TensorList m, TensorList v, double lr, double beta1, double beta2, double eps,
           double weight_decay, int64_t step, Stream) {
  if (params.items.empty()) return;
  struct Block {
    size_t tensor;
    int64_t begin;
  };
  std::vector<Block> blocks;
  for (size_t tensor = 0; tensor < params.items.size(); ++tensor)
    for (int64_t begin = 0; begin < params.items[tensor].size(); begin += kBlock) blocks.push_back({tensor, begin});
  pick_float("adamw", params.items[0].dtype, [&](auto zero) {
    using T = decltype(zero);
    double n = double(step);
    // 1 - beta^n without cancellation where beta is near 1
    double rate = lr / -std::expm1(n * std::log(beta1)), root = std::sqrt(-std::expm1(n * std::log(beta2)));
    Step<T> constants{T(beta1), T(1 - beta1), T(beta2), T(1 - beta2), T(rate), T(1 / root), T(eps), T(lr * weight_decay)};
    parallel_for(int64_t(blocks.size()), [&](int64_t index) {
      auto [tensor, begin] = blocks[index];
      int64_t count = std::min(kBlock, params.items[tensor].size() - begin);
      update<T>(params.items[tensor].as<T>() + begin, grads.items[tensor].as<T>() + begin, m.items[tensor].as<T>() + begin,
                v.items[tensor].as<T>() + begin, count, constants);
    });
  });
}

}  // namespace hstu::cpu
