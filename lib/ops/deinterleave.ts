import { record } from '../autograd.js'
import { argument, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

/**
 * The inverse of {@link interleave}: the even and the odd rows of `y`. Any dtype; the gradient is `interleave`.
 * @param y [2 T, ...]
 * @returns a [T, ...] (even rows) and b [T, ...] (odd rows)
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_INVALID_ARGUMENT for an odd number of rows.
 */
export function deinterleave(y: Tensor): [a: Tensor, b: Tensor] {
  const rest = y.shape.slice(1)
  const { rows } = shapes('deinterleave', { y: [y, ['rows', ...rest]] })
  argument('deinterleave', rows % 2 === 0, () => `y must have an even number of rows, got ${rows}`)
  const a = Tensor.empty([rows / 2, ...rest], y)
  const b = emptyLike(a)
  native.deinterleave(a, b, y)
  record('deinterleave', [a, b], [y], (da, db) => {
    const dy = emptyLike(y)
    native.interleave(dy, da ?? Tensor.zeros(a.shape, a), db ?? Tensor.zeros(b.shape, b))
    return [dy]
  })
  return [a, b]
}
