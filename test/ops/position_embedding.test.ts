import { native } from '#lib/native.js'
import { positionEmbedding } from '#lib/ops/position_embedding.js'
import { Random } from '#lib/random.js'
import { Tensor } from '#lib/tensor.js'
import { describeOp, int64, itOp, normal, offsets, sameBits, sum, throwsCode } from '../harness.js'

interface Case {
  lengths: readonly number[]
  d: number
  N: number
  scale: number
  /** With ids, every n-th of which is 0. */
  padding?: number
}

describeOp<Case>('position_embedding', {
  cases: [
    { name: 'no sequences', lengths: [], d: 4, N: 3, scale: 2 },
    { name: 'no sequences, with ids', lengths: [], d: 4, N: 3, scale: 2, padding: 2 },
    { name: 'empty sequences only', lengths: [0, 0], d: 4, N: 0, scale: 2 },
    { name: 'length 1', lengths: [1], d: 1, N: 1, scale: -1.5 },
    { name: 'mixed', lengths: [0, 3, 1, 0, 7, 5, 0], d: 50, N: 7, scale: Math.sqrt(50) },
    { name: 'mixed, padded', lengths: [0, 3, 1, 0, 7, 5, 0], d: 33, N: 9, scale: Math.sqrt(33), padding: 3 },
    { name: 'all padded', lengths: [4, 2], d: 5, N: 4, scale: 1, padding: 1 },
    { name: 'tasks', lengths: [301, 200, 299], d: 70, N: 303, scale: 0.5, padding: 7 },
  ],
  inputs: ({ lengths, d, N, padding }, random) => {
    const T = sum(lengths)
    const ids = padding ? int64(Array.from({ length: T }, (_, t) => (t % padding === 0 ? 0 : t))) : null
    return { x: normal(random, [T, d]), table: normal(random, [N, d]), seqOffsets: offsets(lengths), ids }
  },
  run: (t, { scale }) => positionEmbedding(t.x!, t.table!, { seqOffsets: t.seqOffsets!, ids: t.ids ?? null, scale }),
  reference: (x, { lengths, d, scale }) => {
    const y: number[] = []
    for (const length of lengths)
      for (let position = 0; position < length; position++) {
        const t = y.length / d
        for (let j = 0; j < d; j++)
          y.push(x.ids?.[t] === 0 ? 0 : scale * x.x![t * d + j]! + x.table![position * d + j]!)
      }
    return [y]
  },
  gradients: ['x', 'table'],
})

itOp('position_embedding', 'the same bits for any number of threads', () => {
  const lengths = Array.from({ length: 300 }, (_, b) => (b * 7) % 23)
  const T = sum(lengths)
  const values = Float32Array.from(normal(new Random(1), [T, 9]).data as Float64Array)
  const starts = offsets(lengths).data as BigInt64Array
  sameBits(() => {
    const [x, table, seqOffsets] = [
      Tensor.from(values, [T, 9]),
      Tensor.from(values.slice(0, 23 * 9), [23, 9]),
      Tensor.from(starts),
    ]
    const [dx, dtable] = [Tensor.empty([T, 9]), Tensor.empty([23, 9])]
    native.position_embedding_backward(dx, dtable, x, seqOffsets, null, 3)
    return [positionEmbedding(x, table, { seqOffsets, scale: 3 }), dx, dtable]
  })
})
itOp('position_embedding', 'names bad arguments', () => {
  const [x, table] = [Tensor.zeros([3, 2]), Tensor.zeros([2, 2])]
  const at = (...values: number[]) => Tensor.from(values, [values.length], { dtype: 'int64' })
  const run = (seqOffsets: Tensor, ids?: Tensor) =>
    positionEmbedding(x, table, { seqOffsets, ids: ids ?? null, scale: 1 })
  const code = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(() => run(at(0, 3)), code, /position_embedding: sequence 0 has 3 rows, table has 2/)
  throwsCode(() => run(at(0, 2)), code, /position_embedding: seq_offsets must run from 0 to the 3 rows of x/)
  throwsCode(() => run(at(1, 3)), code, /seq_offsets must run from 0/)
  throwsCode(() => run(at(0, 2, 1, 3)), code, /seq_offsets\[2\] = 1 is below seq_offsets\[1\] = 2/)
  throwsCode(() => run(at(0, 2, 3), at(1, 1)), 'ERR_HSTU_SHAPE', /ids must have shape \[T=3\]/)
  throwsCode(() => run(Tensor.zeros([2])), 'ERR_HSTU_DTYPE', /seqOffsets must be int64/)
  const wide = () => positionEmbedding(x, Tensor.zeros([3, 3]), { seqOffsets: at(0, 3), scale: 1 })
  throwsCode(wide, 'ERR_HSTU_SHAPE', /table must have shape \[.*d=2\].*float32\[3, 3\]/)
  for (const tensor of [x, table]) tensor.dispose()
})
