import { isTracked, record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

export interface SampledSoftmaxLossOptions {
  /** [T], float32 (float64 with a float64 query). Positions of weight 0 cost nothing and may hold any positive id. */
  weights?: Tensor | null
  /** int64, [T, R], or [R] shared by all positions (in-batch negatives). Without it `numNegatives` ids are drawn. */
  negativeIds?: Tensor | null
  /** R, the number of ids drawn for each position, with replacement and uniform over firstId .. I-1. */
  numNegatives?: number
  /** The first row of the table that is an item (default 1: row 0 is padding). */
  firstId?: number
  /** Divides each item's row by max(|row|, eps) (default true); the query is taken as it is. */
  normalizeItems?: boolean
  /** Default 0.05. */
  temperature?: number
  /** Default 1e-6. */
  eps?: number
  /** Of the draw: its ids are `randomIds([T, R], ...)` with the same seed and offset. Default 0. */
  seed?: bigint
  /** Of the draw; the next one begins at offset + ceil(T R / 4). Default 0. */
  offset?: bigint
  /** int64 [1], added to the offset on the device. */
  base?: Tensor | null
}

/**
 * Softmax cross entropy of each position's item among R negatives, averaged by weight:
 * sum_t w_t (lse_t - s_t,pos) / sum_t w_t with s = <query_t, item> / temperature and lse over the positive and the R negatives; a
 * negative that equals the positive has logit -5e4. 0 where the weights sum to 0.
 * @param query [T, d], float32 or float64; on CUDA also bfloat16 or float16
 * @param table [I, d]
 * @param positiveIds int64 [T], in firstId .. I-1 where the weight is not 0
 * @returns [1], float32 also where the query has 16 bits (float64 with a float64 query)
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE, ERR_HSTU_INVALID_ARGUMENT (an id outside the table names its position).
 * @see Zhai et al., "Actions Speak Louder than Words" (2024), section 4.1: sampled softmax loss.
 */
export function sampledSoftmaxLoss(
  query: Tensor,
  table: Tensor,
  positiveIds: Tensor,
  options: SampledSoftmaxLossOptions = {},
): Tensor {
  const op = 'sampledSoftmaxLoss'
  const { weights = null, negativeIds = null, firstId = 1, normalizeItems = true, temperature = 0.05 } = options
  const { eps = 1e-6, seed = 0n, offset = 0n, base = null } = options
  const { I } = shapes(op, {
    query: [query, ['T', 'd']],
    table: [table, ['I', 'd']],
    positiveIds: [positiveIds, ['T']],
    weights: [weights, ['T']],
    negativeIds: [negativeIds, negativeIds?.rank === 1 ? ['R'] : ['T', 'R']],
    base: [base, [1]],
  })
  dtypes(op, { query, table })
  dtypes(op, { positiveIds, negativeIds, base }, 'int64')
  dtypes(op, { weights }, query.dtype === 'float64' ? 'float64' : 'float32')
  const { numNegatives: R = negativeIds?.shape.at(-1) ?? 0 } = options
  argument(op, Number.isInteger(R) && R >= 1, () => `numNegatives must be an integer of at least 1, got ${R}`)
  argument(op, !negativeIds || negativeIds.shape.at(-1) === R, () => {
    return `numNegatives is ${R}, negativeIds has ${negativeIds!.shape.at(-1)}`
  })
  argument(op, Number.isInteger(firstId) && firstId >= 0 && firstId < I, () => {
    return `firstId must be an integer in 0..${I - 1}, got ${firstId}`
  })
  argument(op, temperature > 0, () => `temperature must be above 0, got ${temperature}`)
  argument(op, eps > 0, () => `eps must be above 0, got ${eps}`)
  const sums = { dtype: query.dtype === 'float64' ? query.dtype : 'float32', device: query.device } as const
  const loss = Tensor.empty([1], sums)
  const lse = Tensor.empty([query.shape[0]!], sums)
  const inputs = [query, table, positiveIds, weights, negativeIds, R, firstId, normalizeItems] as const
  const scalars = [temperature, eps, seed, offset, base] as const
  native.sampled_softmax_loss(loss, lse, ...inputs, ...scalars)
  if (!isTracked(query, table)) lse.dispose()
  return record(op, loss, [query, table], dloss => {
    const dquery = emptyLike(query)
    const dtable = emptyLike(table)
    native.sampled_softmax_loss_backward(dquery, dtable, dloss!, lse, ...inputs, ...scalars)
    return [dquery, dtable]
  })
}
