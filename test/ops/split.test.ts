import { deepStrictEqual } from 'node:assert/strict'
import { valueAndGrad } from '#lib/autograd.js'
import { linear } from '#lib/ops/linear.js'
import { split } from '#lib/ops/split.js'
import { Tensor } from '#lib/tensor.js'
import { describeOp, itOp, normal, offsets, sum, throwsCode } from '../harness.js'

type Case = { a: number[]; b: number[]; rest: number[] }

describeOp<Case>('split', {
  cases: [
    { name: 'no sequences', a: [], b: [], rest: [3] },
    { name: 'only empty sequences', a: [0, 0], b: [0, 0], rest: [2] },
    { name: 'no trailing dims', a: [2, 0, 1], b: [1, 3, 0], rest: [] },
    { name: 'all of it to a', a: [3, 1], b: [0, 0], rest: [4] },
    { name: 'all of it to b', a: [0, 0], b: [2, 5], rest: [4] },
    { name: 'heads', a: [3, 1], b: [1, 2], rest: [2, 5] },
    { name: 'past one task', a: [700, 0, 3, 1500], b: [1, 1300, 0, 2], rest: [33] },
  ],
  inputs: ({ a, b, rest }, random) => ({
    y: normal(random, [sum(a) + sum(b), ...rest]),
    aOffsets: offsets(a),
    bOffsets: offsets(b),
  }),
  run: (t, { a }) => split(t.y!, { aOffsets: t.aOffsets!, bOffsets: t.bOffsets!, aRows: sum(a) }),
  reference: (x, { a, b, rest }) => {
    const width = rest.reduce((p, q) => p * q, 1)
    const parts: [number[], number[]] = [[], []]
    let from = 0
    a.forEach((length, i) => {
      for (let n = 0; n < length * width; n++) parts[0].push(x.y![from++]!)
      for (let n = 0; n < b[i]! * width; n++) parts[1].push(x.y![from++]!)
    })
    return parts
  },
  gradients: ['y'],
  tolerance: { float32: 1e-8, float64: 0 },
})

const make = (...values: number[]) => Tensor.from(BigInt64Array.from(values.map(BigInt)))

itOp('split', 'a part that nothing uses has gradient 0', () => {
  const y = Tensor.from([1, 2, 3], [3, 1])
  const { grads } = valueAndGrad([y], () => {
    const [, b] = split(y, { aOffsets: make(0, 1, 2), bOffsets: make(0, 0, 1), aRows: 2 })
    return linear(b, Tensor.from([5], [1, 1]))
  })
  deepStrictEqual([...grads[0]!.dataSync()], [0, 0, 5])
})
itOp('split', 'names what does not fit', () => {
  const y = Tensor.zeros([5, 2])
  const cut = (aOffsets: Tensor, bOffsets: Tensor, aRows: number) => split(y, { aOffsets, bOffsets, aRows })
  throwsCode(() => cut(make(0, 1, 3), make(0, 1, 2), 4), 'ERR_HSTU_INVALID_ARGUMENT', /a_offsets ends with 3 .* 4 rows/)
  throwsCode(() => cut(make(0, 1, 3), make(0, 4, 2), 3), 'ERR_HSTU_INVALID_ARGUMENT', /sequence 1 .*b_offsets\[1\] = 4/)
  throwsCode(
    () => cut(make(0, 1, 3), make(0, 1, 2), 6),
    'ERR_HSTU_INVALID_ARGUMENT',
    /aRows must be an integer in 0\.\.5/,
  )
  throwsCode(() => cut(make(0, 1, 3), make(0, 2), 3), 'ERR_HSTU_SHAPE', /bOffsets .*int64\[2\]/)
})
