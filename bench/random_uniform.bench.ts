import { randomUniform } from '#lib/ops/random_uniform.js'
import { normal } from '../test/harness.js'
import { benchOp } from './harness.js'

benchOp('random_uniform', {
  cases: [{ case: 'a table grows', rows: 500_000, d: 64 }],
  inputs: (_, random) => ({ like: normal(random, [1]) }),
  run: (t, { rows, d }) => {
    const { dtype, device } = t.like!
    return randomUniform([rows, d], { bound: 0.03, seed: 1n, dtype, device })
  },
  bytes: ({ rows, d }) => 4 * rows * d,
})
