import { record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import type { PhiloxPosition } from '../philox.js'
import { emptyLike, type Tensor } from '../tensor.js'

/**
 * Inverted dropout: element n (row-major) is x / (1 - p) where word n of the Philox4x32-10 draw (Salmon et al. 2011) is at or above
 * p 2^32, else 0. The mask depends on seed, offset and n alone; nothing is kept for the gradient, which draws it again.
 * @param x any shape, float32 or float64; returned itself where p is 0
 * @param p chance to drop an element, 0 <= p < 1
 * @param position key and first counter of the draw, which takes ceil(size / 4) counters
 * @throws HstuError ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT for p outside [0, 1).
 */
export function dropout(x: Tensor, p: number, position: PhiloxPosition): Tensor {
  dtypes('dropout', { x })
  argument('dropout', p >= 0 && p < 1, () => `p must be in [0, 1), got ${p}`)
  if (p === 0) return x
  const { seed, offset, base = null } = position
  shapes('dropout', { base: [base, [1]] })
  dtypes('dropout', { base }, 'int64')
  const y = emptyLike(x)
  native.dropout(y, x, p, seed, offset, base)
  return record('dropout', y, [x], dy => {
    const dx = emptyLike(x)
    native.dropout(dx, dy!, p, seed, offset, base)
    return [dx]
  })
}
