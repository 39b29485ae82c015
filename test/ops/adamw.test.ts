import { deepStrictEqual, ok } from 'node:assert/strict'
import { valueAndGrad } from '#lib/autograd.js'
import { native } from '#lib/native.js'
import { type AdamwOptions, adamw } from '#lib/ops/adamw.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { describeOp, itOp, normal, throwsCode, valuesOf } from '../harness.js'

interface Case {
  sizes: number[]
  steps: number
  options?: Omit<AdamwOptions, 'step' | 'lr'>
  lr?: number
}

const copy = (tensor: Tensor) => Tensor.from(tensor.dataSync(), tensor.shape, tensor)

describeOp<Case>('adamw', {
  cudaDtypes: ['float32'], // master weights and moments
  cases: [
    { name: 'no tensors', sizes: [], steps: 1 },
    { name: 'one step', sizes: [5], steps: 1 },
    { name: 'ten steps', sizes: [33, 1, 0, 17], steps: 10 },
    { name: 'weight decay', sizes: [40], steps: 10, options: { weightDecay: 0.1 } },
    { name: 'SASRec betas, past a block', sizes: [16384, 16385, 3], steps: 3, options: { beta1: 0.9, beta2: 0.98 } },
    { name: 'no momentum', sizes: [9], steps: 4, options: { beta1: 0, beta2: 0, eps: 0.1 } },
    { name: 'learning rate 0', sizes: [9], steps: 2, options: { weightDecay: 0.5 }, lr: 0 },
  ],
  inputs: (c, random) => {
    const values: Record<string, ReturnType<typeof normal>> = {}
    c.sizes.forEach((size, i) => {
      values[`p${i}`] = normal(random, [size, 1])
      values[`g${i}`] = normal(random, [c.steps, size])
    })
    return values
  },
  run: (t, c) => {
    const p = c.sizes.map((_, i) => copy(t[`p${i}`]!))
    const [m, v] = [0, 1].map(() => p.map(x => Tensor.zeros(x.shape, x)))
    for (let step = 1; step <= c.steps; step++) {
      const grads = c.sizes.map((size, i) => t[`g${i}`]!.rows(step - 1, step).view([size, 1]))
      adamw(p, grads, m!, v!, { lr: 1e-2, ...c.options, ...(c.lr === undefined ? {} : { lr: c.lr }), step })
    }
    return [...p, ...m!, ...v!]
  },
  reference: (x, c) => {
    const { beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weightDecay = 0 } = c.options ?? {}
    const lr = c.lr ?? 1e-2
    const p = c.sizes.map((_, i) => Float64Array.from(x[`p${i}`]!))
    const m = c.sizes.map(size => new Float64Array(size))
    const v = c.sizes.map(size => new Float64Array(size))
    for (let step = 1; step <= c.steps; step++)
      c.sizes.forEach((size, i) => {
        for (let j = 0; j < size; j++) {
          const g = x[`g${i}`]![(step - 1) * size + j]!
          m[i]![j] = beta1 * m[i]![j]! + (1 - beta1) * g
          v[i]![j] = beta2 * v[i]![j]! + (1 - beta2) * g * g
          const mean = m[i]![j]! / (1 - beta1 ** step)
          const square = v[i]![j]! / (1 - beta2 ** step)
          p[i]![j]! -= (lr * mean) / (Math.sqrt(square) + eps) + lr * weightDecay * p[i]![j]!
        }
      })
    return [...p, ...m, ...v]
  },
})

itOp('adamw', 'rows without a gradient move by momentum; rows that never had one stay', () =>
  scope(() => {
    const p = Tensor.from([1, 2, 3, 4], [2, 2])
    const [m, v] = [Tensor.zeros([2, 2]), Tensor.zeros([2, 2])]
    adamw([p], [Tensor.from([1, -1, 0, 0], [2, 2])], [m], [v], { lr: 0.1, step: 1 })
    const before = valuesOf(p)
    adamw([p], [Tensor.zeros([2, 2])], [m], [v], { lr: 0.1, step: 2 })
    const after = valuesOf(p)
    ok(after[0]! < before[0]! && after[1]! > before[1]!)
    deepStrictEqual(after.slice(2), Float64Array.of(3, 4))
  }),
)

itOp('adamw', 'bits do not depend on the threads', () =>
  scope(() => {
    const values = Float32Array.from(normal(new Random(3), [50_000]).data as Float64Array)
    const at = (threads: number) => {
      native.set_num_threads(threads)
      const [p, m, v] = [values, values, values.map(Math.abs)].map(x => Tensor.from(x))
      adamw([p!], [Tensor.from(values)], [m!], [v!], { lr: 0.1, step: 3, weightDecay: 0.1 })
      return [p!, m!, v!].map(valuesOf)
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

itOp('adamw', 'names the index and what is wrong', () => {
  const zeros = (...shape: number[]) => Tensor.zeros(shape)
  const double = () => Tensor.zeros([2], { dtype: 'float64' })
  const options = { lr: 0.1, step: 1 }
  const code = 'ERR_HSTU_INVALID_ARGUMENT'
  const two = () => [zeros(2), zeros(2)]
  throwsCode(() => adamw(two(), two(), [zeros(2)], two(), options), code, /m has 1 tensors, params has 2/)
  const shape = /grads\[1\] must have shape \[2\], got float32\[3\]/
  throwsCode(() => adamw(two(), [zeros(2), zeros(3)], two(), two(), options), 'ERR_HSTU_SHAPE', shape)
  throwsCode(() => adamw(two(), two(), two(), [zeros(2), double()], options), 'ERR_HSTU_DTYPE', /v\[1\] is float64/)
  const mixed = () => [zeros(2), double()]
  throwsCode(() => adamw(mixed(), mixed(), mixed(), mixed(), options), 'ERR_HSTU_DTYPE', /params\[1\] is float64/)
  throwsCode(
    () => {
      const p = zeros(2)
      adamw([p, p], two(), two(), two(), options)
    },
    code,
    /params\[1\] is params\[0\]/,
  )
  const one = (more: Partial<AdamwOptions>) => () =>
    adamw([zeros(2)], [zeros(2)], [zeros(2)], [zeros(2)], { ...options, ...more })
  throwsCode(one({ beta1: 1 }), code, /beta1 must be in \[0, 1\), got 1/)
  throwsCode(one({ beta2: -0.1 }), code, /beta2/)
  throwsCode(one({ lr: Number.NaN }), code, /lr/)
  throwsCode(one({ eps: -1 }), code, /eps/)
  throwsCode(one({ step: 0 }), code, /step must be an integer of at least 1, got 0/)
  const p = zeros(1)
  const inTape = () => {
    adamw([p], [p], [p], [p], options)
    return p
  }
  throwsCode(() => valueAndGrad([p], inTape), code, /adamw changes tensors in place/)
  p.dispose()
})
