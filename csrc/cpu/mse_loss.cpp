#include "../ops.h"
#include "pointwise_loss.h"

namespace hstu::cpu {

void mse_loss(Tensor& loss, Tensor& weight_sum, const Tensor& logits, const Tensor& labels, const Tensor* weights, Stream) {
  pointwise_loss<SquaredError>("mse_loss", loss, weight_sum, logits, labels, weights);
}

void mse_loss_backward(Tensor& dlogits, const Tensor& dloss, const Tensor& weight_sum, const Tensor& logits, const Tensor& labels,
                       const Tensor* weights, Stream) {
  pointwise_loss_backward<SquaredError>("mse_loss_backward", dlogits, dloss, weight_sum, logits, labels, weights);
}

}  // namespace hstu::cpu
