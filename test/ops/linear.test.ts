import { linear } from '#lib/ops/linear.js'
import { Tensor } from '#lib/tensor.js'
import { describeOp, itOp, normal, sameRows, throwsCode } from '../harness.js'

type Case = {
  T: number
  inner: number
  out: number
  activation?: 'none' | 'silu' | 'relu' | 'gelu'
  bias?: boolean
  residual?: boolean
}

/** Abramowitz and Stegun 7.1.26 is too coarse for float64: erf by its Taylor series, erfc by a continued fraction beyond 3. */
function erf(x: number): number {
  const a = Math.abs(x)
  if (a > 6) return Math.sign(x)
  if (a < 3) {
    let term = a
    let sum = a
    for (let n = 1; n < 200; n++) sum += (term *= (-a * a) / n) / (2 * n + 1)
    return (Math.sign(x) * 2 * sum) / Math.sqrt(Math.PI)
  }
  let f = 0
  for (let k = 60; k > 0; k--) f = k / 2 / (a + f)
  return Math.sign(x) * (1 - Math.exp(-a * a) / Math.sqrt(Math.PI) / (a + f))
}

const activations = {
  none: (z: number) => z,
  silu: (z: number) => z / (1 + Math.exp(-z)),
  relu: (z: number) => Math.max(z, 0),
  gelu: (z: number) => (z * (1 + erf(z / Math.SQRT2))) / 2,
}

describeOp<Case>('linear', {
  cases: [
    { name: 'no rows', T: 0, inner: 5, out: 3 },
    { name: 'one row', T: 1, inner: 1, out: 1 },
    { name: 'bias', T: 7, inner: 50, out: 33, bias: true },
    { name: 'silu, bias, residual', T: 13, inner: 25, out: 50, activation: 'silu', bias: true, residual: true },
    { name: 'relu', T: 97, inner: 16, out: 64, activation: 'relu', bias: true },
    { name: 'gelu', T: 12, inner: 31, out: 65, activation: 'gelu', bias: true },
    { name: 'tile and one', T: 193, inner: 33, out: 97, residual: true },
    // What Hopper's kernel takes in 16-bit types: widths that are multiples of 8, about its tiles of 64 x 256 and steps of 64.
    {
      name: 'aligned, a row past two tiles',
      T: 129,
      inner: 64,
      out: 264,
      activation: 'silu',
      bias: true,
      residual: true,
    },
    { name: 'aligned, depth of no whole steps', T: 67, inner: 200, out: 72, activation: 'relu', bias: true },
    { name: 'aligned, tiles of both blocks of a cluster', T: 300, inner: 136, out: 520, residual: true },
    { name: 'aligned, one row', T: 1, inner: 8, out: 8, bias: true },
    { name: 'aligned, gelu', T: 65, inner: 72, out: 64, activation: 'gelu', bias: true },
    { name: 'aligned, a split weight gradient', T: 2100, inner: 16, out: 24 },
    { name: 'past the depth and split blocks', T: 2051, inner: 1030, out: 3 },
    { name: 'one column, aligned', T: 65, inner: 264, out: 1, bias: true },
    { name: 'four columns, residual', T: 9, inner: 515, out: 4, activation: 'silu', bias: true, residual: true },
  ],
  inputs: ({ T, inner, out, bias, residual }, random) => ({
    x: normal(random, [T, inner]),
    w: normal(random, [inner, out], 1 / Math.sqrt(inner)),
    bias: bias ? normal(random, [out]) : null,
    residual: residual ? normal(random, [T, out]) : null,
  }),
  run: (t, { activation = 'none' }) => {
    return linear(t.x!, t.w!, { bias: t.bias ?? null, residual: t.residual ?? null, activation })
  },
  reference: (x, { T, inner, out, activation = 'none' }) => {
    const y = new Float64Array(T * out)
    for (let t = 0; t < T; t++)
      for (let o = 0; o < out; o++) {
        let z = x.bias?.[o] ?? 0
        for (let i = 0; i < inner; i++) z += x.x![t * inner + i]! * x.w![i * out + o]!
        y[t * out + o] = activations[activation](z) + (x.residual?.[t * out + o] ?? 0)
      }
    return [y]
  },
  gradients: ['x', 'w', 'bias', 'residual'],
})

itOp('linear', 'a row does not depend on its neighbours', () => {
  const random = Float32Array.from({ length: 101 * 47 }, (_, i) => Math.sin(i * 12.9898))
  const w = Tensor.from(
    Float32Array.from({ length: 47 * 70 }, (_, i) => Math.cos(i * 78.233)),
    [47, 70],
  )
  const all = linear(Tensor.from(random, [101, 47]), w).dataSync() as Float32Array
  for (const row of [0, 5, 96, 100]) {
    const alone = linear(Tensor.from(random.slice(row * 47, (row + 1) * 47), [1, 47]), w).dataSync() as Float32Array
    if (!alone.every((value, j) => Object.is(value, all[row * 70 + j])))
      throw new Error(`row ${row} differs when alone`)
  }
})
for (const dtype of ['float32', 'bfloat16', 'float16'] as const)
  itOp(
    'linear',
    `a row does not depend on the number of rows, ${dtype}`,
    () =>
      // 20000 rows are several rounds of tiles for a large device
      sameRows(dtype, [1, 70, 20000], [72, 264], (rows, x, w) => {
        return linear(x, w, { residual: rows(264, 3) })
      }),
    'cuda',
  )
itOp(
  'linear',
  'a row of few columns does not depend on the number of rows',
  () => sameRows('float32', [1, 9, 3000], [520, 3], (_rows, x, w) => linear(x, w)),
  'cuda',
)
itOp('linear', 'names the argument and both shapes', () => {
  throwsCode(
    () => linear(Tensor.zeros([2, 3]), Tensor.zeros([4, 5])),
    'ERR_HSTU_SHAPE',
    /linear: w .*in=3.*float32\[4, 5\]/,
  )
})
