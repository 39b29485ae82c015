import { deepStrictEqual } from 'node:assert/strict'
import { jaggedToDense } from '#lib/ops/jagged_to_dense.js'
import { type Dtype, Tensor, type TypedArray } from '#lib/tensor.js'
import { describeOp, itOp, normal, offsets, sum, throwsCode } from '../harness.js'

type Case = { lengths: number[]; maxLength: number; rest: number[]; padding?: number }

describeOp<Case>('jagged_to_dense', {
  cases: [
    { name: 'no sequences', lengths: [], maxLength: 4, rest: [3] },
    { name: 'only empty sequences', lengths: [0, 0], maxLength: 3, rest: [2] },
    { name: 'no room', lengths: [2, 1], maxLength: 0, rest: [2] },
    { name: 'no trailing dims', lengths: [2, 0, 1], maxLength: 2, rest: [] },
    { name: 'rows dropped', lengths: [5, 1, 4, 3], maxLength: 3, rest: [7], padding: -1.5 },
    { name: 'heads', lengths: [3, 1], maxLength: 4, rest: [2, 5], padding: 0.125 },
    { name: 'past one task', lengths: [700, 0, 3, 1999, 2000, 2001], maxLength: 2000, rest: [33], padding: 2 },
  ],
  inputs: ({ lengths, rest }, random) => ({ x: normal(random, [sum(lengths), ...rest]), seqOffsets: offsets(lengths) }),
  run: (t, { maxLength, padding }) =>
    jaggedToDense(t.x!, { seqOffsets: t.seqOffsets!, maxLength, ...(padding === undefined ? {} : { padding }) }),
  reference: (x, { lengths, maxLength, rest, padding = 0 }) => {
    const width = rest.reduce((p, q) => p * q, 1)
    const y: number[] = []
    let start = 0
    for (const length of lengths) {
      for (let n = 0; n < maxLength; n++)
        for (let j = 0; j < width; j++) y.push(n < length ? x.x![(start + n) * width + j]! : padding)
      start += length
    }
    return [y]
  },
  gradients: ['x'],
  tolerance: { float32: 1e-8, float64: 0 },
})

const make = (...values: number[]) => Tensor.from(BigInt64Array.from(values.map(BigInt)))

const samples: [Dtype, TypedArray, number, number | bigint][] = [
  ['int32', Int32Array.of(3), -7, -7],
  ['int64', BigInt64Array.of(1n << 60n), -(2 ** 53 - 1), -(2n ** 53n - 1n)],
  ['float32', Float32Array.of(3), Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY],
  ['bfloat16', Uint16Array.of(5), 1.5, 0x3fc0],
  ['bfloat16', Uint16Array.of(5), 1.00390625, 0x3f80], // halfway between 1 and its successor: to even
  ['bfloat16', Uint16Array.of(5), 1.01171875, 0x3f82], // halfway, to even upwards
  ['bfloat16', Uint16Array.of(5), 1 + 2 ** -8 + 2 ** -50, 0x3f81], // above halfway by less than float32 shows
  ['bfloat16', Uint16Array.of(5), Number.NEGATIVE_INFINITY, 0xff80],
  ['float16', Uint16Array.of(5), -1.5, 0xbe00],
  ['float16', Uint16Array.of(5), 65519, 0x7bff],
  ['float16', Uint16Array.of(5), 65520, 0x7c00],
  ['float16', Uint16Array.of(5), 2 ** -24, 0x0001],
  ['float16', Uint16Array.of(5), 2 ** -25, 0x0000],
  ['float16', Uint16Array.of(5), 2 ** -14 - 2 ** -26, 0x0400],
  ['float16', Uint16Array.of(5), Number.NaN, 0x7e00],
]
for (const [dtype, data, padding, bits] of samples)
  itOp('jagged_to_dense', `pads ${dtype} with ${padding}`, () => {
    const y = jaggedToDense(Tensor.from(data, [1], { dtype }), { seqOffsets: make(0, 1, 1), maxLength: 3, padding })
    deepStrictEqual([...y.dataSync()], [data[0], bits, bits, bits, bits, bits])
  })

itOp('jagged_to_dense', 'names what does not fit', () => {
  const x = Tensor.zeros([3, 2])
  const at = (seqOffsets: Tensor, maxLength = 2) => jaggedToDense(x, { seqOffsets, maxLength })
  throwsCode(
    () => at(make(0, 2, 1, 3)),
    'ERR_HSTU_INVALID_ARGUMENT',
    /sequence 1 .*seq_offsets\[1\] = 2, seq_offsets\[2\] = 1/,
  )
  throwsCode(
    () => at(make(0, 2)),
    'ERR_HSTU_INVALID_ARGUMENT',
    /seq_offsets ends with 2 after sequence 0, but there are 3 rows/,
  )
  throwsCode(() => at(make()), 'ERR_HSTU_INVALID_ARGUMENT', /seqOffsets is empty/)
  throwsCode(() => at(make(0, 3), -1), 'ERR_HSTU_INVALID_ARGUMENT', /maxLength/)
  const ids = Tensor.zeros([3], { dtype: 'int64' })
  const half = { seqOffsets: make(0, 3), maxLength: 2, padding: 0.5 }
  throwsCode(() => jaggedToDense(ids, half), 'ERR_HSTU_INVALID_ARGUMENT', /padding 0.5 is no int64/)
})
