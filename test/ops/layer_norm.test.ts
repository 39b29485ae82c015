import { ok } from 'node:assert/strict'
import { native } from '#lib/native.js'
import { layerNorm } from '#lib/ops/layer_norm.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { assertClose, describeOp, itOp, normal, sameBits, throwsCode, valuesOf } from '../harness.js'

interface Case {
  shape: readonly number[]
  affine?: boolean
  eps?: number
  /** Added to every value. */
  shift?: number
}

describeOp<Case>('layer_norm', {
  cases: [
    { name: 'no rows', shape: [0, 4] },
    { name: 'no rows, affine', shape: [0, 4], affine: true },
    { name: 'one row', shape: [1, 50] },
    { name: 'a vector', shape: [9], affine: true },
    { name: 'lanes less one', shape: [5, 31], affine: true },
    { name: 'lanes', shape: [2, 3, 32], affine: true },
    { name: 'lanes and one', shape: [5, 33] },
    { name: 'wide', shape: [2, 515], affine: true },
    { name: 'task less one', shape: [127, 17] },
    { name: 'task', shape: [128, 16], affine: true },
    { name: 'task and one', shape: [129, 15], affine: true },
    { name: 'large eps', shape: [6, 20], affine: true, eps: 0.5 },
    { name: 'mean far from 0', shape: [4, 64], affine: true, shift: 16 },
  ],
  inputs: ({ shape, affine, shift = 0 }, random) => {
    const x = normal(random, shape)
    if (x.kind === 'float') for (let i = 0; i < x.data.length; i++) x.data[i]! += shift
    const d = shape.at(-1)!
    return { x, weight: affine ? normal(random, [d]) : null, bias: affine ? normal(random, [d]) : null }
  },
  run: (t, { eps = 1e-6 }) => layerNorm(t.x!, { weight: t.weight ?? null, bias: t.bias ?? null, eps }),
  reference: (x, { shape, eps = 1e-6 }) => {
    const d = shape.at(-1)!
    const y = new Float64Array(x.x!.length)
    for (let start = 0; start < y.length; start += d) {
      const row = x.x!.subarray(start, start + d)
      const mean = row.reduce((a, b) => a + b, 0) / d
      const variance = row.reduce((a, b) => a + (b - mean) ** 2, 0) / d
      for (let j = 0; j < d; j++)
        y[start + j] = ((row[j]! - mean) / Math.sqrt(variance + eps)) * (x.weight?.[j] ?? 1) + (x.bias?.[j] ?? 0)
    }
    return [y]
  },
  gradients: ['x', 'weight', 'bias'],
})

itOp('layer_norm', 'a row does not depend on its neighbours', () => {
  scope(() => {
    const x = Tensor.from(Float32Array.from(normal(new Random(1), [131, 47]).data as Float64Array), [131, 47])
    const all = valuesOf(layerNorm(x))
    for (const row of [0, 5, 127, 128, 130]) {
      const alone = valuesOf(layerNorm(x.rows(row, row + 1)))
      ok(
        alone.every((value, j) => Object.is(value, all[row * 47 + j])),
        `row ${row} differs when alone`,
      )
    }
  })
})
itOp('layer_norm', 'the same bits for any number of threads', () => {
  const values = (shape: number[], seed: number) =>
    Float32Array.from(normal(new Random(seed), shape).data as Float64Array)
  sameBits(() => {
    const [x, dy] = [Tensor.from(values([1000, 50], 1), [1000, 50]), Tensor.from(values([1000, 50], 2), [1000, 50])]
    const [weight, bias] = [Tensor.from(values([50], 3)), Tensor.from(values([50], 4))]
    const [dx, dweight, dbias] = [Tensor.empty([1000, 50]), Tensor.empty([50]), Tensor.empty([50])]
    native.layer_norm_backward(dx, dweight, dbias, dy, x, weight, 1e-6)
    return [layerNorm(x, { weight, bias }), dx, dweight, dbias]
  })
})
itOp('layer_norm', 'one column: the bias alone, and no gradient of x', () => {
  scope(() => {
    const [x, weight, bias] = [Tensor.from([3, -4], [2, 1]), Tensor.from([2]), Tensor.from([7])]
    assertClose(valuesOf(layerNorm(x, { weight, bias })), [7, 7], 0, 'y')
    const [dx, dweight, dbias] = [Tensor.empty([2, 1]), Tensor.empty([1]), Tensor.empty([1])]
    native.layer_norm_backward(dx, dweight, dbias, Tensor.from([5, 6], [2, 1]), x, weight, 1e-6)
    assertClose([...valuesOf(dx), ...valuesOf(dweight), ...valuesOf(dbias)], [0, 0, 0, 11], 1e-5, 'gradients')
  })
})
itOp('layer_norm', 'constant rows, NaN and large means', () => {
  scope(() => {
    const x = Tensor.from([5, 5, 5, 5, 1, NaN, 2, 3, 1, 2, 3, 4], [3, 4])
    const y = valuesOf(layerNorm(x))
    assertClose(y.slice(0, 4), [0, 0, 0, 0], 0, 'constant row')
    assertClose(y.slice(4, 8), [NaN, NaN, NaN, NaN], 0, 'row with NaN')
    assertClose(y.slice(8), [-1.3416402, -0.4472134, 0.4472134, 1.3416402], 1e-6, 'row after it')
    const far = Float32Array.from({ length: 512 }, (_, i) => 1e4 + Math.sin(i * i))
    const mean = far.reduce((a, b) => a + b, 0) / 512
    const deviation = Math.sqrt(far.reduce((a, b) => a + (b - mean) ** 2, 0) / 512 + 1e-6)
    assertClose(
      valuesOf(layerNorm(Tensor.from(far))),
      Array.from(far, value => (value - mean) / deviation),
      2e-3,
      'far',
    )
  })
})
itOp('layer_norm', 'names bad arguments', () => {
  const [x, d] = [Tensor.zeros([2, 3]), Tensor.zeros([3])]
  throwsCode(() => layerNorm(x, { weight: d }), 'ERR_HSTU_INVALID_ARGUMENT', /layerNorm: weight and bias go together/)
  throwsCode(() => layerNorm(x, { bias: d }), 'ERR_HSTU_INVALID_ARGUMENT', /layerNorm: weight and bias go together/)
  throwsCode(() => layerNorm(x, { eps: 0 }), 'ERR_HSTU_INVALID_ARGUMENT', /eps must be a positive number, got 0/)
  const four = Tensor.zeros([4])
  throwsCode(
    () => layerNorm(x, { weight: four, bias: four }),
    'ERR_HSTU_SHAPE',
    /weight must have shape \[d=3\].*\[4\]/,
  )
  throwsCode(() => layerNorm(Tensor.zeros([2], { dtype: 'int32' })), 'ERR_HSTU_DTYPE', /layerNorm: x must have a float/)
  for (const tensor of [x, d, four]) tensor.dispose()
})
