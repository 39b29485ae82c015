import { deepStrictEqual } from 'node:assert/strict'
import { valueAndGrad } from '#lib/autograd.js'
import { mseLoss } from '#lib/ops/mse_loss.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { describeOp, itOp, normal, type OpTest, sameBits, throwsCode, type Values, valuesOf } from '../harness.js'

interface Case {
  M: number
  /** Absent: predictions [M]. */
  K?: number
  weights?: 'fractional' | 'zero'
}

const common: Omit<OpTest<Case>, 'cases'> = {
  inputs: ({ M, K, weights }, random) => {
    const shape = K ? [M, K] : [M]
    const data = Float64Array.from({ length: M * (K ?? 1) }, (_, i) =>
      weights === 'zero' || i % 4 === 0 ? 0 : random.float(),
    )
    return {
      predictions: normal(random, shape),
      labels: { ...normal(random, shape, 3), kind: 'wide' } as Values,
      weights: weights ? { shape, data, kind: 'wide' } : null,
    }
  },
  run: t => mseLoss(t.predictions!, t.labels!, { weights: t.weights ?? null }),
  reference: (x, { K = 1 }) => {
    const [total, weight] = [new Float64Array(K), new Float64Array(K)]
    x.predictions!.forEach((z, i) => {
      const w = x.weights ? x.weights[i]! : 1
      total[i % K]! += w * (z - x.labels![i]!) ** 2
      weight[i % K]! += w
    })
    return [total.map((sum, k) => (weight[k] === 0 ? 0 : sum / weight[k]!))]
  },
  gradients: ['predictions'],
  tolerance: { float32: 1e-6 },
}

describeOp<Case>('mse_loss', {
  cases: [
    { name: 'no rows', M: 0, K: 2 },
    { name: 'one', M: 1 },
    { name: 'a vector', M: 50, weights: 'fractional' },
    { name: 'three tasks', M: 33, K: 3 },
    { name: 'weights', M: 40, K: 3, weights: 'fractional' },
    { name: 'all weights 0', M: 6, K: 2, weights: 'zero' },
    { name: 'a block of rows and one', M: 1025, K: 3, weights: 'fractional' },
  ],
  ...common,
})

describeOp<Case>('mse_loss', {
  cudaDtypes: ['float32', 'bfloat16'], // a gradient of so many rows is subnormal in float16
  cases: [{ name: 'many blocks', M: 40_000, K: 2 }],
  ...common,
})

itOp('mse_loss', 'elements of weight 0 change no bit, whatever they hold', () =>
  scope(() => {
    const run = (predictions: number[], labels: number[], weights: number[]) => {
      const z = Tensor.from(predictions)
      const w = Tensor.from(weights)
      const { value, grads } = valueAndGrad([z], () => mseLoss(z, Tensor.from(labels), { weights: w }))
      return [value.item(), ...valuesOf(grads[0]!)]
    }
    const [loss, first, second] = run([3, -7], [1, 0.5], [0.5, 2])
    const among = run([3, Number.NaN, -7, 1], [1, 0, 0.5, Number.POSITIVE_INFINITY], [0.5, 0, 2, 0])
    deepStrictEqual(among, [loss, first, 0, second, 0])
  }),
)

itOp('mse_loss', 'bits do not depend on the threads', () =>
  sameBits(() => {
    const random = new Random(5)
    const values = () =>
      Tensor.from(
        Float32Array.from({ length: 30_000 }, () => random.normal()),
        [10_000, 3],
      )
    return mseLoss(values(), values())
  }),
)

itOp('mse_loss', 'names what does not fit', () => {
  const at = (shape: number[]) => mseLoss(Tensor.zeros(shape), Tensor.zeros([2, 3]))
  throwsCode(() => at([2, 2]), 'ERR_HSTU_SHAPE', /mseLoss: labels must have shape \[M=2, K=2\]/)
  const ints = () => mseLoss(Tensor.zeros([2], { dtype: 'int32' }), Tensor.zeros([2]))
  throwsCode(ints, 'ERR_HSTU_DTYPE', /predictions must have a float dtype/)
})
