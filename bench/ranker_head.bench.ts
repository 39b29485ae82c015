import { cast } from '#lib/ops/cast.js'
import { rankerHead } from '#lib/ops/ranker_head.js'
import { int64, offsets } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

const named = ['hidden', 'hiddenBias', 'swishWeight', 'swishBias', 'output', 'outputBias'] as const

benchOp('ranker_head', {
  cases: [
    { case: 'one request', B: 1, M: 2048, d: 512, hidden: 512, K: 1 },
    { case: 'eight requests', B: 8, M: 256, d: 512, hidden: 512, K: 1 },
    { case: 'a few candidates', B: 1, M: 64, d: 512, hidden: 512, K: 1 },
  ],
  inputs: ({ B, M, d, hidden, K }, random) => ({
    x: normal(random, [B * (M + 1), d]),
    rows: int64(Array.from({ length: B * M }, (_, m) => m + Math.floor(m / M) + 1)),
    last: int64(Array.from({ length: B }, (_, b) => b * (M + 1))),
    groups: offsets(Array.from({ length: B }, () => M)),
    stateWeight: normal(random, [d, hidden]),
    hidden: normal(random, [d, hidden]),
    hiddenBias: normal(random, [hidden]),
    swishWeight: normal(random, [hidden]),
    swishBias: normal(random, [hidden]),
    output: normal(random, [hidden, K]),
    outputBias: normal(random, [K]),
  }),
  run: t => {
    // Beside x of 16 bits the parameters are float32.
    const of = (name: string) => (t.x!.dtype === 'float64' ? t[name]! : cast(t[name]!, 'float32'))
    const mlp = Object.fromEntries(named.map(name => [name, of(name)])) as Record<
      (typeof named)[number],
      typeof t.x & object
    >
    const states = { last: t.last! }
    return rankerHead(t.x!, { rows: t.rows!, groups: t.groups!, states, stateWeight: of('stateWeight'), mlp }).logits
  },
  flops: ({ B, M, d, hidden }) => 2 * B * (M + 1) * d * hidden,
})
