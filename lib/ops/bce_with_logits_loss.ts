import { isTracked, record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface BceWithLogitsLossOptions {
  /** Shape of the logits, float32 (float64 with float64). An element of weight 0 counts nothing, whatever it holds. */
  weights?: Tensor | null
}

/**
 * Cross entropy of each task, averaged by weight: loss_k = sum_m w_mk l_mk / sum_m w_mk, 0 where the weights of task k sum to 0, with
 * l = max(z, 0) - z y + log(1 + exp(-|z|)) = -y log p - (1 - y) log(1 - p), p = sigmoid(z): it neither overflows nor loses digits.
 * @param logits [M] or [M, K]: K tasks, at most 256
 * @param labels shape of the logits, 0 .. 1, float32 (float64 with float64 logits)
 * @returns [1] or [K], float32 also for 16-bit logits
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT.
 */
export function bceWithLogitsLoss(logits: Tensor, labels: Tensor, options: BceWithLogitsLossOptions = {}): Tensor {
  const { weights = null } = options
  const dtype = logits.dtype === 'float64' ? 'float64' : 'float32'
  const dims = logits.rank === 1 ? ['M'] : ['M', 'K']
  const { K = 1 } = shapes('bceWithLogitsLoss', {
    logits: [logits, dims],
    labels: [labels, dims],
    weights: [weights, dims],
  })
  dtypes('bceWithLogitsLoss', { logits })
  dtypes('bceWithLogitsLoss', { labels, weights }, dtype)
  argument('bceWithLogitsLoss', K <= 256, () => `at most 256 tasks, got ${K}`)
  const loss = Tensor.empty([K], { dtype, device: logits.device })
  const weightSum = emptyLike(loss)
  native.bce_with_logits_loss(loss, weightSum, logits, labels, weights)
  if (!isTracked(logits)) weightSum.dispose()
  return record('bceWithLogitsLoss', loss, [logits], dloss => {
    const d = emptyLike(logits)
    native.bce_with_logits_loss_backward(d, dloss!, weightSum, logits, labels, weights)
    return [d]
  })
}
