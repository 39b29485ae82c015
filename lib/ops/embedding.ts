import { record } from '../autograd.js'
import { dtypes, shapes } from '../checks.js'
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
  native.embedding(y, table, ids)
  return record('embedding', y, [table], dy => {
    const dtable = emptyLike(table)
    native.embedding_backward(dtable, dy!, ids)
    return [dtable]
  })
}
