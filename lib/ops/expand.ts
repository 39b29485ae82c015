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
