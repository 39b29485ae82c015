import { jaggedToDense } from '#lib/ops/jagged_to_dense.js'
import { offsets, sum } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

/** Lengths spread evenly over 0 .. N. */
const lengths = (B: number, N: number) => Array.from({ length: B }, (_, b) => Math.floor((b * (N + 1)) / B))

benchOp('jagged_to_dense', {
  cases: [
    { case: 'ml-1m batch', B: 512, N: 211, d: 50 },
    { case: 'long', B: 32, N: 2048, d: 256 },
  ],
  inputs: ({ B, N, d }, random) => ({
    x: normal(random, [sum(lengths(B, N)), d]),
    seqOffsets: offsets(lengths(B, N)),
  }),
  run: (t, { N }) => jaggedToDense(t.x!, { seqOffsets: t.seqOffsets!, maxLength: N }),
  gradients: ['x'],
  bytes: ({ B, N, d }, F) => F * d * (sum(lengths(B, N)) + B * N),
  backwardBytes: ({ B, N, d }, F) => 2 * F * d * sum(lengths(B, N)),
})
