import { vocabularyBases } from '#lib/data/ranking/ranker_inputs.js'
import { EmbeddingTable } from '#lib/layers/embedding_table.js'
import { GenerativeRanker, type GenerativeRankerConfig, vocabularySizes } from '#lib/models/generative_ranker.js'
import type { ModelOptions } from '#lib/models/sequence_model.js'
import { Random } from '#lib/random.js'
import { type BundleSchema, type RankerManifest, writeBundle } from '#lib/serve/bundle.js'
import type { Encoder } from '#lib/serve/encode.js'
import { goldenRequest, trainingLogits } from '#lib/serve/golden.js'
import { checkRequest, type RankRequest, type WireRequest } from '#lib/serve/request.js'
import { Vocabulary } from '#lib/serve/vocabulary.js'
import { scope, Tensor } from '#lib/tensor.js'

export const schema: BundleSchema = { actions: ['LIKE', 'SHARE'], contextual: ['country'], series: ['language'] }
export const config: GenerativeRankerConfig = {
  vocabulary: { users: 20, items: 60, contextual: [4], series: [3] },
  actions: 2,
  tasks: [
    { name: 'like', kind: 'binary' },
    { name: 'watch', kind: 'regression' },
  ],
  ...{ dim: 12, layers: 3, heads: 2, qkDim: 4, vDim: 6, hidden: 10, actionDim: 3, scalingSeqLen: 64 },
  ...{ inputDropout: 0, linearDropout: 0 },
}
/** Every form of the model that changes what is cached, or how it is read. */
export const forms: Record<string, Partial<GenerativeRankerConfig>> = {
  interleaved: {},
  'concat, SiLU on u alone, positions': { concat: true, siluAll: false, positions: 700 },
  softmax: { activation: 'softmax' },
  'added, positions': { fusion: 'add', positions: 700 },
  'no bias, one layer': { positionBias: false, timeBias: false, layers: 1 },
  'wide heads': { heads: 1, qkDim: 16, vDim: 8 },
  'heads of 64': { layers: 2, heads: 2, qkDim: 64, vDim: 64 },
  'hash embeddings': { embeddings: 'hash' },
  'many actions, added': { actions: 12, fusion: 'add' },
  'contextual tokens see the history: cached within a request': { contextualFull: true },
}

const ids = (count: number, prefix = '') => Array.from({ length: count }, (_, k) => `${prefix}${k + 1}`)
export const vocabularyIds = [ids(20), ids(4, 'c'), ids(60), ids(3, 'l')]

/** A model whose parameters are large enough that every term matters, and what encodes its requests. */
export function stirred(form: Partial<GenerativeRankerConfig>, options: ModelOptions = {}) {
  const model = new GenerativeRanker({ ...config, ...form }, 3, options)
  const random = new Random(7)
  for (const tensor of Object.values(model.parameters)) {
    const data = tensor.dataSync() as Float32Array
    tensor.write(data.map(x => x + 0.3 * random.normal()))
  }
  const names = ['user', 'country', 'item', 'language']
  const vocabularies = vocabularyIds.map((list, f) => new Vocabulary(names[f]!, list))
  const encoder: Encoder = { config: model.config, vocabularies, unknownIds: 'unknown-row' }
  const actions = ids(model.config.actions, 'a')
  return {
    model,
    table: model.config.embeddings === 'hash' ? tableOf(model) : null,
    encoder,
    schema: { ...schema, actions },
  }
}

/** Rows of all ids that there are, unknown ones among them. */
function tableOf({ config, options }: GenerativeRanker): EmbeddingTable {
  const table = new EmbeddingTable({ dim: config.dim, seed: 11n }, options)
  const sizes = vocabularySizes(config)
  const keys = vocabularyBases(config).flatMap((base, f) =>
    Array.from({ length: sizes[f]! + 1 }, (_, n) => base + BigInt(n)),
  )
  scope(() => {
    const all = Tensor.from(BigInt64Array.from(keys), undefined, { device: options.device ?? 'cpu' })
    table.lookup(all, { insert: true })
  })
  return table
}

/** `rows` random rows of a history that follow those given. */
export function grow(random: Random, history: RankRequest['history'], rows: number): RankRequest['history'] {
  const items = [...(history.items as string[])]
  const times = [...(history.times as number[])]
  const actions = [...(history.actions as number[])]
  const series = [...(history.series as number[])]
  for (let k = 0; k < rows; k++) {
    const s = Number(random.float() < 0.2)
    items.push(s ? `l${1 + random.int(4)}` : String(1 + random.int(64))) // some unknown
    times.push((times.at(-1) ?? 1_000_000) + random.int(900))
    actions.push(s ? 0 : random.int(4))
    series.push(s)
  }
  return { items, times, actions, series, start: history.start ?? 0 }
}

export function randomRequest(random: Random, rows: number, candidates: number): RankRequest {
  const history = grow(random, { items: [], times: [], actions: [], series: [] }, rows)
  const last = (history.times as number[]).at(-1) ?? 1_000_000
  return {
    user: String(1 + random.int(22)),
    history,
    candidates: Array.from({ length: candidates }, () => String(1 + random.int(64))),
    context: random.int(3) > 0 ? { country: `c${1 + random.int(4)}` } : {},
    time: last + random.int(5000),
  }
}

export const limits = { ...schema, maxHistory: 1 << 20, maxCandidates: 1 << 20 }

export const wireOf = (request: RankRequest, maxHistory = limits.maxHistory): WireRequest =>
  checkRequest(request, { ...limits, maxHistory })

/** A bundle of a stirred model, as `hstu export` writes them. */
export async function writeTestBundle(folder: string, form: Partial<GenerativeRankerConfig> = {}, model = 'test-1') {
  const parts = stirred(form)
  try {
    const { config: architecture } = parts.model
    const request = goldenRequest(schema, vocabularyIds)
    const logits = Array.from(trainingLogits(parts, [wireOf(request)], parts.encoder, schema))
    await writeBundle<RankerManifest>(
      folder,
      {
        ...{
          type: 'ranker',
          model,
          architecture,
          precision: 'float32',
          schema,
          maxHistory: 100,
          table: null,
          rates: null,
        },
        golden: { request, logits },
      },
      { tensors: { model: parts.model.parameters }, vocabularies: vocabularyIds },
    )
  } finally {
    parts.model.dispose()
  }
}
