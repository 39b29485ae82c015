import { deepStrictEqual } from 'node:assert/strict'
import { deinterleave } from '#lib/ops/deinterleave.js'
import { interleave } from '#lib/ops/interleave.js'
import { type Dtype, Tensor, type TypedArray } from '#lib/tensor.js'
import { describeOp, itOp, normal, throwsCode } from '../harness.js'

describeOp<{ shape: number[] }>('interleave', {
  cases: [
    { name: 'empty', shape: [0, 3] },
    { name: 'one row', shape: [1, 1] },
    { name: 'no trailing dims', shape: [5] },
    { name: 'odd bytes a row', shape: [7, 3] },
    { name: 'heads', shape: [4, 2, 3] },
    { name: 'past one task', shape: [2100, 33] },
    { name: 'scalars past one task', shape: [70000] },
  ],
  inputs: ({ shape }, random) => ({ a: normal(random, shape), b: normal(random, shape) }),
  run: t => interleave(t.a!, t.b!),
  reference: (x, { shape }) => {
    const width = shape.slice(1).reduce((p, q) => p * q, 1)
    const y: number[] = []
    for (let t = 0; t < shape[0]!; t++)
      for (const part of [x.a!, x.b!]) for (let j = 0; j < width; j++) y.push(part[t * width + j]!)
    return [y]
  },
  gradients: ['a', 'b'],
  tolerance: { float32: 1e-8, float64: 0 },
})

const samples: [Dtype, TypedArray, TypedArray][] = [
  ['int32', Int32Array.of(1, -2), Int32Array.of(7, 8)],
  ['int64', BigInt64Array.of(1n << 62n, -5n), BigInt64Array.of(3n, 4n)],
  ['bfloat16', Uint16Array.of(0x3fc0, 0x8000), Uint16Array.of(0x7f80, 1)],
  ['float16', Uint16Array.of(0x3e00, 0x8000), Uint16Array.of(0x7c00, 2)],
]
for (const [dtype, first, second] of samples)
  itOp('interleave', `moves ${dtype} bit by bit, and deinterleave brings it back`, () => {
    const y = interleave(Tensor.from(first, [2], { dtype }), Tensor.from(second, [2], { dtype }))
    deepStrictEqual([...y.dataSync()], [first[0], second[0], first[1], second[1]])
    deepStrictEqual(
      deinterleave(y).map(part => part.dataSync()),
      [first, second],
    )
  })
itOp('interleave', 'names what does not fit', () => {
  throwsCode(() => interleave(Tensor.zeros([2, 3]), Tensor.zeros([3, 3])), 'ERR_HSTU_SHAPE', /b .*T=2.*float32\[3, 3\]/)
  throwsCode(
    () => interleave(Tensor.zeros([2]), Tensor.zeros([2], { dtype: 'int32' })),
    'ERR_HSTU_DTYPE',
    /b must be float32/,
  )
})
