import { record, valueAndGrad } from '#lib/autograd.js'
import { normLinearSilu } from '#lib/ops/norm_linear_silu.js'
import { Tensor } from '#lib/tensor.js'
import { describeOp, itOp, normal, sameRows, throwsCode } from '../harness.js'

interface Case {
  T: number
  d: number
  H: number
  D: number
  V: number
  bias?: boolean
  affine?: boolean
  siluAll?: boolean
}

describeOp<Case>('norm_linear_silu', {
  cases: [
    { name: 'no rows', T: 0, d: 4, H: 1, D: 2, V: 3 },
    { name: 'one row, research form', T: 1, d: 5, H: 1, D: 3, V: 2 },
    { name: 'research form of d 50', T: 70, d: 50, H: 1, D: 50, V: 50 },
    { name: 'two heads of 25', T: 9, d: 50, H: 2, D: 25, V: 25 },
    { name: 'industrial form', T: 11, d: 32, H: 2, D: 16, V: 8, bias: true, affine: true, siluAll: false },
    { name: 'affine, SiLU on all', T: 99, d: 17, H: 3, D: 5, V: 7, bias: true, affine: true },
    // What Hopper's kernels take in 16-bit types.
    {
      name: 'aligned, parts within a tile',
      T: 131,
      d: 136,
      H: 2,
      D: 64,
      V: 40,
      bias: true,
      affine: true,
      siluAll: false,
    },
    { name: 'aligned, whole tiles', T: 129, d: 64, H: 4, D: 64, V: 64 },
    { name: 'aligned, dx past a tile', T: 131, d: 264, H: 1, D: 64, V: 128, bias: true, affine: true, siluAll: false },
    { name: 'aligned, B held', T: 131, d: 264, H: 2, D: 64, V: 128, bias: true, affine: true, siluAll: false },
    { name: 'aligned, deep', T: 35, d: 576, H: 1, D: 32, V: 32, bias: true, affine: true },
    { name: 'tile and one', T: 97, d: 33, H: 1, D: 16, V: 16, bias: true },
  ],
  inputs: ({ T, d, H, D, V, bias, affine }, random) => ({
    x: normal(random, [T, d]),
    w: normal(random, [d, 2 * H * (D + V)], 1 / Math.sqrt(d)),
    bias: bias ? normal(random, [2 * H * (D + V)]) : null,
    normWeight: affine ? normal(random, [d]) : null,
    normBias: affine ? normal(random, [d]) : null,
  }),
  run: (t, { H, D, V, siluAll = true }) => {
    const { bias = null, normWeight = null, normBias = null } = t
    const out = normLinearSilu(t.x!, t.w!, { heads: H, qkDim: D, vDim: V, bias, normWeight, normBias, siluAll })
    return [out.u, out.v, out.q, out.k]
  },
  reference: (x, { T, d, H, D, V, siluAll = true }) => {
    const widths = [H * V, H * V, H * D, H * D]
    const columns = widths.reduce((a, b) => a + b)
    const out = widths.map(width => new Float64Array(T * width))
    for (let t = 0; t < T; t++) {
      const row = x.x!.slice(t * d, (t + 1) * d)
      const mean = row.reduce((a, b) => a + b, 0) / d
      const variance = row.reduce((a, b) => a + (b - mean) ** 2, 0) / d
      const norm = row.map((value, i) => {
        return ((value - mean) / Math.sqrt(variance + 1e-6)) * (x.normWeight?.[i] ?? 1) + (x.normBias?.[i] ?? 0)
      })
      let column = 0
      widths.forEach((width, part) => {
        for (let j = 0; j < width; j++, column++) {
          let z = x.bias?.[column] ?? 0
          for (let i = 0; i < d; i++) z += norm[i]! * x.w![i * columns + column]!
          out[part]![t * width + j] = part === 0 || siluAll ? z / (1 + Math.exp(-z)) : z
        }
      })
    }
    return out
  },
  gradients: ['x', 'w', 'bias', 'normWeight', 'normBias'],
})

itOp('norm_linear_silu', 'a row does not depend on its neighbours', () => {
  const data = Float32Array.from({ length: 101 * 50 }, (_, i) => Math.sin(i * 12.9898))
  const w = Tensor.from(
    Float32Array.from({ length: 50 * 200 }, (_, i) => Math.cos(i * 78.233)),
    [50, 200],
  )
  const options = { heads: 1, qkDim: 50, vDim: 50 }
  const all = normLinearSilu(Tensor.from(data, [101, 50]), w, options).k.dataSync() as Float32Array
  for (const row of [0, 5, 96, 100]) {
    const alone = normLinearSilu(Tensor.from(data.slice(row * 50, (row + 1) * 50), [1, 50]), w, options).k.dataSync()
    if (!alone.every((value, j) => Object.is(value, all[row * 50 + j])))
      throw new Error(`row ${row} differs when alone`)
  }
})
for (const dtype of ['bfloat16', 'float16'] as const)
  itOp(
    'norm_linear_silu',
    `a row does not depend on the number of rows, ${dtype}`,
    () =>
      // 17000 rows fill a large device; fewer are spread over it by columns
      sameRows(dtype, [1, 300, 17000], [72, 512], (_, x, w) => {
        return normLinearSilu(x, w, { heads: 2, qkDim: 64, vDim: 64 }).q
      }),
    'cuda',
  )
for (const dtype of ['bfloat16', 'float16'] as const)
  for (const d of [72, 264])
    itOp(
      'norm_linear_silu',
      `a row's gradient does not depend on the number of rows, ${dtype}, d ${d}`,
      () =>
        sameRows(dtype, [1, 300, 17000], [d, 512], (rows, x, w) => {
          const douts = [3, 4, 5, 6].map(seed => rows(128, seed).view([x.shape[0]!, 2, 64]))
          const head = () => {
            const { u, v, q, k } = normLinearSilu(x, w, { heads: 2, qkDim: 64, vDim: 64 })
            return record('head', Tensor.zeros([1], x), [u, v, q, k], () => douts)
          }
          return valueAndGrad([x], head).grads[0]!
        }),
      'cuda',
    )
itOp('norm_linear_silu', 'names the argument and both shapes', () => {
  const run = () => normLinearSilu(Tensor.zeros([2, 3]), Tensor.zeros([3, 5]), { heads: 1, qkDim: 1, vDim: 1 })
  throwsCode(run, 'ERR_HSTU_SHAPE', /normLinearSilu: w .*4.*float32\[3, 5\]/)
})
