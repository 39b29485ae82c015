import { record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface JaggedToDenseOptions {
  /** int64 [B + 1] */
  seqOffsets: Tensor
  /** N: rows of the result a sequence; longer sequences lose their last rows. */
  maxLength: number
  /** Value beyond a sequence's length, rounded to x's dtype; an integer where that is one. Default 0. */
  padding?: number
}

/**
 * Lays each sequence in a row of its own, padded: y[b, n] = row n of sequence b, `padding` beyond its length. Any dtype; the gradient
 * is {@link denseToJagged}.
 * @param x [T, ...]
 * @returns [B, N, ...]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT for a length or padding that cannot be, or offsets
 * that do not fit the rows (CPU).
 */
export function jaggedToDense(x: Tensor, { seqOffsets, maxLength, padding = 0 }: JaggedToDenseOptions): Tensor {
  const rest = x.shape.slice(1)
  const dims = shapes('jagged_to_dense', { x: [x, ['T', ...rest]], seqOffsets: [seqOffsets, ['B + 1']] })
  dtypes('jagged_to_dense', { seqOffsets }, 'int64')
  argument('jagged_to_dense', Number.isInteger(maxLength) && maxLength >= 0, () => {
    return `maxLength must be an integer >= 0, got ${maxLength}`
  })
  const whole = x.dtype === 'int64' ? Number.isSafeInteger(padding) : x.dtype !== 'int32' || padding === (padding | 0)
  argument('jagged_to_dense', whole, () => `padding ${padding} is no ${x.dtype}`)
  argument('jagged_to_dense', dims['B + 1'] > 0, () => 'seqOffsets is empty, it must have B + 1 values')
  const y = Tensor.empty([dims['B + 1'] - 1, maxLength, ...rest], x)
  native.jagged_to_dense(y, x, seqOffsets, padding)
  return record('jagged_to_dense', y, [x], dy => {
    const dx = emptyLike(x)
    native.dense_to_jagged(dx, dy!, seqOffsets)
    return [dx]
  })
}
