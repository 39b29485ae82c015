import { isTracked, record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, type Tensor } from '../tensor.js'

export interface LayerNormOptions {
  /** [d]; goes with `bias`: both or neither. */
  weight?: Tensor | null
  /** [d] */
  bias?: Tensor | null
  /** Added to the variance; default 1e-6. */
  eps?: number
}

/**
 * y = (x - mean) / sqrt(var + eps) * weight + bias over the last dim, var the biased variance (Ba et al. 2016, eq. 3, 4).
 * @param x [..., d], float32 or float64
 * @returns [..., d]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT for a weight without a bias, or eps not above 0.
 */
export function layerNorm(x: Tensor, options: LayerNormOptions = {}): Tensor {
  const { weight = null, bias = null, eps = 1e-6 } = options
  shapes('layerNorm', { x: [x, ['...', 'd']], weight: [weight, ['d']], bias: [bias, ['d']] })
  dtypes('layerNorm', { x, weight, bias })
  argument('layerNorm', !weight === !bias, () => 'weight and bias go together, give both or neither')
  argument('layerNorm', eps > 0 && Number.isFinite(eps), () => `eps must be a positive number, got ${eps}`)
  const y = emptyLike(x)
  native.layer_norm(y, x, weight, bias, eps)
  return record('layerNorm', y, [x, weight, bias], dy => {
    const affine = isTracked(weight, bias)
    const dx = emptyLike(x)
    const dweight = weight && affine ? emptyLike(weight) : null
    const dbias = bias && affine ? emptyLike(bias) : null
    native.layer_norm_backward(dx, dweight, dbias, dy!, x, weight, eps)
    return [dx, dweight, dbias]
  })
}
