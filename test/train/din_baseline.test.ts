import { prepareRequests } from '#lib/data/ranking/prepare.js'
import { RequestReader } from '#lib/data/ranking/reader.js'
import { syntheticMapping, writeSyntheticLog } from '#lib/data/ranking/synthetic.js'
import { parseTasks, taskTargets } from '#lib/data/ranking/tasks.js'
import { memory } from '#lib/tensor.js'
import { evaluateDin } from '#lib/train/din_baseline.js'
import { scratch } from '../data/ranking_requests.js'

const files = scratch()

it('DIN learns from a stream, counts its last part once, and the same seed gives the same metrics', async () => {
  const log = files.at('log.csv')
  const { oracleNe } = await writeSyntheticLog(log, {
    ...{ users: 150, items: 60, categories: 5, days: 25, candidates: 5, seed: 3 },
  })
  await prepareRequests(syntheticMapping(log), { out: files.at('records') })
  const reader = await RequestReader.open(files.at('records'))
  const tasks = parseTasks(['like = LIKE', 'watch = watch'], reader.manifest.schema)
  const from = reader.at(0.8)
  const before = memory()
  const options = { from, dim: 16, batchSize: 8, lr: 1e-2, dropout: 0.1, maxHistory: 30 }
  const [one, ...others] = await evaluateDin(reader, tasks, options)
  expect(others).toEqual([]) // regression tasks have no baseline
  let weight = 0
  for await (const batch of reader.batches({ batchSize: 64, first: from }))
    weight += taskTargets(batch, tasks.slice(0, 1)).weights.reduce((sum, w) => sum + w, 0)
  expect(one).toMatchObject({ task: 'like', baseline: 'DIN, one pass', metrics: { weight } })
  expect(one!.metrics.ne).toBeGreaterThan(oracleNe)
  expect(one!.metrics.ne).toBeLessThan(0.98)
  expect(one!.metrics.auc).toBeGreaterThan(0.6)
  expect(await evaluateDin(reader, tasks, options)).toEqual([one])
  const [two] = await evaluateDin(reader, tasks, { ...options, passes: 2, end: from + 40 })
  expect(two!.baseline).toBe('DIN, 2 passes')
  expect(two!.metrics.weight).toBeLessThan(weight)
  expect(memory()).toEqual(before)
})
