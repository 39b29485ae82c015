// What is wrong with records, ids or a folder ends a run with a typed error that names it, or is counted; a run never ends half-written.
import { cpSync, readdirSync, readFileSync, truncateSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeAll, describe, expect, it, vi } from 'vitest'
import { valueAndGrad } from '#lib/autograd.js'
import { selectHistory, sliceBatch } from '#lib/data/ranking/batches.js'
import { rankerBatch } from '#lib/data/ranking/ranker_inputs.js'
import { RequestReader } from '#lib/data/ranking/reader.js'
import type { RequestBatch } from '#lib/data/ranking/schema.js'
import { parseTasks, taskTargets } from '#lib/data/ranking/tasks.js'
import { HstuError } from '#lib/errors.js'
import { GenerativeRanker, type GenerativeRankerConfig } from '#lib/models/generative_ranker.js'
import { Random } from '#lib/random.js'
import { scope } from '#lib/tensor.js'
import { loadCheckpoint, saveCheckpoint } from '#lib/train/checkpoint.js'
import { RankTrainer, type RankTrainerSetting } from '#lib/train/rank_trainer.js'
import { scratch } from '../data/ranking_requests.js'
import { randomRequests } from '../models/requests.js'
import { bits, done, events, losses, records, setting } from './rank_stream.js'

const files = scratch()
let reader: RequestReader
beforeAll(async () => {
  reader = await records(files.at)
})
afterEach(() => void vi.restoreAllMocks())

const make = (change: Partial<RankTrainerSetting> = {}, of = reader) => new RankTrainer(of, { ...setting, ...change })
const typed = (code: string, message: RegExp) =>
  expect.objectContaining({ code, message: expect.stringMatching(message) })

describe('records that are damaged', () => {
  it('end a run that goes on with the shard named; its checkpoint stays, and goes on once they are repaired', async () => {
    const whole = make()
    const expected = await events(whole)
    const folder = files.at('run')
    cpSync(files.at('records'), files.at('copy'), { recursive: true })
    const copy = await RequestReader.open(files.at('copy'))
    const killed = make({ folder }, copy)
    await events(killed, 8)
    const shard = files.at(join('copy', readdirSync(files.at('copy')).find(name => name.startsWith('requests-'))!))
    truncateSync(shard, readFileSync(shard).length >> 1)
    await expect(RequestReader.open(files.at('copy'))).rejects.toThrow(
      typed('ERR_HSTU_DATA', /shard requests-00000.parquet has \d+ bytes of \d+: it was cut off or changed/),
    )
    // The reader was there before the damage.
    const failed = await RankTrainer.resume(folder, copy)
    await expect(events(failed)).rejects.toThrow(typed('ERR_HSTU_DATA', /requests-00000.parquet/))
    expect((await loadCheckpoint(join(folder, 'checkpoint'))).step).toBe(6)
    cpSync(files.at('records'), files.at('copy'), { recursive: true })
    const repaired = await RankTrainer.resume(folder, copy)
    const list = await events(repaired)
    expect(losses(list)).toEqual(losses(expected).slice(6))
    expect(done(list)).toEqual(done(expected))
    expect(bits(repaired)).toEqual(bits(whole))
    for (const trainer of [whole, killed, failed, repaired]) trainer.dispose()
  })

  it.each([0, 2])('are told after the steps before them, lag %i', async lag => {
    const { batches } = reader
    vi.spyOn(reader, 'batches').mockImplementation(async function* (this: RequestReader, options) {
      let left = 5
      for await (const batch of batches.call(reader, options)) {
        if (left-- === 0) throw new HstuError('ERR_HSTU_DATA', 'requests-00000.parquet: record 40 is damaged')
        yield batch
      }
    })
    const folder = files.at(`damaged ${lag}`)
    const trainer = Object.assign(make({ folder }), { lag })
    const steps: number[] = []
    const run = async () => {
      for await (const event of trainer.run()) if (event.type === 'step') steps.push(event.step)
    }
    await expect(run()).rejects.toThrow(typed('ERR_HSTU_DATA', /record 40 is damaged/))
    expect(steps).toEqual([1, 2, 3, 4, 5])
    expect((await loadCheckpoint(join(folder, 'checkpoint'))).step).toBe(3)
    trainer.dispose()
  })
})

describe('a vocabulary that overflows its bound', () => {
  const hash = { ...setting.model, embeddings: 'hash' } as const
  const bounded = (whenFull: 'error' | 'evict' | 'skip', tableRows = 160) =>
    make({
      model: hash,
      folder: files.at(whenFull),
      options: { ...setting.options, batchSize: 4, whenFull, tableRows },
    })

  it('is an error that leaves the last checkpoint', async () => {
    const trainer = bounded('error')
    const message = /EmbeddingTable: \d+ new keys, but \d+ of maxRows 160 are free; raise maxRows or set whenFull/
    await expect(events(trainer)).rejects.toThrow(typed('ERR_HSTU_INVALID_ARGUMENT', message))
    const { step } = await loadCheckpoint(join(files.at('error'), 'checkpoint'))
    expect(step).toBe(3 * Math.floor(trainer.state.step / 3))
    trainer.dispose()
    const again = await RankTrainer.resume(files.at('error'), reader)
    await expect(events(again)).rejects.toThrow(message)
    again.dispose()
  })

  it('or counted: ids evicted, ids without a row', async () => {
    const [evicting, skipping] = [bounded('evict'), bounded('skip')]
    for (const trainer of [evicting, skipping]) {
      expect(done(await events(trainer)).lifetime.like!.weight).toBeGreaterThan(500)
      expect(trainer.table!.rows).toBe(160)
    }
    expect([evicting.table!.evicted > 0, evicting.table!.skipped]).toEqual([true, 0])
    expect([skipping.table!.evicted, skipping.table!.skipped > 0]).toEqual([0, true])
    for (const trainer of [evicting, skipping]) trainer.dispose()
    const tiny = bounded('evict', 5)
    await expect(events(tiny)).rejects.toThrow(/one lookup has \d+ keys more than the 5 rows of maxRows hold/)
    tiny.dispose()
  })
})

describe('a checkpoint that is damaged', () => {
  it('is refused, file and reason named', async () => {
    const folder = files.at('checked')
    const trainer = make({ folder })
    await events(trainer, 4)
    trainer.dispose()
    const at = join(folder, 'checkpoint')
    const { kind, step, json, tensors } = await loadCheckpoint(at)
    const groups = Object.fromEntries(Object.entries(tensors).map(([name, map]) => [name, Object.fromEntries(map)]))
    const refused = async (change: object, message: RegExp) => {
      await saveCheckpoint(at, step, { kind, tensors: groups, json, ...change })
      await expect(RankTrainer.resume(folder, reader)).rejects.toThrow(typed('ERR_HSTU_CHECKPOINT', message))
    }
    await refused({ json: { ...json, metrics: null } }, /checked: the manifest does not hold what it should/)
    await refused({ json: { ...json, feed: null } }, /what was learnt from is not told as the options need it/)
    await refused({ json: { ...json, records: 'others' } }, /trained on other records than those in/)
    await refused({ kind: 'training' }, /holds a 'training' checkpoint, not a ranking run's/)
    await refused({ tensors: { ...groups, model: {} } }, /model: the tensors do not fit/)
    await saveCheckpoint(at, step, { kind, tensors: groups, json })
    ;(await RankTrainer.resume(folder, reader)).dispose()
    const counted = readdirSync(at).find(name => name.startsWith('counted-'))!
    truncateSync(join(at, counted), readFileSync(join(at, counted)).length - 1)
    await expect(RankTrainer.resume(folder, reader)).rejects.toThrow(typed('ERR_HSTU_CHECKPOINT', /counted-/))
  })
})

describe('batches that no reader gives', () => {
  const batch = randomRequests(new Random(4), {
    ...{ histories: [5, 3, 8], candidates: [2, 0, 3], items: 20, users: 4 },
  })
  const tasks = parseTasks(['like = LIKE', 'watch = watch'], batch.schema)
  const config: GenerativeRankerConfig = {
    vocabulary: { users: 4, items: 20, contextual: [4], series: [3] },
    actions: 2,
    tasks: tasks.map(({ name, kind }) => ({ name, kind })),
    ...{ dim: 8, layers: 1, heads: 2, qkDim: 4, vDim: 4, scalingSeqLen: 32, inputDropout: 0, linearDropout: 0 },
  }
  const run = (requests: RequestBatch, change: Partial<GenerativeRankerConfig> = {}) => {
    const model = new GenerativeRanker({ ...config, ...change }, 1)
    try {
      return scope(() => {
        const { inputs, labels, weights } = rankerBatch(requests, taskTargets(requests, tasks), model.config)
        if (change.embeddings === 'hash') return { logits: [] as number[], loss: 0, norm: 0 }
        const logits = Array.from(model.forward(inputs).dataSync(), Number)
        const { value, grads } = valueAndGrad(model.parameters, () => {
          return model.loss(model.forward(inputs), labels, weights).total
        })
        const norm = Math.hypot(...Object.values(grads).flatMap(grad => Array.from(grad.dataSync(), Number)))
        return { logits, loss: value.item(), norm }
      })
    } finally {
      model.dispose()
    }
  }

  it('a request without candidates has no logits and changes no other', () => {
    const others = [sliceBatch(batch, 0, 1), sliceBatch(batch, 2, 3)].flatMap(one => run(one).logits)
    expect(run(batch).logits).toEqual(others)
    const none = run(sliceBatch(batch, 1, 2))
    expect(none).toEqual({ logits: [], loss: 0, norm: 0 })
    expect(run(sliceBatch(batch, 0, 0))).toEqual({ logits: [], loss: 0, norm: 0 })
    const bare = selectHistory(batch, new Uint8Array(16))
    expect(run(bare).logits.every(Number.isFinite)).toBe(true)
  })

  it('numbers, actions and series that the model does not have are named', () => {
    const data = (requests: RequestBatch, message: RegExp, change: Partial<GenerativeRankerConfig> = {}) =>
      expect(() => run(requests, change)).toThrow(typed('ERR_HSTU_DATA', message))
    const { history, candidates } = batch
    const items = (value: bigint) => ({
      ...batch,
      candidates: { ...candidates, items: candidates.items.with(1, value) },
    })
    data(items(21n), /item number 21 is not in the model's 0 \.\. 20/)
    data(items(-1n), /item number -1 is not in the model's 0 \.\. 20/)
    data(items(1n << 56n), /item number 72057594037927936 is not in .* 72057594037927935/, { embeddings: 'hash' })
    data({ ...batch, users: batch.users.with(0, 9n) }, /user number 9 is not in the model's 0 \.\. 4/)
    data({ ...batch, contextual: batch.contextual.with(2, 5n) }, /country number 5 is not in/)
    const actions = history.actions.with(3, 4)
    data({ ...batch, history: { ...history, actions } }, /history row 3 has action bits 4, the model 2 actions/)
    const series = history.series.with(0, 2)
    data({ ...batch, history: { ...history, series } }, /a history row is of series 2, the records have 1/)
  })
})
