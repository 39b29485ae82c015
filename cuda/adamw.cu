#include <cmath>

#include "tensor_batch.cuh"

namespace hstu::cuda {
namespace {

// m = beta1 m + gain1 g; v = beta2 v + gain2 g^2; p -= rate m / (sqrt(v) inverse_root + eps) + decay p. Made in double: 1 - beta in
// float32 would lose digits.
struct Step {
  float beta1, gain1, beta2, gain2, rate, inverse_root, eps, decay;
};

template <typename T>
struct Update {
  T *p, *m, *v;
  const T* g;
  Step step;
  template <int kN>
  __device__ __forceinline__ void at(int64_t i) const {
    Vector<T, kN> vp = load<kN>(p + i), vg = load<kN>(g + i), vm = load<kN>(m + i), vv = load<kN>(v + i);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      float gradient = to_float(vg.at[j]), param = to_float(vp.at[j]);
      float mean = step.beta1 * to_float(vm.at[j]) + step.gain1 * gradient;
      float square = step.beta2 * to_float(vv.at[j]) + step.gain2 * (gradient * gradient);
      vm.at[j] = from_float<T>(mean);
      vv.at[j] = from_float<T>(square);
      vp.at[j] = from_float<T>(param - (step.rate * mean / (sqrtf(square) * step.inverse_root + step.eps) + step.decay * param));
    }
    store(m + i, vm);
    store(v + i, vv);
    store(p + i, vp);
  }
};

// A block owns one chunk of one tensor; reads and writes are 16 bytes where the four pointers allow it.
template <typename T>
__global__ void __launch_bounds__(kBatchThreads) update_chunks(const __grid_constant__ TensorBatch<4> batch, Step step) {
  int64_t begin, end;
  int i = batch.find(begin, end);
  Update<T> update{static_cast<T*>(batch.data[0][i]), static_cast<T*>(batch.data[2][i]), static_cast<T*>(batch.data[3][i]),
                   static_cast<const T*>(batch.data[1][i]), step};
  uintptr_t bits = reinterpret_cast<uintptr_t>(update.p) | reinterpret_cast<uintptr_t>(update.m) | reinterpret_cast<uintptr_t>(update.v) |
                   reinterpret_cast<uintptr_t>(update.g);
  for_chunk<16 / sizeof(T)>(begin, end, bits % 16 == 0, update);
}

}  // namespace

void adamw(TensorList params, TensorList grads, TensorList m, TensorList v, double lr, double beta1, double beta2, double eps,
           double weight_decay, int64_t step, Stream stream) {
  if (params.items.empty()) return;
  pick_dtype("adamw", params.items[0].dtype, [&](auto zero) {
    using T = decltype(zero);
    double n = double(step);
    // 1 - beta^n without cancellation where beta is near 1
    double rate = lr / -std::expm1(n * std::log(beta1)), root = std::sqrt(-std::expm1(n * std::log(beta2)));
    Step constants{float(beta1), float(1 - beta1), float(beta2), float(1 - beta2), float(rate),
                   float(1 / root), float(eps), float(lr * weight_decay)};
    for_each_batch<4>({&params, &grads, &m, &v}, [&](const TensorBatch<4>& batch, int blocks, int64_t) {
      launch(update_chunks<T>, unsigned(blocks), kBatchThreads, 0, stream, batch, constants);
    });
  });
}

}  // namespace hstu::cuda
