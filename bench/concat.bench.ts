import { concat } from '#lib/ops/concat.js'
import { offsets } from '../test/harness.js'
import { benchOp, normal } from './harness.js'

const lengths = (count: number, length: number) => Array.from({ length: count }, (_, b) => (b % 2 ? 2 * length : 0))

benchOp('concat', {
  cases: [
    { case: 'history, candidates', B: 256, La: 200, Lb: 64, d: 256 },
    { case: 'short', B: 8192, La: 6, Lb: 2, d: 64 },
  ],
  inputs: ({ B, La, Lb, d }, random) => ({
    a: normal(random, [B * La, d]),
    b: normal(random, [B * Lb, d]),
    aOffsets: offsets(lengths(B, La)),
    bOffsets: offsets(lengths(B, Lb)),
  }),
  run: t => concat(t.a!, t.b!, { aOffsets: t.aOffsets!, bOffsets: t.bOffsets! }).values,
  gradients: ['a', 'b'],
  bytes: (c, F) => 2 * F * c.B * (c.La + c.Lb) * c.d,
  backwardBytes: (c, F) => 2 * F * c.B * (c.La + c.Lb) * c.d,
})
