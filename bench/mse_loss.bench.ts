import { mseLoss } from '#lib/ops/mse_loss.js'
import { normal, type Values } from '../test/harness.js'
import { benchOp } from './harness.js'

benchOp('mse_loss', {
  cases: [
    { case: 'candidates', M: 2560, K: 3 },
    { case: 'every item token', M: 262_144, K: 8 },
  ],
  inputs: ({ M, K }, random) => {
    const wide = (fill: () => number): Values => {
      return { shape: [M, K], data: Float64Array.from({ length: M * K }, fill), kind: 'wide' }
    }
    return {
      predictions: normal(random, [M, K]),
      labels: wide(() => random.int(2)),
      weights: wide(() => random.float()),
    }
  },
  run: t => mseLoss(t.predictions!, t.labels!, { weights: t.weights! }),
  gradients: ['predictions'],
  bytes: ({ M, K }) => 12 * M * K,
  backwardFlops: ({ M, K }) => 16 * M * K,
})
