import { deepStrictEqual } from 'node:assert/strict'
import { concat } from '#lib/ops/concat.js'
import { split } from '#lib/ops/split.js'
import { type Dtype, Tensor, type TypedArray } from '#lib/tensor.js'
import { describeOp, itOp, normal, offsets, sum, throwsCode } from '../harness.js'

type Case = { a: number[]; b: number[]; rest: number[] }

describeOp<Case>('concat', {
  cases: [
    { name: 'no sequences', a: [], b: [], rest: [3] },
    { name: 'only empty sequences', a: [0, 0, 0], b: [0, 0, 0], rest: [2] },
    { name: 'no trailing dims', a: [2, 0, 1], b: [1, 3, 0], rest: [] },
    { name: 'empty parts', a: [0, 5, 0, 1], b: [4, 0, 0, 1], rest: [7] },
    { name: 'heads', a: [3, 1], b: [1, 2], rest: [2, 5] },
    { name: 'no features', a: [3, 1], b: [1, 2], rest: [0] },
    { name: 'past one task', a: [700, 0, 3, 1500], b: [1, 1300, 0, 2], rest: [33] },
  ],
  inputs: ({ a, b, rest }, random) => ({
    a: normal(random, [sum(a), ...rest]),
    b: normal(random, [sum(b), ...rest]),
    aOffsets: offsets(a),
    bOffsets: offsets(b),
  }),
  run: t => {
    const { values, offsets } = concat(t.a!, t.b!, { aOffsets: t.aOffsets!, bOffsets: t.bOffsets! })
    return [values, offsets]
  },
  reference: (x, { a, b, rest }) => {
    const width = rest.reduce((p, q) => p * q, 1)
    const values: number[] = []
    const ends = [0]
    let fromA = 0
    let fromB = 0
    a.forEach((length, i) => {
      for (let n = 0; n < length * width; n++) values.push(x.a![fromA++]!)
      for (let n = 0; n < b[i]! * width; n++) values.push(x.b![fromB++]!)
      ends.push(ends[i]! + length + b[i]!)
    })
    return [values, ends]
  },
  gradients: ['a', 'b'],
  tolerance: { float32: 1e-8, float64: 0 },
})

const samples: [Dtype, TypedArray, TypedArray, TypedArray][] = [
  ['int32', Int32Array.of(1, -2), Int32Array.of(7), Int32Array.of(1, 7, -2)],
  ['int64', BigInt64Array.of(1n << 62n, -5n), BigInt64Array.of(3n), BigInt64Array.of(1n << 62n, 3n, -5n)],
  ['bfloat16', Uint16Array.of(0x3fc0, 0x8000), Uint16Array.of(0x7f80), Uint16Array.of(0x3fc0, 0x7f80, 0x8000)],
  ['float16', Uint16Array.of(0x3e00, 0x8000), Uint16Array.of(0x7c00), Uint16Array.of(0x3e00, 0x7c00, 0x8000)],
]
for (const [dtype, first, second, joined] of samples)
  itOp('concat', `moves ${dtype} bit by bit, and split brings it back`, () => {
    const aOffsets = Tensor.from(BigInt64Array.of(0n, 1n, 2n))
    const bOffsets = Tensor.from(BigInt64Array.of(0n, 1n, 1n))
    const parts = [Tensor.from(first, [2], { dtype }), Tensor.from(second, [1], { dtype })] as const
    const y = concat(...parts, { aOffsets, bOffsets }).values
    deepStrictEqual(y.dtype, dtype)
    deepStrictEqual(y.dataSync(), joined)
    const back = split(y, { aOffsets, bOffsets, aRows: 2 })
    deepStrictEqual(
      back.map(part => part.dataSync()),
      [first, second],
    )
  })

const make = (...values: number[]) => Tensor.from(BigInt64Array.from(values.map(BigInt)))
const join = (aOffsets: Tensor, bOffsets: Tensor) =>
  concat(Tensor.zeros([3, 2]), Tensor.zeros([2, 2]), { aOffsets, bOffsets })
itOp('concat', 'names what does not fit', () => {
  const good = make(0, 1, 2)
  throwsCode(() => join(make(0, 4, 3), make(0, 1, 2)), 'ERR_HSTU_INVALID_ARGUMENT', /sequence 1 .*a_offsets\[1\] = 4/)
  throwsCode(() => join(make(0, 1, 3), make(0, 1, 1)), 'ERR_HSTU_INVALID_ARGUMENT', /b_offsets ends with 1 .* 2 rows/)
  throwsCode(() => join(make(1, 1, 3), make(0, 1, 2)), 'ERR_HSTU_INVALID_ARGUMENT', /a_offsets\[0\] must be 0, got 1/)
  throwsCode(() => join(make(0, 3), make(0, 1, 2)), 'ERR_HSTU_SHAPE', /bOffsets .*int64\[3\]/)
  throwsCode(() => join(make(), make()), 'ERR_HSTU_INVALID_ARGUMENT', /a_offsets is empty/)
  throwsCode(() => join(Tensor.zeros([3]), make(0, 1, 2)), 'ERR_HSTU_DTYPE', /aOffsets must be int64/)
  const options = { aOffsets: good, bOffsets: good }
  throwsCode(
    () => concat(Tensor.zeros([2, 3]), Tensor.zeros([2, 4]), options),
    'ERR_HSTU_SHAPE',
    /concat: b .*float32\[2, 4\]/,
  )
  const other = Tensor.zeros([2, 3], { dtype: 'float64' })
  throwsCode(() => concat(Tensor.zeros([2, 3]), other, options), 'ERR_HSTU_DTYPE', /b must be float32/)
})
