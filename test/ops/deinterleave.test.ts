import { deepStrictEqual } from 'node:assert/strict'
import { valueAndGrad } from '#lib/autograd.js'
import { deinterleave } from '#lib/ops/deinterleave.js'
import { linear } from '#lib/ops/linear.js'
import { Tensor } from '#lib/tensor.js'
import { describeOp, itOp, normal, throwsCode } from '../harness.js'

describeOp<{ shape: number[] }>('deinterleave', {
  cases: [
    { name: 'empty', shape: [0, 3] },
    { name: 'one row each', shape: [2, 1] },
    { name: 'no trailing dims', shape: [10] },
    { name: 'odd bytes a row', shape: [14, 3] },
    { name: 'heads', shape: [8, 2, 3] },
    { name: 'past one task', shape: [4200, 33] },
    { name: 'scalars past one task', shape: [140000] },
  ],
  inputs: ({ shape }, random) => ({ y: normal(random, shape) }),
  run: t => deinterleave(t.y!),
  reference: (x, { shape }) => {
    const width = shape.slice(1).reduce((p, q) => p * q, 1)
    return [0, 1].map(odd => Array.from(x.y!).filter((_, i) => Math.floor(i / width) % 2 === odd))
  },
  gradients: ['y'],
  tolerance: { float32: 1e-8, float64: 0 },
})

itOp('deinterleave', 'a part that nothing uses has gradient 0', () => {
  const y = Tensor.from([1, 2], [2, 1])
  const { grads } = valueAndGrad([y], () => linear(deinterleave(y)[0], Tensor.from([5], [1, 1])))
  deepStrictEqual([...grads[0]!.dataSync()], [5, 0])
})
itOp('deinterleave', 'refuses an odd number of rows', () => {
  throwsCode(() => deinterleave(Tensor.zeros([3, 2])), 'ERR_HSTU_INVALID_ARGUMENT', /even number of rows, got 3/)
  throwsCode(() => deinterleave(Tensor.zeros([])), 'ERR_HSTU_SHAPE', /deinterleave: y/)
})
