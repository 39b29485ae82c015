import { deepStrictEqual, ok } from 'node:assert/strict'
import { reshape, valueAndGrad } from '#lib/autograd.js'
import { bceWithLogitsLoss } from '#lib/ops/bce_with_logits_loss.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import {
  assertClose,
  describeOp,
  itOp,
  normal,
  type OpTest,
  sameBits,
  throwsCode,
  type Values,
  valuesOf,
} from '../harness.js'

interface Case {
  M: number
  /** Absent: logits [M]. */
  K?: number
  scale?: number
  weights?: 'fractional' | 'zero' | 'a task without'
  soft?: boolean
}

const common: Omit<OpTest<Case>, 'cases'> = {
  inputs: ({ M, K = 1, scale = 2, weights, soft, ...c }, random) => {
    const shape = 'K' in c || K > 1 ? [M, K] : [M]
    const values = (fill: (i: number) => number): Values => {
      return { shape, data: Float64Array.from({ length: M * K }, (_, i) => fill(i)), kind: 'wide' }
    }
    const weight = (i: number) => {
      if (weights === 'zero' || (weights === 'a task without' && i % K === 1)) return 0
      return i % 5 === 0 ? 0 : random.float()
    }
    return {
      logits: normal(random, shape, scale),
      labels: values(() => (soft ? random.float() : random.int(2))),
      weights: weights ? values(weight) : null,
    }
  },
  run: t => bceWithLogitsLoss(t.logits!, t.labels!, { weights: t.weights ?? null }),
  reference: (x, { K = 1 }) => {
    const [total, weight] = [new Float64Array(K), new Float64Array(K)]
    x.logits!.forEach((z, i) => {
      // -log sigmoid(s) by whichever of its two forms does not overflow
      const minusLog = (s: number) => (s > 0 ? Math.log1p(Math.exp(-s)) : Math.log1p(Math.exp(s)) - s)
      const w = x.weights ? x.weights[i]! : 1
      total[i % K]! += w * (x.labels![i]! * minusLog(z) + (1 - x.labels![i]!) * minusLog(-z))
      weight[i % K]! += w
    })
    return [total.map((sum, k) => (weight[k] === 0 ? 0 : sum / weight[k]!))]
  },
  gradients: ['logits'],
  tolerance: { float32: 1e-6 },
}

describeOp<Case>('bce_with_logits_loss', {
  cases: [
    { name: 'no rows', M: 0, K: 3 },
    { name: 'one', M: 1 },
    { name: 'a vector', M: 50 },
    { name: 'three tasks', M: 33, K: 3 },
    { name: 'soft labels', M: 33, K: 2, soft: true },
    { name: 'weights', M: 40, K: 3, weights: 'fractional' },
    { name: 'weights of a vector', M: 40, weights: 'fractional' },
    { name: 'all weights 0', M: 6, K: 2, weights: 'zero' },
    { name: 'a task without weight', M: 20, K: 3, weights: 'a task without' },
    { name: 'logits of hundreds', M: 300, K: 2, scale: 300 },
    { name: 'a block of rows', M: 1024, K: 2 },
    { name: 'a block of rows and one', M: 1025, K: 3, weights: 'fractional' },
    { name: 'as many tasks as threads', M: 5, K: 256 },
    { name: 'more than half as many', M: 70, K: 129 },
  ],
  ...common,
})

describeOp<Case>('bce_with_logits_loss', {
  cudaDtypes: ['float32', 'bfloat16'], // a gradient of so many rows is subnormal in float16
  cases: [{ name: 'many blocks', M: 40_000, K: 2, weights: 'fractional' }],
  ...common,
})

itOp('bce_with_logits_loss', 'stays exact where a sigmoid would be 0 or 1', () =>
  scope(() => {
    const logits = Tensor.from([100, -100, 20, -20], [1, 4])
    const labels = [0, 1, 1, 0]
    const tiny = Math.log1p(Math.exp(-20))
    const losses = valuesOf(bceWithLogitsLoss(logits, Tensor.from(labels, [1, 4])))
    assertClose(losses, [100, 100, tiny, tiny], 1e-6, 'loss')
    for (const k of [2, 3]) ok(Math.abs(losses[k]! / tiny - 1) < 1e-6)
    const { value, grads } = valueAndGrad([logits], () => bceWithLogitsLoss(reshape(logits, [4]), Tensor.from(labels)))
    ok(Math.abs(value.item() - 50) < 1e-5)
    const expected = [0.25, -0.25, -Math.exp(-20) / 4, Math.exp(-20) / 4]
    for (const [i, g] of valuesOf(grads[0]!).entries()) ok(Math.abs(g - expected[i]!) < 1e-7, `gradient ${i} is ${g}`)
  }),
)

itOp('bce_with_logits_loss', 'elements of weight 0 change no bit, whatever they hold', () =>
  scope(() => {
    const run = (logits: number[], labels: number[], weights: number[]) => {
      const z = Tensor.from(logits)
      const w = Tensor.from(weights)
      const { value, grads } = valueAndGrad([z], () => bceWithLogitsLoss(z, Tensor.from(labels), { weights: w }))
      return [value.item(), ...valuesOf(grads[0]!)]
    }
    const [loss, first, second] = run([0.3, -0.7], [1, 0], [0.5, 2])
    const among = run([0.3, Number.NaN, -0.7, 1], [1, 0, 0, Number.NaN], [0.5, 0, 2, 0])
    deepStrictEqual(among, [loss, first, 0, second, 0])
  }),
)

itOp('bce_with_logits_loss', 'bits do not depend on the threads', () =>
  sameBits(() => {
    const random = new Random(5)
    const logits = Tensor.from(
      Float32Array.from({ length: 30_000 }, () => random.normal()),
      [10_000, 3],
    )
    const labels = Tensor.from(
      Float32Array.from({ length: 30_000 }, () => random.int(2)),
      [10_000, 3],
    )
    return bceWithLogitsLoss(logits, labels)
  }),
)

itOp('bce_with_logits_loss', 'names what does not fit', () => {
  const at = (shape: number[], more = {}) => bceWithLogitsLoss(Tensor.zeros(shape), Tensor.zeros([2, 3]), more)
  throwsCode(() => at([2, 2]), 'ERR_HSTU_SHAPE', /bceWithLogitsLoss: labels must have shape \[M=2, K=2\]/)
  throwsCode(() => at([6]), 'ERR_HSTU_SHAPE', /labels must have shape \[M=6\]/)
  throwsCode(() => at([1, 2, 3]), 'ERR_HSTU_SHAPE', /logits must have shape \[M, K\]/)
  throwsCode(() => at([2, 3], { weights: Tensor.zeros([3]) }), 'ERR_HSTU_SHAPE', /weights/)
  const double = Tensor.zeros([2, 3], { dtype: 'float64' })
  throwsCode(() => at([2, 3], { weights: double }), 'ERR_HSTU_DTYPE', /weights must be float32/)
  throwsCode(
    () => bceWithLogitsLoss(double, double.view([2, 3]), { weights: Tensor.zeros([2, 3]) }),
    'ERR_HSTU_DTYPE',
    /float64/,
  )
  const wide = () => bceWithLogitsLoss(Tensor.zeros([1, 257]), Tensor.zeros([1, 257]))
  throwsCode(wide, 'ERR_HSTU_INVALID_ARGUMENT', /at most 256 tasks, got 257/)
  double.dispose()
})
