import { layerNorm } from '#lib/ops/layer_norm.js'
import { benchOp, normal } from './harness.js'

benchOp('layer_norm', {
  cases: [
    { case: 'd 50, no affine', T: 51200, d: 50, affine: false },
    { case: 'd 256', T: 25600, d: 256, affine: true },
    { case: 'd 512', T: 32768, d: 512, affine: true },
  ],
  inputs: (c, random) => ({
    x: normal(random, [c.T, c.d]),
    weight: c.affine ? normal(random, [c.d]) : null,
    bias: c.affine ? normal(random, [c.d]) : null,
  }),
  run: t => layerNorm(t.x!, { weight: t.weight ?? null, bias: t.bias ?? null }),
  gradients: ['x', 'weight', 'bias'],
  bytes: (c, F) => 2 * F * c.T * c.d,
  backwardBytes: (c, F) => 3 * F * c.T * c.d,
})
