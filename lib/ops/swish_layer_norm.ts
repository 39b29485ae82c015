import { isTracked, record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, type Tensor } from '../tensor.js'

export interface SwishLayerNormOptions {
  /** [d]; goes with `bias`: both or neither. */
  weight?: Tensor | null
  /** [d] */
  bias?: Tensor | null
  /** Added to the variance; default 1e-6. */
  eps?: number
}

/**
 * y = x * sigmoid(LN(x)), LN the layer norm over the last dim as in `layerNorm`.
 * @param x [..., d], float32 or float64
 * @returns [..., d]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT for a weight without a bias, or eps not above 0.
 */
export function swishLayerNorm(x: Tensor, options: SwishLayerNormOptions = {}): Tensor {
  const { weight = null, bias = null, eps = 1e-6 } = options
  shapes('swishLayerNorm', { x: [x, ['...', 'd']], weight: [weight, ['d']], bias: [bias, ['d']] })
  dtypes('swishLayerNorm', { x, weight, bias })
  argument('swishLayerNorm', !weight === !bias, () => 'weight and bias go together, give both or neither')
  argument('swishLayerNorm', eps > 0 && Number.isFinite(eps), () => `eps must be a positive number, got ${eps}`)
  const y = emptyLike(x)
  native.swish_layer_norm(y, x, weight, bias, eps)
  return record('swishLayerNorm', y, [x, weight, bias], dy => {
    const affine = isTracked(weight, bias)
    const dx = emptyLike(x)
    const dweight = weight && affine ? emptyLike(weight) : null
    const dbias = bias && affine ? emptyLike(bias) : null
    native.swish_layer_norm_backward(dx, dweight, dbias, dy!, x, weight, bias, eps)
    return [dx, dweight, dbias]
  })
}
