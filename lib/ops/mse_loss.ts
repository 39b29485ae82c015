import { isTracked, record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface MseLossOptions {
  /** Shape of the predictions, float32 (float64 with float64). An element of weight 0 counts nothing, whatever it holds. */
  weights?: Tensor | null
}

/**
 * Squared error of each task, averaged by weight: loss_k = sum_m w_mk (z_mk - y_mk)^2 / sum_m w_mk, 0 where the weights of task k sum
 * to 0.
 * @param predictions [M] or [M, K]: K tasks, at most 256
 * @param labels shape of the predictions, float32 (float64 with float64 predictions)
 * @returns [1] or [K], float32 also for 16-bit predictions
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT.
 */
export function mseLoss(predictions: Tensor, labels: Tensor, options: MseLossOptions = {}): Tensor {
  const { weights = null } = options
  const dtype = predictions.dtype === 'float64' ? 'float64' : 'float32'
  const dims = predictions.rank === 1 ? ['M'] : ['M', 'K']
  const { K = 1 } = shapes('mseLoss', {
    predictions: [predictions, dims],
    labels: [labels, dims],
    weights: [weights, dims],
  })
  dtypes('mseLoss', { predictions })
  dtypes('mseLoss', { labels, weights }, dtype)
  argument('mseLoss', K <= 256, () => `at most 256 tasks, got ${K}`)
  const loss = Tensor.empty([K], { dtype, device: predictions.device })
  const weightSum = emptyLike(loss)
  native.mse_loss(loss, weightSum, predictions, labels, weights)
  if (!isTracked(predictions)) weightSum.dispose()
  return record('mseLoss', loss, [predictions], dloss => {
    const d = emptyLike(predictions)
    native.mse_loss_backward(d, dloss!, weightSum, predictions, labels, weights)
    return [d]
  })
}
