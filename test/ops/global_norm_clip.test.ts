import { deepStrictEqual, ok } from 'node:assert/strict'
import { valueAndGrad } from '#lib/autograd.js'
import { native } from '#lib/native.js'
import { globalNormClip } from '#lib/ops/global_norm_clip.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { describeOp, itOp, normal, throwsCode, valuesOf } from '../harness.js'

interface Case {
  sizes: number[]
  maxNorm: number
  scale?: number
}

describeOp<Case>('global_norm_clip', {
  cudaDtypes: ['float32', 'bfloat16'], // 1e30 is infinite in float16
  cases: [
    { name: 'below the limit', sizes: [5, 3], maxNorm: 100 },
    { name: 'above the limit', sizes: [5, 0, 3], maxNorm: 0.5 },
    { name: 'blocks and tails', sizes: [16384, 16385, 17, 15], maxNorm: 1 },
    { name: 'only measures', sizes: [40], maxNorm: Number.POSITIVE_INFINITY },
    { name: 'squares beyond float32', sizes: [40], maxNorm: 1, scale: 1e30 },
    { name: 'squares below float32', sizes: [40], maxNorm: 1e-7, scale: 1e-30 },
    { name: 'all zero', sizes: [4], maxNorm: 1, scale: 0 },
  ],
  inputs: (c, random) => Object.fromEntries(c.sizes.map((size, i) => [`g${i}`, normal(random, [size], c.scale)])),
  run: (t, c) => {
    const grads = c.sizes.map((_, i) => Tensor.from(t[`g${i}`]!.dataSync(), t[`g${i}`]!.shape, t[`g${i}`]!))
    return [globalNormClip(grads, c.maxNorm), ...grads]
  },
  reference: (x, c) => {
    const grads = c.sizes.map((_, i) => x[`g${i}`]!)
    let squares = 0
    for (const grad of grads) for (const g of grad) squares += g * g
    const norm = Math.sqrt(squares)
    const factor = Math.min(1, c.maxNorm / (norm + 1e-6))
    return [[norm], ...grads.map(grad => grad.map(g => g * factor))]
  },
})

itOp('global_norm_clip', 'below the limit no bit changes', () =>
  scope(() => {
    const values = Float32Array.of(0.1, 0.2, 0.3)
    const grad = Tensor.from(values)
    globalNormClip([grad], 1)
    deepStrictEqual(grad.dataSync(), values)
  }),
)

itOp('global_norm_clip', 'an empty list has norm 0', () =>
  scope(() => deepStrictEqual(globalNormClip([], 1).item(), 0)),
)

itOp('global_norm_clip', 'a norm that is not finite is returned and changes nothing', () =>
  scope(() => {
    for (const bad of [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]) {
      const values = [Float32Array.of(3, 4), Float32Array.of(5, bad)]
      const grads = values.map(x => Tensor.from(x))
      const norm = globalNormClip(grads, 1).item()
      ok(Object.is(norm, Math.abs(bad)))
      deepStrictEqual(
        grads.map(grad => grad.dataSync()),
        values,
      )
    }
  }),
)

itOp('global_norm_clip', 'bits do not depend on the threads', () =>
  scope(() => {
    const values = Float32Array.from(normal(new Random(3), [70_000]).data as Float64Array)
    const at = (threads: number) => {
      native.set_num_threads(threads)
      const grads = [Tensor.from(values), Tensor.from(values.slice(0, 20_001))]
      return [globalNormClip(grads, 1), ...grads].map(valuesOf)
    }
    try {
      const one = at(1)
      deepStrictEqual(at(2), one)
      deepStrictEqual(at(3), one)
    } finally {
      native.set_num_threads(0)
    }
  }),
)

itOp('global_norm_clip', 'names the index and what is wrong', () => {
  const mixed = () => [Tensor.zeros([2]), Tensor.zeros([2], { dtype: 'float64' })]
  throwsCode(() => globalNormClip(mixed(), 1), 'ERR_HSTU_DTYPE', /grads\[1\] is float64, grads\[0\] is float32/)
  throwsCode(
    () => globalNormClip([Tensor.zeros([2])], 0),
    'ERR_HSTU_INVALID_ARGUMENT',
    /maxNorm must be above 0, got 0/,
  )
  throwsCode(
    () => {
      const grad = Tensor.zeros([2])
      globalNormClip([grad, grad], 1)
    },
    'ERR_HSTU_INVALID_ARGUMENT',
    /grads\[1\] is grads\[0\]/,
  )
  const p = Tensor.zeros([1])
  const code = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(() => valueAndGrad([p], () => globalNormClip([p], 1)), code, /globalNormClip changes tensors in place/)
  p.dispose()
})
