import { record } from '../autograd.js'
import { dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, type Tensor } from '../tensor.js'

/**
 * a b, element by element. Both have one shape and dtype (float32 or float64).
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE.
 */
export function mul(a: Tensor, b: Tensor): Tensor {
  shapes('mul', { a: [a, a.shape], b: [b, a.shape] })
  dtypes('mul', { a, b })
  const y = emptyLike(a)
  native.mul(y, a, b)
  return record('mul', y, [a, b], dy => {
    const da = emptyLike(a)
    const db = emptyLike(b)
    native.mul_backward(da, db, dy!, a, b)
    return [da, db]
  })
}
