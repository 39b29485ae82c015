import { describe, expect, it } from 'vitest'
import { valueAndGrad } from '#lib/autograd.js'
import { expandBatch, sliceBatch } from '#lib/data/ranking/batches.js'
import { rankerBatch } from '#lib/data/ranking/ranker_inputs.js'
import type { RequestBatch } from '#lib/data/ranking/schema.js'
import { parseTasks, type Supervision, taskTargets } from '#lib/data/ranking/tasks.js'
import { GenerativeRanker, type GenerativeRankerConfig } from '#lib/models/generative_ranker.js'
import { native } from '#lib/native.js'
import { Philox } from '#lib/philox.js'
import { Random } from '#lib/random.js'
import { type Device, memory, scope, Tensor } from '#lib/tensor.js'
import { relativeError } from '../harness.js'
import { randomRequests } from './requests.js'

const { cuda } = native.backend()
const batch = randomRequests(new Random(1), {
  histories: [7, 0, 12, 3],
  candidates: [4, 2, 1, 3],
  ...{ items: 30, users: 6 },
})
const config: GenerativeRankerConfig = {
  vocabulary: { users: 6, items: 30, contextual: [4], series: [3] },
  actions: 2,
  tasks: [
    { name: 'like', kind: 'binary', weight: 2 },
    { name: 'share', kind: 'binary' },
    { name: 'watch', kind: 'regression', weight: 0.5 },
  ],
  ...{ dim: 12, layers: 2, heads: 2, qkDim: 4, vDim: 6, hidden: 10, actionDim: 3, scalingSeqLen: 64 },
  ...{ inputDropout: 0, linearDropout: 0 },
}
const tasks = parseTasks(['like = LIKE once', 'share = SHARE', 'watch = watch'], batch.schema)
const forms: Record<string, Partial<GenerativeRankerConfig>> = {
  'interleaved, loss on the history too': {},
  'interleaved, concat, SiLU on u alone, positions': { concat: true, siluAll: false, positions: 40 },
  'interleaved, softmax': { activation: 'softmax' },
  additive: { fusion: 'add', positions: 40 },
  'contextual tokens see the history': { contextualFull: true },
}
const superviseOf = (form: Partial<GenerativeRankerConfig>): Supervision =>
  form.fusion === 'add' || form.contextualFull ? 'candidates' : 'all'

/** Makes parameters large enough that every term matters. */
function stir(model: GenerativeRanker): void {
  const random = new Random(7)
  for (const tensor of Object.values(model.parameters)) {
    const data = tensor.dataSync() as Float64Array
    tensor.write(data.map(x => x + 0.3 * random.normal()))
  }
}

function lossAndGradients(
  model: GenerativeRanker,
  requests: RequestBatch,
  supervise: Supervision,
  historyWeight?: Float64Array,
): Record<string, Float64Array> {
  return scope(() => {
    const targets = taskTargets(requests, tasks, { supervise })
    const { inputs, labels, weights } = rankerBatch(requests, targets, model.config, model.options, historyWeight)
    const { value, grads } = valueAndGrad(
      model.parameters,
      () => model.loss(model.forward(inputs), labels, weights).total,
    )
    const all = { value, ...grads }
    return Object.fromEntries(
      Object.entries(all).map(([name, tensor]) => [name, Float64Array.from(tensor.dataSync() as Float64Array)]),
    )
  })
}

function expectRequestsEqualImpressions(form: Partial<GenerativeRankerConfig>, double: boolean, device: Device): void {
  const options = { dtype: double ? 'float64' : 'float32', device } as const
  const model = new GenerativeRanker({ ...config, ...form }, 3, options)
  stir(model)
  const before = memory()
  const { batch: impressions, historyWeight } = expandBatch(batch)
  expect(impressions.requests.length).toBe(10)
  const ofRequests = lossAndGradients(model, batch, superviseOf(form))
  const expanded = lossAndGradients(model, impressions, superviseOf(form), historyWeight)
  expect(memory()).toEqual(before)
  // Of all gradients together: what some of them sum to is 0 but for rounding (a bias before a softmax, before a norm).
  const norm = Math.hypot(
    ...Object.entries(expanded).flatMap(([name, data]) => (name === 'value' ? [] : Math.hypot(...data))),
  )
  expect(norm).toBeGreaterThan(0.01)
  for (const [name, expected] of Object.entries(expanded)) {
    const difference = Math.hypot(...expected.map((x, i) => x - ofRequests[name]![i]!))
    const scale = Math.max(Math.hypot(...expected), name === 'value' ? 0 : 0.01 * norm)
    expect(difference / scale, name).toBeLessThan(double ? 1e-12 : 1e-5)
  }
  model.dispose()
}

describe('request-only batches (ROO)', () => {
  for (const [name, form] of Object.entries(forms)) {
    it(`give loss and gradients of expanded impressions: ${name}`, () => {
      expectRequestsEqualImpressions(form, true, 'cpu')
      expectRequestsEqualImpressions(form, false, 'cpu')
    })
    it.skipIf(!cuda.usable)(`on CUDA${cuda.usable ? '' : ` NOT RUN (${cuda.reason})`}: ${name}`, () => {
      expectRequestsEqualImpressions(form, false, 'cuda')
    })
  }
})

describe('GenerativeRanker', () => {
  /** Logits of the predicted tokens, row by row. */
  const logitsOf = (model: GenerativeRanker, requests: RequestBatch, supervise: Supervision = 'candidates') =>
    scope(() => {
      const targets = taskTargets(requests, tasks, { supervise })
      const { inputs } = rankerBatch(requests, targets, model.config, model.options)
      return model.forward(inputs).dataSync() as Float64Array
    })

  it('has gradients of the whole loss that finite differences confirm, dropout included', () => {
    for (const form of [{}, { fusion: 'add' }] as const) {
      const model = new GenerativeRanker(
        { ...config, ...form, positions: 40, concat: true, inputDropout: 0.2, linearDropout: 0.2 },
        ...([3, { dtype: 'float64' }] as const),
      )
      stir(model)
      const targets = taskTargets(batch, tasks, { supervise: superviseOf(form) })
      const loss = () => {
        const { inputs, labels, weights } = rankerBatch(batch, targets, model.config, model.options)
        return model.loss(model.forward(inputs, new Philox(5n)), labels, weights).total
      }
      const gradients = scope(() => {
        const { grads } = valueAndGrad(model.parameters, loss)
        return Object.entries(grads).map(([name, tensor]) => [name, tensor.dataSync() as Float64Array] as const)
      })
      const random = new Random(3)
      for (const [name, gradient] of gradients) {
        const tensor = model.parameters[name]!
        const data = tensor.dataSync() as Float64Array
        for (let sample = 0; sample < 3; sample++) {
          const i = random.int(data.length)
          const at = (delta: number) => {
            tensor.write(data.map((x, j) => (j === i ? x + delta : x)))
            return scope(() => loss().item())
          }
          const numeric = (at(1e-5) - at(-1e-5)) / 2e-5
          tensor.write(data)
          expect(Math.abs(numeric - gradient[i]!), `${name}[${i}]`).toBeLessThan(1e-7 * Math.max(1, Math.abs(numeric)))
        }
      }
      model.dispose()
    }
  })

  it('never lets a prediction see its own label or what came after it', () => {
    const model = new GenerativeRanker(config, 3, { dtype: 'float64' })
    stir(model)
    const one = sliceBatch(batch, 2, 3) // 12 rows, one candidate
    const [t, K] = [7, tasks.length]
    const actions = one.history.actions.map((x, row) => (row === t ? x ^ 3 : x))
    const [before, after] = [one, { ...one, history: { ...one.history, actions } }].map(requests =>
      logitsOf(model, requests, 'all'),
    )
    const rows = scope(() => {
      const { historyWeights } = taskTargets(one, tasks, { supervise: 'all' })
      const all = Array.from({ length: one.history.items.length }, (_, row) => row)
      return all.filter(row => historyWeights.subarray(row * K, (row + 1) * K).some(weight => weight > 0))
    })
    expect(rows).toContain(t)
    const changed = rows.findIndex(row => row > t)
    expect(after!.slice(0, changed * K)).toEqual(before!.slice(0, changed * K))
    for (let row = changed; row <= rows.length; row++)
      expect(after!.slice(row * K, (row + 1) * K), `row ${row}`).not.toEqual(before!.slice(row * K, (row + 1) * K))
    model.dispose()
  })

  it.each(Object.entries(forms))('scores candidates whoever else is in the batch and in any order: %s', (_, form) => {
    const model = new GenerativeRanker({ ...config, ...form }, 3)
    const all = logitsOf(model, batch)
    const last = logitsOf(model, sliceBatch(batch, 3, 4))
    expect(last).toEqual(all.slice(-last.length))
    const one = sliceBatch(batch, 0, 1)
    const reversed = { ...one, candidates: { ...one.candidates, items: one.candidates.items.slice().reverse() } }
    const rows = (logits: Float64Array) => Array.from({ length: 4 }, (_, m) => logits.slice(3 * m, 3 * m + 3))
    expect(rows(logitsOf(model, reversed)).reverse()).toEqual(rows(logitsOf(model, one)))
    model.dispose()
  })

  it('has losses by kind of task, by weight', () => {
    const model = new GenerativeRanker(config, 3, { dtype: 'float64' })
    scope(() => {
      const tensor = (values: number[]) => Tensor.from(Float64Array.from(values), [2, 3])
      const logits = tensor([0.5, -1, 2, -0.25, 3, 7])
      const { total, tasks } = model.loss(logits, tensor([1, 0, 1.5, 0, 1, NaN]), tensor([1, 0.5, 1, 3, 1, 0]))
      const ce = (z: number, y: number) => Math.log1p(Math.exp(z)) - z * y
      const expected = [(ce(0.5, 1) + 3 * ce(-0.25, 0)) / 4, (0.5 * ce(-1, 0) + ce(3, 1)) / 1.5, 0.25]
      expect(relativeError(tasks.dataSync() as Float64Array, expected)).toBeLessThan(1e-14)
      expect(total.item()).toBeCloseTo(2 * expected[0]! + expected[1]! + 0.5 * expected[2]!, 13)
    })
    model.dispose()
  })

  it('takes looked-up rows of 64-bit keys in place of its table', () => {
    const dense = new GenerativeRanker(config, 3)
    const hash = new GenerativeRanker({ ...config, embeddings: 'hash' }, 3)
    for (const [name, tensor] of Object.entries(hash.parameters)) tensor.write(dense.parameters[name]!.dataSync())
    scope(() => {
      const of = (model: GenerativeRanker) => rankerBatch(batch, taskTargets(batch, tasks), model.config).inputs
      const { ids: keys, ...inputs } = of(hash)
      const rows = of(dense).ids.dataSync() as BigInt64Array
      const table = dense.parameters.table!.dataSync() as Float32Array
      const bases = [0n, 7n, 12n, 43n] // users, countries, items, languages
      expect((keys.dataSync() as BigInt64Array).map(key => bases[Number(key >> 56n)]! + (key & 0xffffffn))).toEqual(
        rows,
      )
      const large = [2n ** 56n - 1n, 2n ** 40n + 2n ** 31n, 2n ** 32n - 1n]
      const items = batch.candidates.items.map((item, m) => large[m] ?? item)
      const wide = { ...batch, candidates: { ...batch.candidates, items } }
      const { ids } = rankerBatch(wide, taskTargets(wide, tasks), hash.config).inputs
      expect((ids.dataSync() as BigInt64Array).slice(-items.length)).toEqual(items.map(item => (2n << 56n) + item))
      const embedded = Tensor.from(
        Array.from(rows, row => Array.from(table.subarray(Number(row) * 12, (Number(row) + 1) * 12))).flat(),
        [rows.length, 12],
      )
      expect(hash.forward({ ...inputs, ids: keys }, null, embedded).dataSync()).toEqual(logitsOf(dense, batch))
      expect(() => hash.forward({ ...inputs, ids: keys })).toThrow(/embeddings 'hash': give forward the looked-up rows/)
    })
    dense.dispose()
    hash.dispose()
  })

  it('names what is wrong with a config or a batch', () => {
    const bad = (change: Partial<GenerativeRankerConfig>, message: RegExp) =>
      expect(() => new GenerativeRanker({ ...config, ...change })).toThrow(
        expect.objectContaining({ code: 'ERR_HSTU_INVALID_ARGUMENT', message: expect.stringMatching(message) }),
      )
    bad({ heads: 0 }, /heads must be an integer of at least 1, got 0/)
    bad({ actions: 40 }, /actions must be an integer of at least 1 and at most 31, got 40/)
    bad({ fusion: 'concat' as 'add' }, /fusion must be one of interleave, add, got "concat"/)
    bad({ inputDropout: 1 }, /inputDropout must be in \[0, 1\), got 1/)
    bad({ tasks: [] }, /tasks must be at least one/)
    bad({ tasks: [{ name: 'like', kind: 'binary', weight: -1 }] }, /task like: weight must be a non-negative/)
    const wrong = (change: Partial<GenerativeRankerConfig>, supervise: Supervision, error: object) => {
      const model = new GenerativeRanker({ ...config, ...change })
      expect(() => logitsOf(model, batch, supervise)).toThrow(expect.objectContaining(error))
      model.dispose()
    }
    const message = (text: RegExp) => expect.stringMatching(text)
    const leak = 'ERR_HSTU_INVALID_ARGUMENT'
    wrong({ contextualFull: true }, 'all', { code: leak, message: message(/history rows with contextualFull/) })
    wrong({ fusion: 'add' }, 'history', { code: leak, message: message(/history rows with fusion 'add'/) })
    const data = (text: RegExp) => ({ code: 'ERR_HSTU_DATA', message: message(text) })
    const { vocabulary } = config
    wrong({ vocabulary: { ...vocabulary, items: 5 } }, 'all', data(/item number \d+ is not in the model's 0 \.\. 5/))
    wrong({ vocabulary: { ...vocabulary, series: [] } }, 'all', data(/have 1 auxiliary series, the model 0/))
    wrong({ actions: 3 }, 'all', data(/have 2 actions, the model 3/))
    wrong({ positions: 5 }, 'all', {
      code: 'ERR_HSTU_SHAPE',
      message: message(/14 tokens before its candidates, the position table 5/),
    })
  })
})
