import { normGateLinear } from '#lib/ops/norm_gate_linear.js'
import { benchOp, normal } from './harness.js'

benchOp('norm_gate_linear', {
  cases: [
    { case: 'd 50', T: 25600, d: 50, H: 1, V: 50, dropout: 0 },
    { case: 'd 50, dropout', T: 25600, d: 50, H: 1, V: 50, dropout: 0.2 },
    { case: 'd 512', T: 4096, d: 512, H: 8, V: 64, dropout: 0 },
  ],
  cudaCases: [
    { case: 'd 512', T: 65536, d: 512, H: 8, V: 64, dropout: 0 },
    { case: 'd 512, dropout', T: 65536, d: 512, H: 8, V: 64, dropout: 0.2 },
    { case: 'd 256', T: 131072, d: 256, H: 4, V: 64, dropout: 0 },
  ],
  inputs: (c, random) => ({
    x: normal(random, [c.T, c.d]),
    u: normal(random, [c.T, c.H, c.V]),
    o: normal(random, [c.T, c.H, c.V]),
    w: normal(random, [c.H * c.V, c.d], 0.02),
  }),
  run: (t, c) => {
    return normGateLinear(t.x!, t.u!, t.o!, t.w!, { dropout: c.dropout, position: { seed: 1n, offset: 0n } })
  },
  gradients: ['x', 'u', 'o', 'w'],
  flops: c => 2 * c.T * c.H * c.V * c.d,
  bytes: (c, F) => F * (c.T * (2 * c.d + 2 * c.H * c.V) + c.H * c.V * c.d),
  peer: c => ({ case: 'gemm', M: c.T, N: c.d, K: c.H * c.V }),
})
