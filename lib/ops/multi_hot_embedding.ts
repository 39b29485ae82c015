import { isTracked, record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface MultiHotEmbeddingOptions {
  /** [K, d]: what an action that is not known (negative) becomes. */
  pending?: Tensor | null
}

/**
 * Multi-hot actions as features side by side: y[t, k] = table[k] where bit k of actions[t] is set, else 0 (the action encoder of Zhai et
 * al. 2024). A negative action is not known, as a candidate's: its row is `pending`, learned like the table.
 * @param table [K, d], float32 or float64, K at most 63
 * @param actions int64 [T], bit k for action k
 * @returns [T, K d]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT naming an action with a bit that no row of the table has,
 * or a negative one without `pending` (CPU).
 */
export function multiHotEmbedding(table: Tensor, actions: Tensor, options: MultiHotEmbeddingOptions = {}): Tensor {
  const op = 'multiHotEmbedding'
  const { pending = null } = options
  const { K, d, T } = shapes(op, {
    table: [table, ['K', 'd']],
    actions: [actions, ['T']],
    pending: [pending, ['K', 'd']],
  })
  dtypes(op, { table, pending })
  dtypes(op, { actions }, 'int64')
  argument(op, K <= 63, () => `table has ${K} rows, an action has at most 63 bits`)
  const y = Tensor.empty([T, K * d], table)
  native.multi_hot_embedding(y, table, actions, pending)
  return record(op, y, [table, pending], dy => {
    const dtable = emptyLike(table)
    const dpending = pending && isTracked(pending) ? emptyLike(pending) : null
    native.multi_hot_embedding_backward(dtable, dpending, dy!, actions)
    return [dtable, dpending]
  })
}
