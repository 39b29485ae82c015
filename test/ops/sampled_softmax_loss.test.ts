import { deepStrictEqual, ok, strictEqual } from 'node:assert/strict'
import { valueAndGrad } from '#lib/autograd.js'
import { native } from '#lib/native.js'
import { type SampledSoftmaxLossOptions, sampledSoftmaxLoss } from '#lib/ops/sampled_softmax_loss.js'
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
  R: number
  /** Negatives: drawn by the op, one list a position, or one list for all. */
  ids?: 'drawn' | 'given' | 'shared'
  weights?: 'fractional' | 'zero'
  scale?: number
  /** Part of the offset that a tensor holds. */
  base?: bigint
  options?: Pick<SampledSoftmaxLossOptions, 'firstId' | 'normalizeItems' | 'temperature' | 'eps' | 'seed' | 'offset'>
}

/** Philox4x32-10 in BigInt arithmetic, from the paper: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011). */
function philox(key: bigint, counter: bigint): number[] {
  const low = (x: bigint) => x & 0xffffffffn
  let [k0, k1] = [low(key), low(key >> 32n)]
  let c = [low(counter), low(counter >> 32n), 0n, 0n] as [bigint, bigint, bigint, bigint]
  for (let round = 0; round < 10; round++) {
    const a = c[0] * 0xd2511f53n
    const b = c[2] * 0xcd9e8d57n
    c = [(b >> 32n) ^ c[1] ^ k0, low(b), (a >> 32n) ^ c[3] ^ k1, low(a)]
    k0 = low(k0 + 0x9e3779b9n)
    k1 = low(k1 + 0xbb67ae85n)
  }
  return c.map(Number)
}

function drawn(index: number, firstId: number, I: number, seed: bigint, offset: bigint): number {
  const block = BigInt.asUintN(64, offset + BigInt(Math.floor(index / 4)))
  const word = philox(BigInt.asUintN(64, seed), block)[index % 4]!
  return firstId + Number((BigInt(word) * BigInt(I - firstId)) >> 32n)
}

function negative(x: Arrays, c: Case, t: number, r: number): number {
  const { firstId = 1, seed = 0n, offset = 0n } = c.options ?? {}
  if (c.ids === 'given') return x.negatives![t * c.R + r]!
  if (c.ids === 'shared') return x.negatives![r]!
  return drawn(t * c.R + r, firstId, c.I, seed, offset)
}

/** log(sum of exp(logit - positive)): log1p keeps the digits where the positive outweighs the others. */
function crossEntropy(logits: number[], positive: number): number {
  const others = logits.filter((_, i) => i !== positive).map(s => s - logits[positive]!)
  const max = Math.max(0, ...others)
  const sum = others.reduce((total, s) => total + Math.exp(s - max), 0)
  return max === 0 ? Math.log1p(sum) : max + Math.log(Math.exp(-max) + sum)
}

function reference(x: Arrays, c: Case): number[][] {
  const { normalizeItems = true, temperature = 0.05, eps = 1e-6 } = c.options ?? {}
  const score = (t: number, item: number) => {
    let dot = 0
    let squares = 0
    for (let j = 0; j < c.d; j++) {
      dot += x.query![t * c.d + j]! * x.table![item * c.d + j]!
      squares += x.table![item * c.d + j]! ** 2
    }
    return (normalizeItems ? dot / Math.max(Math.sqrt(squares), eps) : dot) / temperature
  }
  let total = 0
  let weights = 0
  for (let t = 0; t < c.T; t++) {
    const w = x.weights ? x.weights[t]! : 1
    if (w === 0) continue
    const positive = x.positives![t]!
    const logits = [score(t, positive)]
    for (let r = 0; r < c.R; r++) {
      const id = negative(x, c, t, r)
      logits.push(id === positive ? -5e4 : score(t, id))
    }
    total += w * crossEntropy(logits, 0)
    weights += w
  }
  return [[weights === 0 ? 0 : total / weights]]
}

function inputs(c: Case, random: Random) {
  const { firstId = 1 } = c.options ?? {}
  const item = () => firstId + random.int(c.I - firstId)
  const weights = normal(random, [c.T])
  if (c.weights)
    for (let t = 0; t < c.T; t++) weights.data[t] = c.weights === 'zero' || t % 3 === 0 ? 0 : random.float()
  const count = c.ids === 'shared' ? c.R : c.T * c.R
  return {
    query: normal(random, [c.T, c.d], (c.scale ?? 1) / Math.sqrt(c.d)),
    table: normal(random, [c.I, c.d]),
    positives: int64(Array.from({ length: c.T }, (_, t) => (c.weights && weights.data[t] === 0 ? 0 : item()))),
    weights: c.weights ? ({ ...weights, kind: 'wide' } as Values) : null,
    negatives:
      c.ids && c.ids !== 'drawn'
        ? int64(Array.from({ length: count }, item), c.ids === 'shared' ? [c.R] : [c.T, c.R])
        : null,
    base: c.base === undefined ? null : int64([c.base]),
  }
}

function run(t: Record<string, Tensor>, c: Case): Tensor {
  const given = { weights: t.weights ?? null, negativeIds: t.negatives ?? null }
  return sampledSoftmaxLoss(t.query!, t.table!, t.positives!, {
    ...c.options,
    ...(t.base ? { offset: (c.options?.offset ?? 0n) - c.base!, base: t.base } : {}),
    ...given,
    ...(given.negativeIds ? {} : { numNegatives: c.R }),
  })
}

describeOp<Case>('sampled_softmax_loss', {
  cudaDtypes: ['float32', 'bfloat16'], // a gradient near 0 is subnormal in float16
  cases: [
    { name: 'no rows', T: 0, I: 5, d: 3, R: 2 },
    { name: 'no rows, shared', T: 0, I: 5, d: 3, R: 2, ids: 'shared' },
    { name: 'one row, one negative', T: 1, I: 3, d: 1, R: 1, options: { seed: 3n } },
    { name: 'drawn, R not a multiple of four', T: 9, I: 11, d: 7, R: 5, options: { seed: 5n, offset: 1n } },
    { name: 'drawn, ml-1m shape', T: 131, I: 40, d: 50, R: 128, options: { seed: -2n, offset: 2n ** 40n } },
    { name: 'drawn, a counter that wraps', T: 3, I: 50, d: 5, R: 150, options: { seed: 2n ** 62n, offset: -3n } },
    { name: 'drawn, offset on the device', T: 31, I: 40, d: 50, R: 12, options: { seed: 8n, offset: 3n }, base: -4n },
    { name: 'rows of more than one register block', T: 20, I: 30, d: 72, R: 67 },
    { name: 'given', T: 13, I: 9, d: 16, R: 6, ids: 'given' },
    { name: 'shared, past a chunk and a row block', T: 101, I: 60, d: 33, R: 300, ids: 'shared' },
    { name: 'fractional weights, padding', T: 25, I: 17, d: 12, R: 9, weights: 'fractional' },
    { name: 'fractional weights, shared', T: 25, I: 17, d: 12, R: 9, ids: 'shared', weights: 'fractional' },
    { name: 'fractional weights, given', T: 25, I: 17, d: 12, R: 9, ids: 'given', weights: 'fractional' },
    { name: 'all weights 0', T: 6, I: 7, d: 4, R: 3, weights: 'zero' },
    { name: 'all weights 0, shared', T: 6, I: 7, d: 4, R: 3, ids: 'shared', weights: 'zero' },
    { name: 'items as they are', T: 14, I: 10, d: 16, R: 5, options: { normalizeItems: false, temperature: 1 } },
    { name: 'items as they are, shared', T: 14, I: 10, d: 5, R: 5, ids: 'shared', options: { normalizeItems: false } },
    { name: 'half the rows below eps', T: 14, I: 12, d: 9, R: 5, options: { eps: 3 } },
    { name: 'half the rows below eps, shared', T: 14, I: 12, d: 9, R: 5, ids: 'shared', options: { eps: 3 } },
    { name: 'firstId 0', T: 8, I: 6, d: 3, R: 4, options: { firstId: 0 } },
    { name: 'firstId 4', T: 8, I: 9, d: 3, R: 4, ids: 'given', options: { firstId: 4 } },
    { name: 'every negative is the positive', T: 5, I: 2, d: 3, R: 4 },
    { name: 'every negative is the positive, shared', T: 5, I: 2, d: 3, R: 4, ids: 'shared' },
  ],
  inputs,
  run,
  reference,
  gradients: ['query', 'table'],
})

describeOp<Case>('sampled_softmax_loss', {
  cases: [
    { name: 'logits of thousands', T: 50, I: 30, d: 50, R: 128, scale: 300 },
    { name: 'logits of thousands, shared', T: 50, I: 30, d: 50, R: 290, ids: 'shared', scale: 300 },
    { name: 'logits near the collisions', T: 50, I: 6, d: 50, R: 16, scale: 4000 },
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

function gradients(query: Tensor, table: Tensor, positives: Tensor, options: SampledSoftmaxLossOptions): Result {
  const { value, grads } = valueAndGrad({ query, table }, () => sampledSoftmaxLoss(query, table, positives, options))
  return { loss: valuesOf(value), dquery: valuesOf(grads.query), dtable: valuesOf(grads.table) }
}

const float = (random: Random, ...shape: number[]) =>
  Tensor.from(Float32Array.from(normal(random, shape).data as Float64Array), shape)
const ids = (values: number[], shape?: number[]) => Tensor.from(int64(values).data as BigInt64Array, shape)

itOp('sampled_softmax_loss', 'the reference generator gives the known answer of Random123', () => {
  deepStrictEqual(philox(0n, 0n), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8])
})

for (const kind of ['drawn', 'given', 'shared'] as const)
  itOp('sampled_softmax_loss', `bits do not depend on the threads, one item a hundred thousand times, ${kind}`, () =>
    scope(() => {
      const [T, I, d] = [100_000, 50, 10]
      const random = new Random(7)
      const [query, table] = [float(random, T, d), float(random, I, d)]
      const positives = ids(Array.from({ length: T }, () => 3))
      const negatives = { drawn: null, given: ids(Array(2 * T).fill(4), [T, 2]), shared: ids([4, 5, 4, 3]) }[kind]
      const options = negatives ? { negativeIds: negatives } : { numNegatives: 3, seed: 9n }
      try {
        const [one, two, three, again] = [1, 2, 3, 3].map(threads => {
          native.set_num_threads(threads)
          return scope(() => gradients(query, table, positives, options))
        })
        deepStrictEqual(two, one)
        deepStrictEqual(three, one)
        deepStrictEqual(again, one)
      } finally {
        native.set_num_threads(0)
      }
    }),
  )

for (const kind of ['given', 'shared'] as const)
  itOp('sampled_softmax_loss', `rows of weight 0 change no bit, whatever they hold, ${kind}`, () =>
    scope(() => {
      const [T, I, d, R] = [70, 12, 10, 3]
      const random = new Random(8)
      const [query, table] = [float(random, T, d), float(random, I, d)]
      const item = () => 1 + random.int(I - 1)
      const positives = Array.from({ length: T }, item)
      const negatives = Array.from({ length: kind === 'shared' ? R : T * R }, item)
      const options = { negativeIds: kind === 'shared' ? ids(negatives) : ids(negatives, [T, R]) }
      const alone = gradients(query, table, ids(positives), options)
      const padded = new Float32Array(2 * T * d).fill(Number.NaN)
      const values = query.dataSync() as Float32Array
      for (let t = 0; t < T; t++) padded.set(values.subarray(t * d, (t + 1) * d), 2 * t * d)
      const twice = negatives.flatMap((_, i) => (i % R ? [] : [...negatives.slice(i, i + R), ...Array(R).fill(-7)]))
      const among = gradients(Tensor.from(padded, [2 * T, d]), table, ids(positives.flatMap(id => [id, 99])), {
        negativeIds: kind === 'shared' ? options.negativeIds : ids(twice, [2 * T, R]),
        weights: Tensor.from(Float32Array.from({ length: 2 * T }, (_, t) => 1 - (t % 2))),
      })
      deepStrictEqual(among.loss, alone.loss)
      deepStrictEqual(among.dtable, alone.dtable)
      for (let t = 0; t < T; t++) {
        deepStrictEqual(among.dquery.slice(2 * t * d, (2 * t + 1) * d), alone.dquery.slice(t * d, (t + 1) * d))
        ok(among.dquery.slice((2 * t + 1) * d, (2 * t + 2) * d).every(x => x === 0))
      }
    }),
  )

itOp('sampled_softmax_loss', 'a NaN in a row that counts reaches the loss', () =>
  scope(() => {
    const query = Tensor.from([1, Number.NaN, 1, 1], [2, 2])
    const loss = sampledSoftmaxLoss(query, Tensor.from([0, 0, 1, 2, 3, 4], [3, 2]), ids([1, 2]), { numNegatives: 3 })
    ok(Number.isNaN(loss.item()))
  }),
)

itOp('sampled_softmax_loss', 'a loss far below the precision of its logits', () =>
  scope(() => {
    const [query, table] = [Tensor.from([0.5, 0], [1, 2]), Tensor.from([0, 0, 1, 0, -1, 0], [3, 2])]
    const expected = Math.log1p(Math.exp(-20))
    for (const negativeIds of [ids([2]), ids([2], [1, 1])]) {
      const { value, grads } = valueAndGrad([query, table], () =>
        sampledSoftmaxLoss(query, table, ids([1]), { negativeIds }),
      )
      ok(Math.abs(value.item() / expected - 1) < 1e-5)
      ok(Math.abs((valuesOf(grads[0]!)[0]! * 0.05) / (-2 * expected) - 1) < 1e-5)
    }
  }),
)

itOp(
  'sampled_softmax_loss',
  'the loss of 16-bit inputs is float32, and as exact',
  () =>
    scope(() => {
      const c: Case = { T: 60, I: 70, d: 32, R: 40 }
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
itOp('sampled_softmax_loss', 'names the position and the value of an id outside the table', () => {
  const call = (positives: number[], negativeIds: Tensor) => () =>
    sampledSoftmaxLoss(zeros(2, 3), zeros(5, 3), ids(positives), { negativeIds })
  const code = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(() => call([1, 5], ids([1]))(), code, /positive_ids\[1\] = 5 is outside 1\.\.4/)
  throwsCode(() => call([0, 1], ids([1]))(), code, /positive_ids\[0\] = 0 is outside 1\.\.4/)
  throwsCode(() => call([1, 1], ids([1, 2, -1]))(), code, /negative_ids\[2\] = -1 is outside 1\.\.4/)
  throwsCode(() => call([1, 1], ids([1, 2, 9, 0], [2, 2]))(), code, /negative_ids\[1, 0\] = 9 is outside 1\.\.4/)
})
itOp('sampled_softmax_loss', 'names what is wrong with its arguments', () => {
  const call = (options: SampledSoftmaxLossOptions, query = zeros(2, 3), table = zeros(5, 3)) =>
    sampledSoftmaxLoss(query, table, ids([1, 2]), options)
  const code = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(() => call({}), code, /numNegatives must be .* got 0/)
  throwsCode(() => call({ numNegatives: 3, negativeIds: ids([1]) }), code, /numNegatives is 3, negativeIds has 1/)
  throwsCode(() => call({ numNegatives: 1, firstId: 5 }), code, /firstId .* 0\.\.4, got 5/)
  throwsCode(() => call({ numNegatives: 1, temperature: 0 }), code, /temperature/)
  throwsCode(() => call({ numNegatives: 1, eps: 0 }), code, /eps/)
  throwsCode(() => call({ numNegatives: 1, weights: zeros(3) }), 'ERR_HSTU_SHAPE', /weights .*T=2.*float32\[3\]/)
  throwsCode(() => call({ negativeIds: ids([1, 1, 1], [3, 1]) }), 'ERR_HSTU_SHAPE', /negativeIds .*T=2.*int64\[3, 1\]/)
  throwsCode(() => call({ numNegatives: 1 }, zeros(2, 4)), 'ERR_HSTU_SHAPE', /table .*d=4.*float32\[5, 3\]/)
  throwsCode(() => call({ negativeIds: zeros(3) }), 'ERR_HSTU_DTYPE', /negativeIds must be int64/)
  const double = Tensor.zeros([2, 3], { dtype: 'float64' })
  throwsCode(() => call({ numNegatives: 1 }, double), 'ERR_HSTU_DTYPE', /table is float32, query is float64/)
})
