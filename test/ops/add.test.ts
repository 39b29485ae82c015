import { add } from '#lib/ops/add.js'
import { Tensor } from '#lib/tensor.js'
import { describeOp, itOp, normal, throwsCode } from '../harness.js'

describeOp('add', {
  cases: [
    { name: 'empty', shape: [0, 3] },
    { name: 'one', shape: [1] },
    { name: 'matrix', shape: [17, 33] },
    { name: 'past one task', shape: [3, 16385] },
  ],
  inputs: ({ shape }, random) => ({ a: normal(random, shape), b: normal(random, shape) }),
  run: t => add(t.a!, t.b!),
  reference: x => [x.a!.map((a, i) => a + x.b![i]!)],
  gradients: ['a', 'b'],
})

itOp('add', 'names both shapes', () => {
  throwsCode(() => add(Tensor.zeros([2, 3]), Tensor.zeros([3, 2])), 'ERR_HSTU_SHAPE', /add: b .*float32\[3, 2\]/)
})
itOp('add', 'names a dtype that differs', () => {
  throwsCode(() => add(Tensor.zeros([2]), Tensor.zeros([2], { dtype: 'float64' })), 'ERR_HSTU_DTYPE', /b is float64/)
})
itOp('add', 'names a disposed tensor', () => {
  const a = Tensor.zeros([2])
  a.dispose()
  throwsCode(() => add(a, Tensor.zeros([2])), 'ERR_HSTU_DISPOSED', /add: a is disposed/)
})
