import { concatBatches } from '../data/ranking/batches.js'
import { rankerBatch } from '../data/ranking/ranker_inputs.js'
import type { RequestBatch } from '../data/ranking/schema.js'
import type { EmbeddingTable } from '../layers/embedding_table.js'
import type { GenerativeRanker } from '../models/generative_ranker.js'
import { scope } from '../tensor.js'
import type { BundleSchema } from './bundle.js'
import type { Encoder } from './encode.js'
import { idCount, idText } from './ids.js'
import type { RankRequest, WireRequest } from './request.js'

/** A request as training reads it. */
function requestBatch(request: WireRequest, { config, vocabularies }: Encoder, schema: BundleSchema): RequestBatch {
  const { items, series, candidates, context } = request
  const [T, M, C] = [series.length, idCount(candidates), context.length]
  const numberOf = (f: number, id: string | bigint | null) =>
    BigInt(id === null ? 0 : (vocabularies[f]?.numberOf(id) ?? 0))
  const item = 1 + config.vocabulary.contextual.length
  const user = config.vocabulary.users > 0 ? numberOf(0, request.user) : 0n
  const zeros = { taken: new Int32Array(T), pending: new Int32Array(T), requests: new Int32Array(T).fill(-1) }
  return {
    schema: { ...schema, values: [] },
    ...{ requests: Int32Array.of(0), requestIds: [''], users: BigInt64Array.of(user) },
    times: BigInt64Array.of(request.time),
    contextual: BigInt64Array.from({ length: C }, (_, c) => numberOf(c + 1, context[c]!)),
    history: {
      offsets: BigInt64Array.of(0n, BigInt(T)),
      items: BigInt64Array.from({ length: T }, (_, t) => numberOf(item + series[t]!, idText(items, t))),
      ...{ series, times: request.times, values: {}, ...zeros },
      actions: request.actions.map((action, t) => (series[t] === 0 ? action : 0)),
    },
    ...{ historyStart: Int32Array.of(request.start), supervisedFrom: Int32Array.of(T) },
    candidates: {
      offsets: BigInt64Array.of(0n, BigInt(M)),
      items: BigInt64Array.from({ length: M }, (_, m) => numberOf(item, idText(candidates, m))),
      requestIndex: new BigInt64Array(M),
      ...{ actions: new Int32Array(M), taken: new Int32Array(M), values: {} },
    },
  }
}

/**
 * Logits [M, K] of all candidates of some requests, as training computes them: without cache and microbatches. What the serving path is
 * held against.
 */
export function trainingLogits(
  { model, table }: { model: GenerativeRanker; table: EmbeddingTable | null },
  requests: readonly WireRequest[],
  encoder: Encoder,
  schema: BundleSchema,
): Float32Array {
  return scope(() => {
    const batch = concatBatches(requests.map(request => requestBatch(request, encoder, schema)))
    const K = model.config.tasks.length
    const [rows, candidates] = [batch.history.items.length * K, batch.candidates.items.length * K]
    const none = { labels: new Float32Array(candidates), weights: new Float32Array(candidates) }
    const targets = { ...none, historyLabels: new Float32Array(rows), historyWeights: new Float32Array(rows) }
    const { inputs } = rankerBatch(batch, targets, model.config, model.options)
    const embedded = table ? [table.embed(table.lookup(inputs.ids))] : []
    return model.forward(inputs, null, ...embedded).dataSync() as Float32Array
  })
}

/** A request of ids that the vocabularies have, the same for the same vocabularies: no user's own history. */
export function goldenRequest(schema: BundleSchema, vocabularies: readonly (readonly string[] | null)[]): RankRequest {
  const some = (f: number, count: number) => {
    const ids = vocabularies[f] ?? []
    return Array.from({ length: Math.min(count, ids.length) }, (_, k) => ids[Math.floor((k * ids.length) / count)]!)
  }
  const item = 1 + schema.contextual.length
  const items = some(item, 24)
  return {
    user: vocabularies[0]?.[0] ?? '',
    history: {
      items,
      times: items.map((_, k) => 1_000_000 + 600 * k * k),
      actions: items.map((_, k) => k % 2 ** Math.min(schema.actions.length, 20)),
    },
    candidates: some(item, 8).reverse(),
    context: Object.fromEntries(schema.contextual.map((name, c) => [name, vocabularies[c + 1]?.[0] ?? null])),
    time: 2_000_000,
  }
}
