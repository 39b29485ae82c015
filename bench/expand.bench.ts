import { expand } from '#lib/ops/expand.js'
import { offsets } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

benchOp('expand', {
  cases: [
    { case: 'candidates', B: 256, K: 128, d: 256 },
    { case: 'impressions', B: 8192, K: 4, d: 256 },
  ],
  inputs: ({ B, K, d }, random) => ({ x: normal(random, [B, d]), offsets: offsets(new Array<number>(B).fill(K)) }),
  run: (t, { B, K }) => expand(t.x!, { offsets: t.offsets!, rows: B * K }),
  gradients: ['x'],
  bytes: ({ B, K, d }, F) => F * d * B * (K + 1),
  backwardBytes: ({ B, K, d }, F) => F * d * B * (K + 1),
})
