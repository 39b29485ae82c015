import { isTracked, record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface SoftmaxLossOptions {
  /** [T], float32 (float64 with a float64 query). Positions of weight 0 cost nothing and may hold any positive id. */
  weights?: Tensor | null
  /** The first row of the table that is an item (default 1: row 0 is padding). */
  firstId?: number
  /** Divides each item's row by max(|row|, eps) (default true); the query is taken as it is. */
  normalizeItems?: boolean
  /** Default 0.05. */
  temperature?: number
  /** Default 1e-6. */
  eps?: number
}

/**
 * Softmax cross entropy of each position's item among all items, averaged by weight:
 * sum_t w_t (lse_t - s_t,pos) / sum_t w_t with s = <query_t, item> / temperature and lse over rows firstId .. I-1 of the table. 0 where
 * the weights sum to 0. Scores are made in chunks; memory does not grow with T I.
 * @param query [T, d], float32 or float64; on CUDA also bfloat16 or float16
 * @param table [I, d]
 * @param positiveIds int64 [T], in firstId .. I-1 where the weight is not 0
 * @returns [1], float32 also where the query has 16 bits (float64 with a float64 query)
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT (an id outside the table names its position).
 */
export function softmaxLoss(
  query: Tensor,
  table: Tensor,
  positiveIds: Tensor,
  options: SoftmaxLossOptions = {},
): Tensor {
  const op = 'softmaxLoss'
  const { weights = null, firstId = 1, normalizeItems = true, temperature = 0.05, eps = 1e-6 } = options
  const { I } = shapes(op, {
    query: [query, ['T', 'd']],
    table: [table, ['I', 'd']],
    positiveIds: [positiveIds, ['T']],
    weights: [weights, ['T']],
  })
  dtypes(op, { query, table })
  dtypes(op, { positiveIds }, 'int64')
  dtypes(op, { weights }, query.dtype === 'float64' ? 'float64' : 'float32')
  argument(op, Number.isInteger(firstId) && firstId >= 0 && firstId < I, () => {
    return `firstId must be an integer in 0..${I - 1}, got ${firstId}`
  })
  argument(op, temperature > 0, () => `temperature must be above 0, got ${temperature}`)
  argument(op, eps > 0, () => `eps must be above 0, got ${eps}`)
  const sums = { dtype: query.dtype === 'float64' ? query.dtype : 'float32', device: query.device } as const
  const loss = Tensor.empty([1], sums)
  const lse = Tensor.empty([query.shape[0]!], sums)
  const inputs = [query, table, positiveIds, weights, firstId, normalizeItems, temperature, eps] as const
  native.softmax_loss(loss, lse, ...inputs)
  if (!isTracked(query, table)) lse.dispose()
  return record(op, loss, [query, table], dloss => {
    const dquery = emptyLike(query)
    const dtable = emptyLike(table)
    native.softmax_loss_backward(dquery, dtable, dloss!, lse, ...inputs)
    return [dquery, dtable]
  })
}
