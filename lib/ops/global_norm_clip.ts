import { refuseInTape } from '../autograd.js'
import { argument, dtypes } from '../checks.js'
import { native } from '../native.js'
import { Tensor } from '../tensor.js'

/**
 * Scales all gradients in place by min(1, maxNorm / (norm + 1e-6)), where norm is the root of the sum of the squares of all their
 * elements. Where the norm is not finite they are left as they are.
 * @param grads of any shapes, all float32 or all float64; an empty list has norm 0
 * @param maxNorm above 0; Infinity only measures
 * @returns norm [1], before the scaling
 * @throws HstuError ERR_HSTU_DTYPE naming the index; ERR_HSTU_INVALID_ARGUMENT, also inside `valueAndGrad`.
 * @see Pascanu et al., "On the difficulty of training recurrent neural networks" (2013), algorithm 1.
 */
export function globalNormClip(grads: readonly Tensor[], maxNorm: number): Tensor {
  refuseInTape('globalNormClip')
  argument('globalNormClip', maxNorm > 0, () => `maxNorm must be above 0, got ${maxNorm}`)
  dtypes('globalNormClip', Object.fromEntries(grads.map((grad, i) => [`grads[${i}]`, grad])))
  const seen = new Map<Tensor, number>()
  grads.forEach((grad, i) => {
    argument('globalNormClip', !seen.has(grad), () => `grads[${i}] is grads[${seen.get(grad)}]`)
    seen.set(grad, i)
  })
  const norm = Tensor.empty([1], grads[0])
  native.global_norm_clip(norm, grads, maxNorm)
  return norm
}
