import { evalBatch, type FilterSeen } from '../data/batch.js'
import type { SequenceDataset } from '../data/dataset.js'
import { toDevice, toInputs } from '../data/inputs.js'
import { epochBatches, evaluableUsers, type SplitProtocol } from '../data/split.js'
import { HstuError } from '../errors.js'
import type { SequenceModel } from '../models/sequence_model.js'
import { embedding } from '../ops/embedding.js'
import { targetRank } from '../ops/target_rank.js'
import { scope } from '../tensor.js'
import { type Metrics, rankingMetrics } from './metrics.js'

export interface EvaluateOptions {
  /** 'valid' ranks the last action but one, 'test' (default) the last. */
  stage?: 'valid' | 'test'
  protocol?: SplitProtocol
  /** Which items are left out of the ranking: 'history' (default), 'all' or 'none'. */
  filterSeen?: FilterSeen
  /** Users to evaluate; default all that have a history. */
  users?: ArrayLike<number>
  batchSize?: number
  signal?: AbortSignal
  onProgress?: (done: number, total: number) => void
}

/** Lets timers, signals and I/O run between batches. */
export function breathe(): Promise<void> {
  return new Promise(resolve => setImmediate(resolve))
}

/**
 * Ranks each user's held-out action among all items (spec: leave-last-out, full corpus, score ties count against the model).
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT when a score is NaN, ERR_HSTU_DATA when no user can be evaluated, ERR_HSTU_ABORTED.
 */
export async function evaluate(
  model: SequenceModel,
  dataset: SequenceDataset,
  options: EvaluateOptions = {},
): Promise<Metrics> {
  const { stage = 'test', protocol = 'valid', filterSeen = 'history', batchSize = 128, signal, onProgress } = options
  const users = options.users ?? evaluableUsers(dataset, stage)
  const { maxLength } = model.config
  const items = model.itemEmbeddings()
  const ranks: number[] = []
  try {
    for (const part of epochBatches(users, batchSize)) {
      if (signal?.aborted) throw new HstuError('ERR_HSTU_ABORTED', 'evaluation was aborted', { cause: signal.reason })
      const batch = evalBatch(dataset, part, { maxLength, stage, protocol, filterSeen })
      scope(() => {
        const output = model.forward(toInputs(batch, model.options, model.config.numItems))
        const query = embedding(output, toDevice(batch.lastRows, model.options))
        const rank = targetRank(query, items, toDevice(batch.targetIds, model.options), {
          ...{
            excludeIds: toDevice(batch.excludeIds, model.options),
            excludeOffsets: toDevice(batch.excludeOffsets, model.options),
          },
        })
        for (const value of rank.dataSync()) ranks.push(Number(value))
      })
      onProgress?.(ranks.length, users.length)
      await breathe()
    }
  } finally {
    items.dispose()
  }
  if (ranks.length === 0)
    throw new HstuError('ERR_HSTU_DATA', `${dataset.name}: no user has a history to evaluate at stage '${stage}'`)
  if (ranks.includes(0)) {
    throw new HstuError(
      'ERR_HSTU_INVALID_ARGUMENT',
      `evaluation: ${ranks.filter(rank => rank === 0).length} users got NaN scores`,
    )
  }
  return rankingMetrics(ranks)
}
