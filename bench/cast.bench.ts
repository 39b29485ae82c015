import { cast } from '#lib/ops/cast.js'
import { type Dtype, dtypeBytes } from '#lib/tensor.js'
import { benchOp, normal } from './harness.js'

benchOp<{ case: string; size: number; to: Dtype }>('cast', {
  cases: (['bfloat16', 'float16', 'float64', 'int64'] as const).map(to => ({ case: `to ${to}`, size: 1 << 24, to })),
  inputs: (c, random) => ({ x: normal(random, [c.size]) }),
  run: (t, c) => cast(t.x!, c.to),
  bytes: (c, F) => (F + dtypeBytes[c.to]) * c.size,
})
