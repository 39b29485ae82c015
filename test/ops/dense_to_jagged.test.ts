import { deepStrictEqual } from 'node:assert/strict'
import { denseToJagged } from '#lib/ops/dense_to_jagged.js'
import { type Dtype, Tensor, type TypedArray } from '#lib/tensor.js'
import { describeOp, itOp, normal, offsets, sum, throwsCode } from '../harness.js'

type Case = { lengths: number[]; maxLength: number; rest: number[] }

describeOp<Case>('dense_to_jagged', {
  cases: [
    { name: 'no sequences', lengths: [], maxLength: 4, rest: [3] },
    { name: 'only empty sequences', lengths: [0, 0], maxLength: 3, rest: [2] },
    { name: 'no dense rows', lengths: [2, 1], maxLength: 0, rest: [2] },
    { name: 'no trailing dims', lengths: [2, 0, 1], maxLength: 2, rest: [] },
    { name: 'rows beyond N', lengths: [5, 1, 4, 3], maxLength: 3, rest: [7] },
    { name: 'heads', lengths: [3, 1], maxLength: 4, rest: [2, 5] },
    { name: 'past one task', lengths: [700, 0, 3, 1999, 2000, 2001], maxLength: 2000, rest: [33] },
  ],
  inputs: ({ lengths, maxLength, rest }, random) => ({
    dense: normal(random, [lengths.length, maxLength, ...rest]),
    seqOffsets: offsets(lengths),
  }),
  run: (t, { lengths }) => denseToJagged(t.dense!, { seqOffsets: t.seqOffsets!, rows: sum(lengths) }),
  reference: (x, { lengths, maxLength, rest }) => {
    const width = rest.reduce((p, q) => p * q, 1)
    const rows: number[] = []
    lengths.forEach((length, b) => {
      for (let n = 0; n < length; n++)
        for (let j = 0; j < width; j++) rows.push(n < maxLength ? x.dense![(b * maxLength + n) * width + j]! : 0)
    })
    return [rows]
  },
  gradients: ['dense'],
  tolerance: { float32: 1e-8, float64: 0 },
})

const make = (...values: number[]) => Tensor.from(BigInt64Array.from(values.map(BigInt)))

const samples: [Dtype, TypedArray][] = [
  ['int32', Int32Array.of(1, -2, 3, 4)],
  ['int64', BigInt64Array.of(1n << 62n, -2n, 3n, 4n)],
  ['bfloat16', Uint16Array.of(0x3fc0, 1, 2, 3)],
  ['float16', Uint16Array.of(0x3e00, 1, 2, 3)],
]
for (const [dtype, data] of samples)
  itOp('dense_to_jagged', `moves ${dtype} bit by bit`, () => {
    const dense = Tensor.from(data, [2, 2], { dtype })
    const x = denseToJagged(dense, { seqOffsets: make(0, 1, 3), rows: 3 })
    deepStrictEqual([...x.dataSync()], [data[0], data[2], data[3]])
  })
itOp('dense_to_jagged', 'names what does not fit', () => {
  const dense = Tensor.zeros([2, 3, 4])
  const at = (seqOffsets: Tensor, rows: number) => denseToJagged(dense, { seqOffsets, rows })
  throwsCode(() => at(make(0, 2, 4), 5), 'ERR_HSTU_INVALID_ARGUMENT', /seq_offsets ends with 4 .* 5 rows/)
  throwsCode(() => at(make(0, 4, 2), 2), 'ERR_HSTU_INVALID_ARGUMENT', /sequence 1 has a negative length/)
  throwsCode(() => at(make(0, 4), 4), 'ERR_HSTU_SHAPE', /seqOffsets must have shape \[3\]/)
  throwsCode(() => at(make(0, 2, 4), 1.5), 'ERR_HSTU_INVALID_ARGUMENT', /rows must be an integer/)
})
