import { describe, expect, it } from 'vitest'
import { evalBatch } from '#lib/data/batch.js'
import { toInputs } from '#lib/data/inputs.js'
import { evaluableUsers } from '#lib/data/split.js'
import { evaluate } from '#lib/eval/evaluate.js'
import { METRIC_KS, rankingMetrics } from '#lib/eval/metrics.js'
import { recommend } from '#lib/eval/recommend.js'
import { createModel } from '#lib/models/create.js'
import { memory, scope } from '#lib/tensor.js'
import { toyDataset, toyModel } from '../train/fixture.js'

const dataset = toyDataset()
const model = createModel(toyModel, 5)

/** Scores of all items for one user by plain loops over the model's own vectors. */
function scoresOf(
  user: number,
  stage: 'valid' | 'test',
): { scores: Float64Array; target: number; history: Set<number> } {
  const batch = evalBatch(dataset, [user], { maxLength: 10, stage })
  const [output, items] = scope(() => [model.forward(toInputs(batch)).dataSync(), model.itemEmbeddings().dataSync()])
  const d = 16
  const last = (output.length / d - 1) * d
  const scores = new Float64Array(21)
  for (let i = 1; i <= 20; i++)
    for (let c = 0; c < d; c++) scores[i]! += Number(output[last + c]) * Number(items[i * d + c])
  return { scores, target: Number(batch.targetIds[0]), history: new Set([...batch.ids].map(Number)) }
}

describe('rankingMetrics', () => {
  it('is HR, NDCG and MRR by hand', () => {
    const metrics = rankingMetrics([1, 3, 11, 600])
    expect(metrics).toMatchObject({ users: 4, 'hr@1': 0.25, 'hr@5': 0.5, 'hr@10': 0.5, 'hr@50': 0.75, 'hr@500': 0.75 })
    expect(metrics['ndcg@10']).toBeCloseTo((1 + 0.5) / 4, 12)
    expect(metrics.mrr).toBeCloseTo((1 + 1 / 3 + 1 / 11 + 1 / 600) / 4, 12)
    expect(Object.keys(metrics)).toHaveLength(2 + 2 * METRIC_KS.length)
  })
})

describe('evaluate', () => {
  it.each(['valid', 'test'] as const)('ranks the %s action as plain loops do', async stage => {
    const ranks = [...evaluableUsers(dataset, stage)].map(user => {
      const { scores, target, history } = scoresOf(user, stage)
      let rank = 1
      for (let i = 1; i <= 20; i++) if (i !== target && !history.has(i) && scores[i]! >= scores[target]!) rank++
      return rank
    })
    const before = memory()
    expect(await evaluate(model, dataset, { stage })).toEqual(rankingMetrics(ranks))
    expect(await evaluate(model, dataset, { stage, batchSize: 7 })).toEqual(rankingMetrics(ranks))
    expect(memory()).toEqual(before)
  })

  it('can be aborted, and says when there is nothing to rank or a score is NaN', async () => {
    await expect(evaluate(model, dataset, { signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: 'ERR_HSTU_ABORTED',
    })
    await expect(evaluate(model, dataset, { users: [] })).rejects.toMatchObject({ code: 'ERR_HSTU_DATA' })
    const broken = createModel(toyModel, 5)
    const items = broken.parameters.items!
    items.write((items.dataSync() as Float32Array).map((x, i) => (i === 40 ? Number.NaN : x)))
    await expect(evaluate(broken, dataset)).rejects.toMatchObject({
      code: 'ERR_HSTU_INVALID_ARGUMENT',
      message: expect.stringMatching(/NaN/),
    })
    broken.dispose()
  })
})

describe('recommend', () => {
  it('lists the best items that the user has not had, best first', () => {
    const before = memory()
    const [list] = recommend(model, dataset, [0], { k: 20 })
    const row = dataset.offsets[1]! - dataset.offsets[0]!
    const had = new Set(dataset.items.slice(Math.max(0, row - 10), row))
    expect(list!.map(entry => entry.item).filter(item => had.has(item))).toEqual([])
    expect(list).toHaveLength(20 - had.size)
    expect(list!.every((entry, i) => i === 0 || entry.score <= list![i - 1]!.score)).toBe(true)
    expect(list![0]!.itemId).toBe(dataset.itemIds[list![0]!.item])
    expect(memory()).toEqual(before)
    expect(() => recommend(model, dataset, [0], { k: 0 })).toThrow(/k must be a positive integer, got 0/)
    expect(() => recommend(model, dataset, [99])).toThrow(/99/)
  })
})
