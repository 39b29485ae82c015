import { deepStrictEqual } from 'node:assert/strict'
import { record, valueAndGrad } from '#lib/autograd.js'
import { native } from '#lib/native.js'
import { expand, segmentSum } from '#lib/ops/expand.js'
import { Random } from '#lib/random.js'
import { type Dtype, scope, Tensor, type TypedArray } from '#lib/tensor.js'
import { describeOp, itOp, normal, offsets, sum, throwsCode } from '../harness.js'

type Case = { candidates: number[]; rest: number[] }

describeOp<Case>('expand', {
  cases: [
    { name: 'no requests', candidates: [], rest: [3] },
    { name: 'no candidates', candidates: [0, 0], rest: [3] },
    { name: 'no trailing dims', candidates: [2, 0, 1], rest: [] },
    { name: 'some without candidates', candidates: [0, 3, 1, 0, 5, 0], rest: [7] },
    { name: 'heads', candidates: [3, 1], rest: [2, 5] },
    { name: 'past one task', candidates: [700, 0, 3, 1999, 1], rest: [65] },
  ],
  inputs: ({ candidates, rest }, random) => ({
    x: normal(random, [candidates.length, ...rest]),
    offsets: offsets(candidates),
  }),
  run: (t, { candidates }) => expand(t.x!, { offsets: t.offsets!, rows: sum(candidates) }),
  reference: (x, { candidates, rest }) => {
    const width = rest.reduce((p, q) => p * q, 1)
    const y: number[] = []
    candidates.forEach((count, b) => {
      for (let m = 0; m < count; m++) for (let j = 0; j < width; j++) y.push(x.x![b * width + j]!)
    })
    return [y]
  },
  gradients: ['x'],
  tolerance: { float32: 1e-6, float64: 1e-14 },
})

describeOp<Case>('expand', {
  cases: [
    { name: 'sums: no requests', candidates: [], rest: [3] },
    { name: 'sums: no trailing dims', candidates: [2, 0, 1], rest: [] },
    { name: 'sums: some without candidates', candidates: [0, 3, 1, 0, 5, 0], rest: [2, 3] },
    { name: 'sums: past one task', candidates: [700, 0, 3, 1999, 1], rest: [65] },
  ],
  inputs: ({ candidates, rest }, random) => ({
    x: normal(random, [sum(candidates), ...rest]),
    offsets: offsets(candidates),
  }),
  run: t => segmentSum(t.x!, t.offsets!),
  reference: (x, { candidates, rest }) => {
    const width = rest.reduce((p, q) => p * q, 1)
    let m = 0
    return [
      candidates.flatMap(count => {
        const total = new Array<number>(width).fill(0)
        for (const end = m + count; m < end; m++) for (let j = 0; j < width; j++) total[j]! += x.x![m * width + j]!
        return total
      }),
    ]
  },
  gradients: ['x'],
})

const make = (...values: number[]) => Tensor.from(BigInt64Array.from(values.map(BigInt)))

const samples: [Dtype, TypedArray][] = [
  ['int32', Int32Array.of(1, -2)],
  ['int64', BigInt64Array.of(1n << 62n, -2n)],
  ['bfloat16', Uint16Array.of(0x3fc0, 1)],
  ['float16', Uint16Array.of(0x3e00, 1)],
]
for (const [dtype, data] of samples)
  itOp('expand', `moves ${dtype} bit by bit`, () => {
    const y = expand(Tensor.from(data, [2], { dtype }), { offsets: make(0, 2, 3), rows: 3 })
    deepStrictEqual([...y.dataSync()], [data[0], data[0], data[1]])
  })
itOp('expand', 'the gradient is a float32 sum in order of m, whatever the number of threads', () => {
  const random = new Random(4)
  const counts = Array.from({ length: 37 }, () => random.int(60))
  const rows = sum(counts)
  const dy = Float32Array.from({ length: rows * 5 }, () => random.normal())
  const expected: number[] = []
  let m = 0
  for (const count of counts) {
    const total = new Float32Array(5)
    for (const end = m + count; m < end; m++) for (let j = 0; j < 5; j++) total[j]! += dy[m * 5 + j]!
    expected.push(...total)
  }
  for (const threads of [1, 2, 3]) {
    native.set_num_threads(threads)
    try {
      scope(() => {
        const x = Tensor.zeros([counts.length, 5])
        const { grads } = valueAndGrad([x], () => {
          const y = expand(x, { offsets: Tensor.from(offsets(counts).data as BigInt64Array), rows })
          return record('seed', Tensor.zeros([1]), [y], () => [Tensor.from(dy, [rows, 5])])
        })
        deepStrictEqual([...grads[0]!.dataSync()], expected)
      })
    } finally {
      native.set_num_threads(0)
    }
  }
})
itOp('expand', 'names what does not fit', () => {
  const x = Tensor.zeros([2, 4])
  const at = (offsets: Tensor, rows: number) => expand(x, { offsets, rows })
  throwsCode(() => at(make(0, 2, 4), 5), 'ERR_HSTU_INVALID_ARGUMENT', /expand: offsets ends with 4 .* 5 rows/)
  throwsCode(() => at(make(0, 4, 2), 2), 'ERR_HSTU_INVALID_ARGUMENT', /sequence 1 has a negative length/)
  throwsCode(() => at(make(0, 4), 4), 'ERR_HSTU_SHAPE', /offsets must have shape \[3\]/)
  const bad = () => segmentSum(x, make(0, 1))
  throwsCode(bad, 'ERR_HSTU_INVALID_ARGUMENT', /offsets ends with 1 .* 2 rows/)
  throwsCode(() => segmentSum(x, Tensor.zeros([2])), 'ERR_HSTU_DTYPE', /segmentSum: offsets must be int64/)
  x.dispose()
})
