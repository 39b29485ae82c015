import { add } from '#lib/ops/add.js'
import { benchOp, normal } from './harness.js'

benchOp('add', {
  cases: [
    { case: 'out of cache', T: 65536, d: 512 },
    { case: 'model of d 50', T: 25600, d: 50 },
  ],
  inputs: (c, random) => ({ a: normal(random, [c.T, c.d]), b: normal(random, [c.T, c.d]) }),
  run: t => add(t.a!, t.b!),
  bytes: (c, F) => 3 * F * c.T * c.d,
})
