import { deepStrictEqual, ok, strictEqual } from 'node:assert/strict'
import { valueAndGrad } from '#lib/autograd.js'
import { native } from '#lib/native.js'
import { type SoftmaxLossOptions, softmaxLoss } from '#lib/ops/softmax_loss.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import {
  type Arrays,
  assertClose,
  describeOp,
  int64,
  itOp,
  normal,
  throwsCode,
  toArrays,
  toTensors,
  type Values,
  valuesOf,
} from '../harness.js'

interface Case {
  T: number
  I: number
  d: number
  weights?: 'fractional' | 'zero'
  scale?: number
  options?: Pick<SoftmaxLossOptions, 'firstId' | 'normalizeItems' | 'temperature' | 'eps'>
}

/** log(sum of exp(logit - positive)): log1p keeps the digits where the positive outweighs the others. */
function crossEntropy(logits: number[], positive: number): number {
  const others = logits.filter((_, i) => i !== positive).map(s => s - logits[positive]!)
  const max = Math.max(0, ...others)
  const sum = others.reduce((total, s) => total + Math.exp(s - max), 0)
  return max === 0 ? Math.log1p(sum) : max + Math.log(Math.exp(-max) + sum)
}

function reference(x: Arrays, c: Case): number[][] {
  const { firstId = 1, normalizeItems = true, temperature = 0.05, eps = 1e-6 } = c.options ?? {}
  let total = 0
  let weights = 0
  for (let t = 0; t < c.T; t++) {
    const w = x.weights ? x.weights[t]! : 1
    if (w === 0) continue
    const logits: number[] = []
    for (let i = firstId; i < c.I; i++) {
      let dot = 0
      let squares = 0
      for (let j = 0; j < c.d; j++) {
        dot += x.query![t * c.d + j]! * x.table![i * c.d + j]!
        squares += x.table![i * c.d + j]! ** 2
      }
      logits.push((normalizeItems ? dot / Math.max(Math.sqrt(squares), eps) : dot) / temperature)
    }
    total += w * crossEntropy(logits, x.positives![t]! - firstId)
    weights += w
  }
  return [[weights === 0 ? 0 : total / weights]]
}

function inputs(c: Case, random: Random) {
  const { firstId = 1 } = c.options ?? {}
  const weights = normal(random, [c.T])
  if (c.weights)
    for (let t = 0; t < c.T; t++) weights.data[t] = c.weights === 'zero' || t % 3 === 0 ? 0 : random.float()
  const item = () => firstId + random.int(c.I - firstId)
  return {
    query: normal(random, [c.T, c.d], (c.scale ?? 1) / Math.sqrt(c.d)),
    table: normal(random, [c.I, c.d]),
    positives: int64(Array.from({ length: c.T }, (_, t) => (c.weights && weights.data[t] === 0 ? 0 : item()))),
    weights: c.weights ? ({ ...weights, kind: 'wide' } as Values) : null,
  }
}

const run = (t: Record<string, Tensor>, c: Case) =>
  softmaxLoss(t.query!, t.table!, t.positives!, { ...c.options, weights: t.weights ?? null })

describeOp<Case>('softmax_loss', {
  cudaDtypes: ['float32', 'bfloat16'], // a gradient near 0 is subnormal in float16
  cases: [
    { name: 'no rows', T: 0, I: 5, d: 3 },
    { name: 'one row', T: 1, I: 3, d: 1 },
    { name: 'the only item', T: 4, I: 2, d: 3 },
    { name: 'a chunk of items', T: 7, I: 257, d: 50 },
    { name: 'a chunk and one', T: 7, I: 258, d: 16 },
    { name: 'a block of rows', T: 96, I: 20, d: 33 },
    { name: 'a block of rows and one', T: 97, I: 20, d: 8 },
    { name: 'several of both', T: 300, I: 600, d: 25 },
    { name: 'fractional weights, padding', T: 130, I: 300, d: 12, weights: 'fractional' },
    { name: 'all weights 0', T: 6, I: 7, d: 4, weights: 'zero' },
    { name: 'items as they are', T: 14, I: 10, d: 16, options: { normalizeItems: false, temperature: 1 } },
    { name: 'half the rows below eps', T: 14, I: 12, d: 9, options: { eps: 3 } },
    { name: 'firstId 0', T: 8, I: 6, d: 3, options: { firstId: 0 } },
    { name: 'firstId 4', T: 8, I: 9, d: 3, options: { firstId: 4 } },
  ],
  inputs,
  run,
  reference,
  gradients: ['query', 'table'],
})

describeOp<Case>('softmax_loss', {
  cases: [
    { name: 'logits of thousands', T: 50, I: 600, d: 50, scale: 300 },
    { name: 'more runs of rows than partial gradients', T: 3300, I: 40, d: 5 },
  ],
  inputs,
  run,
  reference,
})

interface Result {
  loss: Float64Array
  dquery: Float64Array
  dtable: Float64Array
}

function gradients(query: Tensor, table: Tensor, positives: Tensor, options: SoftmaxLossOptions = {}): Result {
  const { value, grads } = valueAndGrad({ query, table }, () => softmaxLoss(query, table, positives, options))
  return { loss: valuesOf(value), dquery: valuesOf(grads.query), dtable: valuesOf(grads.table) }
}

const float = (random: Random, ...shape: number[]) =>
  Tensor.from(Float32Array.from(normal(random, shape).data as Float64Array), shape)
const ids = (values: number[]) => Tensor.from(int64(values).data as BigInt64Array)

itOp('softmax_loss', 'bits do not depend on the threads, one item a hundred thousand times', () =>
  scope(() => {
    const [T, I, d] = [100_000, 50, 10]
    const random = new Random(7)
    const [query, table, positives] = [float(random, T, d), float(random, I, d), ids(Array(T).fill(3))]
    try {
      const [one, two, three, again] = [1, 2, 3, 3].map(threads => {
        native.set_num_threads(threads)
        return scope(() => gradients(query, table, positives))
      })
      deepStrictEqual(two, one)
      deepStrictEqual(three, one)
      deepStrictEqual(again, one)
    } finally {
      native.set_num_threads(0)
    }
  }),
)

itOp('softmax_loss', 'rows of weight 0 change no bit, whatever they hold', () =>
  scope(() => {
    const [T, I, d] = [70, 300, 10]
    const random = new Random(8)
    const [query, table] = [float(random, T, d), float(random, I, d)]
    const positives = Array.from({ length: T }, () => 1 + random.int(I - 1))
    const alone = gradients(query, table, ids(positives))
    const padded = new Float32Array(2 * T * d).fill(Number.NaN)
    const values = query.dataSync() as Float32Array
    for (let t = 0; t < T; t++) padded.set(values.subarray(t * d, (t + 1) * d), 2 * t * d)
    const weights = Tensor.from(Float32Array.from({ length: 2 * T }, (_, t) => 1 - (t % 2)))
    const twice = ids(positives.flatMap(id => [id, 999]))
    const among = gradients(Tensor.from(padded, [2 * T, d]), table, twice, { weights })
    deepStrictEqual(among.loss, alone.loss)
    deepStrictEqual(among.dtable, alone.dtable)
    for (let t = 0; t < T; t++) {
      deepStrictEqual(among.dquery.slice(2 * t * d, (2 * t + 1) * d), alone.dquery.slice(t * d, (t + 1) * d))
      ok(among.dquery.slice((2 * t + 1) * d, (2 * t + 2) * d).every(x => x === 0))
    }
  }),
)

itOp('softmax_loss', 'rows below firstId get a zero gradient', () =>
  scope(() => {
    const random = new Random(9)
    const { dtable } = gradients(float(random, 4, 3), float(random, 9, 3), ids([4, 5, 8, 4]), { firstId: 4 })
    ok(dtable.slice(0, 12).every(x => x === 0) && dtable.slice(12).every(x => x !== 0))
  }),
)

itOp('softmax_loss', 'a loss far below the precision of its logits', () =>
  scope(() => {
    const [query, table] = [Tensor.from([0.5, 0], [1, 2]), Tensor.from([0, 0, 1, 0, -1, 0], [3, 2])]
    const expected = Math.log1p(Math.exp(-20))
    const { value, grads } = valueAndGrad([query, table], () => softmaxLoss(query, table, ids([1])))
    ok(Math.abs(value.item() / expected - 1) < 1e-5)
    ok(Math.abs((valuesOf(grads[0]!)[0]! * 0.05) / (-2 * expected) - 1) < 1e-5)
  }),
)

itOp(
  'softmax_loss',
  'the loss of 16-bit inputs is float32, and as exact',
  () =>
    scope(() => {
      const c: Case = { T: 60, I: 300, d: 32 }
      const x = inputs(c, new Random(11))
      for (const dtype of ['bfloat16', 'float16'] as const) {
        const loss = run(toTensors(x, dtype, 'cuda:0'), c)
        strictEqual(loss.dtype, 'float32')
        assertClose(valuesOf(loss), reference(toArrays(x, dtype), c)[0]!, 1e-5, dtype)
      }
    }),
  'cuda',
)

const zeros = (...shape: number[]) => Tensor.zeros(shape)
itOp('softmax_loss', 'names what is wrong', () => {
  const call = (options: SoftmaxLossOptions = {}, query = zeros(2, 3), positives = [1, 2]) =>
    softmaxLoss(query, zeros(5, 3), ids(positives), options)
  const code = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(() => call({}, zeros(2, 3), [1, 5]), code, /softmax_loss: positive_ids\[1\] = 5 is outside 1\.\.4/)
  throwsCode(() => call({ firstId: 5 }), code, /firstId .* 0\.\.4, got 5/)
  throwsCode(() => call({ temperature: Number.NaN }), code, /temperature/)
  throwsCode(() => call({ eps: -1 }), code, /eps/)
  throwsCode(() => call({ weights: zeros(3) }), 'ERR_HSTU_SHAPE', /weights .*T=2.*float32\[3\]/)
  throwsCode(() => call({}, zeros(2, 4)), 'ERR_HSTU_SHAPE', /table .*d=4.*float32\[5, 3\]/)
  throwsCode(() => call({}, Tensor.zeros([2, 3], { dtype: 'float64' })), 'ERR_HSTU_DTYPE', /table is float32/)
  throwsCode(() => softmaxLoss(zeros(2, 3), zeros(5, 3), zeros(2)), 'ERR_HSTU_DTYPE', /positiveIds must be int64/)
})
