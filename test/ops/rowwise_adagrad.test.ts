import { deepStrictEqual } from 'node:assert/strict'
import { valueAndGrad } from '#lib/autograd.js'
import { rowwiseAdagrad } from '#lib/ops/rowwise_adagrad.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { describeOp, int64, itOp, normal, sameBits, throwsCode, type Values, valuesOf } from '../harness.js'

interface Case {
  rows: number
  d: number
  T: number
  steps?: number
  lr?: number
  eps?: number
  /** Every n-th id is row 0. */
  hot?: number
}

const copy = (x: Tensor) => Tensor.from(x.dataSync(), x.shape, x)

describeOp<Case>('rowwise_adagrad', {
  cudaDtypes: ['float32'], // the step is far below the digits of a 16-bit table
  cases: [
    { name: 'no ids', rows: 3, d: 4, T: 0 },
    { name: 'no rows', rows: 0, d: 4, T: 0 },
    { name: 'one id', rows: 1, d: 1, T: 1 },
    { name: 'each row once or more', rows: 5, d: 3, T: 31 },
    { name: 'a window of ids', rows: 4, d: 8, T: 32 },
    { name: 'a window and one', rows: 40, d: 2, T: 33, steps: 3 },
    { name: 'runs across windows', rows: 3, d: 50, T: 200, steps: 2 },
    { name: 'one row takes all', rows: 9, d: 5, T: 1000, hot: 1 },
    { name: 'one row takes half', rows: 900, d: 12, T: 500, hot: 2 },
    { name: 'more than a strip of columns', rows: 7, d: 260, T: 90 },
    { name: 'many rows, few ids', rows: 70_000, d: 2, T: 20, steps: 2 },
    { name: 'a large eps', rows: 5, d: 3, T: 9, eps: 0.5, steps: 2 },
    { name: 'learning rate 0', rows: 5, d: 3, T: 9, lr: 0 },
  ],
  inputs: ({ rows, d, T, steps = 1, hot }, random) => ({
    table: normal(random, [rows, d]),
    accumulator: {
      shape: [rows],
      data: Float64Array.from({ length: rows }, () => random.float()),
      kind: 'wide',
    } as Values,
    grads: normal(random, [steps * T, d]),
    ids: int64(Array.from({ length: steps * T }, (_, t) => (hot && t % hot === 0 ? 0 : random.int(rows)))),
  }),
  run: (t, { T, steps = 1, lr = 0.1, eps }) => {
    const [table, accumulator] = [copy(t.table!), copy(t.accumulator!)]
    for (let s = 0; s < steps; s++) {
      const [grads, ids] = [t.grads!, t.ids!].map(x => x.rows(s * T, (s + 1) * T))
      rowwiseAdagrad(table, accumulator, grads!, ids!, { lr, ...(eps === undefined ? {} : { eps }) })
    }
    return [table, accumulator]
  },
  reference: (x, { rows, d, T, steps = 1, lr = 0.1, eps = 1e-8 }) => {
    const [table, accumulator] = [x.table!.slice(), x.accumulator!.slice()]
    for (let s = 0; s < steps; s++)
      for (let i = 0; i < rows; i++) {
        const g = new Float64Array(d)
        let named = false
        for (let t = s * T; t < (s + 1) * T; t++) {
          if (x.ids![t] !== i) continue
          named = true
          for (let j = 0; j < d; j++) g[j]! += x.grads![t * d + j]!
        }
        if (!named) continue
        accumulator[i]! += g.reduce((sum, value) => sum + value * value, 0) / d
        for (let j = 0; j < d; j++) table[i * d + j]! -= (lr * g[j]!) / (Math.sqrt(accumulator[i]!) + eps)
      }
    return [table, accumulator]
  },
})

itOp('rowwise_adagrad', 'rows that no id names keep their bits, and a gradient of 0 moves nothing', () =>
  scope(() => {
    const table = Tensor.from([1, 2, 3, 4, 5, 6], [3, 2])
    const accumulator = Tensor.from([0, Number.NaN, 0])
    rowwiseAdagrad(
      table,
      accumulator,
      Tensor.from([0, 0, 3, 4], [2, 2]),
      Tensor.from([0, 2], [2], { dtype: 'int64' }),
      { lr: 1 },
    )
    const moved = [5 - 3 / Math.sqrt(12.5), 6 - 4 / Math.sqrt(12.5)].map(Math.fround)
    deepStrictEqual([...valuesOf(accumulator)], [0, Number.NaN, 12.5])
    deepStrictEqual([...valuesOf(table)].slice(0, 4), [1, 2, 3, 4])
    for (const j of [0, 1]) deepStrictEqual(Math.abs(valuesOf(table)[4 + j]! - moved[j]!) < 1e-6, true)
  }),
)

itOp('rowwise_adagrad', 'bits do not depend on the threads', () => {
  const random = new Random(6)
  const [rows, d, T] = [5000, 9, 20_000]
  const values = (size: number) => Float32Array.from({ length: size }, () => random.normal())
  const [weights, gradient] = [values(rows * d), values(T * d)]
  const names = BigInt64Array.from({ length: T }, () => BigInt(Math.floor(rows * random.float() ** 4)))
  sameBits(() => {
    const [table, accumulator] = [Tensor.from(weights, [rows, d]), Tensor.zeros([rows])]
    rowwiseAdagrad(table, accumulator, Tensor.from(gradient, [T, d]), Tensor.from(names), { lr: 0.1 })
    return [table, accumulator]
  })
})

itOp('rowwise_adagrad', 'names what is wrong', () => {
  const ids = (...values: bigint[]) => Tensor.from(BigInt64Array.from(values))
  const at = (named: Tensor, more: { accumulator?: Tensor; lr?: number; eps?: number } = {}) => {
    const { accumulator = Tensor.zeros([4]), ...options } = more
    rowwiseAdagrad(Tensor.zeros([4, 2]), accumulator, Tensor.zeros([2, 2]), named, { lr: 0.1, ...options })
  }
  const code = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(() => at(ids(1n, 4n)), code, /rowwise_adagrad: ids\[1\] = 4 is outside 0\.\.3/)
  throwsCode(() => at(ids(1n)), 'ERR_HSTU_SHAPE', /ids must have shape \[T=2\]/)
  throwsCode(() => at(ids(0n, 1n), { accumulator: Tensor.zeros([4, 2]) }), 'ERR_HSTU_SHAPE', /accumulator/)
  throwsCode(() => at(ids(0n, 1n), { lr: -1 }), code, /lr must not be negative/)
  throwsCode(() => at(ids(0n, 1n), { eps: Number.NaN }), code, /eps must not be negative/)
  const p = Tensor.zeros([1])
  const inTape = () =>
    valueAndGrad([p], () => {
      at(ids(0n, 1n))
      return p
    })
  throwsCode(inTape, code, /rowwiseAdagrad changes tensors in place/)
  p.dispose()
})
