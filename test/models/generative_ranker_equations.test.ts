// GenerativeRanker against a reference that was written from its equations alone.
import { describe, expect, it } from 'vitest'
import { rankerBatch } from '#lib/data/ranking/ranker_inputs.js'
import { parseTasks, taskTargets } from '#lib/data/ranking/tasks.js'
import { GenerativeRanker, type GenerativeRankerConfig } from '#lib/models/generative_ranker.js'
import { Random } from '#lib/random.js'
import { memory, scope } from '#lib/tensor.js'
import { relativeError } from '../harness.js'
import { naiveRanker } from './naive_ranker.js'
import { randomRequests } from './requests.js'

const batch = randomRequests(new Random(11), {
  ...{ histories: [6, 0, 9, 1], candidates: [3, 2, 1, 4], items: 25, users: 5, seriesEvery: 4 },
})
const config: GenerativeRankerConfig = {
  vocabulary: { users: 5, items: 25, contextual: [4], series: [3] },
  actions: 2,
  tasks: [
    { name: 'like', kind: 'binary' },
    { name: 'watch', kind: 'regression' },
  ],
  ...{ dim: 10, layers: 2, heads: 2, qkDim: 3, vDim: 4, hidden: 7, actionDim: 3, scalingSeqLen: 48 },
  ...{ inputDropout: 0.2, linearDropout: 0.2 }, // in training alone
}
const forms: Record<string, Partial<GenerativeRankerConfig>> = {
  interleaved: {},
  'interleaved, concat, SiLU on u alone, positions': { concat: true, siluAll: false, positions: 30 },
  'interleaved, softmax': { activation: 'softmax' },
  'interleaved, few buckets and few positions of the bias': { timeBuckets: 12, scalingSeqLen: 8 },
  'interleaved, without biases': { timeBias: false, positionBias: false },
  'interleaved, contextual tokens see the history': { contextualFull: true },
  additive: { fusion: 'add' },
  'additive, positions, no time bias': { fusion: 'add', positions: 30, timeBias: false },
  'additive, contextual tokens see the history': { fusion: 'add', contextualFull: true },
  'one token of all users': { vocabulary: { ...config.vocabulary, users: 0 } },
}
const tasks = parseTasks(['like = LIKE or SHARE', 'watch = watch'], batch.schema)

describe('GenerativeRanker computes its equations', () => {
  it.each(Object.entries(forms))('%s', (_, form) => {
    const before = memory()
    const model = new GenerativeRanker({ ...config, ...form }, 3, { dtype: 'float64' })
    const random = new Random(7)
    for (const tensor of Object.values(model.parameters))
      tensor.write((tensor.dataSync() as Float64Array).map(x => x + 0.4 * random.normal()))
    const generative = form.fusion !== 'add' && !form.contextualFull
    const users = model.config.vocabulary.users
    const requests = users > 0 ? batch : { ...batch, users: batch.users.map(() => 0n) }
    const [actual, supervised] = scope(() => {
      const targets = taskTargets(batch, tasks, { supervise: generative ? 'all' : 'candidates' })
      const { inputs } = rankerBatch(batch, targets, model.config, model.options)
      const rows = batch.requests.length
      const own = Array.from({ length: rows }, (_, b) => {
        const [first, end] = [Number(batch.history.offsets[b]), Number(batch.history.offsets[b + 1])]
        const weights = (t: number) => targets.historyWeights.subarray(2 * t, 2 * t + 2)
        return Array.from({ length: end - first }, (_, row) => row).filter(row => weights(first + row).some(w => w > 0))
      })
      return [model.forward(inputs).dataSync() as Float64Array, own] as const
    })
    const each = supervised.map((rows, b) => naiveRanker(model, requests, b, rows))
    // History rows of all requests first, then all candidates.
    const expected = [
      ...each.flatMap((logits, b) => logits.slice(0, supervised[b]!.length)),
      ...each.flatMap((logits, b) => logits.slice(supervised[b]!.length)),
    ].flat()
    expect(supervised.flat().length).toBe(
      generative ? batch.history.series.filter((s, t) => s === 0 && batch.history.pending[t] === 0).length : 0,
    )
    expect(expected.length).toBe(2 * (supervised.flat().length + 10))
    expect(Math.max(...expected) - Math.min(...expected)).toBeGreaterThan(0.5)
    expect(relativeError(actual, expected)).toBeLessThan(1e-11)
    model.dispose()
    expect(memory()).toEqual(before)
  })
})
