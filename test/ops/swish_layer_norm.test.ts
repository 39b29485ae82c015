import { native } from '#lib/native.js'
import { swishLayerNorm } from '#lib/ops/swish_layer_norm.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { assertClose, describeOp, itOp, normal, sameBits, throwsCode, valuesOf } from '../harness.js'

interface Case {
  shape: readonly number[]
  affine?: boolean
  eps?: number
}

describeOp<Case>('swish_layer_norm', {
  cases: [
    { name: 'no rows', shape: [0, 4], affine: true },
    { name: 'one column', shape: [3, 1], affine: true },
    { name: 'one row', shape: [1, 50] },
    { name: 'a vector', shape: [9], affine: true },
    { name: 'lanes less one', shape: [5, 31], affine: true },
    { name: 'lanes', shape: [2, 3, 32] },
    { name: 'lanes and one', shape: [5, 33], affine: true },
    { name: 'wide', shape: [2, 515], affine: true },
    { name: 'task and one', shape: [129, 15], affine: true, eps: 0.1 },
  ],
  inputs: ({ shape, affine }, random) => ({
    x: normal(random, shape, 2),
    weight: affine ? normal(random, [shape.at(-1)!]) : null,
    bias: affine ? normal(random, [shape.at(-1)!]) : null,
  }),
  run: (t, { eps = 1e-6 }) => swishLayerNorm(t.x!, { weight: t.weight ?? null, bias: t.bias ?? null, eps }),
  reference: (x, { shape, eps = 1e-6 }) => {
    const d = shape.at(-1)!
    const y = new Float64Array(x.x!.length)
    for (let start = 0; start < y.length; start += d) {
      const row = x.x!.subarray(start, start + d)
      const mean = row.reduce((a, b) => a + b, 0) / d
      const variance = row.reduce((a, b) => a + (b - mean) ** 2, 0) / d
      for (let j = 0; j < d; j++) {
        const norm = ((row[j]! - mean) / Math.sqrt(variance + eps)) * (x.weight?.[j] ?? 1) + (x.bias?.[j] ?? 0)
        y[start + j] = row[j]! / (1 + Math.exp(-norm))
      }
    }
    return [y]
  },
  gradients: ['x', 'weight', 'bias'],
})

itOp('swish_layer_norm', 'the same bits for any number of threads', () => {
  const values = (shape: number[], seed: number) =>
    Float32Array.from(normal(new Random(seed), shape).data as Float64Array)
  sameBits(() => {
    const [x, dy] = [Tensor.from(values([1000, 50], 1), [1000, 50]), Tensor.from(values([1000, 50], 2), [1000, 50])]
    const [weight, bias] = [Tensor.from(values([50], 3)), Tensor.from(values([50], 4))]
    const [dx, dweight, dbias] = [Tensor.empty([1000, 50]), Tensor.empty([50]), Tensor.empty([50])]
    native.swish_layer_norm_backward(dx, dweight, dbias, dy, x, weight, bias, 1e-6)
    return [swishLayerNorm(x, { weight, bias }), dx, dweight, dbias]
  })
})
itOp('swish_layer_norm', 'a saturated gate passes x or nothing; a constant row passes half', () => {
  scope(() => {
    const [weight, bias] = [Tensor.zeros([4]), Tensor.from([200, -200, 0, 0])]
    assertClose(valuesOf(swishLayerNorm(Tensor.from([1, 2, 3, 4]), { weight, bias })), [1, 0, 1.5, 2], 1e-7, 'gate')
    assertClose(valuesOf(swishLayerNorm(Tensor.from([3, 3, 3, 3]))), [1.5, 1.5, 1.5, 1.5], 1e-7, 'constant')
  })
})
itOp('swish_layer_norm', 'names bad arguments', () => {
  const [x, d] = [Tensor.zeros([2, 3]), Tensor.zeros([3])]
  throwsCode(() => swishLayerNorm(x, { weight: d }), 'ERR_HSTU_INVALID_ARGUMENT', /swishLayerNorm: weight and bias go/)
  throwsCode(
    () => swishLayerNorm(x, { eps: NaN }),
    'ERR_HSTU_INVALID_ARGUMENT',
    /eps must be a positive number, got NaN/,
  )
  const four = Tensor.zeros([4])
  throwsCode(
    () => swishLayerNorm(x, { weight: d, bias: four }),
    'ERR_HSTU_SHAPE',
    /bias must have shape \[d=3\].*\[4\]/,
  )
  for (const tensor of [x, d, four]) tensor.dispose()
})
