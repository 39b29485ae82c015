import { toDevice } from '../data/inputs.js'
import { type CachedHistory, takeRows } from '../layers/hstu_layer.js'
import type { CachedRankerInputs, GenerativeRanker } from '../models/generative_ranker.js'
import { kvAppend } from '../ops/kv_append.js'
import type { Tensor } from '../tensor.js'
import { type EncodedRequest, historyTokens } from './encode.js'
import { joined, Words } from './words.js'

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
  const offsets = new Words(lengths.length + 1)
  let sum = 0
  lengths.forEach((length, b) => {
    offsets.put(b + 1, (sum += length), 0)
  })
  return offsets.values
}

/** Where each token of a pass is among the rows, and below them the actions, and its index in the request. */
function layoutOf(parts: readonly Part[], ids: number, withPositions: boolean) {
  const N = parts.reduce((sum, { slot, from, first, end }) => sum + historyTokens(slot.request) - from + end - first, 0)
  const [source, positions] = [new Words(N), withPositions ? new Words(N) : null]
  let [n, row, action] = [0, 0, ids]
  for (const { slot, from, first, end } of parts) {
    const { rowsBefore, times } = slot.request
    const h = times.length
    if (rowsBefore) {
      for (let t = from; t < h; t++) source.put(n + t - from, rowsBefore[t + 1]! > rowsBefore[t]! ? row++ : action++, 0)
      source.count(n + h - from, row, end - first)
      row += end - first
    } else source.count(n, n, h - from + end - first)
    positions?.count(n, from, h - from)
    n += h - from
    for (let m = 0; m < end - first; m++) positions?.put(n + m, h, 0)
    n += end - first
  }
  return { source: source.values, positions: positions?.values ?? null }
}

/** The rows of the last layer: of each part the last row of its history, if that is fresh, then the candidates. */
function askedOf(parts: readonly Part[], fresh: readonly number[], counts: readonly number[]) {
  const withState = fresh.map(length => Number(length > 0))
  const offsets = offsetsOf(counts.map((count, b) => count + withState[b]!))
  const total = Number(offsets.at(-1)!)
  const [rows, predicted] = [new Words(total), new Words(total - withState.reduce((a, b) => a + b, 0))]
  let [n, r, p] = [0, 0, 0]
  counts.forEach((count, b) => {
    const state = withState[b]!
    rows.count(r, n + fresh[b]! - state, count + state)
    predicted.count(p, r + state, count)
    n += fresh[b]! + count
    r += count + state
    p += count
  })
  const times = parts.flatMap(({ slot: { request }, first, end }, b) => [
    request.times.subarray(request.times.length - withState[b]!),
    request.candidateTimes.subarray(first, end),
  ])
  return { rows: rows.values, offsets, predicted: predicted.values, queryTimes: joined(times) }
}

/** The tokens of a pass on the device, and a cache a layer; tensors belong to the current scope. @param pages of each layer */
export function assemblePass(parts: readonly Part[], model: GenerativeRanker, pages: readonly Tensor[]) {
  const { config, options } = model
  const tokens = parts.map(({ slot }) => historyTokens(slot.request))
  const fresh = parts.map(({ from }, b) => tokens[b]! - from)
  const counts = parts.map(partRows)
  const cached = parts.some(({ from }) => from > 0)
  const each = (of: (request: EncodedRequest, part: Part) => BigInt64Array[]) =>
    joined(parts.flatMap(part => of(part.slot.request, part)))
  const ids = each(({ rows, rowsBefore, candidates }, { from, first, end }) => [
    ...[rows.subarray(rowsBefore ? rowsBefore[from] : from), candidates.subarray(first, end)],
  ])
  const actions = each(({ actions, rowsBefore }, { from, first, end }) =>
    rowsBefore
      ? [actions.subarray(from - rowsBefore[from]!)]
      : [actions.subarray(from), new BigInt64Array(end - first).fill(-1n)],
  )
  const timesFrom = (whole: boolean) =>
    each(({ times, candidateTimes }, { from, first, end }) => [
      ...[times.subarray(whole ? 0 : from), candidateTimes.subarray(first, end)],
    ])
  const { source, positions } = layoutOf(parts, ids.length, Boolean(config.positions))
  const asked = askedOf(parts, fresh, counts)

  const device = (data: BigInt64Array | Int32Array) => toDevice(data, options)
  const paged = cached
    ? {
        ...pageTable(parts.map(({ from }) => from > 0)),
        kvLengths: device(Int32Array.from(parts, ({ from }) => from)),
        timeOffsets: device(offsetsOf(tokens.map((h, b) => h + counts[b]!))),
      }
    : null
  const queryTimes = device(timesFrom(false))
  const inputs: CachedRankerInputs = {
    seqOffsets: device(offsetsOf(fresh.map((length, b) => length + counts[b]!))),
    ...{ times: cached ? device(timesFrom(true)) : queryTimes, queryTimes },
    maxSeqLen: Math.max(...tokens.map((h, b) => h + counts[b]!)),
    ...{ numTargets: device(Int32Array.from(counts)), contextual: 1 + config.vocabulary.contextual.length },
    ...{ ids: device(ids), actions: device(actions), source: device(source) },
    positions: positions && device(positions),
    predicted: device(asked.predicted),
    states: device(asked.offsets.slice(0, -1)),
    groups: device(offsetsOf(counts)),
    asked: { rows: device(asked.rows), offsets: device(asked.offsets), queryTimes: device(asked.queryTimes) },
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
    const wantedRows = new Words(lengths.reduce((a, b) => a + b, 0))
    if (wantedRows.values.length === 0) return null
    let [first, row] = [0, 0]
    parts.forEach(({ from }, b) => {
      wantedRows.count(row, first + begins[b]! - from, lengths[b]!)
      row += lengths[b]!
      first += fresh[b]! + counts[b]!
    })
    const wanted = device(wantedRows.values)
    const seqOffsets = device(offsetsOf(lengths))
    const kvLengths = device(Int32Array.from(lengths, (length, b) => (length > 0 ? begins[b]! : 0)))
    const where = { ...pageTable(lengths.map(length => length > 0)), kvLengths }
    return (of: Tensor, k: Tensor, v: Tensor) =>
      kvAppend(takeRows(k, wanted), takeRows(v, wanted), { seqOffsets, paged: { pages: of, ...where } })
  }
}
