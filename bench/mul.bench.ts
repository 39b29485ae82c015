import { mul } from '#lib/ops/mul.js'
import { benchOp, normal } from './harness.js'

benchOp('mul', {
  cases: [
    { case: 'out of cache', T: 32768, d: 512 },
    { case: 'model of d 50', T: 25600, d: 50 },
  ],
  inputs: (c, random) => ({ a: normal(random, [c.T, c.d]), b: normal(random, [c.T, c.d]) }),
  run: t => mul(t.a!, t.b!),
  gradients: ['a', 'b'],
  bytes: (c, F) => 3 * F * c.T * c.d,
  backwardBytes: (c, F) => 5 * F * c.T * c.d,
})
