import { valueAndGrad } from '#lib/autograd.js'
import { l2Normalize } from '#lib/ops/l2_normalize.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { assertClose, describeOp, itOp, normal, sameBits, throwsCode, valuesOf } from '../harness.js'

interface Case {
  shape: readonly number[]
  eps?: number
}

describeOp<Case>('l2_normalize', {
  cases: [
    { name: 'no rows', shape: [0, 4] },
    { name: 'a vector', shape: [9] },
    { name: 'lanes less one', shape: [5, 15] },
    { name: 'lanes', shape: [2, 3, 16] },
    { name: 'lanes and one', shape: [5, 17] },
    { name: 'd 50', shape: [129, 50] },
    { name: 'wide', shape: [2, 515] },
    { name: 'below eps', shape: [4, 6], eps: 100 },
    { name: 'on both sides of eps', shape: [40, 4], eps: 2 },
  ],
  inputs: ({ shape }, random) => ({ x: normal(random, shape) }),
  run: (t, { eps }) => l2Normalize(t.x!, eps),
  reference: (x, { shape, eps = 1e-6 }) => {
    const d = shape.at(-1)!
    return [x.x!.map((value, i) => value / Math.max(eps, Math.hypot(...x.x!.subarray(i - (i % d), i - (i % d) + d))))]
  },
  gradients: ['x'],
})

itOp('l2_normalize', 'zero rows, and norms whose square float32 does not hold', () => {
  scope(() => {
    assertClose(valuesOf(l2Normalize(Tensor.from([0, 0, 3, 4], [2, 2]))), [0, 0, 0.6, 0.8], 1e-7, 'zero row')
    assertClose(
      valuesOf(l2Normalize(Tensor.from([3e30, 4e30, 3e38, 3e38], [2, 2]))),
      [0.6, 0.8, Math.SQRT1_2, Math.SQRT1_2],
      1e-6,
      'large',
    )
    assertClose(valuesOf(l2Normalize(Tensor.from([3e-30, 4e-30]), 1e-35)), [0.6, 0.8], 1e-6, 'small')
    assertClose(valuesOf(l2Normalize(Tensor.from([3, -4], [2, 1]))), [1, -1], 0, 'one column')
    const x = Tensor.zeros([1])
    const { grads } = valueAndGrad([x], () => l2Normalize(x, 0.25))
    assertClose(valuesOf(grads[0]!), [4], 0, 'gradient at 0 is 1 / eps')
  })
})
itOp('l2_normalize', 'the same bits for any number of threads', () => {
  const values = Float32Array.from(normal(new Random(1), [1000, 50]).data as Float64Array)
  sameBits(() => l2Normalize(Tensor.from(values, [1000, 50])))
})
itOp('l2_normalize', 'names bad arguments', () => {
  const x = Tensor.zeros([2, 3])
  throwsCode(() => l2Normalize(x, 0), 'ERR_HSTU_INVALID_ARGUMENT', /l2Normalize: eps must be a positive number, got 0/)
  throwsCode(() => l2Normalize(Tensor.zeros([], {})), 'ERR_HSTU_SHAPE', /l2Normalize: x must have shape/)
  throwsCode(
    () => l2Normalize(Tensor.zeros([2], { dtype: 'int64' })),
    'ERR_HSTU_DTYPE',
    /l2Normalize: x must have a float/,
  )
  x.dispose()
})
