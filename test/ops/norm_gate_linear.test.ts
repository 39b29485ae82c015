import { normGateLinear } from '#lib/ops/norm_gate_linear.js'
import { Tensor } from '#lib/tensor.js'
import { describeOp, itOp, normal, philoxWord, sameRows, throwsCode } from '../harness.js'

interface Case {
  T: number
  d: number
  H: number
  V: number
  bias?: boolean
  affine?: boolean
  concat?: boolean
  dropout?: number
  /** Part of the offset that a tensor holds. */
  base?: bigint
}

const position = { seed: 0x1234_5678_9abc_def0n, offset: 77n }

describeOp<Case>('norm_gate_linear', {
  cases: [
    { name: 'no rows', T: 0, d: 4, H: 1, V: 3 },
    { name: 'one row', T: 1, d: 5, H: 1, V: 4 },
    { name: 'research form of d 50', T: 70, d: 50, H: 1, V: 50, bias: true, dropout: 0.2 },
    { name: 'two heads of 25', T: 9, d: 50, H: 2, V: 25, bias: true },
    { name: 'concat, affine', T: 11, d: 32, H: 2, V: 8, bias: true, affine: true, concat: true },
    // What Hopper's kernels take in 16-bit types: on chip up to H V = 512, by a pass before the product beyond.
    { name: 'aligned, on chip', T: 131, d: 72, H: 2, V: 40, bias: true, affine: true, dropout: 0.3 },
    { name: 'aligned, whole tiles', T: 129, d: 256, H: 2, V: 64 },
    { name: 'aligned, two pieces', T: 131, d: 328, H: 2, V: 144, bias: true, affine: true },
    { name: 'aligned, concat', T: 67, d: 40, H: 1, V: 24, bias: true, concat: true },
    { name: 'aligned, past what fits on chip', T: 35, d: 64, H: 4, V: 144, affine: true },
    { name: 'concat, affine, dropout', T: 97, d: 17, H: 3, V: 7, bias: true, affine: true, concat: true, dropout: 0.5 },
    { name: 'offset on the device', T: 33, d: 16, H: 1, V: 16, bias: true, dropout: 0.2, base: 70n },
  ],
  inputs: ({ T, d, H, V, bias, affine, concat, base }, random) => ({
    x: normal(random, [T, d]),
    u: normal(random, [T, H, V]),
    o: normal(random, [T, H, V]),
    w: normal(random, [(concat ? 3 : 1) * H * V, d], 1 / Math.sqrt(H * V)),
    bias: bias ? normal(random, [d]) : null,
    normWeight: affine ? normal(random, [H * V]) : null,
    normBias: affine ? normal(random, [H * V]) : null,
    base: base === undefined ? null : { shape: [1], data: BigInt64Array.of(base), kind: 'int64' },
  }),
  run: (t, { concat = false, dropout = 0, base = 0n }) => {
    const { bias = null, normWeight = null, normBias = null } = t
    const at = { ...position, offset: position.offset - base, base: t.base ?? null }
    return normGateLinear(t.x!, t.u!, t.o!, t.w!, { bias, normWeight, normBias, concat, dropout, position: at })
  },
  reference: (x, { T, d, H, V, concat = false, dropout = 0 }) => {
    const width = H * V
    const inner = (concat ? 3 : 1) * width
    const y = new Float64Array(T * d)
    const threshold = Math.floor(dropout * 2 ** 32)
    for (let t = 0; t < T; t++) {
      const u = x.u!.slice(t * width, (t + 1) * width)
      const o = x.o!.slice(t * width, (t + 1) * width)
      const mean = o.reduce((a, b) => a + b, 0) / width
      const variance = o.reduce((a, b) => a + (b - mean) ** 2, 0) / width
      const gated = u.map((value, i) => {
        const norm = (o[i]! - mean) / Math.sqrt(variance + 1e-6)
        return value * (norm * (x.normWeight?.[i] ?? 1) + (x.normBias?.[i] ?? 0))
      })
      const g = concat ? [...u, ...o, ...gated] : [...gated]
      const kept = g.map((value, i) => {
        if (dropout === 0) return value
        return philoxWord(position.seed, position.offset, t * inner + i) >= threshold ? value / (1 - dropout) : 0
      })
      for (let j = 0; j < d; j++) {
        let sum = x.x![t * d + j]! + (x.bias?.[j] ?? 0)
        for (let i = 0; i < inner; i++) sum += kept[i]! * x.w![i * d + j]!
        y[t * d + j] = sum
      }
    }
    return [y]
  },
  gradients: ['x', 'u', 'o', 'w', 'bias', 'normWeight', 'normBias'],
})

for (const dtype of ['bfloat16', 'float16'] as const)
  itOp(
    'norm_gate_linear',
    `a row does not depend on the number of rows, ${dtype}`,
    () =>
      // 17000 rows are several rounds of tiles for a large device; 300 are spread over it by columns
      sameRows(dtype, [1, 300, 17000], [128, 264], (rows, x, w) => {
        const [u, o] = [rows(128, 5), x].map(values => values.view([values.shape[0]!, 2, 64]))
        return normGateLinear(rows(264, 7), u!, o!, w)
      }),
    'cuda',
  )
itOp('norm_gate_linear', 'names bad arguments', () => {
  const [x, u, w] = [Tensor.zeros([2, 3]), Tensor.zeros([2, 1, 4]), Tensor.zeros([4, 3])]
  throwsCode(
    () => normGateLinear(x, u, u, w, { dropout: 1 }),
    'ERR_HSTU_INVALID_ARGUMENT',
    /dropout must be in \[0, 1\)/,
  )
  throwsCode(() => normGateLinear(x, u, u, w, { dropout: 0.1 }), 'ERR_HSTU_INVALID_ARGUMENT', /position/)
  throwsCode(() => normGateLinear(x, u, u, w, { concat: true }), 'ERR_HSTU_SHAPE', /w must have shape \[12, 3\]/)
  for (const tensor of [x, u, w]) tensor.dispose()
})
