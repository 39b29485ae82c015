import { linear } from '#lib/ops/linear.js'
import { normal } from '../test/harness.js'
import { benchOp } from './harness.js'

benchOp('linear', {
  cases: [
    { case: 'cube', T: 1024, in: 1024, out: 1024 },
    { case: 'model of d 50', T: 25600, in: 50, out: 200 },
    { case: 'd 512, uvqk', T: 4096, in: 512, out: 2048 },
  ],
  inputs: (c, random) => ({ x: normal(random, [c.T, c.in]), w: normal(random, [c.in, c.out]) }),
  run: t => linear(t.x!, t.w!),
  gradients: ['x', 'w'],
  flops: c => 2 * c.T * c.in * c.out,
})
