import { targetRank } from '#lib/ops/target_rank.js'
import { int64, offsets } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

benchOp('target_rank', {
  cases: [
    { case: 'ml-100k', B: 943, I: 1682, d: 50, E: 100 },
    { case: 'beauty', B: 22363, I: 12101, d: 64, E: 9 },
    { case: 'ml-20m, a part', B: 4096, I: 26744, d: 256, E: 200 },
  ],
  inputs: ({ B, I, d, E }, random) => ({
    query: normal(random, [B, d]),
    table: normal(random, [I, d]),
    targetIds: int64(Array.from({ length: B }, () => 1 + random.int(I - 1))),
    excludeIds: int64(Array.from({ length: B * E }, () => random.int(I))),
    excludeOffsets: offsets(new Array<number>(B).fill(E)),
  }),
  run: t => {
    const exclusions = { excludeIds: t.excludeIds!, excludeOffsets: t.excludeOffsets! }
    return targetRank(t.query!, t.table!, t.targetIds!, exclusions)
  },
  bytes: ({ B, I, d, E }, F) => F * d * (B + I) + 8 * B * (E + 2),
  flops: ({ B, I, d }) => 2 * B * I * d,
})
