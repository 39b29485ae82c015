import { record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, type Tensor } from '../tensor.js'

/**
 * y = x / max(|x|, eps) over the last dim, |x| the Euclidean norm. Where the norm is below eps the divisor is the constant eps, also
 * for the gradient.
 * @param x [..., d], float32 or float64
 * @returns [..., d]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT for eps not above 0.
 */
export function l2Normalize(x: Tensor, eps = 1e-6): Tensor {
  shapes('l2Normalize', { x: [x, ['...', 'd']] })
  dtypes('l2Normalize', { x })
  argument('l2Normalize', eps > 0 && Number.isFinite(eps), () => `eps must be a positive number, got ${eps}`)
  const y = emptyLike(x)
  native.l2_normalize(y, x, eps)
  return record('l2Normalize', y, [x], dy => {
    const dx = emptyLike(x)
    native.l2_normalize_backward(dx, dy!, x, eps)
    return [dx]
  })
}
