import { sampledSoftmaxLoss } from '#lib/ops/sampled_softmax_loss.js'
import { int64 } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

benchOp('sampled_softmax_loss', {
  cases: [
    { case: 'ml-100k', T: 20_000, R: 128, d: 50, I: 1683, shared: false },
    { case: 'ml-1m', T: 25_000, R: 128, d: 50, I: 3953, shared: false },
    { case: 'ml-20m', T: 12_500, R: 128, d: 256, I: 26_745, shared: false },
    { case: 'beauty', T: 6400, R: 512, d: 64, I: 57_290, shared: false },
    { case: 'ml-1m in-batch', T: 25_000, R: 1024, d: 50, I: 3953, shared: true },
  ],
  inputs: ({ T, R, d, I, shared }, random) => {
    const item = () => 1 + random.int(I - 1)
    return {
      query: normal(random, [T, d], 1 / Math.sqrt(d)),
      table: normal(random, [I, d]),
      positives: int64(Array.from({ length: T }, item)),
      negatives: shared ? int64(Array.from({ length: R }, item)) : null,
    }
  },
  run: (t, { R }) => {
    const options = t.negatives ? { negativeIds: t.negatives } : { numNegatives: R, seed: 1n }
    return sampledSoftmaxLoss(t.query!, t.table!, t.positives!, options)
  },
  gradients: ['query', 'table'],
  bytes: ({ T, d, I }, F) => F * d * (T + I),
  flops: ({ T, R, d }) => 2 * T * (R + 1) * d,
  // The products again, then one product each for dquery and dtable.
  backwardFlops: ({ T, R, d }) => 6 * T * (R + 1) * d,
})
