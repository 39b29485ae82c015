import { check, HstuError } from '../errors.js'
import { EmbeddingTable, type EmbeddingTableConfig, type EmbeddingTableState } from '../layers/embedding_table.js'
import { type Precision, precisions } from '../layers/precision.js'
import { type AnySequenceModel, createModel, type ModelSpec } from '../models/create.js'
import { GenerativeRanker, type GenerativeRankerConfig, vocabularySizes } from '../models/generative_ranker.js'
import type { ModelOptions } from '../models/sequence_model.js'
import type { Tensor, TensorOptions } from '../tensor.js'
import { assignTensors, type LoadedCheckpoint, loadCheckpoint, saveCheckpoint } from '../train/checkpoint.js'
import type { HostTensor } from '../train/safetensors.js'
import { BaseRates, type SavedRates } from './base_rates.js'
import type { RankRequest } from './request.js'
import { Vocabulary } from './vocabulary.js'

/** Version of the bundle's own fields; the checkpoint format around them has one too. */
export const BUNDLE_VERSION = 2

/** Names of what a ranker's requests speak of. */
export interface BundleSchema {
  actions: readonly string[]
  contextual: readonly string[]
  series: readonly string[]
}

/** `manifest.json`, field `json`, of a ranker's bundle. */
export interface RankerManifest {
  bundle: number
  type: 'ranker'
  /** Names this content: caches are keyed by it. */
  model: string
  architecture: GenerativeRankerConfig
  precision: Precision
  schema: BundleSchema
  /** Rows of a history in training. */
  maxHistory: number
  /** Of 'hash' embeddings. */
  table: { config: EmbeddingTableConfig; seed: string; state: EmbeddingTableState } | null
  /** What its logits stand on; null where they stand on nothing. */
  rates: SavedRates | null
  /** dtype and shape of each tensor of each safetensors file. */
  tensors: Record<string, Record<string, { dtype: string; shape: readonly number[] }>>
  /** A request and the logits [m, K] that this model gives it, with the rates, computed on the CPU in float32. */
  golden: { request: RankRequest; logits: number[] }
}

/** `manifest.json`, field `json`, of a retrieval model's bundle. */
export interface RetrieverManifest extends Pick<RankerManifest, 'bundle' | 'model' | 'precision' | 'tensors'> {
  type: 'retriever'
  architecture: ModelSpec
  /** The best items of a history, and their scores. */
  golden: { items: string[]; times: number[] | null; time: number; best: string[]; scores: number[] }
}

export type BundleManifest = RankerManifest | RetrieverManifest

/** What goes into a bundle beside its manifest. */
export interface BundleContent {
  tensors: Record<string, Record<string, Tensor | HostTensor>>
  /** External ids by vocabulary, null where a model has no ids; in the order of `vocabularySizes`, or the items alone. */
  vocabularies: readonly (readonly string[] | null)[]
}

/** A bundle that has been read and checked; nothing of it is on a device yet. */
export interface LoadedBundle<M extends BundleManifest = BundleManifest> {
  folder: string
  manifest: M
  tensors: LoadedCheckpoint['tensors']
  vocabularies: readonly (Vocabulary | null)[]
}

const KIND = 'bundle'
const vocabularyFile = (f: number) => `vocabulary-${f}.json`
const describe = ({ dtype, shape }: { dtype: string; shape: readonly number[] }) => ({ dtype, shape: [...shape] })

/**
 * Writes a bundle in place of the one in `folder`. It counts from one rename on: a crash or kill at any moment leaves the old one whole.
 * @throws HstuError ERR_HSTU_CHECKPOINT; also when `folder` holds a checkpoint that is no bundle.
 */
export async function writeBundle<M extends BundleManifest>(
  folder: string,
  manifest: Omit<M, 'bundle' | 'tensors'>,
  { tensors, vocabularies }: BundleContent,
): Promise<void> {
  const shapes = Object.entries(tensors).map(([group, of]) => [
    group,
    Object.fromEntries(Object.entries(of).map(([name, tensor]) => [name, describe(tensor)])),
  ])
  await saveCheckpoint(folder, 0, {
    kind: KIND,
    tensors,
    json: { bundle: BUNDLE_VERSION, ...manifest, tensors: Object.fromEntries(shapes) },
    files: Object.fromEntries(
      vocabularies.flatMap((ids, f) => (ids ? [[vocabularyFile(f), JSON.stringify(ids)]] : [])),
    ),
  })
}

/**
 * Reads a bundle: sizes and hashes of all files, then every field, before anything is returned.
 * @throws HstuError ERR_HSTU_CHECKPOINT naming file and field.
 */
export async function readBundle(folder: string): Promise<LoadedBundle> {
  const { kind, json, tensors, files } = await loadCheckpoint(folder)
  const where = `${folder}/manifest.json`
  const wants = (holds: boolean, field: string, wanted: string, found: unknown) =>
    check(holds, 'ERR_HSTU_CHECKPOINT', () => {
      const text = JSON.stringify(found) ?? 'nothing'
      return `${where}: ${field}: expected ${wanted}, found ${text.length > 80 ? `${text.slice(0, 80)}...` : text}`
    })
  wants(kind === KIND, 'kind', `'${KIND}' (hstu export makes one of a checkpoint)`, kind)
  const manifest = json as unknown as BundleManifest
  const isObject = (value: unknown) => typeof value === 'object' && value !== null && !Array.isArray(value)
  const { bundle, type, model, architecture, precision, golden } = manifest
  wants(bundle === BUNDLE_VERSION, 'json.bundle', `version ${BUNDLE_VERSION}`, bundle)
  wants(type === 'ranker' || type === 'retriever', 'json.type', "'ranker' or 'retriever'", type)
  wants(typeof model === 'string' && model !== '', 'json.model', 'a name', model)
  wants(precisions.includes(precision), 'json.precision', `one of ${precisions.join(', ')}`, precision)
  wants(isObject(architecture), 'json.architecture', 'an object', architecture)
  wants(isObject(golden), 'json.golden', 'an object', golden)
  wants(isObject(manifest.tensors), 'json.tensors', 'an object', manifest.tensors)
  const groups = Object.keys(tensors)
  wants(sameText(Object.keys(manifest.tensors), groups), 'json.tensors', `the groups ${groups}`, manifest.tensors)
  for (const group of groups) {
    const found = Object.fromEntries([...tensors[group]!].map(([name, tensor]) => [name, describe(tensor)]))
    for (const name of new Set([...Object.keys(found), ...Object.keys(manifest.tensors[group]!)])) {
      const said = manifest.tensors[group]![name]
      wants(sameText(said, found[name]), `json.tensors.${group}.${name}`, JSON.stringify(found[name]), said)
    }
  }
  const names = type === 'ranker' ? checkRanker(manifest as RankerManifest, wants) : ['items']
  const sizes = type === 'ranker' ? rankerSizes(manifest as RankerManifest, tensors) : [null]
  const vocabularies = names.map((name, f) => {
    const text = files[vocabularyFile(f)]
    if (text === undefined) {
      wants(sizes[f] === 0, `texts.${vocabularyFile(f)}`, `the vocabulary '${name}'`, undefined)
      return null
    }
    const vocabulary = new Vocabulary(name, parseIds(text, `${folder}/${vocabularyFile(f)}`))
    const size = sizes[f] ?? (architecture as ModelSpec).config?.numItems
    wants(vocabulary.size === size, `texts.${vocabularyFile(f)}`, `${size} ids of '${name}'`, vocabulary.size)
    return vocabulary
  })
  return { folder, manifest, tensors, vocabularies }
}

const sameText = (a: unknown, b: unknown) => JSON.stringify(a) === JSON.stringify(b)

/** A model that knows no users may stand on their rates: their ids are there for these. */
function rankerSizes({ architecture, rates }: RankerManifest, tensors: LoadedCheckpoint['tensors']): number[] {
  const [users, ...others] = vocabularySizes(architecture) as [number, ...number[]]
  const rated = rates?.ids ? tensors.rates?.get('rates.users')?.data.length : undefined
  return [users === 0 && rated ? rated / (2 * architecture.tasks.length) - 1 : users, ...others]
}

type Wants = (holds: boolean, field: string, wanted: string, found: unknown) => void

/** @returns names of the vocabularies */
function checkRanker(manifest: RankerManifest, wants: Wants): string[] {
  const { architecture, schema, maxHistory, golden, table, rates } = manifest
  const texts = (value: unknown): value is string[] => Array.isArray(value) && value.every(x => typeof x === 'string')
  for (const name of ['actions', 'contextual', 'series'] as const)
    wants(texts(schema?.[name]), `json.schema.${name}`, 'a list of names', schema?.[name])
  const { vocabulary, actions, tasks, embeddings } = architecture
  const lists = [vocabulary?.contextual, vocabulary?.series, tasks]
  wants(lists.every(Array.isArray), 'json.architecture', 'vocabulary and tasks', architecture)
  wants(schema.actions.length === actions, 'json.schema.actions', `${actions} names`, schema.actions)
  for (const name of ['contextual', 'series'] as const)
    wants(
      schema[name].length === vocabulary[name].length,
      ...([`json.schema.${name}`, `${vocabulary[name].length} names`, schema[name]] as const),
    )
  wants(Number.isSafeInteger(maxHistory) && maxHistory > 0, 'json.maxHistory', 'a count', maxHistory)
  wants((embeddings === 'hash') === Boolean(table?.config), 'json.table', "one with embeddings 'hash' alone", table)
  // Of a regression it is a sum of values.
  const rate = (own: unknown, k: number) =>
    Array.isArray(own) &&
    own.length === 2 &&
    own.every(Number.isFinite) &&
    own[1] >= 0 &&
    (tasks[k]!.kind !== 'binary' || (own[0] >= 0 && own[0] <= own[1]))
  const rated = rates && Array.isArray(rates.base) && rates.base.length === tasks.length && rates.base.every(rate)
  wants(rates === null || Boolean(rated), 'json.rates', `null, or ${tasks.length} pairs of positives and weight`, rates)
  wants(
    Boolean(rates?.ids) === Boolean(manifest.tensors.rates),
    'json.rates.ids',
    'true with a group of rates alone',
    rates,
  )
  const count = (golden.request?.candidates?.length ?? 0) * tasks.length
  const finite = Array.isArray(golden.logits) && golden.logits.every(Number.isFinite)
  wants(finite && count > 0 && golden.logits.length === count, 'json.golden.logits', `${count} numbers`, golden.logits)
  return ['user', ...schema.contextual, 'item', ...schema.series]
}

function parseIds(text: string, file: string): string[] {
  let ids: unknown
  try {
    ids = JSON.parse(text)
  } catch (cause) {
    throw new HstuError('ERR_HSTU_CHECKPOINT', `${file}: expected a JSON list of ids`, { cause })
  }
  check(Array.isArray(ids), 'ERR_HSTU_CHECKPOINT', () => `${file}: expected a JSON list of ids, found ${typeof ids}`)
  return ids as string[]
}

/** On the CPU a model computes in float32. */
function modelOptions({ precision }: BundleManifest, options: TensorOptions): ModelOptions {
  return { ...options, precision: (options.device ?? 'cpu') === 'cpu' ? 'float32' : precision }
}

/** What is wrong with a model's config is wrong with the bundle. */
function inBundle<T>(folder: string, make: () => T): T {
  try {
    return make()
  } catch (cause) {
    if (!(cause instanceof HstuError) || cause.code !== 'ERR_HSTU_INVALID_ARGUMENT') throw cause
    throw new HstuError('ERR_HSTU_CHECKPOINT', `${folder}/manifest.json: json.architecture: ${cause.message}`, {
      cause,
    })
  }
}

/** A ranker on a device, with its table of 'hash' embeddings. @throws HstuError ERR_HSTU_CHECKPOINT, ERR_HSTU_OUT_OF_MEMORY */
export function makeRanker(
  { folder, manifest, tensors }: LoadedBundle<RankerManifest>,
  options: TensorOptions = {},
): { model: GenerativeRanker; table: EmbeddingTable | null } {
  const { architecture, table: saved } = manifest
  const model = inBundle(folder, () => new GenerativeRanker(architecture, 0, modelOptions(manifest, options)))
  let table: EmbeddingTable | null = null
  try {
    assignTensors(model.parameters, tensors.model ?? new Map(), `${folder}: model`)
    if (saved) {
      table = inBundle(folder, () => new EmbeddingTable({ ...saved.config, seed: BigInt(saved.seed) }, options))
      table.restore(tensors.table ?? new Map(), saved.state)
    }
    return { model, table }
  } catch (error) {
    model.dispose()
    table?.dispose()
    throw error
  }
}

/** What the logits of a ranker stand on; null for nothing. @throws HstuError ERR_HSTU_CHECKPOINT */
export function makeRates({ folder, manifest, tensors, vocabularies }: LoadedBundle<RankerManifest>): BaseRates | null {
  const { rates, architecture, schema } = manifest
  if (!rates) return null
  const [users, items] = [vocabularies[0], vocabularies[1 + schema.contextual.length]].map(ids => ids?.size ?? 0)
  try {
    return new BaseRates(architecture.tasks, rates, tensors.rates, { users: users!, items: items! })
  } catch (cause) {
    if (!(cause instanceof HstuError)) throw cause
    throw new HstuError('ERR_HSTU_CHECKPOINT', `${folder}: rates: ${cause.message}`, { cause })
  }
}

/** A retrieval model on a device. @throws HstuError ERR_HSTU_CHECKPOINT, ERR_HSTU_OUT_OF_MEMORY */
export function makeRetrievalModel(
  { folder, manifest, tensors }: LoadedBundle<RetrieverManifest>,
  options: TensorOptions = {},
): AnySequenceModel {
  const model = inBundle(folder, () => createModel(manifest.architecture, 0, modelOptions(manifest, options)))
  try {
    assignTensors(model.parameters, tensors.model ?? new Map(), `${folder}: model`)
    return model
  } catch (error) {
    model.dispose()
    throw error
  }
}
