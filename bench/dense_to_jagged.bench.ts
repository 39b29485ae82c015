import { denseToJagged } from '#lib/ops/dense_to_jagged.js'
import { offsets, sum } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

/** Lengths spread evenly over 0 .. N. */
const lengths = (B: number, N: number) => Array.from({ length: B }, (_, b) => Math.floor((b * (N + 1)) / B))

benchOp('dense_to_jagged', {
  cases: [
    { case: 'ml-1m batch', B: 512, N: 211, d: 50 },
    { case: 'long', B: 32, N: 2048, d: 256 },
  ],
  inputs: ({ B, N, d }, random) => ({ dense: normal(random, [B, N, d]), seqOffsets: offsets(lengths(B, N)) }),
  run: (t, { B, N }) => denseToJagged(t.dense!, { seqOffsets: t.seqOffsets!, rows: sum(lengths(B, N)) }),
  gradients: ['dense'],
  bytes: ({ B, N, d }, F) => 2 * F * d * sum(lengths(B, N)),
  backwardBytes: ({ B, N, d }, F) => F * d * (sum(lengths(B, N)) + B * N),
})
