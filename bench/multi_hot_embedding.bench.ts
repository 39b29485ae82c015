import { multiHotEmbedding } from '#lib/ops/multi_hot_embedding.js'
import { int64, normal } from '../test/harness.js'
import { benchOp } from './harness.js'

benchOp('multi_hot_embedding', {
  cases: [
    { case: 'deskdrop actions', T: 25_600, K: 5, d: 8 },
    { case: 'wide', T: 262_144, K: 8, d: 32 },
  ],
  inputs: ({ T, K, d }, random) => ({
    table: normal(random, [K, d]),
    actions: int64(Array.from({ length: T }, () => random.int(1 << K) - 1)),
    pending: normal(random, [K, d]),
  }),
  run: t => multiHotEmbedding(t.table!, t.actions!, { pending: t.pending! }),
  gradients: ['table', 'pending'],
  bytes: ({ T, K, d }) => (4 * K * d + 8) * T,
  backwardFlops: ({ T, K, d }) => (4 * K * d + 8) * T,
})
