// Losses of elements [M, K] that are averaged task by task; Loss gives value(z, y) and its derivative (math.h).
#pragma once
#include "../dispatch.h"
#include "../math.h"
#include "scratch.h"
#include "threads.h"

namespace hstu::cpu {

constexpr int64_t kLossRows = 1024;  // rows whose losses one task sums

// Summed in double: fixed blocks of rows, then the blocks in order.
template <typename Loss>
void pointwise_loss(const char* op, Tensor& loss, Tensor& weight_sum, const Tensor& logits, const Tensor& labels, const Tensor* weights) {
  pick_float(op, logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t tasks = loss.size(), rows = tasks == 0 ? 0 : logits.size() / tasks, blocks = (rows + kLossRows - 1) / kLossRows;
    const T *z = logits.as<T>(), *y = labels.as<T>(), *w = data_or_null<T>(weights);
    Scratch<double> sums(blocks * 2 * tasks, true);  // [blocks, {loss, weight}, K]
    parallel_blocks(rows, kLossRows, [&](int64_t begin, int64_t end) {
      double* sum = sums + begin / kLossRows * 2 * tasks;
      for (int64_t i = begin * tasks, k = 0; i < end * tasks; ++i, k = k + 1 == tasks ? 0 : k + 1) {
        T weight = w ? w[i] : T(1);
        if (weight == T(0)) continue;
        sum[k] += double(weight) * double(Loss::value(z[i], y[i]));
        sum[tasks + k] += double(weight);
      }
    });
    for (int64_t k = 0; k < tasks; ++k) {
      double total = 0, weight = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        total += sums[block * 2 * tasks + k];
        weight += sums[(block * 2 + 1) * tasks + k];
      }
      loss.as<T>()[k] = weight == 0 ? T(0) : T(total / weight);
      weight_sum.as<T>()[k] = T(weight);
    }
  });
}

template <typename Loss>
void pointwise_loss_backward(const char* op, Tensor& dlogits, const Tensor& dloss, const Tensor& weight_sum, const Tensor& logits,
                             const Tensor& labels, const Tensor* weights) {
  pick_float(op, logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t tasks = dloss.size(), rows = tasks == 0 ? 0 : logits.size() / tasks;
    const T *z = logits.as<T>(), *y = labels.as<T>(), *w = data_or_null<T>(weights);
    Scratch<T> scale(tasks);
    for (int64_t k = 0; k < tasks; ++k) {
      T weight = weight_sum.as<T>()[k];
      scale[k] = weight == T(0) ? T(0) : dloss.as<T>()[k] / weight;
    }
    parallel_blocks(rows, kLossRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * tasks, k = 0; i < end * tasks; ++i, k = k + 1 == tasks ? 0 : k + 1) {
        T weight = w ? w[i] : T(1);
        dlogits.as<T>()[i] = weight == T(0) ? T(0) : scale[k] * weight * Loss::derivative(z[i], y[i]);
      }
    });
  });
}

}  // namespace hstu::cpu
