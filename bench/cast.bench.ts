import { cast, castAll } from '#lib/ops/cast.js'
import { type Dtype, dtypeBytes } from '#lib/tensor.js'
import { normal } from '../test/harness.js'
import { benchOp } from './harness.js'

benchOp<{ case: string; tensors: number; size: number; to: Dtype }>('cast', {
  cases: [
    ...(['bfloat16', 'float16', 'float64', 'int64'] as const).map(to => ({
      ...{ case: `to ${to}`, tensors: 1, size: 1 << 24, to },
    })),
    { case: 'a model to bfloat16', tensors: 40, size: 25_000, to: 'bfloat16' },
  ],
  inputs: (c, random) => ({ x: normal(random, [c.tensors, c.size]) }),
  run: (t, c) => {
    if (c.tensors === 1) return cast(t.x!, c.to)
    const rows = Array.from({ length: c.tensors }, (_, i) => [String(i), t.x!.rows(i, i + 1)] as const)
    return Object.values(castAll(Object.fromEntries(rows), c.to))
  },
  bytes: c => (4 + dtypeBytes[c.to]) * c.tensors * c.size,
})
