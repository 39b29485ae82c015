import { record } from '../autograd.js'
import { dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, type Tensor } from '../tensor.js'

/**
 * a + b, element by element. Both have one shape and dtype (float32 or float64).
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE.
 */
export function add(a: Tensor, b: Tensor): Tensor {
  shapes('add', { a: [a, a.shape], b: [b, a.shape] })
  dtypes('add', { a, b })
  const y = emptyLike(a)
  native.add(y, a, b)
  return record('add', y, [a, b], dy => [dy, dy])
}
