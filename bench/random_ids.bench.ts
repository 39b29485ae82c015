import { randomIds } from '#lib/ops/random_ids.js'
import { int32 } from '../test/harness.js'
import { benchOp } from './harness.js'

benchOp('random_ids', {
  cases: [
    { case: 'ml-1m negatives', T: 25600, R: 128, dtype: 'int64' },
    { case: 'amazon negatives', T: 6400, R: 512, dtype: 'int64' },
  ],
  dtypes: ['float32'],
  inputs: () => ({ where: int32([0]) }), // the device under test
  run: (t, { T, R }) => randomIds([T, R], { low: 1, high: 3707, seed: 1n, device: t.where!.device }),
  bytes: ({ T, R }) => 8 * T * R,
})
