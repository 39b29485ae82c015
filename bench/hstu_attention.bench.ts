import { hstuAttention } from '#lib/ops/hstu_attention.js'
import { int64, offsets } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

type Case = { B: number; L: number; H: number; D: number; V: number; bias: boolean; activation: 'silu' | 'softmax' }

// Full sequences, causal. Visible pairs: H * B * L * (L + 1) / 2, each 2 D + 2 V flops forward and 6 D + 4 V backward.
const pairs = (c: Case) => (c.H * c.B * c.L * (c.L + 1)) / 2

benchOp('hstu_attention', {
  cases: [
    { case: 'ml-20m with rab', B: 128, L: 200, H: 1, D: 50, V: 50, bias: true, activation: 'silu' },
    { case: 'ml-20m without bias', B: 128, L: 200, H: 1, D: 50, V: 50, bias: false, activation: 'silu' },
    { case: 'ml-20m softmax', B: 128, L: 200, H: 1, D: 50, V: 50, bias: false, activation: 'softmax' },
    { case: 'long with rab', B: 4, L: 2048, H: 4, D: 64, V: 64, bias: true, activation: 'silu' },
    { case: 'long without bias', B: 4, L: 2048, H: 4, D: 64, V: 64, bias: false, activation: 'silu' },
  ] as (Case & { case: string })[],
  inputs: (c, random) => {
    const T = c.B * c.L
    const times = Array.from({ length: T }, () => 0)
    for (let t = 0; t < T; t++) times[t] = (t % c.L ? times[t - 1]! : 1.6e9) + Math.floor(Math.exp(14 * random.float()))
    return {
      q: normal(random, [T, c.H, c.D]),
      k: normal(random, [T, c.H, c.D]),
      v: normal(random, [T, c.H, c.V]),
      seqOffsets: offsets(Array<number>(c.B).fill(c.L)),
      posW: c.bias ? normal(random, [1, c.L]) : null,
      timeW: c.bias ? normal(random, [1, 129]) : null,
      times: int64(times),
    }
  },
  run: (t, c) =>
    hstuAttention(t.q!, t.k!, t.v!, {
      seqOffsets: t.seqOffsets!,
      maxSeqLen: c.L,
      scale: 1 / c.L,
      alpha: 1 / Math.sqrt(c.D),
      posW: t.posW ?? null,
      timeW: t.timeW ?? null,
      queryTime: t.times!,
      keyTime: t.times!,
      activation: c.activation,
    }),
  gradients: ['q', 'k', 'v', 'posW', 'timeW'],
  bytes: (c, F) => 2 * F * c.B * c.L * c.H * (c.D + c.V),
  flops: c => pairs(c) * 2 * (c.D + c.V),
  backwardFlops: c => pairs(c) * (6 * c.D + 4 * c.V),
})
