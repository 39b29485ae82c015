import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { Tensor } from '../tensor.js'

export interface TopKOptions {
  /** Ids that may not be returned, jagged by query: int64 [E]. Ids that name no item are ignored, repeated ones are welcome. */
  excludeIds?: Tensor | null
  /** int64 [B + 1]; goes with `excludeIds`. */
  excludeOffsets?: Tensor | null
  /** First row of the table that is an item: row 0 is padding. Default 1. */
  firstId?: number
}

/**
 * Exact maximum inner product search: the k items with the highest `<query_b, table_i>`, best first, ties by the smaller id. The
 * [B, I] scores are never stored. A score has the same bits whatever the batch, and equal rows of the table score equally. A NaN
 * score counts as -infinity. Where fewer than k items are left the rest has id -1 and score -infinity. No gradient.
 * @param query [B, d], float32 or float64
 * @param table [I, d]
 * @returns `scores` [B, k] and `ids`, int64 [B, k]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT for a bad k, firstId, or exclusions without offsets
 * or with offsets that do not fit (CPU).
 */
export function topK(
  query: Tensor,
  table: Tensor,
  k: number,
  options: TopKOptions = {},
): { scores: Tensor; ids: Tensor } {
  const { excludeIds = null, excludeOffsets = null, firstId = 1 } = options
  const { B } = shapes('top_k', {
    query: [query, ['B', 'd']],
    table: [table, ['I', 'd']],
    excludeIds: [excludeIds, ['E']],
  })
  shapes('top_k', { excludeOffsets: [excludeOffsets, [B + 1]] })
  dtypes('top_k', { query, table })
  dtypes('top_k', { excludeIds, excludeOffsets }, 'int64')
  argument('top_k', Number.isInteger(k) && k >= 1, () => `k must be an integer >= 1, got ${k}`)
  argument('top_k', Number.isInteger(firstId) && firstId >= 0, () => `firstId must be an integer >= 0, got ${firstId}`)
  argument('top_k', !excludeIds === !excludeOffsets, () => 'excludeIds and excludeOffsets go together')
  const scores = Tensor.empty([B, k], query)
  const ids = Tensor.empty([B, k], { dtype: 'int64', device: query.device })
  native.top_k(scores, ids, query, table, excludeIds, excludeOffsets, firstId)
  return { scores, ids }
}
