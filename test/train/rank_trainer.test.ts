import { beforeAll, describe, expect, it } from 'vitest'
import { prepareRequests } from '#lib/data/ranking/prepare.js'
import { RequestReader } from '#lib/data/ranking/reader.js'
import { syntheticMapping, writeSyntheticLog } from '#lib/data/ranking/synthetic.js'
import type { BinaryMetrics } from '#lib/eval/ranking_metrics.js'
import { memory } from '#lib/tensor.js'
import { type RankEvent, RankTrainer, type RankTrainerSetting } from '#lib/train/rank_trainer.js'
import { scratch } from '../data/ranking_requests.js'
import { bits, done, events, losses, records, setting, stateOf } from './rank_stream.js'

const files = scratch()
let reader: RequestReader
beforeAll(async () => {
  reader = await records(files.at)
})

const { options } = setting
const forms: Record<string, Partial<RankTrainerSetting>> = {
  'one pass': {},
  'two passes, generative, Stochastic Length': {
    options: { ...options, passes: 2, supervise: 'history', stochasticLength: 1.3 },
  },
  'hash table that evicts': {
    model: { ...setting.model, embeddings: 'hash' },
    options: { ...options, tableRows: 160, whenFull: 'evict', batchSize: 4 },
  },
  'two passes over some requests of a user, hash table, Stochastic Length': {
    model: { ...setting.model, embeddings: 'hash' },
    options: { ...options, passes: 2, supervise: 'new', userRate: 0.5, stochasticLength: 1.4 },
  },
  'two passes on top of the rates of users and items, hash table': {
    model: { ...setting.model, embeddings: 'hash' },
    options: { ...options, passes: 2, baseRateWindow: 50, idRates: true, idDropout: 0.2, batchSize: 16 },
  },
  'two passes over sequences, on top of base rates, without users and some items': {
    options: {
      ...{ ...options, passes: 2, supervise: 'new', learnEvery: 7, baseRateWindow: 50, userIds: false, idDropout: 0.2 },
      ...{ until: 0.9, schedule: 'cosine', finalShare: 0.1 },
    },
  },
}

describe('RankTrainer', () => {
  it.each(Object.entries(forms))('goes on after a kill at any step as without it: %s', async (name, form) => {
    const whole = new RankTrainer(reader, { ...setting, ...form })
    const expected = await events(whole)
    const [wanted, wantedBits, wantedState] = [losses(expected), bits(whole), stateOf(whole)]
    if (form.options?.whenFull) expect(whole.table!.evicted).toBeGreaterThan(0)
    if (form.options?.stochasticLength) expect(wantedState.sparsity!.cut).toBeGreaterThan(10)
    if (form.options?.userRate) {
      expect(wantedState.sampled!.trained).toBeLessThan(0.7 * wantedState.sampled!.requests)
      expect(whole.state.requests).toBe(wantedState.sampled!.trained)
    }
    whole.dispose()
    for (const stop of [1, 4, Math.floor(wanted.length * 0.6), Math.floor(wanted.length * 0.9), wanted.length]) {
      const folder = files.at(`run ${name} ${stop}`)
      const killed = new RankTrainer(reader, { ...setting, ...form, folder })
      await events(killed, stop)
      killed.dispose()
      const resumed = await RankTrainer.resume(folder, reader)
      const from = resumed.state.step
      expect(from).toBe(3 * Math.floor((stop - 1) / 3)) // the step's event comes before its checkpoint
      const list = await events(resumed)
      expect(losses(list)).toEqual(wanted.slice(from))
      expect(done(list)).toEqual(done(expected))
      expect(bits(resumed)).toEqual(wantedBits)
      expect(stateOf(resumed)).toEqual(wantedState)
      resumed.dispose()
    }
  })

  it('predicts each request once before it learns from it, and counts the last fifth', async () => {
    const before = memory()
    const trainer = new RankTrainer(reader, { ...setting, options: { ...setting.options, trainShare: 0.8 } })
    const fresh = new RankTrainer(reader, setting)
    const list = await events(trainer)
    const { counted, lifetime } = done(list)
    let [impressions, tail] = [0, 0]
    for await (const batch of reader.batches({ batchSize: 64 }))
      for (const b of batch.candidates.requestIndex) {
        impressions++
        tail += Number(batch.requests[Number(b)]! >= reader.at(0.8))
      }
    expect(lifetime.like!.weight).toBe(impressions)
    expect(counted.like!.weight).toBe(tail)
    expect(counted.watch!.weight).toBe(tail)
    expect(trainer.state.impressions).toBe(impressions)
    expect(list.filter(event => event.type === 'step').length).toBe(trainer.totalSteps)
    // The first step alone was predicted by the initial weights: a model that has not learnt.
    const first = (await reader.batches({ batchSize: 8 }).next()).value!
    const [step] = losses(await events(fresh, 1))
    expect(step![1]).toBe(losses(list)[0]![1])
    expect(fresh.metrics.lifetime().like!.weight).toBe(first.candidates.items.length)
    fresh.dispose()
    trainer.dispose()
    expect(memory()).toEqual(before)
  })

  it('learns: better than the base rate', async () => {
    const log = files.at('longer.csv')
    const stream = { users: 150, items: 60, categories: 5, days: 25, candidates: 5, seed: 3 }
    const { oracleNe } = await writeSyntheticLog(log, stream)
    await prepareRequests(syntheticMapping(log), { out: files.at('longer') })
    const trainer = new RankTrainer(await RequestReader.open(files.at('longer')), {
      ...{ ...setting, tasks: ['like = LIKE'], taskWeights: {} },
      options: { ...setting.options, lr: 3e-3 },
    })
    const { counted } = done(await events(trainer))
    const { ne, auc } = counted.like as BinaryMetrics
    expect(ne).toBeGreaterThan(oracleNe)
    expect(ne).toBeLessThan(0.98)
    expect(auc).toBeGreaterThan(0.6)
    trainer.dispose()
  })

  it('is interrupted between steps with a checkpoint', async () => {
    const folder = files.at('interrupted')
    const trainer = new RankTrainer(reader, { ...setting, folder })
    const controller = new AbortController()
    const list: RankEvent[] = []
    for await (const event of trainer.run({ signal: controller.signal })) {
      list.push(event)
      if (event.type === 'step' && event.step === 4) controller.abort()
    }
    expect(list.at(-1)).toEqual({ type: 'interrupted', step: 4, folder })
    trainer.dispose()
    const resumed = await RankTrainer.resume(folder, reader)
    expect(resumed.state.step).toBe(4)
    resumed.dispose()
  })

  it('names what is wrong', async () => {
    const bad = (change: Partial<RankTrainerSetting>, code: string, message: RegExp) =>
      expect(() => new RankTrainer(reader, { ...setting, ...change })).toThrow(
        expect.objectContaining({ code, message: expect.stringMatching(message) }),
      )
    const argument = 'ERR_HSTU_INVALID_ARGUMENT'
    bad({ options: { passes: 0 } }, argument, /passes must be a positive integer, got 0/)
    bad({ options: { epochs: 3 } as object }, argument, /unknown training option 'epochs'/)
    bad({ tasks: ['like = LIKED'] }, 'ERR_HSTU_DATA', /no action "?'?LIKED/)
    bad({ options: { stochasticLength: 2.5 } }, argument, /stochasticLength must be 0 or in \(1, 2\], got 2.5/)
    bad(
      { options: { lengthSelection: 'old' as 'recent' } },
      argument,
      /lengthSelection must be one of weighted, recent/,
    )
    bad(
      { options: { userRate: 1 } },
      argument,
      /supervise must be 'new' where userRate or learnEvery is set, got "candidates"/,
    )
    bad({ options: { userRate: -1 } }, argument, /userRate must be a non-negative number, got -1/)
    const both = { supervise: 'new', userRate: 1, learnEvery: 5 } as const
    bad({ options: both }, argument, /learnEvery must be 0 where userRate is set, got 5/)
    const leaky = { supervise: 'history', idRates: true, baseRateWindow: 9 } as const
    bad({ options: leaky }, argument, /idRates must be false but with supervise 'candidates' and a baseRateWindow/)
    bad({ options: { until: 0.7 } }, argument, /until must be at least trainShare, 0.8, got 0.7/)
    bad({ options: { idDropout: 1 } }, argument, /idDropout must be in \[0, 1\), got 1/)
    bad({ options: { baseRateWindow: -1 } }, argument, /baseRateWindow must be a non-negative number, got -1/)
    bad({ taskWeights: { love: 1 } }, 'ERR_HSTU_DATA', /taskWeights: there is no task love/)
    await expect(RankTrainer.resume(files.at('nowhere'), reader)).rejects.toThrow(
      expect.objectContaining({ code: 'ERR_HSTU_CHECKPOINT' }),
    )
    const other = files.at('other.csv')
    await writeSyntheticLog(other, { users: 10, items: 100, categories: 10, days: 5, candidates: 2, seed: 4 })
    await prepareRequests(syntheticMapping(other), { out: files.at('other records') })
    const elsewhere = await RequestReader.open(files.at('other records'))
    await expect(RankTrainer.resume(files.at('interrupted'), elsewhere)).rejects.toThrow(/trained on other records/)
  })
})
