import { mul } from '#lib/ops/mul.js'
import { Tensor } from '#lib/tensor.js'
import { describeOp, itOp, normal, throwsCode } from '../harness.js'

describeOp('mul', {
  cases: [
    { name: 'empty', shape: [0, 3] },
    { name: 'scalar', shape: [] },
    { name: 'one', shape: [1] },
    { name: 'matrix', shape: [17, 33] },
    { name: 'one task less one', shape: [16383] },
    { name: 'past one task', shape: [3, 16385] },
  ],
  inputs: ({ shape }, random) => ({ a: normal(random, shape), b: normal(random, shape) }),
  run: t => mul(t.a!, t.b!),
  reference: x => [x.a!.map((a, i) => a * x.b![i]!)],
  gradients: ['a', 'b'],
})

describeOp('mul', {
  cases: [{ name: 'square of one tensor' }],
  inputs: (_, random) => ({ a: normal(random, [5, 7]) }),
  run: t => mul(t.a!, t.a!),
  reference: x => [x.a!.map(a => a * a)],
  gradients: ['a'],
})

itOp('mul', 'names both shapes and a dtype that differs', () => {
  throwsCode(() => mul(Tensor.zeros([2, 3]), Tensor.zeros([3, 2])), 'ERR_HSTU_SHAPE', /mul: b .*float32\[3, 2\]/)
  const double = { dtype: 'float64' } as const
  throwsCode(() => mul(Tensor.zeros([2]), Tensor.zeros([2], double)), 'ERR_HSTU_DTYPE', /mul: b is float64/)
})
