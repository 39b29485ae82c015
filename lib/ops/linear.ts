import { isTracked, record } from '../autograd.js'
import { dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface LinearOptions {
  /** [out] */
  bias?: Tensor | null
  /** Added after the activation, same shape as the result. */
  residual?: Tensor | null
  activation?: 'none' | 'silu' | 'relu' | 'gelu'
}

/**
 * y = activation(x w + bias) + residual.
 * @param x [..., in], float32 or float64
 * @param w [in, out]
 * @returns [..., out]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE.
 */
export function linear(x: Tensor, w: Tensor, options: LinearOptions = {}): Tensor {
  const { bias = null, residual = null, activation = 'none' } = options
  const dims = shapes('linear', { x: [x, ['...', 'in']], w: [w, ['in', 'out']], bias: [bias, ['out']] })
  const shape = [...x.shape.slice(0, -1), dims.out]
  if (residual) shapes('linear', { residual: [residual, shape] })
  dtypes('linear', { x, w, bias, residual })
  const y = Tensor.empty(shape, x)
  const z = activation !== 'none' && isTracked(x, w, bias) ? emptyLike(y) : null
  native.linear(y, z, x, w, bias, residual, activation)
  return record('linear', y, [x, w, bias, residual], dy => {
    const dx = isTracked(x) ? emptyLike(x) : null
    const dw = isTracked(w) ? emptyLike(w) : null
    const dbias = bias && isTracked(bias) ? emptyLike(bias) : null
    if (dx || dw || dbias) native.linear_backward(dx, dw, dbias, dy!, x, w, z, activation)
    return [dx, dw, dbias, dy]
  })
}
