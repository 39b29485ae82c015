import { valueAndGrad } from '../autograd.js'
import { rankerBatch } from '../data/ranking/ranker_inputs.js'
import type { RequestBatch, TaskTargets } from '../data/ranking/schema.js'
import type { EmbeddingTable } from '../layers/embedding_table.js'
import type { GenerativeRanker } from '../models/generative_ranker.js'
import type { AdamW } from '../optim/adamw.js'
import type { Philox } from '../philox.js'
import { scope, type Tensor, type TypedArray } from '../tensor.js'

/** What a step reads and changes. */
export interface RankParts {
  model: GenerativeRanker
  optimizer: AdamW
  /** Rows of 'hash' embeddings. */
  table: EmbeddingTable | null
  philox: Philox
}

/**
 * Logits of the candidates, [M, K], as the parameters are at the call. Ids that have no row in a table yet get none: they read row 0.
 * @param targets of the candidates alone
 */
export function predict(
  { model, table }: RankParts,
  batch: RequestBatch,
  targets: TaskTargets,
): Promise<Float32Array | Float64Array> {
  return scope(() => {
    const { inputs } = rankerBatch(batch, targets, model.config, model.options)
    const logits = table ? model.forward(inputs, null, table.embed(table.lookup(inputs.ids))) : model.forward(inputs)
    return { data: logits.data() as Promise<Float32Array | Float64Array> }
  }).data
}

/** Puts one optimiser step on the device's queue. @returns its loss, once the device has come to it */
export function trainStep(
  { model, optimizer, table, philox }: RankParts,
  batch: RequestBatch,
  targets: TaskTargets,
  rates: { lr: number; tableLr: number },
): Promise<TypedArray> {
  return scope(() => {
    const { inputs, labels, weights } = rankerBatch(batch, targets, model.config, model.options)
    const rows = table?.lookup(inputs.ids, { insert: true })
    const embedded = rows && table!.embed(rows)
    const params: Record<string, Tensor> = embedded ? { ...model.parameters, embedded } : model.parameters
    const { value, grads } = valueAndGrad(params, () => {
      return model.loss(model.forward(inputs, philox, embedded), labels, weights).total
    })
    optimizer.step(grads, rates.lr)
    if (rows) table!.step(rows, grads.embedded!, rates.tableLr)
    return { data: value.data() }
  }).data
}
