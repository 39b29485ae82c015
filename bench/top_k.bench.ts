import { topK } from '#lib/ops/top_k.js'
import { int64, offsets } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

benchOp('top_k', {
  cases: [
    { case: 'ml-100k', B: 943, I: 1682, d: 50, k: 10, E: 100 },
    { case: 'beauty', B: 22363, I: 12101, d: 64, k: 10, E: 9 },
    { case: 'beauty, long list', B: 22363, I: 12101, d: 64, k: 500, E: 9 },
    { case: 'one request', B: 1, I: 262144, d: 64, k: 100, E: 200 },
  ],
  inputs: ({ B, I, d, E }, random) => ({
    query: normal(random, [B, d]),
    table: normal(random, [I, d]),
    excludeIds: int64(Array.from({ length: B * E }, () => random.int(I))),
    excludeOffsets: offsets(new Array<number>(B).fill(E)),
  }),
  run: (t, { k }) => {
    const { scores, ids } = topK(t.query!, t.table!, k, {
      excludeIds: t.excludeIds!,
      excludeOffsets: t.excludeOffsets!,
    })
    return [scores, ids]
  },
  bytes: ({ B, I, d, k, E }, F) => F * d * (B + I) + 8 * B * E + (8 + F) * B * k,
  flops: ({ B, I, d }) => 2 * B * I * d,
})
