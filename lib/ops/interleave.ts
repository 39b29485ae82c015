import { record } from '../autograd.js'
import { dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

/**
 * Rows of `a` and `b` in turn: y[2 t] = a[t], y[2 t + 1] = b[t]. Any dtype; the gradient is {@link deinterleave}.
 * @param a [T, ...]
 * @param b shape and dtype of `a`
 * @returns [2 T, ...]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE.
 */
export function interleave(a: Tensor, b: Tensor): Tensor {
  const rest = a.shape.slice(1)
  const { T } = shapes('interleave', { a: [a, ['T', ...rest]], b: [b, ['T', ...rest]] })
  dtypes('interleave', { b }, a.dtype)
  const y = Tensor.empty([2 * T, ...rest], a)
  native.interleave(y, a, b)
  return record('interleave', y, [a, b], dy => {
    const da = emptyLike(a)
    const db = emptyLike(b)
    native.deinterleave(da, db, dy!)
    return [da, db]
  })
}
