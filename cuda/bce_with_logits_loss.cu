#include "pointwise_loss.cuh"

namespace hstu::cuda {

void bce_with_logits_loss(Tensor& loss, Tensor& weight_sum, const Tensor& logits, const Tensor& labels, const Tensor* weights,
        Stream stream) {
  pointwise_loss<BceWithLogits>("bce_with_logits_loss", loss, weight_sum, logits, labels, weights, stream);
}

void bce_with_logits_loss_backward(Tensor& dlogits, const Tensor& dloss, const Tensor& weight_sum, const Tensor& logits,
                                   const Tensor& labels, const Tensor* weights, Stream stream) {
  pointwise_loss_backward<BceWithLogits>("bce_with_logits_loss_backward", dlogits, dloss, weight_sum, logits, labels, weights, stream);
}

}  // namespace hstu::cuda
