import { isTracked, record } from '../autograd.js'
import { argument, dtypes, shapes } from '../checks.js'
import { native } from '../native.js'
import { emptyLike, Tensor } from '../tensor.js'

/**
 * The rows of a table that ids name. The gradient adds the rows of equal ids in a fixed order: bit-equal run to run.
 * @param table [I, d], float32 or float64
 * @param ids int64 [...], each in 0 .. I - 1
 * @returns [..., d]
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT naming the position and value of an id out of range.
 */
export function embedding(table: Tensor, ids: Tensor): Tensor {
  const { d } = shapes('embedding', { table: [table, ['I', 'd']] })
  dtypes('embedding', { table })
  dtypes('embedding', { ids }, 'int64')
  const y = Tensor.empty([...ids.shape, d], table)
  native.embedding([y], [table], ids)
  return record('embedding', y, [table], dy => {
    const dtable = emptyLike(table)
    native.embedding_backward(dtable, dy!, ids)
    return [dtable]
  })
}

/**
 * Rows of several tensors at once. No gradient: for inference.
 * @param tables [I, ...] each, of one float dtype
 * @param ids int64 [T], each in 0 .. I - 1
 * @returns [T, ...] of each
 * @throws HstuError ERR_HSTU_SHAPE, ERR_HSTU_DTYPE; ERR_HSTU_INVALID_ARGUMENT as {@link embedding}, also inside `valueAndGrad`.
 */
export function takeRows<const X extends readonly Tensor[]>(tables: X, ids: Tensor): { [K in keyof X]: Tensor } {
  const op = 'embedding'
  argument(op, tables.length > 0 && !isTracked(...tables), () => 'takeRows takes at least one tensor, and no gradient')
  const flat = tables.map(table => {
    const I = table.shape[0] ?? 0
    return table.view([I, I === 0 ? 0 : table.size / I])
  })
  flat.forEach((table, n) => {
    shapes(op, { 'table 0': [flat[0], ['I', 'd']], [`table ${n}`]: [table, ['I', `d of table ${n}`]] })
    dtypes(op, { 'table 0': flat[0], [`table ${n}`]: table })
  })
  dtypes(op, { ids }, 'int64')
  const y = tables.map(table => Tensor.empty([ids.size, ...table.shape.slice(1)], table))
  native.embedding(y, flat, ids)
  return y as { [K in keyof X]: Tensor }
}
