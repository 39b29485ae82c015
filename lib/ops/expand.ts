import { record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface ExpandOptions {
  /** Where each request's candidates begin, int64 [B + 1]. */
  offsets: Tensor
  /** M, the last of the offsets: given, so that they need not be read back from the device. */
  rows: number
}

/**
 * One row a request to its candidates: y[m] = x[b] for m in offsets[b] .. offsets[b + 1] - 1. Any dtype; the gradient of a request
 * is the sum over its candidates.
 * @param x [B, ...]
 * @returns [M, ...]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT for offsets that do not fit the rows (CPU).
 */
export function expand(x: Tensor, { offsets, rows }: ExpandOptions): Tensor {
  const rest = x.shape.slice(1)
  const { B } = shapes('expand', { x: [x, ['B', ...rest]] })
  shapes('expand', { offsets: [offsets, [B + 1]] })
  dtypes('expand', { offsets }, 'int64')
  argument('expand', Number.isInteger(rows) && rows >= 0, () => `rows must be an integer >= 0, got ${rows}`)
  const y = Tensor.empty([rows, ...rest], x)
  native.expand(y, x, offsets)
  return record('expand', y, [x], dy => {
    const dx = emptyLike(x)
    native.expand_backward(dx, dy!, offsets)
    return [dx]
  })
}

/**
 * The sum of each request's rows, in order: y[b] = sum of x[m] over m in offsets[b] .. offsets[b + 1] - 1, 0 where there are none. The
 * gradient is {@link expand}.
 * @param x [M, ...], float32 or float64
 * @param offsets int64 [B + 1]
 * @returns [B, ...]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT for offsets that do not fit the rows (CPU).
 */
export function segmentSum(x: Tensor, offsets: Tensor): Tensor {
  shapes('segmentSum', { x: [x, ['M', ...x.shape.slice(1)]], offsets: [offsets, ['B + 1']] })
  dtypes('segmentSum', { x })
  dtypes('segmentSum', { offsets }, 'int64')
  argument('segmentSum', offsets.size >= 1, () => 'offsets must have one value more than there are requests, got none')
  const y = Tensor.empty([offsets.size - 1, ...x.shape.slice(1)], x)
  native.expand_backward(y, x, offsets)
  return record('segmentSum', y, [x], dy => {
    const dx = emptyLike(x)
    native.expand(dx, dy!, offsets)
    return [dx]
  })
}
