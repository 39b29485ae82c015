#include "../ops.h"
#include "pointwise_loss.h"

namespace hstu::cpu {

void bce_with_logits_loss(Tensor& loss, Tensor& weight_sum, const Tensor& logits, const Tensor& labels, const Tensor* weights, Stream) {
  pointwise_loss<BceWithLogits>("bce_with_logits_loss", loss, weight_sum, logits, labels, weights);
}

void bce_with_logits_loss_backward(Tensor& dlogits, const Tensor& dloss, const Tensor& weight_sum, const Tensor& logits,
                                   const Tensor& labels, const Tensor* weights, Stream) {
  pointwise_loss_backward<BceWithLogits>("bce_with_logits_loss_backward", dlogits, dloss, weight_sum, logits, labels, weights);
}

}  // namespace hstu::cpu
