import { record } from '../autograd.js'
import { native } from '../native.js'
import { type Dtype, Tensor } from '../tensor.js'

const isFloat = (dtype: Dtype): boolean => dtype !== 'int32' && dtype !== 'int64'

/**
 * x in another dtype; x itself where it has that dtype already.
 *
 * To a float dtype: rounded once to nearest, ties to even; NaN stays NaN. Float to integer: cut toward zero, saturating, NaN gives 0;
 * int64 to int32 saturates. Between float dtypes the gradient is cast back; through an integer none flows.
 * @param x any shape and dtype
 * @returns same shape
 */
export function cast(x: Tensor, dtype: Dtype): Tensor {
  if (x.dtype === dtype) return x
  const y = Tensor.empty(x.shape, { dtype, device: x.device })
  native.cast(y, x)
  return isFloat(x.dtype) && isFloat(dtype) ? record('cast', y, [x], dy => [cast(dy!, x.dtype)]) : y
}
