import { beforeAll, describe, expect, it } from 'vitest'
import type { RequestReader } from '#lib/data/ranking/reader.js'
import type { RequestBatch } from '#lib/data/ranking/schema.js'
import { parseTasks } from '#lib/data/ranking/tasks.js'
import type { Impression } from '#lib/eval/baseline_features.js'
import { Random } from '#lib/random.js'
import { RankFeed, sendRate } from '#lib/train/rank_feed.js'
import { type RankOptions, rankOptions } from '#lib/train/rank_options.js'
import { scratch } from '../data/ranking_requests.js'
import { randomRequests } from '../models/requests.js'
import { records } from './rank_stream.js'

const files = scratch()
let reader: RequestReader
beforeAll(async () => {
  reader = await records(files.at)
})

const feedOf = (options: Partial<RankOptions>, sizes = reader.manifest.sizes) =>
  new RankFeed(rankOptions(options), parseTasks(['like = LIKE'], reader.manifest.schema), 'interleave', sizes)

/** Labels of a batch that have a weight, as `request:item`. */
function labelsOf({ batch, targets }: NonNullable<ReturnType<RankFeed['work']>['learn']>): string[] {
  const { candidates, history } = batch
  const shown = Array.from(
    candidates.items,
    (item, m) => `${batch.requests[Number(candidates.requestIndex[m]!)]}:${item}`,
  )
  const past = Array.from(history.items, (item, t) => `${history.requests[t]}:${item}`)
  return [...shown.filter((_, m) => targets.weights[m]! > 0), ...past.filter((_, t) => targets.historyWeights[t]! > 0)]
}

async function labels(feed: RankFeed, pass = 0, batchSize = 16): Promise<string[]> {
  const all: string[] = []
  for await (const batch of reader.batches({ batchSize })) {
    const work = feed.work(batch, pass)
    work.commit()
    if (work.learn) all.push(...labelsOf(work.learn))
  }
  return all
}

describe('1/n sampling of users', () => {
  it('learns from a request of K impressions with probability min(1, c K / n)', () => {
    const histories = Array.from({ length: 60 }, (_, b) => 3 * b)
    const candidates = histories.map((_, b) => 1 + (b % 4))
    const batch = randomRequests(new Random(2), { histories, candidates, items: 50, users: 20 })
    expect(sendRate(batch, 40, 1)).toBe(1 / 121)
    expect(sendRate(batch, 3, 2)).toBe(8 / 13)
    expect(sendRate(batch, 0, 1)).toBe(1)
    for (const userRate of [1, 5]) {
      const feed = new RankFeed(
        ...([
          rankOptions({ supervise: 'new', userRate, maxHistory: 1000 }),
          parseTasks(['like = LIKE'], batch.schema),
        ] as const),
        ...(['interleave', { users: 20, items: 50 }] as const),
      )
      const passes = 500
      const sent = new Float64Array(60)
      for (let pass = 0; pass < passes; pass++) {
        feed.begin()
        const work = feed.work(batch, pass)
        work.commit()
        for (const request of work.learn?.batch.requests ?? []) sent[request - 100]! += 1
      }
      let [mean, variance] = [0, 0]
      sent.forEach((count, b) => {
        const p = sendRate(batch, b, userRate)
        const sigma = Math.sqrt(passes * p * (1 - p))
        expect(Math.abs(count - passes * p), `request ${b}`).toBeLessThan(4 * sigma + 1)
        mean += passes * p
        variance += sigma ** 2
      })
      const trained = sent.reduce((sum, count) => sum + count, 0)
      expect(Math.abs(trained - mean)).toBeLessThan(3 * Math.sqrt(variance))
      expect(feed.sampled).toEqual({ requests: 60 * passes, trained })
    }
  })

  it('gives each label at most once a pass, those since the last request learnt from with it', async () => {
    const every = await labels(feedOf({ supervise: 'candidates' }))
    const some = feedOf({ supervise: 'new', userRate: 1, maxHistory: 200 })
    for (const pass of [0, 1]) {
      some.begin()
      const found = await labels(some, pass)
      expect(new Set(found).size).toBe(found.length)
      expect(found.length).toBeGreaterThan(0.4 * every.length)
      expect(found.length).toBeLessThan(every.length)
      expect(every).toEqual(expect.arrayContaining(found))
    }
    // Where every request is learnt from, there is nothing left in the histories.
    expect(await labels(feedOf({ supervise: 'new', userRate: 1e9 }))).toEqual(every)
  })

  it('draws the same in batches of any size, and after a restored state', async () => {
    const options: Partial<RankOptions> = { supervise: 'new', userRate: 0.5, stochasticLength: 1.3, maxHistory: 30 }
    const expected = (await labels(feedOf(options))).sort()
    expect((await labels(feedOf(options), 0, 7)).sort()).toEqual(expected)
    let feed = feedOf(options)
    const found: string[] = []
    for await (const batch of reader.batches({ batchSize: 9 })) {
      const { learn, commit } = feed.work(batch, 0)
      commit()
      if (learn) found.push(...labelsOf(learn))
      const { json, tensors } = feed.state()
      feed = feedOf(options)
      feed.restore(JSON.parse(JSON.stringify(json)), new Map(Object.entries(tensors)))
    }
    expect(found.sort()).toEqual(expected)
    expect(feed.sampled!.requests).toBe(reader.manifest.requests)
    expect(feed.sparsity!.cut).toBeGreaterThan(0)
    const other = feedOf({})
    const { json, tensors } = feed.state()
    expect(() => other.restore(json, new Map(Object.entries(tensors)))).toThrow(
      expect.objectContaining({ code: 'ERR_HSTU_CHECKPOINT' }),
    )
  })
})

describe('learnEvery', () => {
  it('gives each label at most once a pass, as soon as so many of the user are new', async () => {
    const every = 6
    for (const pass of [0, 1]) {
      const feed = feedOf({ supervise: 'new', learnEvery: every, maxHistory: 1000 })
      const found = await labels(feed, pass)
      expect(new Set(found).size).toBe(found.length)
      const all = await labels(feedOf({}), pass)
      expect(all).toEqual(expect.arrayContaining(found))
      // What is left of each user is less than the number that is waited for.
      const users = new Map<string, number>()
      for await (const batch of reader.batches({ batchSize: 64 }))
        for (const [m, b] of batch.candidates.requestIndex.entries())
          users.set(`${batch.requests[Number(b)]}:${batch.candidates.items[m]}`, Number(batch.users[Number(b)]!))
      const left = new Map<number, number>()
      const known = new Set(found)
      for (const label of all)
        if (!known.has(label)) left.set(users.get(label)!, (left.get(users.get(label)!) ?? 0) + 1)
      expect(Math.max(...left.values())).toBeLessThan(every)
      expect(feed.sampled!.trained).toBeLessThan(0.7 * feed.sampled!.requests)
    }
    const options = { supervise: 'new', learnEvery: every } as const
    expect(await labels(feedOf(options), 0, 7)).toHaveLength((await labels(feedOf(options), 0, 40)).length)
    expect(await labels(feedOf(options), 0)).not.toEqual(await labels(feedOf(options), 1)) // another beginning
  })
})

describe('baseRateWindow', () => {
  it('gives the logits of the rates before each step', async () => {
    const window = 30
    const tasks = parseTasks(['like = LIKE', 'watch = watch'], reader.manifest.schema)
    const feed = new RankFeed(rankOptions({ baseRateWindow: window }), tasks, 'interleave', reader.manifest.sizes)
    const before: number[] = []
    for await (const batch of reader.batches({ batchSize: 16 })) {
      const { candidates, base, commit } = feed.work(batch, 0)
      // The label of i impressions ago counts exp(-i / window).
      const decayed = (values: readonly number[]) =>
        values.reduce((sum, x, i) => sum + x * Math.exp(-(values.length - 1 - i) / window), 0)
      const rate = (decayed(before) + 1) / (decayed(before.map(() => 1)) + 2)
      expect(base!.all[0]).toBeCloseTo(Math.log(rate / (1 - rate)), 8)
      expect(base!.all[1]).toBe(0)
      for (let m = 0; m < candidates.labels.length; m += 2) before.push(candidates.labels[m]!)
      commit()
    }
    expect(before.length).toBeGreaterThan(300)
  })
})

/** The additive logit whose users' rates forget: of n impressions the one k before the last counts .99^k. */
function forgettingLogit() {
  const seen: (Impression & { label: number })[] = []
  const rateOf = (own: typeof seen, strength: number, base: number, kept: number) => {
    const weights = own.map((_, i) => kept ** (own.length - 1 - i))
    const positives = own.reduce((sum, { label }, i) => sum + weights[i]! * label, 0)
    return (positives + strength * base) / (weights.reduce((a, b) => a + b, 0) + strength)
  }
  const logit = (p: number) => Math.log(p / (1 - p))
  return {
    predict({ user, item }: Impression): number {
      const base = (seen.reduce((sum, { label }) => sum + label, 0) + 1) / (seen.length + 2)
      const users = rateOf(
        seen.filter(one => one.user === user),
        5,
        base,
        0.99,
      )
      const items = rateOf(
        seen.filter(one => one.item === item),
        20,
        base,
        1,
      )
      return logit(users) + logit(items) - logit(base)
    },
    update: (impression: Impression, label: number) => void seen.push({ ...impression, label }),
  }
}

describe('idRates', () => {
  it('predicts as the additive logit does, over the base rate, and begins anew with a pass', async () => {
    const tasks = parseTasks(['like = LIKE', 'watch = watch'], reader.manifest.schema)
    const options = rankOptions({ baseRateWindow: 1e12, idRates: true }) // the window is all there was
    let feed = new RankFeed(options, tasks, 'interleave', reader.manifest.sizes)
    for (const pass of [0, 1]) {
      if (pass > 0) feed.begin()
      const reference = forgettingLogit()
      for await (const batch of reader.batches({ batchSize: 16 })) {
        const { batch: read, base, candidates, commit } = feed.work(batch, pass)
        const shown = Array.from(read.candidates.items, (item, m) => {
          return { user: read.users[Number(read.candidates.requestIndex[m]!)]!, item, time: 0n }
        })
        // Rates of all go on from the pass before; those of ids do not.
        const own = pass === 0 ? 0 : base!.all[0]!
        shown.forEach((impression, m) => {
          if (pass === 0) expect(base!.candidates[2 * m]).toBeCloseTo(reference.predict(impression), 6)
          else expect(Math.abs(base!.candidates[2 * m]! - own)).toBeLessThan(4)
          expect(base!.candidates[2 * m + 1]).toBe(0)
        })
        shown.forEach((impression, m) => {
          reference.update(impression, candidates.labels[2 * m]!)
        })
        commit()
        const { json, tensors } = feed.state()
        feed = new RankFeed(options, tasks, 'interleave', reader.manifest.sizes)
        feed.restore(JSON.parse(JSON.stringify(json)), new Map(Object.entries(tensors)))
      }
    }
    feed.begin()
    const first = (await reader.batches({ batchSize: 4 }).next()).value as RequestBatch
    const { all, candidates } = feed.baseOf(first)!
    for (let m = 0; m < candidates.length; m += 2) expect(candidates[m]).toBeCloseTo(all[0]!, 12)
    expect(() => feed.restore(feed.state().json, new Map())).toThrow(
      expect.objectContaining({ code: 'ERR_HSTU_CHECKPOINT', message: expect.stringMatching(/rates of users/) }),
    )
    const { json, tensors } = feed.state()
    const { 'rates.rule': _, ...older } = tensors
    expect(() => feed.restore(json, new Map(Object.entries(older)))).toThrow(
      expect.objectContaining({
        code: 'ERR_HSTU_CHECKPOINT',
        message: expect.stringMatching(/counted by another rule/),
      }),
    )
  })
})

describe('idDropout', () => {
  it('hides items in training alone, the same ones in batches of any size', async () => {
    const hidden = async (batchSize: number) => {
      const feed = feedOf({ idDropout: 0.3 })
      const items: bigint[] = []
      let shown = 0
      for await (const batch of reader.batches({ batchSize })) {
        const { batch: whole, learn, commit } = feed.work(batch, 0)
        commit()
        shown += whole.candidates.items.filter(item => item === 0n).length
        expect(learn!.batch.history.items.filter((_, t) => batch.history.series[t] !== 0)).toEqual(
          batch.history.items.filter((_, t) => batch.history.series[t] !== 0),
        )
        items.push(...learn!.batch.candidates.items)
      }
      expect(shown).toBe(0)
      return items
    }
    const items = await hidden(16)
    expect(await hidden(33)).toEqual(items)
    const share = items.filter(item => item === 0n).length / items.length
    expect(Math.abs(share - 0.3)).toBeLessThan(4 * Math.sqrt((0.3 * 0.7) / items.length))
  })
})

describe('RankFeed', () => {
  it('changes nothing before a step is made', async () => {
    const feed = feedOf({ supervise: 'new', userRate: 1, stochasticLength: 1.2, maxHistory: 50 })
    const before = structuredClone(feed.state())
    const batches: RequestBatch[] = []
    for await (const batch of reader.batches({ batchSize: 80 })) batches.push(batch)
    const work = feed.work(batches.at(-1)!, 0)
    expect(feed.state()).toEqual(before)
    work.commit()
    expect(feed.state()).not.toEqual(before)
  })

  it('predicts at full length what it learns from shortened', async () => {
    const feed = feedOf({ stochasticLength: 1.2, supervise: 'history' })
    for await (const batch of reader.batches({ batchSize: 64, first: 120 })) {
      const { batch: whole, learn, commit } = feed.work(batch, 0)
      commit()
      expect(whole.history).toEqual(batch.history)
      expect(learn!.batch.history.items.length).toBeLessThan(whole.history.items.length)
      expect(learn!.batch.candidates).toBe(whole.candidates)
    }
    expect(feed.sparsity!.meanKept).toBeLessThan(feed.sparsity!.meanLength)
  })

  it('names a user that the records do not know', async () => {
    const [batch] = [(await reader.batches({ batchSize: 64 }).next()).value as RequestBatch]
    expect(() =>
      feedOf({ supervise: 'new', userRate: 1 }, { ...reader.manifest.sizes, users: 5 }).work(batch, 0),
    ).toThrow(
      expect.objectContaining({
        code: 'ERR_HSTU_DATA',
        message: expect.stringMatching(/request \d+: user number \d+ is not in the records' 0 \.\. 5/),
      }),
    )
  })
})
