import { linear } from '#lib/ops/linear.js'
import { benchOp, normal } from './harness.js'

benchOp('linear', {
  cases: [
    { case: 'cube', T: 1024, in: 1024, out: 1024 },
    { case: 'model of d 50', T: 25600, in: 50, out: 200 },
    { case: 'd 512, uvqk', T: 4096, in: 512, out: 2048 },
  ],
  cudaCases: [
    { case: 'cube', T: 8192, in: 8192, out: 8192 },
    { case: 'd 512, uvqk', T: 65536, in: 512, out: 2048 },
    { case: 'd 512, output', T: 65536, in: 512, out: 512 },
    { case: 'd 1024, uvqk', T: 65536, in: 1024, out: 4096 },
    { case: 'd 256, uvqk', T: 131072, in: 256, out: 1024 },
    { case: 'd 256, output', T: 131072, in: 256, out: 256 },
  ],
  inputs: (c, random) => ({ x: normal(random, [c.T, c.in]), w: normal(random, [c.in, c.out]) }),
  run: t => linear(t.x!, t.w!),
  gradients: ['x', 'w'],
  flops: c => 2 * c.T * c.in * c.out,
  bytes: (c, F) => F * (c.T * (c.in + c.out) + c.in * c.out),
  peer: c => ({ case: 'gemm', M: c.T, N: c.out, K: c.in }),
})
