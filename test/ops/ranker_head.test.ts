import { deepStrictEqual } from 'node:assert/strict'
import { valueAndGrad } from '#lib/autograd.js'
import { cast } from '#lib/ops/cast.js'
import { embedding } from '#lib/ops/embedding.js'
import { expand } from '#lib/ops/expand.js'
import { linear } from '#lib/ops/linear.js'
import { rankerHead } from '#lib/ops/ranker_head.js'
import { swishLayerNorm } from '#lib/ops/swish_layer_norm.js'
import { Random } from '#lib/random.js'
import { type Device, type Dtype, scope, Tensor } from '#lib/tensor.js'
import {
  describeOp,
  type Inputs,
  int64,
  itOp,
  normal,
  offsets,
  sum,
  type Tensors,
  throwsCode,
  toTensors,
} from '../harness.js'

interface Case {
  /** Rows of x; candidates of each request. */
  R: number
  counts: readonly number[]
  d: number
  hidden: number
  K: number
  known?: boolean
}

const inputsOf = ({ R, counts, d, hidden, K, known = false }: Case, random: Random): Inputs => ({
  x: normal(random, [R, d]),
  rows: int64(Array.from({ length: sum(counts) }, () => random.int(R))),
  groups: offsets(counts),
  last: known ? null : int64(counts.map(() => random.int(R))),
  states: known ? normal(random, [counts.length, hidden]) : null,
  stateWeight: normal(random, [d, hidden], d ** -0.5),
  hidden: normal(random, [d, hidden], d ** -0.5),
  hiddenBias: normal(random, [hidden]),
  swishWeight: normal(random, [hidden]),
  swishBias: normal(random, [hidden]),
  output: normal(random, [hidden, K], hidden ** -0.5),
  outputBias: normal(random, [K]),
})

/** x as it is; beside a 16-bit one everything else is float32. */
function run(t: Tensors): Tensor[] {
  const of = (name: string) => (t.x!.dtype === 'float64' ? t[name]! : cast(t[name]!, 'float32'))
  const mlp = {
    ...{ hidden: of('hidden'), hiddenBias: of('hiddenBias'), swishWeight: of('swishWeight') },
    ...{ swishBias: of('swishBias'), output: of('output'), outputBias: of('outputBias') },
  }
  const states = t.last ? { last: t.last } : { known: of('states') }
  const { logits, states: made } = rankerHead(t.x!, {
    ...{ rows: t.rows!, groups: t.groups!, states, stateWeight: of('stateWeight'), mlp },
  })
  return [logits, made]
}

/** The ops that it stands for. */
function composed(t: Tensors): Tensor[] {
  const of = (name: string) => (t.x!.dtype === 'float64' ? t[name]! : cast(t[name]!, 'float32'))
  const take = (ids: Tensor) => cast(embedding(t.x!, ids), of('hidden').dtype)
  const states = t.last ? linear(take(t.last), of('stateWeight')) : of('states')
  const residual = expand(states, { offsets: t.groups!, rows: t.rows!.size })
  const z = linear(take(t.rows!), of('hidden'), { bias: of('hiddenBias'), residual })
  const gated = swishLayerNorm(z, { weight: of('swishWeight'), bias: of('swishBias') })
  return [linear(gated, of('output'), { bias: of('outputBias') }), states]
}

const cases: (Case & { name: string })[] = [
  { name: 'no requests', R: 3, counts: [], d: 8, hidden: 8, K: 1 },
  { name: 'no candidates', R: 3, counts: [0, 0], d: 8, hidden: 8, K: 2 },
  { name: 'one', R: 1, counts: [1], d: 8, hidden: 8, K: 1 },
  { name: 'odd widths', R: 9, counts: [3, 0, 4], d: 5, hidden: 7, K: 3 },
  { name: 'an empty request', R: 100, counts: [0, 70, 0, 1, 0], d: 24, hidden: 72, K: 4 },
  { name: 'a tile and one', R: 200, counts: [65], d: 64, hidden: 64, K: 1 },
  { name: 'states that are known', R: 200, counts: [30, 99], d: 40, hidden: 132, K: 2, known: true },
  { name: 'many tasks', R: 64, counts: [20, 20], d: 32, hidden: 64, K: 9 },
  { name: 'a wide hidden layer', R: 64, counts: [5, 6], d: 72, hidden: 1024, K: 1 },
  { name: 'wider', R: 64, counts: [5, 6], d: 16, hidden: 1028, K: 1 },
]

describeOp<Case>('ranker_head', {
  cases,
  inputs: inputsOf,
  run: t => run(t),
  reference: (x, { counts, d, hidden, K }) => {
    const row = (id: number) => x.x!.subarray(id * d, (id + 1) * d)
    const product = (from: ArrayLike<number>, w: Float64Array, n: number) =>
      Array.from({ length: n }, (_, j) => Array.from(from).reduce((s, v, i) => s + v * w[i * n + j]!, 0))
    const states = counts.map((_, b) =>
      x.last ? product(row(x.last[b]!), x.stateWeight!, hidden) : [...x.states!.subarray(b * hidden, (b + 1) * hidden)],
    )
    let m = 0
    const logits = counts.flatMap((count, b) =>
      Array.from({ length: count }, () => {
        const z = product(row(x.rows![m++]!), x.hidden!, hidden).map((v, j) => v + x.hiddenBias![j]! + states[b]![j]!)
        const mean = z.reduce((a, v) => a + v, 0) / hidden
        const deviation = Math.sqrt(z.reduce((a, v) => a + (v - mean) ** 2, 0) / hidden + 1e-6)
        const gated = z.map(
          (v, j) => v / (1 + Math.exp(-(((v - mean) / deviation) * x.swishWeight![j]! + x.swishBias![j]!))),
        )
        return product(gated, x.output!, K).map((v, k) => v + x.outputBias![k]!)
      }).flat(),
    )
    return [logits, states.flat()]
  },
})

/** The bits of the ops that it stands for. */
function likeOps(dtype: Dtype, device: Device) {
  for (const c of [...cases, { R: 300, counts: [64, 131], d: 512, hidden: 512, K: 1 }])
    scope(() => {
      const t = toTensors(inputsOf(c, new Random(7)), dtype, device)
      const values = (list: Tensor[]) => list.map(tensor => tensor.dataSync())
      deepStrictEqual(values(run(t)), values(composed(t)))
    })
}
itOp('ranker_head', 'has the bits of the ops that it stands for', () => likeOps('float32', 'cpu'))
for (const dtype of ['float32', 'bfloat16', 'float16'] as const)
  itOp('ranker_head', `has the bits of the ops that it stands for in ${dtype}`, () => likeOps(dtype, 'cuda:0'), 'cuda')

itOp('ranker_head', 'names what is wrong', () => {
  scope(() => {
    const c = { R: 4, counts: [2], d: 3, hidden: 5, K: 1 }
    const make = (change: Partial<Tensors> = {}) =>
      run({ ...toTensors(inputsOf(c, new Random(1)), 'float32'), ...change } as Tensors)
    const ids = (...values: bigint[]) => Tensor.from(BigInt64Array.from(values))
    throwsCode(() => make({ rows: ids(0n, 4n) }), 'ERR_HSTU_INVALID_ARGUMENT', /\[1\] = 4 is outside 0\.\.3/)
    throwsCode(
      () => make({ hidden: Tensor.zeros([4, 5]) }),
      'ERR_HSTU_SHAPE',
      /ranker_head: hidden must have shape \[3, hidden/,
    )
    throwsCode(
      () => make({ x: Tensor.zeros([4, 3], { dtype: 'float64' }) }),
      'ERR_HSTU_DTYPE',
      /x is float64|is float64/,
    )
    const { x, ...rest } = toTensors(inputsOf(c, new Random(1)), 'float32')
    const inTape = () => valueAndGrad([x!], () => run({ x: x!, ...rest } as Tensors)[0]!)
    throwsCode(inTape, 'ERR_HSTU_INVALID_ARGUMENT', /valueAndGrad/)
  })
})
