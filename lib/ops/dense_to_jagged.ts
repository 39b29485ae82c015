import { record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface DenseToJaggedOptions {
  /** int64 [B + 1] */
  seqOffsets: Tensor
  /** T, the last of the offsets: given, so that they need not be read back from the device. */
  rows: number
}

/**
 * Packs the sequences of a padded tensor: x[t] = dense[b, t - start of b]; rows beyond N are 0. Any dtype; the gradient is
 * {@link jaggedToDense} with padding 0.
 * @param dense [B, N, ...]
 * @returns [T, ...]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT for offsets that do not fit the rows (CPU).
 */
export function denseToJagged(dense: Tensor, { seqOffsets, rows }: DenseToJaggedOptions): Tensor {
  const rest = dense.shape.slice(2)
  const { B } = shapes('dense_to_jagged', { dense: [dense, ['B', 'N', ...rest]] })
  shapes('dense_to_jagged', { seqOffsets: [seqOffsets, [B + 1]] })
  dtypes('dense_to_jagged', { seqOffsets }, 'int64')
  argument('dense_to_jagged', Number.isInteger(rows) && rows >= 0, () => `rows must be an integer >= 0, got ${rows}`)
  const x = Tensor.empty([rows, ...rest], dense)
  native.dense_to_jagged(x, dense, seqOffsets)
  return record('dense_to_jagged', x, [dense], dx => {
    const dy = emptyLike(dense)
    native.jagged_to_dense(dy, dx!, seqOffsets, 0)
    return [dy]
  })
}
