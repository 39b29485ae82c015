import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { inspectRequests } from '#lib/data/ranking/inspect.js'
import { prepareRequests } from '#lib/data/ranking/prepare.js'
import { rankingPreset, rankingPresetNames } from '#lib/data/ranking/presets.js'
import { RequestReader } from '#lib/data/ranking/reader.js'
import { syntheticMapping, writeSyntheticLog } from '#lib/data/ranking/synthetic.js'
import { parseTasks, taskTargets } from '#lib/data/ranking/tasks.js'
import { evaluateBaselines } from '#lib/eval/ranking_baselines.js'
import { expectError } from './files.js'
import { scratch } from './ranking_requests.js'

const { at } = scratch()
const real = process.env.HSTU_DATA ?? ''
const missing = (name: string) => {
  const absent = real === '' || !existsSync(join(real, name))
  if (absent) console.warn(`skipped: ${name}/ not found; set HSTU_DATA to the folder that has it`)
  return absent
}

async function baselines(reader: RequestReader, gaucBy: 'request' | 'user') {
  const tasks = parseTasks(reader.manifest.tasks, reader.manifest.schema)
  const report = await evaluateBaselines(reader.batches({ batchSize: 1024 }), tasks, { from: reader.at(0.8), gaucBy })
  return (task: string) =>
    report.filter(row => row.task === task).map(({ metrics }) => [metrics.ne, metrics.auc] as [number, number])
}
/** NE and AUC near what was measured elsewhere, with constants and smoothing of its own. */
const expectNear = (found: [number, number][], ne: number[], auc: number[], within = 0.02) => {
  found.forEach(([n, a], k) => {
    expect(Math.abs(n - ne[k]!), `NE ${n} of baseline ${k}, expected ${ne[k]}`).toBeLessThan(within)
    if (k > 0) expect(Math.abs(a - auc[k]!), `AUC ${a} of baseline ${k}, expected ${auc[k]}`).toBeLessThan(within)
  })
}

describe('ml-100k', { skip: missing('ml-100k') }, () => {
  it('has the records, rates and baselines that are known of it', async () => {
    const manifest = await prepareRequests(rankingPreset('ranking/ml-100k', join(real, 'ml-100k')), { out: at('ml') })
    expect(manifest).toMatchObject({ candidates: 100_000, requests: 49_439, sizes: { users: 943, items: 1682 } })
    const reader = await RequestReader.open(at('ml'))
    const report = await inspectRequests(reader)
    expect(report.tasks[0]!.rate).toBeCloseTo(0.554, 3)
    expect(report.tasks[0]!.lastRate).toBeCloseTo(0.566, 3)
    expect(report.pending).toBe(0)
    const ne = await baselines(reader, 'request')
    expectNear(
      ne('good').slice(0, 6),
      [1.001, 0.909, 0.871, 0.849, 0.848, 0.839],
      [0.5, 0.7, 0.739, 0.753, 0.753, 0.761],
    )
  })
})

describe('Deskdrop', { skip: missing('deskdrop') }, () => {
  it('has the records, rates and baselines that are known of it', async () => {
    const manifest = await prepareRequests(rankingPreset('ranking/deskdrop', join(real, 'deskdrop')), {
      out: at('desk'),
    })
    // Counted in the file: sessions with a view, and different (person, session, article) among views.
    expect(manifest).toMatchObject({
      ...{ requests: 28_516, candidates: 45_510, sizes: { users: 1895, items: 2987 } },
      counts: { rows: 72_312, duplicates: 2284, withoutCandidates: 224 },
    })
    const reader = await RequestReader.open(at('desk'))
    const ids = new Set<string>()
    let [like, weight] = [0, 0]
    const tasks = parseTasks(manifest.tasks, manifest.schema)
    for await (const batch of reader.batches({ batchSize: 4096 })) {
      for (const id of batch.requestIds) ids.add(id)
      const { labels, weights } = taskTargets(batch, tasks)
      for (let m = 0; m < batch.candidates.items.length; m++) {
        weight += weights[3 * m]!
        like += labels[3 * m]! * weights[3 * m]!
      }
    }
    expect(ids.size).toBe(28_516)
    expect([like, weight]).toEqual([5286, 44_351])
    const ne = await baselines(reader, 'user')
    expectNear(ne('like').slice(0, 1), [1.009], [0])
    // Additive logit, ids, ids + means, and with history and recency; by itself the history has no figure to compare with.
    const compared = (task: string) => ne(task).filter((_, k) => k > 1 && k !== 5)
    expectNear(compared('like'), [0.871, 0.884, 0.862, 0.843], [0, 0.747, 0.768, 0.785])
    expectNear(compared('any'), [0.897, 0.909, 0.889, 0.882], [0, 0.719, 0.738, 0.746], 0.03)
    expectNear(compared('bookmark'), [0.85, 0.872, 0.859, 0.849], [0, 0.763, 0.79, 0.797], 0.03)
  })
})

describe('presets', () => {
  it('know their names', () => {
    expect(rankingPresetNames).toEqual(['ranking/deskdrop', 'ranking/ml-100k'])
    expect(() => rankingPreset('ranking/other', '.')).toThrow(/unknown preset 'ranking\/other'.*ranking\/ml-100k/)
  })
})

describe('the synthetic stream', () => {
  it('grows, drifts, repeats exactly and has a best possible NE', async () => {
    const options = { users: 200, items: 400, categories: 20, days: 30, seed: 3 }
    const [a, b] = [at('a.csv'), at('b.csv')]
    const log = await writeSyntheticLog(a, options)
    expect(await writeSyntheticLog(b, options)).toEqual(log)
    expect(log.rows).toBeGreaterThan(30_000)
    const manifest = await prepareRequests(syntheticMapping(a), { out: at('syn') })
    expect(manifest).toMatchObject({ candidates: log.rows, requests: log.requests, sizes: { users: 200 } })
    const reader = await RequestReader.open(at('syn'))
    // Numbers go by first appearance, so the largest so far is the vocabulary so far.
    const grown: number[] = []
    const rates: number[] = []
    const like = manifest.schema.actions.indexOf('LIKE')
    let largest = 0
    for await (const { candidates } of reader.batches({ batchSize: Math.ceil(log.requests / 10) })) {
      let likes = 0
      for (let m = 0; m < candidates.items.length; m++) {
        largest = Math.max(largest, Number(candidates.items[m]!))
        likes += (candidates.actions[m]! >> like) & 1
      }
      grown.push(largest)
      rates.push(likes / candidates.items.length)
    }
    expect(grown.length).toBe(10)
    for (let k = 1; k < 10; k++) expect(grown[k]!).toBeGreaterThan(grown[k - 1]!)
    expect(Math.min(...rates)).toBeGreaterThan(0.15)
    const ne = await baselines(reader, 'request')
    const best = Math.min(...ne('like').map(([value]) => value))
    expect(log.oracleNe).toBeGreaterThan(0.5)
    expect(best).toBeLessThan(0.97)
    expect(log.oracleNe).toBeLessThan(best - 0.05)
  })
  it('refuses sizes that make no stream', async () => {
    await expectError(writeSyntheticLog(at('x.csv'), { users: 0 }), ['users', 'positive'], 'ERR_HSTU_INVALID_ARGUMENT')
    await expectError(writeSyntheticLog(at('x.csv'), { items: 10 }), ['items'], 'ERR_HSTU_INVALID_ARGUMENT')
    expect(existsSync(at('x.csv'))).toBe(false)
  })
})
