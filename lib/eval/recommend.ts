import { type FilterSeen, requestBatch } from '../data/batch.js'
import type { SequenceDataset } from '../data/dataset.js'
import { toDevice, toInputs } from '../data/inputs.js'
import { check } from '../errors.js'
import type { SequenceModel } from '../models/sequence_model.js'
import { embedding } from '../ops/embedding.js'
import { topK } from '../ops/top_k.js'
import { scope } from '../tensor.js'

export interface Recommendation {
  /** Internal item id, 1 .. numItems. */
  item: number
  /** External id, as in the file. */
  itemId: string
  /** Cosine of the user's and the item's vector. */
  score: number
}

/**
 * The `k` best next items of each user after their last action.
 * @param options.queryTimes seconds at which each user asks; default the time of the last action
 * @param options.filterSeen items left out: 'history' (default), 'all', 'none'
 * @returns one list a user, best first; shorter than k where fewer items are left
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT for an unknown user or a `k` below 1.
 */
export function recommend(
  model: SequenceModel,
  dataset: SequenceDataset,
  users: ArrayLike<number>,
  options: { k?: number; queryTimes?: ArrayLike<number | bigint>; filterSeen?: FilterSeen } = {},
): Recommendation[][] {
  const { k = 10, ...rest } = options
  check(
    Number.isInteger(k) && k >= 1,
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `recommend: k must be a positive integer, got ${k}`,
  )
  const batch = requestBatch(dataset, users, { maxLength: model.config.maxLength, ...rest })
  return scope(() => {
    const output = model.forward(toInputs(batch, model.options, model.config.numItems))
    const query = embedding(output, toDevice(batch.lastRows, model.options))
    const { scores, ids } = topK(query, model.itemEmbeddings(), Math.min(k, dataset.numItems), {
      ...{
        excludeIds: toDevice(batch.excludeIds, model.options),
        excludeOffsets: toDevice(batch.excludeOffsets, model.options),
      },
    })
    const [score, id] = [scores.dataSync(), ids.dataSync()]
    const width = scores.shape[1]!
    return Array.from({ length: batch.users.length }, (_, b) => {
      const list: Recommendation[] = []
      for (let n = b * width; n < (b + 1) * width; n++) {
        const item = Number(id[n])
        if (item > 0) list.push({ item, itemId: dataset.itemIds[item]!, score: Number(score[n]) })
      }
      return list
    })
  })
}
