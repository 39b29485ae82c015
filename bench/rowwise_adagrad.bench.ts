import { rowwiseAdagrad } from '#lib/ops/rowwise_adagrad.js'
import { int64, normal } from '../test/harness.js'
import { benchOp } from './harness.js'

benchOp('rowwise_adagrad', {
  cases: [
    { case: 'a batch of a small table', I: 3953, T: 25_600, d: 64 },
    { case: 'a batch of a large table', I: 1_000_000, T: 102_400, d: 64 },
    { case: 'one hot id', I: 3953, T: 102_400, d: 64, hot: true },
  ],
  inputs: (c, random) => ({
    table: normal(random, [c.I, c.d]),
    accumulator: { ...normal(random, [c.I]), data: new Float64Array(c.I).fill(1), kind: 'wide' },
    grads: normal(random, [c.T, c.d]),
    ids: int64(Array.from({ length: c.T }, () => (c.hot ? 7 : Math.floor(c.I * random.float() ** 3)))),
  }),
  run: t => {
    rowwiseAdagrad(t.table!, t.accumulator!, t.grads!, t.ids!, { lr: 1e-6 })
    return t.table!
  },
  // Reads the gradients; the rows and their accumulators, at most one an id, are not counted.
  bytes: c => (4 * c.d + 8) * c.T,
})
