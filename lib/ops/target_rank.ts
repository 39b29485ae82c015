import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { Tensor } from '../tensor.js'

export interface TargetRankOptions {
  /** Ids that do not compete, jagged by query: int64 [E]. The target always counts, also where it is listed here. */
  excludeIds?: Tensor | null
  /** int64 [B + 1]; goes with `excludeIds`. */
  excludeOffsets?: Tensor | null
  /** First row of the table that is an item: row 0 is padding. Default 1. */
  firstId?: number
}

/**
 * The rank of each query's target among all items by `<query_b, table_i>`: 1 + number of other items, not excluded, that score at or
 * above the target (ties count against it). 0 where the target's score or that of any item in the running is NaN. No gradient.
 * @param query [B, d], float32 or float64
 * @param table [I, d]
 * @param targetIds int64 [B], each in firstId .. I - 1
 * @returns int64 [B]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT for exclusions without offsets, and on the CPU for a
 * target that is no item or offsets that do not fit.
 */
export function targetRank(query: Tensor, table: Tensor, targetIds: Tensor, options: TargetRankOptions = {}): Tensor {
  const { excludeIds = null, excludeOffsets = null, firstId = 1 } = options
  const { B } = shapes('target_rank', {
    query: [query, ['B', 'd']],
    table: [table, ['I', 'd']],
    targetIds: [targetIds, ['B']],
    excludeIds: [excludeIds, ['E']],
  })
  shapes('target_rank', { excludeOffsets: [excludeOffsets, [B + 1]] })
  dtypes('target_rank', { query, table })
  dtypes('target_rank', { targetIds, excludeIds, excludeOffsets }, 'int64')
  argument(
    'target_rank',
    Number.isInteger(firstId) && firstId >= 0,
    () => `firstId must be an integer >= 0, got ${firstId}`,
  )
  argument('target_rank', !excludeIds === !excludeOffsets, () => 'excludeIds and excludeOffsets go together')
  const rank = Tensor.empty([B], { dtype: 'int64', device: query.device })
  native.target_rank(rank, query, table, targetIds, excludeIds, excludeOffsets, firstId)
  return rank
}
