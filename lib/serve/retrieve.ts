import { toDevice, toInputs } from '../data/inputs.js'
import type { SequenceModel } from '../models/sequence_model.js'
import { embedding } from '../ops/embedding.js'
import { topK } from '../ops/top_k.js'
import { scope, type Tensor } from '../tensor.js'
import { joined } from './words.js'

/** A history of item numbers, 1 .. numItems, not empty, and when the user asks. */
export interface RetrievalRows {
  items: BigInt64Array
  /** Seconds; null for a model that was trained without times, for all requests alike. */
  times: BigInt64Array | null
  time: bigint
  /** Item numbers left out, each once; default those of the history. */
  exclude?: BigInt64Array
}

/** Item numbers, best first; fewer than k where fewer are left. */
export interface Retrieved {
  items: Int32Array
  scores: Float32Array
}

/**
 * The k items with the highest scores after each history, exactly: every item is scored, ties go to the smaller number.
 * @param table the model's `itemEmbeddings()`, where they are kept
 */
export function retrieve(
  model: SequenceModel,
  requests: readonly RetrievalRows[],
  k: number,
  table: Tensor | null = null,
): Retrieved[] {
  const { maxLength, numItems } = model.config
  const kept = requests.map(({ items, times, time, exclude }) => {
    const from = Math.max(0, items.length - maxLength)
    const [own, when] = [items.subarray(from), times?.subarray(from) ?? null]
    // A row asks when the next action happens; the last one when the user asks.
    const asks = when?.map((_, t) => when[t + 1] ?? time) ?? null
    return { own, when, asks, out: exclude ?? BigInt64Array.from(new Set(items)) }
  })
  const offsets = (lengths: number[]) => {
    let sum = 0n
    return BigInt64Array.from([0n, ...lengths.map(length => (sum += BigInt(length)))])
  }
  const timed = (arrays: (BigInt64Array | null)[]) => (arrays.includes(null) ? null : joined(arrays as BigInt64Array[]))
  const rows = offsets(kept.map(({ own }) => own.length))
  return scope(() => {
    const batch = {
      ...{ ids: joined(kept.map(({ own }) => own)), offsets: rows, times: timed(kept.map(({ when }) => when)) },
      queryTimes: timed(kept.map(({ asks }) => asks)),
      maxLength: Math.max(...kept.map(({ own }) => own.length)),
    }
    const output = model.forward(toInputs(batch, model.options, numItems))
    const last = toDevice(
      rows.slice(1).map(row => row - 1n),
      model.options,
    )
    const { scores, ids } = topK(embedding(output, last), table ?? model.itemEmbeddings(), Math.min(k, numItems), {
      excludeIds: toDevice(joined(kept.map(({ out }) => out)), model.options),
      excludeOffsets: toDevice(offsets(kept.map(({ out }) => out.length)), model.options),
    })
    const [score, id] = [scores.dataSync() as Float32Array, ids.dataSync() as BigInt64Array]
    const width = scores.shape[1]!
    return kept.map((_, b) => {
      const items = Int32Array.from(id.subarray(b * width, (b + 1) * width), Number)
      const count = items.indexOf(-1) < 0 ? width : items.indexOf(-1)
      return { items: items.slice(0, count), scores: score.slice(b * width, b * width + count) }
    })
  })
}
