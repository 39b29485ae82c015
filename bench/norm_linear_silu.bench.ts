import { normLinearSilu } from '#lib/ops/norm_linear_silu.js'
import { benchOp, normal } from './harness.js'

const columns = (c: { H: number; D: number; V: number }) => 2 * c.H * (c.D + c.V)

benchOp('norm_linear_silu', {
  cases: [
    { case: 'd 50', T: 25600, d: 50, H: 1, D: 50, V: 50 },
    { case: 'd 512', T: 4096, d: 512, H: 8, D: 64, V: 64 },
  ],
  cudaCases: [
    { case: 'd 512', T: 65536, d: 512, H: 8, D: 64, V: 64 },
    { case: 'd 256', T: 131072, d: 256, H: 4, D: 64, V: 64 },
  ],
  inputs: (c, random) => ({ x: normal(random, [c.T, c.d]), w: normal(random, [c.d, columns(c)], 0.02) }),
  run: (t, c) => {
    const { u, v, q, k } = normLinearSilu(t.x!, t.w!, { heads: c.H, qkDim: c.D, vDim: c.V })
    return [u, v, q, k]
  },
  gradients: ['x', 'w'],
  flops: c => 2 * c.T * c.d * columns(c),
  bytes: (c, F) => F * (c.T * (c.d + columns(c)) + c.d * columns(c)),
  peer: c => ({ case: 'gemm', M: c.T, N: columns(c), K: c.d }),
})
