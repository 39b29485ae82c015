import { valueAndGrad } from '../autograd.js'
import { type RankerBatch, rankerBatch } from '../data/ranking/ranker_inputs.js'
import type { RequestBatch, TaskTargets } from '../data/ranking/schema.js'
import { HstuError } from '../errors.js'
import type { EmbeddingTable } from '../layers/embedding_table.js'
import type { GenerativeRanker, RankerInputs } from '../models/generative_ranker.js'
import { add } from '../ops/add.js'
import type { AdamW } from '../optim/adamw.js'
import type { Philox } from '../philox.js'
import { scope, Tensor } from '../tensor.js'
import type { BaseLogits, Predicted, RankWork } from './rank_feed.js'

/** What a step reads and changes. */
export interface RankParts {
  model: GenerativeRanker
  optimizer: AdamW
  /** Rows of 'hash' embeddings. */
  table: EmbeddingTable | null
  philox: Philox
}

/** Logits of the candidates, [M, K]. */
export type Logits = Float32Array | Float64Array

/** A step that was put on the device's queue. Its values come once the device has come to them. */
export interface RankStepHandle {
  /** Rejects with ERR_HSTU_INVALID_ARGUMENT where it is not finite; null where nothing was learnt from. */
  loss: Promise<number> | null
  /** As the parameters were before the step; null where nothing was predicted. */
  logits: Promise<Logits> | null
}

/** Logits of the candidates of a batch, [M, K], as the parameters are at the call. */
export function predict(parts: RankParts, { batch, candidates, base }: Predicted): Promise<Logits> {
  const { config, options } = parts.model
  return scope(() => ({ logits: scores(parts, rankerBatch(batch, candidates, config, options).inputs, base) })).logits
}

/** Ids that have no row in a table yet get none: they read row 0. */
function scores({ model, table }: RankParts, inputs: RankerInputs, base: BaseLogits | null): Promise<Logits> {
  const read = () => {
    const logits = table ? model.forward(inputs, null, table.embed(table.lookup(inputs.ids))) : model.forward(inputs)
    return { logits: quiet(onTop(base, logits).data() as Promise<Logits>) }
  }
  return scope(read).logits
}

/** logits [R, K], whose last M rows are candidates, plus those that they are learnt on top of. */
function onTop(base: BaseLogits | null, logits: Tensor): Tensor {
  if (!base) return logits
  const { dtype, device, shape } = logits
  const { all, candidates } = base
  const rows = new Float64Array(logits.size).map((_, i) => all[i % all.length]!)
  rows.set(candidates, rows.length - candidates.length)
  return add(logits, Tensor.from(dtype === 'float64' ? rows : Float32Array.from(rows), shape, { device }))
}

/** Told to who awaits it. */
function quiet<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => {})
  return promise
}

/**
 * Puts step number `step` on the queue: predictions where `predicts`, then an optimiser step on what there is to learn from. Nothing waits
 * for the device, which runs the steps before while the host prepares this one.
 * @throws HstuError ERR_HSTU_OUT_OF_MEMORY naming the step and its size, and whatever an op throws.
 */
export function enqueueRankStep(
  parts: RankParts,
  { batch, candidates, base, learn }: RankWork,
  predicts: boolean,
  step: number,
  rates: { lr: number; tableLr: number },
): RankStepHandle {
  const { model, philox } = parts
  const { offset } = philox
  const batchOf = (requests: RequestBatch, targets: TaskTargets) =>
    rankerBatch(requests, targets, model.config, model.options)
  try {
    return scope(() => {
      const same = learn !== null && learn.batch === batch && learn.targets === candidates
      const whole = predicts || same ? batchOf(batch, candidates) : null
      const logits = predicts ? scores(parts, whole!.inputs, base) : null
      const loss = learn && train(parts, same ? whole! : batchOf(learn.batch, learn.targets), learn.base, rates)
      return { logits, loss: loss && quiet(loss.then(value => finite(value, step))) }
    })
  } catch (error) {
    philox.offset = offset
    if (!(error instanceof HstuError && error.code === 'ERR_HSTU_OUT_OF_MEMORY')) throw error
    const size = `${batch.requests.length} requests, ${batch.history.items.length} rows of history`
    const message = `step ${step} (${size}) was abandoned, no parameter has changed; lower batchSize or maxHistory: ${error.message}`
    throw new HstuError('ERR_HSTU_OUT_OF_MEMORY', message, { cause: error })
  }
}

function train(
  { model, optimizer, table, philox }: RankParts,
  { inputs, labels, weights }: RankerBatch,
  base: BaseLogits | null,
  { lr, tableLr }: { lr: number; tableLr: number },
): Promise<number> {
  const run = () => {
    const rows = table?.lookup(inputs.ids, { insert: true })
    const embedded = rows && table!.embed(rows)
    const params: Record<string, Tensor> = embedded ? { ...model.parameters, embedded } : model.parameters
    const { value, grads } = valueAndGrad(params, () => {
      return model.loss(onTop(base, model.forward(inputs, philox, embedded)), labels, weights).total
    })
    if (rows) table!.step(rows, grads.embedded!, tableLr) // first: the other one allocates nothing
    optimizer.step(grads, lr)
    return { loss: value.data().then(data => Number(data[0])) }
  }
  return scope(run).loss
}

function finite(loss: number, step: number): number {
  const advice = `loss became ${loss} at step ${step}: lower lr or set clipNorm`
  if (!Number.isFinite(loss)) throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', advice)
  return loss
}
