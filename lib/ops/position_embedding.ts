import { record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, type Tensor } from '../tensor.js'

export interface PositionEmbeddingOptions {
  /** int64 [B + 1]: where each sequence begins in x; first 0, last T. */
  seqOffsets: Tensor
  /** int64 [T]: rows with id 0 (padding) become 0. Without it no row does. */
  ids?: Tensor | null
  /** Factor of x, usually sqrt(d). */
  scale: number
}

/**
 * y[t] = scale x[t] + table[t - start of t's sequence], 0 where ids[t] = 0: positions count from each sequence's first row.
 * @param x [T, d], float32 or float64
 * @param table [N, d], N at least the longest sequence
 * @returns [T, d]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT for a sequence longer than N or offsets that are none.
 */
export function positionEmbedding(x: Tensor, table: Tensor, options: PositionEmbeddingOptions): Tensor {
  const { seqOffsets, ids = null, scale } = options
  shapes('positionEmbedding', { x: [x, ['T', 'd']], table: [table, ['N', 'd']], ids: [ids, ['T']] })
  shapes('positionEmbedding', { seqOffsets: [seqOffsets, ['B + 1']] })
  dtypes('positionEmbedding', { x, table })
  dtypes('positionEmbedding', { seqOffsets, ids }, 'int64')
  argument('positionEmbedding', Number.isFinite(scale), () => `scale must be a finite number, got ${scale}`)
  const y = emptyLike(x)
  native.position_embedding(y, x, table, seqOffsets, ids, scale)
  return record('positionEmbedding', y, [x, table], dy => {
    const dx = emptyLike(x)
    const dtable = emptyLike(table)
    native.position_embedding_backward(dx, dtable, dy!, seqOffsets, ids, scale)
    return [dx, dtable]
  })
}
