import { isTracked } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { Tensor } from '../tensor.js'

/**
 * y[t] = table_1[ids_1[t]] + table_2[ids_2[t]] + .., rounded after each addition as {@link add} rounds; an id of -1 adds nothing, and a row
 * without any is 0. No gradient: for inference, whose encoders have become tables.
 * @param terms 1 to 4 of: table [I, d], of one float dtype, and ids int64 [T], each in -1 .. I - 1
 * @param y [T, d] to write into, in place of a new tensor
 * @returns [T, d]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT naming the position and value of an id out of range (CPU),
 * also inside `valueAndGrad`.
 */
export function embeddingSum(terms: readonly { table: Tensor; ids: Tensor }[], y?: Tensor): Tensor {
  const op = 'embedding_sum'
  argument(op, terms.length >= 1 && terms.length <= 4, () => `1 to 4 tables, got ${terms.length}`)
  const [first] = terms as [{ table: Tensor; ids: Tensor }]
  const [d, T] = [first.table.shape[1] ?? 0, first.ids.size]
  terms.forEach(({ table, ids }, n) => {
    shapes(op, { [`table ${n}`]: [table, ['I', d]], [`ids ${n}`]: [ids, [T]] })
    dtypes(op, { 'table 0': first.table, [`table ${n}`]: table })
    dtypes(op, { [`ids ${n}`]: ids }, 'int64')
  })
  const tables = terms.map(({ table }) => table)
  argument(op, !isTracked(...tables), () => 'takes no gradient: call it outside valueAndGrad')
  shapes(op, { y: [y, [T, d]] })
  dtypes(op, { 'table 0': first.table, y })
  const out = y ?? Tensor.empty([T, d], first.table)
  native.embedding_sum(
    out,
    tables,
    terms.map(({ ids }) => ids),
  )
  return out
}
