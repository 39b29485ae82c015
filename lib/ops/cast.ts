import { record } from '../autograd.js'
import { dtypes } from '../checks.js'
import { native } from '../native.js'
import { type Dtype, Tensor } from '../tensor.js'

const isFloat = (dtype: Dtype): boolean => dtype !== 'int32' && dtype !== 'int64'

/** Tensors of one dtype in another: one call, and one node of the tape. */
function convert(xs: readonly Tensor[], dtype: Dtype): readonly Tensor[] {
  const from = xs[0]!.dtype
  const ys = xs.map(x => Tensor.empty(x.shape, { dtype, device: x.device }))
  native.cast(ys, xs)
  if (!isFloat(from) || !isFloat(dtype)) return ys
  return record('cast', ys, xs, (...dys) => {
    const dxs = [
      ...convert(
        dys.filter(dy => dy !== null),
        from,
      ),
    ]
    return dys.map(dy => dy && dxs.shift()!)
  })
}

/**
 * x in another dtype; x itself where it has that dtype already.
 *
 * To a float dtype: rounded once to nearest, ties to even; NaN stays NaN. Float to integer: cut toward zero, saturating, NaN gives 0;
 * int64 to int32 saturates. Between float dtypes the gradient is cast back; through an integer none flows.
 * @param x any shape and dtype
 * @returns same shape
 */
export function cast(x: Tensor, dtype: Dtype): Tensor {
  return x.dtype === dtype ? x : convert([x], dtype)[0]!
}

/**
 * Tensors by name, each cast as {@link cast} does it, together: on CUDA 64 of them are one launch, and so are their gradients.
 * @param tensors of any shapes and one float dtype, but for those that have `dtype` already
 * @returns the same names
 * @throws HstuError ERR_HSTU_DTYPE where they differ.
 */
export function castAll(tensors: Record<string, Tensor>, dtype: Dtype): Record<string, Tensor> {
  const others = Object.entries(tensors).filter(([, tensor]) => tensor.dtype !== dtype)
  if (others.length === 0) return tensors
  dtypes('castAll', Object.fromEntries(others))
  const ys = convert(
    others.map(([, tensor]) => tensor),
    dtype,
  )
  return { ...tensors, ...Object.fromEntries(others.map(([name], n) => [name, ys[n]!])) }
}
