import { dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { Tensor } from '../tensor.js'

/**
 * Offsets of the given lengths: offsets[0] = 0, offsets[b + 1] = offsets[b] + lengths[b]. No gradient.
 * @param lengths int32 or int64 [B]
 * @returns int64 [B + 1]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT for a negative length (CPU).
 */
export function cumsum(lengths: Tensor): Tensor {
  const { B } = shapes('cumsum', { lengths: [lengths, ['B']] })
  if (lengths.dtype !== 'int32') dtypes('cumsum', { lengths }, 'int64')
  const offsets = Tensor.empty([B + 1], { dtype: 'int64', device: lengths.device })
  native.cumsum(offsets, lengths)
  return offsets
}
