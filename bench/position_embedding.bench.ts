import { positionEmbedding } from '#lib/ops/position_embedding.js'
import { int64, offsets } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

benchOp('position_embedding', {
  cases: [
    { case: 'ml-1m batch', B: 128, N: 200, d: 50 },
    { case: 'long', B: 32, N: 2048, d: 256 },
  ],
  inputs: (c, random) => ({
    x: normal(random, [c.B * c.N, c.d]),
    table: normal(random, [c.N, c.d]),
    seqOffsets: offsets(Array(c.B).fill(c.N)),
    ids: int64(Array.from({ length: c.B * c.N }, () => random.int(1000))),
  }),
  run: (t, c) => {
    return positionEmbedding(t.x!, t.table!, { seqOffsets: t.seqOffsets!, ids: t.ids!, scale: Math.sqrt(c.d) })
  },
  gradients: ['x', 'table'],
  bytes: (c, F) => (2 * F * c.d + 8) * c.B * c.N,
  backwardBytes: (c, F) => (2 * F * c.d + 8) * c.B * c.N,
})
