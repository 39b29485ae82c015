import { record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface SplitOptions {
  /** Offsets of the first parts, int64 [B + 1]. */
  aOffsets: Tensor
  /** Offsets of the second parts, int64 [B + 1]. */
  bOffsets: Tensor
  /** Ta, the rows of all first parts together: given, so that the offsets need not be read back from the device. */
  aRows: number
}

/**
 * The inverse of {@link concat}: each sequence of `y` is cut into its first `aOffsets[b + 1] - aOffsets[b]` rows and the rest.
 * Any dtype; the gradient is `concat`.
 * @param y [Ta + Tb, ...]
 * @returns a [Ta, ...] and b [Tb, ...]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT for offsets that do not fit the rows (CPU).
 */
export function split(y: Tensor, { aOffsets, bOffsets, aRows }: SplitOptions): [a: Tensor, b: Tensor] {
  const rest = y.shape.slice(1)
  const dims = shapes('split', {
    y: [y, ['T', ...rest]],
    aOffsets: [aOffsets, ['B + 1']],
    bOffsets: [bOffsets, ['B + 1']],
  })
  dtypes('split', { aOffsets, bOffsets }, 'int64')
  argument('split', Number.isInteger(aRows) && aRows >= 0 && aRows <= dims.T, () => {
    return `aRows must be an integer in 0..${dims.T} (the rows of y), got ${aRows}`
  })
  const a = Tensor.empty([aRows, ...rest], y)
  const b = Tensor.empty([dims.T - aRows, ...rest], y)
  native.split(a, b, y, aOffsets, bOffsets)
  record('split', [a, b], [y], (da, db) => {
    const dy = emptyLike(y)
    const offsets = emptyLike(aOffsets)
    native.concat(dy, offsets, da ?? Tensor.zeros(a.shape, a), db ?? Tensor.zeros(b.shape, b), aOffsets, bOffsets)
    return [dy]
  })
  return [a, b]
}
