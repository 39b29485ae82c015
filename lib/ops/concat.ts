import { record } from '../autograd.js'
import { dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface ConcatOptions {
  /** Offsets of a's sequences, int64 [B + 1]. */
  aOffsets: Tensor
  /** Offsets of b's sequences, int64 [B + 1]. */
  bOffsets: Tensor
}

/**
 * Joins two jagged tensors sequence by sequence: the rows of `a`, then the rows of `b`. Any dtype; the gradient is {@link split}.
 * @param a [Ta, ...]
 * @param b [Tb, ...], trailing dims and dtype as `a`
 * @returns `values` [Ta + Tb, ...] and their `offsets`, int64 [B + 1]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT for offsets that do not fit the rows (CPU).
 */
export function concat(
  a: Tensor,
  b: Tensor,
  { aOffsets, bOffsets }: ConcatOptions,
): { values: Tensor; offsets: Tensor } {
  const rest = a.shape.slice(1)
  const { Ta, Tb } = shapes('concat', {
    a: [a, ['Ta', ...rest]],
    b: [b, ['Tb', ...rest]],
    aOffsets: [aOffsets, ['B + 1']],
    bOffsets: [bOffsets, ['B + 1']],
  })
  dtypes('concat', { b }, a.dtype)
  dtypes('concat', { aOffsets, bOffsets }, 'int64')
  const values = Tensor.empty([Ta + Tb, ...rest], a)
  const offsets = emptyLike(aOffsets)
  native.concat(values, offsets, a, b, aOffsets, bOffsets)
  record('concat', values, [a, b], dy => {
    const da = emptyLike(a)
    const db = emptyLike(b)
    native.split(da, db, dy!, aOffsets, bOffsets)
    return [da, db]
  })
  return { values, offsets }
}
