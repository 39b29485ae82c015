import { createHash, randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { sqlPath, withDatabase } from '../data/duckdb.js'
import { RequestReader } from '../data/ranking/reader.js'
import { check, HstuError } from '../errors.js'
import type { EmbeddingTableState } from '../layers/embedding_table.js'
import { vocabularySizes } from '../models/generative_ranker.js'
import { assignTensors, loadCheckpoint } from '../train/checkpoint.js'
import { loadModel } from '../train/model_checkpoint.js'
import type { RankFeedState } from '../train/rank_feed.js'
import { RankTrainer, type RankTrainerSetting } from '../train/rank_trainer.js'
import { fromCheckpoint } from '../train/state.js'
import { BaseRates, onTop, RATE_TENSORS } from './base_rates.js'
import { type BundleSchema, type RankerManifest, type RetrieverManifest, writeBundle } from './bundle.js'
import { encodeRequest } from './encode.js'
import { goldenRequest, trainingLogits } from './golden.js'
import { checkRequest } from './request.js'
import { retrieve } from './retrieve.js'
import { Vocabulary } from './vocabulary.js'

/** What `exportBundle` wrote. */
export interface ExportedBundle {
  folder: string
  type: 'ranker' | 'retriever'
  /** Names the content: training step and a random part. */
  model: string
}

const modelName = (step: number) => `${step}-${randomBytes(6).toString('hex')}`

/**
 * Writes what a service needs of a training run into `out`: parameters, vocabulary, and a golden request. An existing bundle there is
 * replaced as a whole. On the CPU, whatever the run was trained on.
 * @param run folder of a ranking run, or of a retrieval run or its `best/`
 * @param options.requests records that a ranking run was trained on; default those in its folder
 * @throws HstuError ERR_HSTU_CHECKPOINT, ERR_HSTU_DATA
 */
export async function exportBundle(
  run: string,
  out: string,
  options: { requests?: string } = {},
): Promise<ExportedBundle> {
  check(existsSync(run), 'ERR_HSTU_CHECKPOINT', () => `${run}: no such folder`)
  if (existsSync(join(run, 'best'))) return exportRetriever(join(run, 'best'), out)
  if (!existsSync(join(run, 'checkpoint'))) return exportRetriever(run, out)
  const own = join(run, 'requests')
  const folder = options.requests ?? (existsSync(own) ? own : null)
  check(folder !== null, 'ERR_HSTU_DATA', () => `${run} has no records of its own: name those that it was trained on`)
  return exportRanker(run, folder!, out)
}

/** What is read of a ranking run's checkpoint. */
interface SavedRanking {
  setting: RankTrainerSetting
  table: EmbeddingTableState | null
  feed: RankFeedState
  records: string
}

async function exportRanker(run: string, requests: string, out: string): Promise<ExportedBundle> {
  const reader = await RequestReader.open(requests)
  const checkpoint = await loadCheckpoint(join(run, 'checkpoint'))
  return fromCheckpoint(run, async () => {
    const { setting, table, feed, records } = checkpoint.json as unknown as SavedRanking
    const fail = (message: string) => new HstuError('ERR_HSTU_CHECKPOINT', `${run}: ${message}`)
    if (checkpoint.kind !== 'ranking') throw fail(`holds a '${checkpoint.kind}' checkpoint, not a ranking run's`)
    if (records !== createHash('sha256').update(JSON.stringify(reader.manifest)).digest('hex'))
      throw fail(`the run was trained on other records than those in ${requests}`)
    const { precision = 'float32', maxHistory = 256, seed = 0, idRates = false } = setting.options ?? {}
    // A trainer knows what model a setting makes; its optimiser is not read.
    const trainer = new RankTrainer(reader, {
      ...setting,
      ...{ options: { ...setting.options, precision: 'float32' }, tensors: { device: 'cpu' } },
    })
    try {
      assignTensors(trainer.model.parameters, checkpoint.tensors.model!, `${run}: model`)
      if (trainer.table) trainer.table.restore(checkpoint.tensors.table!, table!)
      const { actions, contextual, series } = reader.manifest.schema
      const schema: BundleSchema = { actions, contextual, series }
      const { config } = trainer.model
      const { sizes } = reader.manifest
      const own = vocabularySizes(config)
      const vocabularies = await readVocabularies(requests, schema, idRates ? [sizes.users, ...own.slice(1)] : own)
      const saved = feed.baseRates ? { base: feed.baseRates, ids: idRates } : null
      const rateTensors = idRates
        ? Object.fromEntries(RATE_TENSORS.map(name => [name, checkpoint.tensors.feed!.get(name)!]))
        : null
      const rates = saved && new BaseRates(config.tasks, saved, checkpoint.tensors.feed, sizes)
      const request = goldenRequest(schema, vocabularies)
      const encoder = {
        ...{ config, unknownIds: 'error' as const, rates },
        vocabularies: vocabularies.map((ids, f) => ids && new Vocabulary(`${f}`, ids)),
      }
      const limits = { ...schema, maxHistory, maxCandidates: Infinity }
      const wire = checkRequest(request, limits)
      const { base } = encodeRequest(wire, encoder)
      const logits = onTop(trainingLogits(trainer, [wire], encoder, schema), base)
      const model = modelName(checkpoint.step)
      const { seed: _, ...tableConfig } = trainer.table?.config ?? { dim: config.dim }
      await writeBundle<RankerManifest>(
        out,
        {
          ...{ type: 'ranker', model, architecture: config, precision, schema, maxHistory },
          table: trainer.table && { config: tableConfig, seed: String(seed), state: table! },
          rates: saved,
          golden: { request, logits: Array.from(logits) },
        },
        {
          tensors: {
            model: trainer.model.parameters,
            ...(trainer.table ? { table: trainer.table.state().tensors } : {}),
            ...(rateTensors ? { rates: rateTensors } : {}),
          },
          vocabularies,
        },
      )
      return { folder: out, type: 'ranker', model }
    } finally {
      trainer.dispose()
    }
  })
}

/** External ids of the records' vocabularies, in the order of `vocabularySizes`; null for a vocabulary of size 0. */
async function readVocabularies(
  folder: string,
  { contextual, series }: BundleSchema,
  sizes: readonly number[],
): Promise<(string[] | null)[]> {
  const names = ['users', ...contextual.map(c => `contextual-${c}`), 'items', ...series.map(s => `series-${s}`)]
  const all: (string[] | null)[] = []
  for (const [f, name] of names.entries()) {
    const path = join(folder, `vocabulary-${name}.parquet`)
    const ids = await withDatabase(path, undefined, database =>
      database.column(`SELECT id FROM read_parquet(${sqlPath(path)}) ORDER BY number`),
    )
    // `users: 0` is a model that knows no users.
    check(sizes[f] === 0 || ids.length === sizes[f], 'ERR_HSTU_DATA', () => {
      return `${path}: has ${ids.length} ids, the model ${sizes[f]}`
    })
    all.push(sizes[f] === 0 ? null : (ids as string[]))
  }
  return all
}

async function exportRetriever(folder: string, out: string): Promise<ExportedBundle> {
  const { model, spec, itemIds, step } = await loadModel(folder, { device: 'cpu' })
  try {
    const ids = itemIds.slice(1)
    const items = ids.filter((_, k) => k % Math.ceil(ids.length / Math.min(16, model.config.maxLength)) === 0)
    const times = items.map((_, k) => 1_000_000 + 3600 * k)
    const time = 2_000_000
    const rows = BigInt64Array.from(items, id => BigInt(itemIds.indexOf(id)))
    const [best] = retrieve(model, [{ items: rows, times: BigInt64Array.from(times, BigInt), time: BigInt(time) }], 10)
    const name = modelName(step)
    await writeBundle<RetrieverManifest>(
      out,
      {
        ...{ type: 'retriever', model: name, architecture: spec, precision: model.options.precision ?? 'float32' },
        golden: {
          ...{ items, times, time, best: Array.from(best!.items, item => itemIds[item]!) },
          scores: Array.from(best!.scores),
        },
      },
      { tensors: { model: model.parameters }, vocabularies: [ids] },
    )
    return { folder: out, type: 'retriever', model: name }
  } finally {
    model.dispose()
  }
}
