import { interleave } from '#lib/ops/interleave.js'
import { benchOp, normal } from './harness.js'

benchOp('interleave', {
  cases: [
    { case: 'items, actions', T: 32768, d: 256 },
    { case: 'narrow', T: 131072, d: 50 },
    { case: 'scalars', T: 4194304, d: 1 },
  ],
  inputs: ({ T, d }, random) => ({ a: normal(random, [T, d]), b: normal(random, [T, d]) }),
  run: t => interleave(t.a!, t.b!),
  gradients: ['a', 'b'],
  bytes: (c, F) => 4 * F * c.T * c.d,
  backwardBytes: (c, F) => 4 * F * c.T * c.d,
})
