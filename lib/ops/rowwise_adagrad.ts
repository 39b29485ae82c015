import { refuseInTape } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import type { Tensor } from '../tensor.js'

export interface RowwiseAdagradOptions {
  /** Learning rate of this step. */
  lr: number
  /** Default 1e-8. */
  eps?: number
}

/**
 * One step of Adagrad with one accumulator a row, in place on the rows of `table` and `accumulator` that ids name, and on no other:
 * g = sum of grads[t] over t with ids[t] = i; accumulator[i] += mean of g^2 over its d columns;
 * table[i] -= lr g / (sqrt(accumulator[i]) + eps). The cost does not grow with the table. The same bits run to run.
 * @param table [I, d], float32 or float64
 * @param accumulator [I], float32 (float64 with a float64 table)
 * @param grads [T, d]: the gradient of the rows as looked up; equal ids are added up here
 * @param ids int64 [T], each in 0 .. I - 1
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT naming an id out of range (CPU), also inside `valueAndGrad`.
 * @see Duchi et al., "Adaptive Subgradient Methods" (2011); one accumulator a row as in Mudigere et al., "Software-Hardware Co-design for
 * Fast and Scalable Training of Deep Learning Recommendation Models" (2022).
 */
export function rowwiseAdagrad(
  table: Tensor,
  accumulator: Tensor,
  grads: Tensor,
  ids: Tensor,
  { lr, eps = 1e-8 }: RowwiseAdagradOptions,
): void {
  const op = 'rowwiseAdagrad'
  refuseInTape(op)
  shapes(op, {
    table: [table, ['I', 'd']],
    accumulator: [accumulator, ['I']],
    grads: [grads, ['T', 'd']],
    ids: [ids, ['T']],
  })
  dtypes(op, { table, grads })
  dtypes(op, { accumulator }, table.dtype === 'float64' ? 'float64' : 'float32')
  dtypes(op, { ids }, 'int64')
  for (const [name, value] of Object.entries({ lr, eps }))
    argument(op, value >= 0, () => `${name} must not be negative, got ${value}`)
  native.rowwise_adagrad(table, accumulator, grads, ids, lr, eps)
}
