import { toDevice } from '../data/inputs.js'
import { type CachedHistory, takeRows } from '../layers/hstu_layer.js'
import type { CachedRankerInputs, GenerativeRanker } from '../models/generative_ranker.js'
import { kvAppend } from '../ops/kv_append.js'
import type { Tensor } from '../tensor.js'
import { type EncodedRequest, historyTokens, TOKEN_COLUMNS } from './encode.js'

/** A request, and what of its history is in pages. */
export interface Slot {
  request: EncodedRequest
  /** Pages of the whole history, in order; null: none are kept, and the candidates must be one microbatch. */
  pages: Int32Array | null
  /** Leading tokens of the history that are read from the pages; less than all, for the last one's output is wanted. */
  cached: number
  /** Leading tokens that the pages hold, at least `cached`: those after them are written. */
  stored: number
}

/** Candidates `first .. end - 1` of a slot, with the history that is not in pages yet, or behind all of it. */
export interface Part {
  slot: Slot
  from: number
  first: number
  end: number
}

/** Candidates of a part. */
export const partRows = ({ first, end }: Part) => end - first

/** int64 offsets [B + 1] of lengths. */
function offsetsOf(lengths: readonly number[]): BigInt64Array {
  const offsets = new BigInt64Array(lengths.length + 1)
  lengths.forEach((length, b) => {
    offsets[b + 1] = offsets[b]! + BigInt(length)
  })
  return offsets
}

/** The tokens of a pass on the device, and a cache a layer; tensors belong to the current scope. @param pages of each layer */
export function assemblePass(parts: readonly Part[], model: GenerativeRanker, pages: readonly Tensor[]) {
  const { config, options } = model
  const tokens = parts.map(({ slot }) => historyTokens(slot.request))
  const fresh = parts.map(({ from }, b) => tokens[b]! - from)
  const counts = parts.map(partRows)
  const N = fresh.reduce((sum, length, b) => sum + length + counts[b]!, 0)
  const cached = parts.some(({ from }) => from > 0)
  const interleave = config.fusion !== 'add'

  const [source, queryTimes] = [new BigInt64Array(N), new BigInt64Array(N)]
  const keyTimes = cached ? new BigInt64Array(parts.reduce((sum, { from }) => sum + from, N)) : queryTimes
  const [ids, actions]: [bigint[], bigint[]] = [[], []]
  const positions = config.positions ? new BigInt64Array(N) : null
  const asked: bigint[] = []
  const actionTokens: number[] = []
  let [n, key] = [0, 0]
  const token = (id: bigint, action: bigint, time: bigint, position: number) => {
    if (!interleave) actions.push(action)
    else if (id < 0n) {
      source[n] = BigInt(actions.push(action) - 1)
      actionTokens.push(n)
    }
    if (id >= 0n) source[n] = BigInt(ids.push(id) - 1)
    queryTimes[n] = time
    if (positions) positions[n] = BigInt(position)
    if (cached) keyTimes[key++] = time
    n++
  }
  parts.forEach(({ slot: { request }, from, first, end }, b) => {
    const { history, candidates, times } = request
    const h = tokens[b]!
    if (cached) for (let t = 0; t < from; t++) keyTimes[key++] = history[TOKEN_COLUMNS * t + 2]!
    for (let t = from; t < h; t++) {
      const at = TOKEN_COLUMNS * t
      if (t === h - 1) asked.push(BigInt(n))
      token(history[at]!, history[at + 1]!, history[at + 2]!, t)
    }
    for (let m = first; m < end; m++) {
      asked.push(BigInt(n))
      token(candidates[m]!, -1n, times[m]!, h)
    }
  })
  // Action rows come below those of ids.
  for (const at of actionTokens) source[at]! += BigInt(ids.length)

  const device = (data: BigInt64Array | Int32Array) => toDevice(data, options)
  const withState = fresh.map(length => Number(length > 0))
  const askedOffsets = offsetsOf(counts.map((count, b) => count + withState[b]!))
  const predicted = counts.flatMap((count, b) => {
    const begin = Number(askedOffsets[b]!) + withState[b]!
    return Array.from({ length: count }, (_, m) => BigInt(begin + m))
  })
  const paged = cached
    ? {
        ...pageTable(parts.map(({ from }) => from > 0)),
        kvLengths: device(Int32Array.from(parts, ({ from }) => from)),
        timeOffsets: device(offsetsOf(tokens.map((h, b) => h + counts[b]!))),
      }
    : null
  const inputs: CachedRankerInputs = {
    seqOffsets: device(offsetsOf(fresh.map((length, b) => length + counts[b]!))),
    ...{ times: device(keyTimes), queryTimes: device(queryTimes) },
    maxSeqLen: Math.max(...tokens.map((h, b) => h + counts[b]!)),
    ...{ numTargets: device(Int32Array.from(counts)), contextual: 1 + config.vocabulary.contextual.length },
    ...{ ids: device(BigInt64Array.from(ids)), actions: device(BigInt64Array.from(actions)), source: device(source) },
    positions: positions && device(positions),
    predicted: device(BigInt64Array.from(predicted)),
    states: device(askedOffsets.slice(0, -1)),
    groups: device(offsetsOf(counts)),
    asked: {
      rows: device(BigInt64Array.from(asked)),
      offsets: device(askedOffsets),
      queryTimes: device(BigInt64Array.from(asked, row => queryTimes[Number(row)]!)),
    },
  }
  const append = appender()
  const layers: CachedHistory[] = pages.map(of => ({
    paged: paged && { ...paged, pages: of },
    append: (k, v) => append?.(of, k, v),
  }))
  return { inputs, layers }

  function pageTable(used: readonly boolean[]) {
    const lists = parts.map(({ slot }, b) => (used[b] && slot.pages) || new Int32Array(0))
    const offsets = offsetsOf(lists.map(list => list.length))
    const table = new Int32Array(Number(offsets.at(-1)!))
    lists.forEach((list, b) => void table.set(list, Number(offsets[b]!)))
    return { pageTable: device(table), pageOffsets: device(offsets) }
  }

  /** Writes what is new of histories that have pages; null where nothing is. */
  function appender() {
    const begins = parts.map(({ slot: { stored }, from }) => Math.max(stored, from))
    const lengths = parts.map(({ slot }, b) => (slot.pages ? Math.max(0, tokens[b]! - begins[b]!) : 0))
    const rows: bigint[] = []
    let first = 0
    parts.forEach(({ from }, b) => {
      for (let t = 0; t < lengths[b]!; t++) rows.push(BigInt(first + begins[b]! - from + t))
      first += fresh[b]! + counts[b]!
    })
    if (rows.length === 0) return null
    const wanted = device(BigInt64Array.from(rows))
    const seqOffsets = device(offsetsOf(lengths))
    const kvLengths = device(Int32Array.from(lengths, (length, b) => (length > 0 ? begins[b]! : 0)))
    const where = { ...pageTable(lengths.map(length => length > 0)), kvLengths }
    return (of: Tensor, k: Tensor, v: Tensor) =>
      kvAppend(takeRows(k, wanted), takeRows(v, wanted), { seqOffsets, paged: { pages: of, ...where } })
  }
}
