import { argument, dtypes } from '../checks.js'
import { native } from '../native.js'
import { Tensor, type TensorOptions } from '../tensor.js'

export interface RandomUniformOptions extends TensorOptions {
  /** Above 0. */
  bound: number
  /** Key of the generator. */
  seed: bigint
  /** Block of the generator's stream at which the draw begins; n elements use ceil(n / 4) blocks. Default 0. */
  offset?: bigint
}

/**
 * Independent numbers, uniform in -bound .. bound (bound itself not reached), the same bits on every device: element n (row-major) is
 * `bound 2^-23 (w >> 8)`, w = word n mod 4, as a signed number, of block `offset + floor(n / 4)` of Philox4x32-10 keyed by `seed`.
 * @returns float32 unless `dtype` names another, of the given shape
 * @throws HstuError ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT.
 */
export function randomUniform(shape: readonly number[], options: RandomUniformOptions): Tensor {
  const { bound, seed, offset = 0n, ...like } = options
  argument('randomUniform', bound > 0 && Number.isFinite(bound), () => `bound must be a number above 0, got ${bound}`)
  const x = Tensor.empty(shape, like)
  dtypes('randomUniform', { x })
  native.random_uniform(x, bound, seed, offset)
  return x
}
