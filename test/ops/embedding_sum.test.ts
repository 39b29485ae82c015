import { deepStrictEqual } from 'node:assert/strict'
import { valueAndGrad } from '#lib/autograd.js'
import { add } from '#lib/ops/add.js'
import { embedding } from '#lib/ops/embedding.js'
import { embeddingSum } from '#lib/ops/embedding_sum.js'
import { Random } from '#lib/random.js'
import { type Device, type Dtype, scope, Tensor } from '#lib/tensor.js'
import { describeOp, int64, itOp, normal, placed, sameBits, throwsCode } from '../harness.js'

interface Case {
  /** Rows of each table. */
  rows: readonly number[]
  d: number
  T: number
  /** Share of ids that are -1. */
  none?: number
}

const draw = (random: Random, count: number, rows: number, none: number) =>
  Array.from({ length: count }, () => (rows === 0 || random.float() < none ? -1 : random.int(rows)))

describeOp<Case>('embedding_sum', {
  cases: [
    { name: 'no tokens', rows: [3, 2], d: 4, T: 0 },
    { name: 'no columns', rows: [3], d: 0, T: 5 },
    { name: 'one table', rows: [7], d: 5, T: 20 },
    { name: 'one of two', rows: [30, 9], d: 8, T: 41, none: 0.5 },
    { name: 'an empty table', rows: [0, 4], d: 3, T: 9, none: 0.3 },
    { name: 'four tables', rows: [12, 5, 40, 1], d: 24, T: 33, none: 0.2 },
    { name: 'rows of nothing', rows: [4, 4], d: 16, T: 50, none: 0.9 },
    { name: 'past one task', rows: [100, 17, 64], d: 512, T: 130, none: 0.1 },
    { name: 'an odd width', rows: [100, 17], d: 259, T: 40 },
  ],
  inputs: ({ rows, d, T, none = 0 }, random) =>
    Object.fromEntries(
      rows.flatMap((count, n) => [
        [`table${n}`, normal(random, [count, d])],
        [`ids${n}`, int64(draw(random, T, count, none))],
      ]),
    ),
  run: (t, { rows }) => embeddingSum(rows.map((_, n) => ({ table: t[`table${n}`]!, ids: t[`ids${n}`]! }))),
  reference: (x, { rows, d, T }) => {
    const y = new Float64Array(T * d)
    rows.forEach((_, n) => {
      for (let t = 0; t < T; t++)
        for (let j = 0; j < d; j++) {
          const id = x[`ids${n}`]![t]!
          if (id >= 0) y[t * d + j]! += x[`table${n}`]![id * d + j]!
        }
    })
    return [y]
  },
})

/** The bits of the ops that it stands for. */
function likeAdd(dtype: Dtype, device: Device) {
  scope(() => {
    const random = new Random(5)
    const [rows, d, T] = [23, 72, 200]
    const terms = [0, 1, 2].map(() => ({
      table: placed(normal(random, [rows, d]).data as Float64Array, [rows, d], dtype, device),
      ids: Tensor.from(BigInt64Array.from(draw(random, T, rows, 0), BigInt), undefined, { device }),
    }))
    const [a, b, c] = terms.map(({ table, ids }) => embedding(table, ids))
    deepStrictEqual(embeddingSum(terms).dataSync(), add(add(a!, b!), c!).dataSync())
  })
}
itOp('embedding_sum', 'has the bits of embedding and add', () => likeAdd('float32', 'cpu'))
for (const dtype of ['float32', 'bfloat16', 'float16'] as const)
  itOp('embedding_sum', `has the bits of embedding and add in ${dtype}`, () => likeAdd(dtype, 'cuda:0'), 'cuda')

itOp('embedding_sum', 'gives the same bits with any number of threads', () => {
  sameBits(() => {
    const random = new Random(3)
    const table = placed(normal(random, [50, 300]).data as Float64Array, [50, 300], 'float32', 'cpu')
    const ids = Tensor.from(BigInt64Array.from(draw(random, 700, 50, 0.2), BigInt))
    return embeddingSum([
      { table, ids },
      { table, ids },
    ])
  })
})

itOp('embedding_sum', 'names what is wrong', () => {
  scope(() => {
    const table = Tensor.zeros([10, 2])
    const ids = (...values: bigint[]) => Tensor.from(BigInt64Array.from(values))
    const code = 'ERR_HSTU_INVALID_ARGUMENT'
    const of = (...values: bigint[]) => ({ table, ids: ids(...values) })
    throwsCode(() => embeddingSum([of(0n, 10n)]), code, /embedding_sum: ids\[0\]\[1\] = 10 is outside -1\.\.9/)
    throwsCode(() => embeddingSum([of(0n), of(-2n)]), code, /embedding_sum: ids\[1\]\[0\] = -2 is outside -1\.\.9/)
    throwsCode(() => embeddingSum([]), code, /1 to 4 tables, got 0/)
    throwsCode(() => embeddingSum([of(0n), of(0n, 1n)]), 'ERR_HSTU_SHAPE', /ids 1 must have shape \[1\]/)
    const other = { table: Tensor.zeros([10, 3]), ids: ids(0n) }
    throwsCode(() => embeddingSum([of(0n), other]), 'ERR_HSTU_SHAPE', /table 1 must have shape \[I=10, 2\]/)
    const wide = { table: Tensor.zeros([10, 2], { dtype: 'float64' }), ids: ids(0n) }
    throwsCode(() => embeddingSum([of(0n), wide]), 'ERR_HSTU_DTYPE', /table 1 is float64/)
    throwsCode(() => valueAndGrad([table], () => embeddingSum([of(0n)])), code, /valueAndGrad/)
  })
})
