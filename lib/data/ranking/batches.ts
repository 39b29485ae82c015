import { check } from '../../errors.js'
import type { Random } from '../../random.js'
import { wordsOf } from '../words.js'
import type { CandidateRows, HistoryRows, RequestBatch } from './schema.js'

const rowsBetween = (offsets: BigInt64Array, from: number, to: number) => {
  const base = offsets[from]!
  const own = offsets.slice(from, to + 1)
  for (let b = 0; b < own.length; b++) own[b]! -= base
  return { own, first: Number(base), end: Number(offsets[to]!) }
}

type Jagged = HistoryRows | CandidateRows
type AnyArray = BigInt64Array | Int32Array | Uint8Array | Float32Array

/** Rows `first .. end` of every array but the offsets. */
function cut<R extends Jagged>(rows: R, own: BigInt64Array, first: number, end: number): R {
  const values = Object.entries(rows.values).map(([name, array]) => [name, array.slice(first, end)])
  const arrays = Object.entries(rows)
    .filter(([name]) => name !== 'offsets' && name !== 'values')
    .map(([name, array]) => [name, (array as AnyArray).slice(first, end)])
  return { ...Object.fromEntries(arrays), offsets: own, values: Object.fromEntries(values) } as R
}

/** Requests `from .. to - 1` of a batch, as a batch with arrays of its own. */
export function sliceBatch(batch: RequestBatch, from: number, to: number): RequestBatch {
  const B = batch.requests.length
  check(
    Number.isInteger(from) && Number.isInteger(to) && 0 <= from && from <= to && to <= B,
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `requests ${from} .. ${to} are not a range of a batch of ${B}`,
  )
  const C = batch.schema.contextual.length
  const history = rowsBetween(batch.history.offsets, from, to)
  const candidates = rowsBetween(batch.candidates.offsets, from, to)
  const rows = cut(batch.candidates, candidates.own, candidates.first, candidates.end)
  for (let m = 0; m < rows.requestIndex.length; m++) rows.requestIndex[m]! -= BigInt(from)
  return {
    schema: batch.schema,
    requests: batch.requests.slice(from, to),
    requestIds: batch.requestIds.slice(from, to),
    users: batch.users.slice(from, to),
    times: batch.times.slice(from, to),
    contextual: batch.contextual.slice(from * C, to * C),
    history: cut(batch.history, history.own, history.first, history.end),
    historyStart: batch.historyStart.slice(from, to),
    supervisedFrom: batch.supervisedFrom.slice(from, to),
    candidates: rows,
  }
}

function join<A extends AnyArray>(arrays: readonly A[]): A {
  const make = arrays[0]!.constructor as new (length: number) => A
  const all = new make(arrays.reduce((sum, array) => sum + array.length, 0))
  let at = 0
  for (const array of arrays) {
    all.set(array as never, at)
    at += array.length
  }
  return all
}

function joinOffsets(parts: readonly BigInt64Array[]): BigInt64Array {
  const all = new BigInt64Array(parts.reduce((sum, part) => sum + part.length - 1, 1))
  let at = 0
  for (const part of parts) {
    const base = all[at]!
    for (let b = 1; b < part.length; b++) all[++at] = base + part[b]!
  }
  return all
}

function joinRows<R extends Jagged>(parts: readonly R[]): R {
  const names = Object.keys(parts[0]!).filter(name => name !== 'offsets' && name !== 'values') as (keyof R)[]
  const arrays = names.map(name => [name, join(parts.map(part => part[name] as AnyArray))])
  const values = Object.keys(parts[0]!.values).map(name => [name, join(parts.map(part => part.values[name]!))])
  return {
    ...Object.fromEntries(arrays),
    offsets: joinOffsets(parts.map(part => part.offsets)),
    values: Object.fromEntries(values),
  } as R
}

/** The requests of several batches of one schema, in order. */
export function concatBatches(batches: readonly RequestBatch[]): RequestBatch {
  check(batches.length > 0, 'ERR_HSTU_INVALID_ARGUMENT', () => 'no batches to put together')
  if (batches.length === 1) return batches[0]!
  const candidates = joinRows(batches.map(batch => batch.candidates))
  let row = 0
  let base = 0
  for (const batch of batches) {
    for (let m = 0; m < batch.candidates.items.length; m++) candidates.requestIndex[row++]! += BigInt(base)
    base += batch.requests.length
  }
  return {
    schema: batches[0]!.schema,
    requests: join(batches.map(batch => batch.requests)),
    requestIds: batches.flatMap(batch => batch.requestIds),
    users: join(batches.map(batch => batch.users)),
    times: join(batches.map(batch => batch.times)),
    contextual: join(batches.map(batch => batch.contextual)),
    history: joinRows(batches.map(batch => batch.history)),
    historyStart: join(batches.map(batch => batch.historyStart)),
    supervisedFrom: join(batches.map(batch => batch.supervisedFrom)),
    candidates,
  }
}

/**
 * The batch as impression logs have it: one row, a request of one candidate, an impression. What request-only batches
 * are measured against.
 *
 * @returns the batch of M requests, and for each of them 1 / K of its request: the weight of its history's loss
 */
export function expandBatch(batch: RequestBatch): { batch: RequestBatch; historyWeight: Float64Array } {
  const { offsets, requestIndex } = batch.candidates
  const parts: RequestBatch[] = []
  const historyWeight = new Float64Array(requestIndex.length)
  for (let b = 0; b < batch.requests.length; b++) {
    const one = sliceBatch(batch, b, b + 1)
    const K = Number(offsets[b + 1]! - offsets[b]!)
    historyWeight.fill(1 / K, Number(offsets[b]!), Number(offsets[b + 1]!))
    for (let m = 0; m < K; m++) {
      const candidates = cut(one.candidates, BigInt64Array.of(0n, 1n), m, m + 1)
      parts.push({ ...one, candidates: { ...candidates, requestIndex: BigInt64Array.of(0n) } })
    }
  }
  return { batch: parts.length === 0 ? batch : concatBatches(parts), historyWeight }
}

function filtered<A extends AnyArray>(array: A, rows: Int32Array): A {
  const kept = new (array.constructor as new (length: number) => A)(rows.length)
  if (array instanceof Uint8Array) for (let t = 0; t < rows.length; t++) kept[t] = array[rows[t]!]!
  else if (array instanceof BigInt64Array) {
    const [from, to] = [wordsOf(array), wordsOf(kept as BigInt64Array)]
    for (let t = 0; t < rows.length; t++) {
      const row = rows[t]!
      to[2 * t] = from[2 * row]!
      to[2 * t + 1] = from[2 * row + 1]!
    }
  } else {
    const bits = (of: AnyArray) => new Int32Array(of.buffer, of.byteOffset, of.length) // NaN as it is
    const [from, to] = [bits(array), bits(kept)]
    for (let t = 0; t < rows.length; t++) to[t] = from[rows[t]!]!
  }
  return kept
}

/** The rows where `keep` is not 0, in order. */
export function keptRows(keep: ArrayLike<number>): Int32Array {
  const rows = new Int32Array(keep.length)
  let count = 0
  for (let t = 0; t < rows.length; t++) {
    rows[count] = t
    count += keep[t] ? 1 : 0
  }
  return rows.subarray(0, count)
}

/**
 * The batch with some rows of its histories: what Stochastic Length and a shorter maximum leave. Rows keep their order
 * and times; an item and its actions are one row, and go together.
 * @param keep [T] not 0 for the rows that stay
 */
export function selectHistory(batch: RequestBatch, keep: ArrayLike<number>): RequestBatch {
  const { offsets, values, ...arrays } = batch.history
  const T = batch.history.items.length
  check(keep.length === T, 'ERR_HSTU_INVALID_ARGUMENT', () => `keep has ${keep.length} entries for ${T} rows`)
  const B = batch.requests.length
  const rows = keptRows(keep)
  const own = new BigInt64Array(B + 1)
  const supervisedFrom = new Int32Array(B)
  const historyStart = batch.historyStart.slice()
  let count = 0
  for (let b = 0; b < B; b++) {
    const [first, end] = [Number(offsets[b]!), Number(offsets[b + 1]!)]
    const [start, supervised] = [count, first + batch.supervisedFrom[b]!]
    while (count < rows.length && rows[count]! < end) supervisedFrom[b]! += Number(rows[count++]! < supervised)
    if (count > start) historyStart[b]! += rows[start]! - first
    own[b + 1] = BigInt(count)
  }
  const all = (of: Record<string, AnyArray>) =>
    Object.fromEntries(Object.entries(of).map(([name, array]) => [name, filtered(array, rows)]))
  const history = { ...all(arrays), values: all(values), offsets: own } as HistoryRows
  return { ...batch, history, historyStart, supervisedFrom }
}

/**
 * The batch with some of its items unknown (number 0): candidates and rows of the main series, each with chance `share`.
 * @param randomOf generator of the draws for request b
 */
export function hideItems(batch: RequestBatch, share: number, randomOf: (b: number) => Random): RequestBatch {
  const hidden = ({ offsets, items }: Jagged, main: (row: number) => boolean, random: Random[]) => {
    const own = items.slice()
    random.forEach((draws, b) => {
      for (let row = Number(offsets[b]!); row < Number(offsets[b + 1]!); row++)
        if (draws.float() < share && main(row)) own[row] = 0n
    })
    return own
  }
  const { history, candidates } = batch
  const random = Array.from(batch.requests, (_, b) => randomOf(b))
  return {
    ...batch,
    history: { ...history, items: hidden(history, t => history.series[t] === 0, random) },
    candidates: { ...candidates, items: hidden(candidates, () => true, random) },
  }
}

/** The batch with at most the last `maxHistory` rows of every history; the batch itself where none has more. */
export function truncateHistory(batch: RequestBatch, maxHistory: number): RequestBatch {
  check(
    Number.isInteger(maxHistory) && maxHistory >= 0,
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `maxHistory must be an integer of at least 0, got ${maxHistory}`,
  )
  const { offsets, items } = batch.history
  const keep = new Uint8Array(items.length)
  let whole = true
  for (let b = 0; b < batch.requests.length; b++) {
    const [first, end] = [Number(offsets[b]!), Number(offsets[b + 1]!)]
    whole &&= end - first <= maxHistory
    keep.fill(1, Math.max(first, end - maxHistory), end)
  }
  return whole ? batch : selectHistory(batch, keep)
}
