import { softmaxLoss } from '#lib/ops/softmax_loss.js'
import { int64 } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

benchOp('softmax_loss', {
  cases: [
    { case: 'ml-100k', T: 20_000, d: 50, I: 1683 },
    { case: 'ml-1m', T: 25_000, d: 50, I: 3953 },
    { case: 'beauty', T: 1600, d: 64, I: 57_290 },
  ],
  inputs: ({ T, d, I }, random) => ({
    query: normal(random, [T, d], 1 / Math.sqrt(d)),
    table: normal(random, [I, d]),
    positives: int64(Array.from({ length: T }, () => 1 + random.int(I - 1))),
  }),
  run: t => softmaxLoss(t.query!, t.table!, t.positives!),
  gradients: ['query', 'table'],
  bytes: ({ T, d, I }, F) => F * d * (T + I),
  flops: ({ T, d, I }) => 2 * T * d * (I - 1),
  // The products again, then one product each for dquery and dtable.
  backwardFlops: ({ T, d, I }) => 6 * T * d * (I - 1),
})
