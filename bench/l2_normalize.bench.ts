import { l2Normalize } from '#lib/ops/l2_normalize.js'
import { benchOp, normal } from './harness.js'

benchOp('l2_normalize', {
  cases: [
    { case: 'd 50', T: 102400, d: 50 },
    { case: 'd 256', T: 51200, d: 256 },
  ],
  inputs: (c, random) => ({ x: normal(random, [c.T, c.d]) }),
  run: t => l2Normalize(t.x!),
  gradients: ['x'],
  bytes: (c, F) => 2 * F * c.T * c.d,
  backwardBytes: (c, F) => 3 * F * c.T * c.d,
})
