import { embeddingSum } from '#lib/ops/embedding_sum.js'
import { int64 } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

benchOp('embedding_sum', {
  cases: [
    { case: 'items and actions', I: 100_000, T: 9048, d: 512 },
    { case: 'a batch of histories', I: 100_000, T: 98_304, d: 512 },
  ],
  inputs: (c, random) => ({
    items: normal(random, [c.I, c.d]),
    actions: normal(random, [16, c.d]),
    itemIds: int64(Array.from({ length: c.T }, () => random.int(c.I))),
    actionIds: int64(Array.from({ length: c.T }, () => random.int(16))),
  }),
  run: t =>
    embeddingSum([
      { table: t.items!, ids: t.itemIds! },
      { table: t.actions!, ids: t.actionIds! },
    ]),
  bytes: (c, F) => c.T * (2 * F * c.d + 16) + 16 * F * c.d,
})
