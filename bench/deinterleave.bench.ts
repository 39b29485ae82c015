import { deinterleave } from '#lib/ops/deinterleave.js'
import { benchOp, normal } from './harness.js'

benchOp('deinterleave', {
  cases: [
    { case: 'items, actions', T: 32768, d: 256 },
    { case: 'narrow', T: 131072, d: 50 },
    { case: 'scalars', T: 4194304, d: 1 },
  ],
  inputs: ({ T, d }, random) => ({ y: normal(random, [2 * T, d]) }),
  run: t => deinterleave(t.y!),
  gradients: ['y'],
  bytes: (c, F) => 4 * F * c.T * c.d,
  backwardBytes: (c, F) => 4 * F * c.T * c.d,
})
