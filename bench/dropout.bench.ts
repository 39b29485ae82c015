import { dropout } from '#lib/ops/dropout.js'
import { benchOp, normal } from './harness.js'

benchOp('dropout', {
  cases: [
    { case: 'model of d 50', T: 25600, d: 50, p: 0.2 },
    { case: 'out of cache', T: 32768, d: 512, p: 0.5 },
  ],
  inputs: (c, random) => ({ x: normal(random, [c.T, c.d]) }),
  run: (t, c) => dropout(t.x!, c.p, { seed: 1n, offset: 0n }),
  gradients: ['x'],
  bytes: (c, F) => 2 * F * c.T * c.d,
  backwardBytes: (c, F) => 2 * F * c.T * c.d,
})
