import { adamw } from '#lib/ops/adamw.js'
import { benchOp, normal } from './harness.js'

benchOp('adamw', {
  cases: [
    { case: 'one table', tensors: 1, size: 8_000_000 },
    { case: 'a model', tensors: 40, size: 25_000 },
  ],
  dtypes: ['float32'],
  inputs: ({ tensors, size }, random) =>
    Object.fromEntries(
      ['p', 'g', 'm', 'v'].map(name => {
        const values = normal(random, [tensors, size])
        return [
          name,
          name === 'v' ? { ...values, data: (values.data as Float64Array).map(Math.abs), kind: 'float' } : values,
        ]
      }),
    ),
  run: (t, { tensors }) => {
    const [p, g, m, v] = ['p', 'g', 'm', 'v'].map(name =>
      Array.from({ length: tensors }, (_, i) => t[name]!.rows(i, i + 1)),
    )
    adamw(p!, g!, m!, v!, { lr: 1e-6, beta2: 0.98, step: 10 })
    return p!
  },
  // Reads p, g, m, v; writes p, m, v.
  bytes: ({ tensors, size }) => 7 * 4 * tensors * size,
})
