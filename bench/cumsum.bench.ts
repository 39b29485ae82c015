import { cumsum } from '#lib/ops/cumsum.js'
import { int32 } from '../test/harness.js'
import { benchOp } from './harness.js'

benchOp('cumsum', {
  cases: [{ case: 'lengths', B: 1048576, dtype: 'int64' }],
  dtypes: ['float32'],
  inputs: ({ B }, random) => ({ lengths: int32(Array.from({ length: B }, () => random.int(200))) }),
  run: t => cumsum(t.lengths!),
  bytes: ({ B }) => 12 * B,
})
