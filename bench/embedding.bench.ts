import { embedding } from '#lib/ops/embedding.js'
import { int64 } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

benchOp('embedding', {
  cases: [
    { case: 'ml-1m batch', I: 3953, T: 25600, d: 50 },
    { case: 'ml-1m negatives', I: 3953, T: 1_638_400, d: 50 },
    { case: 'amazon books batch', I: 695_763, T: 6400, d: 64 },
    { case: 'one hot id', I: 3953, T: 262_144, d: 64, hot: true },
  ],
  inputs: (c, random) => ({
    table: normal(random, [c.I, c.d]),
    ids: int64(Array.from({ length: c.T }, () => (c.hot ? 7 : Math.floor(c.I * random.float() ** 3)))),
  }),
  run: t => embedding(t.table!, t.ids!),
  gradients: ['table'],
  bytes: (c, F) => (F * c.d + 8) * c.T + F * c.d * (c.hot ? 1 : Math.min(c.T, c.I)),
  backwardBytes: (c, F) => (F * c.d + 8) * c.T + F * c.d * c.I,
})
