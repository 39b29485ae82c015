// A small stream of request records, and what the tests of its trainer look at.
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { deserialize, serialize } from 'node:v8'
import { concatBatches, sliceBatch } from '#lib/data/ranking/batches.js'
import type { RequestManifest } from '#lib/data/ranking/manifest.js'
import { prepareRequests } from '#lib/data/ranking/prepare.js'
import { RequestReader } from '#lib/data/ranking/reader.js'
import type { RequestBatch } from '#lib/data/ranking/schema.js'
import { syntheticMapping, writeSyntheticLog } from '#lib/data/ranking/synthetic.js'
import type { RankEvent, RankTrainer, RankTrainerSetting } from '#lib/train/rank_trainer.js'
import { readAll } from '../data/ranking_requests.js'

export const setting: RankTrainerSetting = {
  model: {
    ...{ dim: 16, layers: 1, heads: 2, qkDim: 8, vDim: 8, scalingSeqLen: 64 },
    ...{ inputDropout: 0.1, linearDropout: 0.1 },
  },
  tasks: ['like = LIKE', 'share = SHARE', 'watch = watch'],
  taskWeights: { watch: 1e-4 },
  options: { batchSize: 8, maxHistory: 20, window: 200, windowEvery: 5, checkpointEvery: 3, seed: 5 },
}

/**
 * About 200 requests of 40 users with up to 5 candidates. Where HSTU_TEST_RECORDS names a file they come from it (it is written where there
 * is none): a host with a GPU and without DuckDB then runs the trainer's tests on records made elsewhere.
 */
export async function records(at: (name: string) => string): Promise<RequestReader> {
  const file = process.env.HSTU_TEST_RECORDS
  if (file && existsSync(file)) return inMemory(deserialize(readFileSync(file)) as Held)
  const log = at('log.csv')
  await writeSyntheticLog(log, { users: 40, items: 200, categories: 10, days: 8, candidates: 5, seed: 3 })
  await prepareRequests(syntheticMapping(log), { out: at('records') })
  const reader = await RequestReader.open(at('records'))
  if (!file) return reader
  const held: Held = { manifest: reader.manifest, all: concatBatches(await readAll(reader)) }
  writeFileSync(file, serialize(held))
  return inMemory(held)
}

interface Held {
  manifest: RequestManifest
  all: RequestBatch
}

/** A reader of requests that are held. */
function inMemory({ manifest, all }: Held): RequestReader {
  async function* batches({ batchSize, first = 0, end = manifest.requests }: Parameters<RequestReader['batches']>[0]) {
    for (let at = first; at < end; at += batchSize) yield sliceBatch(all, at, Math.min(at + batchSize, end))
  }
  return Object.assign(Object.create(RequestReader.prototype), { folder: 'memory', manifest, batches })
}

/** All events of a run, which is left at the event of step `stopAfter` as a kill leaves it: nothing is saved then. */
export async function events(trainer: RankTrainer, stopAfter = Infinity): Promise<RankEvent[]> {
  const list: RankEvent[] = []
  for await (const event of trainer.run()) {
    list.push(event)
    if (event.type === 'step' && event.step >= stopAfter) break
  }
  return list
}

/** Parameters, moments and table. */
export function bits({ model, optimizer, table }: RankTrainer) {
  const groups = [model.parameters, optimizer.m, optimizer.v, ...(table ? [table.state().tensors] : [])]
  return groups.flatMap(group => Object.entries(group).map(([name, tensor]) => [name, tensor.dataSync()] as const))
}

export const losses = (list: RankEvent[]) =>
  list.flatMap(event => (event.type === 'step' ? [[event.step, event.loss]] : []))

/** What a whole run ended with. */
export function done(list: RankEvent[]) {
  const event = list.at(-1)!
  if (event.type !== 'done') throw new Error(`the run ended with ${event.type}`)
  return { counted: event.counted, lifetime: event.lifetime }
}

/** The state but for the time that it took. */
export function stateOf({ state, sparsity, sampled }: RankTrainer) {
  const { seconds: _, ...rest } = state
  return { ...structuredClone(rest), sparsity, sampled }
}
