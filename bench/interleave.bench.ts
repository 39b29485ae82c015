import { interleave } from '#lib/ops/interleave.js'
import { normal } from '../test/harness.js'
import { benchOp } from './harness.js'

benchOp('interleave', {
  cases: [
    { case: 'items, actions', T: 32768, d: 256 },
    { case: 'narrow', T: 131072, d: 50 },
    { case: 'scalars', T: 4194304, d: 1 },
  ],
  inputs: ({ T, d }, random) => ({ a: normal(random, [T, d]), b: normal(random, [T, d]) }),
  run: t => interleave(t.a!, t.b!),
  gradients: ['a', 'b'],
  bytes: c => 4 * 4 * c.T * c.d,
  backwardFlops: c => 4 * 4 * c.T * c.d,
})
