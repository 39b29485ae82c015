// Bundles of runs whose logits stand on rates: what a service answers is what the run's own evaluation says of the same request.
import { beforeAll, describe, expect, it } from 'vitest'
import { sliceBatch, truncateHistory } from '#lib/data/ranking/batches.js'
import type { RequestReader } from '#lib/data/ranking/reader.js'
import type { RequestBatch } from '#lib/data/ranking/schema.js'
import { taskTargets } from '#lib/data/ranking/tasks.js'
import { type LoadedBundle, makeRates, type RankerManifest, readBundle } from '#lib/serve/bundle.js'
import { exportBundle } from '#lib/serve/export.js'
import { Ranker } from '#lib/serve/ranker.js'
import type { RankRequest } from '#lib/serve/request.js'
import { loadCheckpoint, saveCheckpoint } from '#lib/train/checkpoint.js'
import { RankFeed, type RankFeedState } from '#lib/train/rank_feed.js'
import { predict } from '#lib/train/rank_step.js'
import { RankTrainer, type RankTrainerSetting } from '#lib/train/rank_trainer.js'
import { plain, readAll, scratch } from '../data/ranking_requests.js'
import { events, records, setting } from '../train/rank_stream.js'

const files = scratch()
let reader: RequestReader
let batch: RequestBatch
beforeAll(async () => {
  reader = await records(files.at)
  batch = (await readAll(reader))[0]!
})

const { options, model } = setting
const rated = { ...options, maxHistory: 400, baseRateWindow: 50, windowEvery: 0 }
const forms: Record<string, Partial<RankTrainerSetting>> = {
  'rates of users and items': { options: { ...rated, idRates: true } },
  'rates of users whom the model does not know, hash table': {
    ...{ model: { ...model, embeddings: 'hash' as const }, options: { ...rated, idRates: true, userIds: false } },
  },
  'a base rate alone, users not known': { options: { ...rated, userIds: false } },
}

/** A trained run's bundle, and what its own evaluation says of request b: probabilities of binary tasks, values of the others. */
async function exported(name: string, form: Partial<RankTrainerSetting>) {
  const [run, out] = [files.at(`run ${name}`), files.at(`bundle ${name}`)]
  const trainer = new RankTrainer(reader, { ...setting, ...form, folder: run })
  await events(trainer)
  await trainer.save()
  const { json, tensors } = await loadCheckpoint(`${run}/checkpoint`)
  const feed = new RankFeed(trainer.options, trainer.tasks, 'interleave', reader.manifest.sizes)
  feed.restore((json as unknown as { feed: RankFeedState }).feed, tensors.feed)
  const evaluated = async (b: number) => {
    const one = truncateHistory(sliceBatch(batch, b, b + 1), trainer.options.maxHistory)
    const work = { batch: one, candidates: taskTargets(one, trainer.tasks), base: feed.baseOf(one) }
    const logits = await predict({ model: trainer.model, table: trainer.table } as never, work)
    return trainer.tasks.map(({ name, kind }, k) => {
      const of = Array.from(logits).filter((_, i) => i % trainer.tasks.length === k)
      return [name, kind === 'binary' ? of.map(z => 1 / (1 + Math.exp(-z))) : of] as const
    })
  }
  await exportBundle(run, out, { requests: files.at('records') })
  return { out, evaluated, trainer }
}

/** Request b by its external ids. */
function requestOf(
  b: number,
  { vocabularies, manifest }: LoadedBundle<RankerManifest>,
  userIds: readonly string[],
): RankRequest {
  const { user, time, contextual, start, history, candidates } = plain(batch)[b]!
  const { schema } = manifest
  const item = 1 + schema.contextual.length
  const idOf = (f: number, number: number) => vocabularies[f]!.ids[number - 1]!
  return {
    user: userIds[user - 1]!,
    history: {
      items: history.map(row => idOf(item + row.series, row.item)),
      times: history.map(row => row.time),
      actions: history.map(row => (row.series === 0 ? row.actions : 0)),
      series: history.map(row => row.series),
      start,
    },
    candidates: candidates.map(row => idOf(item, row.item)),
    context: Object.fromEntries(
      schema.contextual.map((name, c) => [name, contextual[c] ? idOf(1 + c, contextual[c]!) : null]),
    ),
    time,
  }
}

describe('base rates of a bundle', () => {
  it.each(Object.entries(forms))('give a service the scores of the evaluation: %s', async (name, form) => {
    const { out, evaluated, trainer } = await exported(name, form)
    try {
      const bundle = (await readBundle(out)) as LoadedBundle<RankerManifest>
      const ids = Boolean(form.options!.idRates)
      expect(bundle.manifest.rates).toMatchObject({ ids })
      expect(bundle.vocabularies[0]?.size).toBe(ids || form.options!.userIds !== false ? 40 : undefined)
      const userIds = bundle.vocabularies[0]?.ids ?? Array.from({ length: 40 }, (_, n) => `${n}`)
      await using ranker = await Ranker.load(out, { device: 'cpu', maxHistory: 400, threads: 1 })
      let moved = 0
      for (let b = 3; b < batch.requests.length; b += 17) {
        const request = requestOf(b, bundle, userIds)
        const { scores } = await ranker.rank(request)
        for (const [task, wanted] of await evaluated(b))
          expect([task, Array.from(scores[task]!)]).toEqual([task, wanted])
        const stranger = await ranker.rank({ ...request, user: 'a stranger' })
        const same = JSON.stringify(stranger.scores) === JSON.stringify(scores)
        if (form.options!.userIds === false && !ids) expect(same).toBe(true)
        else moved += Number(!same)
      }
      if (ids) expect(moved).toBeGreaterThan(5)
    } finally {
      trainer.dispose()
    }
  })

  it('are refused where they are not those of the vocabularies, or of the tasks', async () => {
    const out = files.at('bundle rates of users and items')
    const { json, tensors, files: texts } = await loadCheckpoint(out)
    const groups = Object.fromEntries(Object.entries(tensors).map(([group, of]) => [group, Object.fromEntries(of!)]))
    const wrong = files.at('wrong')
    const refuse = async (change: Record<string, unknown>, message: RegExp, changed = groups) => {
      const shapes = Object.entries(changed).map(([group, of]) => [
        group,
        Object.fromEntries(Object.entries(of).map(([name, { dtype, shape }]) => [name, { dtype, shape }])),
      ])
      await saveCheckpoint(wrong, 0, {
        ...{ kind: 'bundle', tensors: changed, files: texts },
        json: { ...json, tensors: Object.fromEntries(shapes), ...change },
      })
      const load = async () => makeRates((await readBundle(wrong)) as LoadedBundle<RankerManifest>)
      await expect(load()).rejects.toMatchObject({
        code: 'ERR_HSTU_CHECKPOINT',
        message: expect.stringMatching(message),
      })
    }
    const { rates } = json as unknown as RankerManifest
    await refuse({ rates: undefined }, /json\.rates: expected null, or 3 pairs of positives and weight, found nothing/)
    await refuse({ rates: null }, /json\.rates\.ids: expected true with a group of rates alone/)
    await refuse({ rates: { ...rates, base: rates!.base.slice(1) } }, /json\.rates: expected null, or 3 pairs/)
    await refuse(
      {
        rates: {
          ...rates,
          base: [
            [1, 2],
            [3, 2],
            [0, 1],
          ],
        },
      },
      /json\.rates: expected null, or 3 pairs/,
    ) // more positives than weight
    await refuse(
      {
        rates: {
          ...rates,
          base: [
            [1, 2],
            [1, null],
            [0, 1],
          ],
        },
      },
      /json\.rates: expected null, or 3 pairs/,
    )
    await refuse({ rates: { ...rates, ids: false } }, /json\.rates\.ids: expected true with a group/)
    const { rates: _, ...without } = groups
    await refuse({}, /json\.rates\.ids: expected true with a group/, without as typeof groups)
    const short = { dtype: 'float64' as const, shape: [6], data: new Float64Array(6) }
    const few = { ...groups, rates: { ...groups.rates!, 'rates.items': short } }
    await refuse({}, /rates: the rates of items are not those of the records/, few as typeof groups)
    const none = { ...groups, rates: { 'rates.users': groups.rates!['rates.users']! } }
    await refuse({}, /rates: the rates of items are not those of the records/, none as typeof groups)
  })
})
