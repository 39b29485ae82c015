import { refuseInTape } from '../autograd.js'
import { argument, dtypes, isLike, shapes } from '../checks.js'
import { native } from '../native.js'
import type { Tensor } from '../tensor.js'

export interface AdamwOptions {
  /** Learning rate of this step. */
  lr: number
  /** Default 0.9. */
  beta1?: number
  /** Default 0.999. */
  beta2?: number
  /** Default 1e-8. */
  eps?: number
  /** Decoupled; default 0. */
  weightDecay?: number
  /** The number of this step, from 1. */
  step: number
}

/**
 * One AdamW step over lists of equal length, in place on `params`, `m` and `v`:
 * m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
 * p -= lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps) + lr weightDecay p.
 * `params[i]`, `grads[i]`, `m[i]` and `v[i]` have one shape; all tensors share one dtype, float32 or float64. No tensor may be in
 * `params` twice.
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE naming the index; ERR_HSTU_INVALID_ARGUMENT, also inside `valueAndGrad`.
 * @see Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2.
 */
export function adamw(
  params: readonly Tensor[],
  grads: readonly Tensor[],
  m: readonly Tensor[],
  v: readonly Tensor[],
  options: AdamwOptions,
): void {
  const { lr, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weightDecay = 0, step } = options
  refuseInTape('adamw')
  for (const [name, list] of Object.entries({ grads, m, v }))
    argument('adamw', list.length === params.length, () => {
      return `${name} has ${list.length} tensors, params has ${params.length}`
    })
  if (new Set(params).size < params.length) {
    const again = params.findIndex((param, i) => params.indexOf(param) < i)
    argument('adamw', false, () => `params[${again}] is params[${params.indexOf(params[again]!)}]`)
  }
  params.forEach((param, i) => {
    const likeFirst = param.dtype === params[0]!.dtype && i > 0
    if (likeFirst && isLike(grads[i], param) && isLike(m[i], param) && isLike(v[i], param)) return
    const shape = param.shape
    shapes('adamw', { [`grads[${i}]`]: [grads[i], shape], [`m[${i}]`]: [m[i], shape], [`v[${i}]`]: [v[i], shape] })
    const tensors = { [`params[${i}]`]: param, [`grads[${i}]`]: grads[i], [`m[${i}]`]: m[i], [`v[${i}]`]: v[i] }
    dtypes('adamw', { 'params[0]': params[0], ...tensors })
  })
  for (const [name, beta] of Object.entries({ beta1, beta2 }))
    argument('adamw', beta >= 0 && beta < 1, () => `${name} must be in [0, 1), got ${beta}`)
  for (const [name, value] of Object.entries({ lr, eps, weightDecay }))
    argument('adamw', value >= 0, () => `${name} must not be negative, got ${value}`)
  argument('adamw', Number.isSafeInteger(step) && step >= 1, () => `step must be an integer of at least 1, got ${step}`)
  native.adamw(params, grads, m, v, lr, beta1, beta2, eps, weightDecay, BigInt(step))
}
