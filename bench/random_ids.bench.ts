import { randomIds } from '#lib/ops/random_ids.js'
import { benchOp } from './harness.js'

benchOp('random_ids', {
  cases: [
    { case: 'ml-1m negatives', T: 25600, R: 128 },
    { case: 'amazon negatives', T: 6400, R: 512 },
  ],
  inputs: () => ({}),
  run: (_, { T, R }) => randomIds([T, R], { low: 1, high: 3707, seed: 1n }),
  bytes: ({ T, R }) => 8 * T * R,
})
