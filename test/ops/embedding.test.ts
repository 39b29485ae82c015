import { deepStrictEqual } from 'node:assert/strict'
import { native } from '#lib/native.js'
import { embedding, takeRows } from '#lib/ops/embedding.js'
import { Random } from '#lib/random.js'
import { type Device, type Dtype, scope, Tensor } from '#lib/tensor.js'
import { assertClose, describeOp, int64, itOp, normal, sameBits, throwsCode, toTensors, valuesOf } from '../harness.js'

interface Case {
  rows: number
  d: number
  shape: readonly number[]
  /** Every n-th id is row 0. */
  hot?: number
}

describeOp<Case>('embedding', {
  cases: [
    { name: 'no ids', rows: 3, d: 4, shape: [0] },
    { name: 'no ids, no rows', rows: 0, d: 4, shape: [2, 0] },
    { name: 'one id', rows: 1, d: 1, shape: [1] },
    { name: 'an id without dims', rows: 5, d: 3, shape: [] },
    { name: 'a matrix of ids', rows: 7, d: 5, shape: [3, 11] },
    { name: 'more rows than ids', rows: 5000, d: 3, shape: [40] },
    { name: 'buckets less one', rows: 1023, d: 2, shape: [700] },
    { name: 'buckets', rows: 1024, d: 2, shape: [700] },
    { name: 'past two task blocks', rows: 130, d: 50, shape: [1000] },
    { name: 'a row named once more than a chunk', rows: 9, d: 3, shape: [2050], hot: 2 },
    { name: 'rows named many chunks', rows: 3, d: 2, shape: [9000], hot: 3 },
  ],
  inputs: ({ rows, d, shape, hot }, random) => {
    const count = shape.reduce((a, b) => a * b, 1)
    const ids = Array.from({ length: count }, (_, i) => (hot && i % hot === 0 ? 0 : random.int(rows)))
    return { table: normal(random, [rows, d]), ids: int64(ids, shape) }
  },
  run: t => embedding(t.table!, t.ids!),
  reference: (x, { d }) => [Array.from(x.ids!).flatMap(id => [...x.table!.subarray(id * d, (id + 1) * d)])],
  gradients: ['table'],
  tolerance: { float32: 1e-7, float64: 0 },
})

/** Rows of tensors of several widths, more than one launch has. */
function rowsAtOnce(dtype: Dtype, device: Device) {
  scope(() => {
    const random = new Random(9)
    const shapes = [
      [40, 3, 8],
      [40, 5],
      [40, 64],
      [40, 1, 1],
      [40, 2, 16],
      [40, 0],
    ]
    const inputs = Object.fromEntries(shapes.map((shape, n) => [`table${n}`, normal(random, shape)]))
    const t = toTensors({ ...inputs, ids: int64(Array.from({ length: 99 }, () => random.int(40))) }, dtype, device)
    const tables = shapes.map((_, n) => t[`table${n}`]!)
    takeRows(tables, t.ids!).forEach((rows, n) => {
      const [table, rest] = [tables[n]!, shapes[n]!.slice(1)]
      deepStrictEqual(rows.shape, [99, ...rest])
      deepStrictEqual(rows.dataSync(), embedding(table.view([40, rest.reduce((a, b) => a * b, 1)]), t.ids!).dataSync())
    })
  })
}
itOp('embedding', 'takes rows of several tensors at once', () => rowsAtOnce('float32', 'cpu'))
for (const dtype of ['float32', 'bfloat16'] as const)
  itOp('embedding', `takes rows of several tensors at once in ${dtype}`, () => rowsAtOnce(dtype, 'cuda:0'), 'cuda')

/** dtable by plain addition over t in float64. */
function scatter(dy: ArrayLike<number>, ids: readonly number[], rows: number, d: number): Float64Array {
  const sum = new Float64Array(rows * d)
  ids.forEach((id, t) => {
    for (let j = 0; j < d; j++) sum[id * d + j]! += dy[t * d + j]!
  })
  return sum
}

itOp('embedding', 'a million times one id', () => {
  const [count, rows, d] = [1_000_000, 5, 2]
  const random = new Random(1)
  const values = Float32Array.from({ length: count * d }, () => random.float())
  const ids = new BigInt64Array(count).fill(3n)
  sameBits(() => {
    const dtable = Tensor.empty([rows, d])
    native.embedding_backward(dtable, Tensor.from(values, [count, d]), Tensor.from(ids))
    const expected = scatter(values, Array(count).fill(3), rows, d)
    assertClose(valuesOf(dtable), expected, 1e-6, 'dtable')
    return dtable
  })
})
itOp('embedding', 'grouping survives many rows, skew and any number of threads', () => {
  for (const [count, rows, d] of [
    [200_000, 70_001, 3],
    [100_000, 2, 1],
    [70_000, 1_500_000, 1],
  ] as const) {
    const random = new Random(rows)
    const values = Float32Array.from({ length: count * d }, () => random.normal())
    const ids = Array.from({ length: count }, () => Math.floor(rows * random.float() ** 6))
    const expected = scatter(values, ids, rows, d)
    sameBits(() => {
      const dtable = Tensor.empty([rows, d])
      native.embedding_backward(dtable, Tensor.from(values, [count, d]), Tensor.from(ids, [count], { dtype: 'int64' }))
      assertClose(valuesOf(dtable), expected, 1e-5, `dtable of ${rows} rows`)
      return dtable
    })
  }
})
itOp('embedding', 'rows that no id names are 0, and a row is added in order of t', () => {
  scope(() => {
    const dtable = Tensor.from([9, 9, 9], [3, 1])
    const dy = Tensor.from([1e8, 1, -1e8, 5], [4, 1])
    native.embedding_backward(dtable, dy, Tensor.from([1, 1, 1, 2], [4], { dtype: 'int64' }))
    deepStrictEqual([...valuesOf(dtable)], [0, Math.fround(Math.fround(1e8 + 1) - 1e8), 5])
  })
})
itOp('embedding', 'names the position and value of an id out of range', () => {
  const table = Tensor.zeros([10, 2])
  const ids = (values: bigint[]) => Tensor.from(BigInt64Array.from(values))
  const code = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(() => embedding(table, ids([0n, 9n, 10n])), code, /embedding: ids\[2\] = 10 is outside 0\.\.9/)
  throwsCode(() => embedding(table, ids([-1n])), code, /embedding: ids\[0\] = -1 is outside 0\.\.9/)
  throwsCode(() => embedding(table, ids([1n, 1n << 62n])), code, /ids\[1\] = 4611686018427387904 is outside 0\.\.9/)
  const backward = () => native.embedding_backward(table, Tensor.zeros([1, 2]), ids([99n]))
  throwsCode(backward, code, /embedding_backward: ids\[0\] = 99 is outside 0\.\.9/)
  throwsCode(() => embedding(table, Tensor.zeros([2], { dtype: 'int32' })), 'ERR_HSTU_DTYPE', /ids must be int64/)
  throwsCode(
    () => embedding(Tensor.zeros([3]), ids([0n])),
    'ERR_HSTU_SHAPE',
    /embedding: table must have shape \[I, d\]/,
  )
  table.dispose()
})
