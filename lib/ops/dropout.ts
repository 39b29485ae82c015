import { record } from '../autograd.js'
import { argument, dtypes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, type Tensor } from '../tensor.js'

export interface DropoutOptions {
  /** Key of the generator, 64 bits. */
  seed: bigint
  /** First Philox block of this draw, which uses ceil(size / 4) blocks. */
  offset: bigint
}

/**
 * Inverted dropout: element n (row-major) is x / (1 - p) where word n of the Philox4x32-10 draw (Salmon et al. 2011) is at or above
 * p 2^32, else 0. The mask depends on seed, offset and n alone; nothing is kept for the gradient, which draws it again.
 * @param x any shape, float32 or float64; returned itself where p is 0
 * @param p chance to drop an element, 0 <= p < 1
 * @throws HstuError ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT for p outside [0, 1).
 */
export function dropout(x: Tensor, p: number, { seed, offset }: DropoutOptions): Tensor {
  dtypes('dropout', { x })
  argument('dropout', p >= 0 && p < 1, () => `p must be in [0, 1), got ${p}`)
  if (p === 0) return x
  const y = emptyLike(x)
  native.dropout(y, x, p, seed, offset)
  return record('dropout', y, [x], dy => {
    const dx = emptyLike(x)
    native.dropout(dx, dy!, p, seed, offset)
    return [dx]
  })
}
