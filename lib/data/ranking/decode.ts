import { HstuError } from '../../errors.js'
import type { Chunk } from '../duckdb.js'
import {
  candidateValueColumn,
  historyValueColumn,
  REQUEST_COLUMNS,
  type RequestBatch,
  type RequestSchema,
} from './schema.js'

/** Columns of a shard in the order they are read, with their types. */
export function shardColumns(schema: RequestSchema): [string, string][] {
  const values = schema.values.flatMap(name => [historyValueColumn(name), candidateValueColumn(name)])
  return [...Object.entries(REQUEST_COLUMNS), ...values.map((name): [string, string] => [name, 'FLOAT[]'])]
}

type Numbers = Int32Array | BigInt64Array | Float32Array | Uint8Array

/** A list column: row r owns `items[entries[2 r]] ..`, `entries[2 r + 1]` of them. */
interface Lists {
  entries: BigUint64Array
  items: Numbers
}

/**
 * Rows of a chunk as a {@link RequestBatch} with arrays of its own.
 *
 * The typed arrays behind DuckDB's vectors are not in the package's types, but a value at a time costs ten times as much.
 *
 * @param expected number that the first row has to have
 * @param after time that no row may precede
 * @throws HstuError ERR_HSTU_DATA naming the record: lists of different lengths, records out of order, NULLs.
 */
export function decodeChunk(
  chunk: Chunk,
  schema: RequestSchema,
  where: string,
  expected: number,
  after: bigint,
): RequestBatch {
  const columns = shardColumns(schema)
  const B = chunk.rowCount
  const indexOf = new Map(columns.map(([name], k) => [name, k]))
  const vector = (name: string) => chunk.getColumnVector(indexOf.get(name)!) as unknown
  const fail = (row: number, message: string): never => {
    throw new HstuError('ERR_HSTU_DATA', `${where}: record ${expected + row}: ${message}`)
  }
  const flat = <A extends Numbers>(name: string): A => {
    const { items, validity } = vector(name) as { items: A; validity: { itemValid(row: number): boolean } }
    for (let row = 0; row < B; row++) if (!validity.itemValid(row)) fail(row, `${name} is missing`)
    return items.slice(0, B) as A
  }
  const lists = (name: string): Lists => {
    const { entryData, childData, validity } = vector(name) as {
      entryData: BigUint64Array
      childData: { items: Numbers }
      validity: { itemValid(row: number): boolean }
    }
    for (let row = 0; row < B; row++) if (!validity.itemValid(row)) fail(row, `${name} is missing`)
    return { entries: entryData, items: childData.items }
  }
  const offsetsOf = ({ entries }: Lists): BigInt64Array => {
    const offsets = new BigInt64Array(B + 1)
    for (let row = 0; row < B; row++) offsets[row + 1] = offsets[row]! + entries[2 * row + 1]!
    return offsets
  }
  const packed = <A extends Numbers>(name: string, offsets: BigInt64Array, make: new (length: number) => A): A => {
    const { entries, items } = lists(name)
    const to = new make(Number(offsets[B]!))
    for (let row = 0; row < B; row++) {
      const [from, count] = [Number(entries[2 * row]!), Number(entries[2 * row + 1]!)]
      const length = Number(offsets[row + 1]! - offsets[row]!)
      if (count !== length) fail(row, `${name} has ${count} entries, expected ${length}`)
      to.set(items.subarray(from, from + count) as never, Number(offsets[row]!))
    }
    return to
  }

  const history = offsetsOf(lists('history_item'))
  const candidates = offsetsOf(lists('candidate_item'))
  const C = schema.contextual.length
  const contextual = BigInt64Array.from({ length: B + 1 }, (_, row) => BigInt(row * C))
  const valuesOf = (column: (name: string) => string, offsets: BigInt64Array) =>
    Object.fromEntries(schema.values.map(name => [name, packed(column(name), offsets, Float32Array)]))
  const requestIndex = new BigInt64Array(Number(candidates[B]!))
  for (let row = 0; row < B; row++)
    requestIndex.fill(BigInt(row), Number(candidates[row]!), Number(candidates[row + 1]!))
  const ids = chunk.getColumnVector(indexOf.get('request_id')!)
  const batch: RequestBatch = {
    schema,
    requests: flat<Int32Array>('request'),
    requestIds: Array.from({ length: B }, (_, row) => String(ids.getItem(row) ?? fail(row, 'request_id is missing'))),
    users: flat<BigInt64Array>('user'),
    times: flat<BigInt64Array>('time'),
    contextual: packed('contextual', contextual, BigInt64Array),
    history: {
      offsets: history,
      items: packed('history_item', history, BigInt64Array),
      series: packed('history_series', history, Uint8Array),
      times: packed('history_time', history, BigInt64Array),
      actions: packed('history_action', history, Int32Array),
      taken: packed('history_taken', history, Int32Array),
      pending: packed('history_pending', history, Int32Array),
      requests: packed('history_request', history, Int32Array),
      values: valuesOf(historyValueColumn, history),
    },
    historyStart: flat<Int32Array>('history_start'),
    supervisedFrom: flat<Int32Array>('supervised_from'),
    candidates: {
      offsets: candidates,
      items: packed('candidate_item', candidates, BigInt64Array),
      requestIndex,
      actions: packed('candidate_action', candidates, Int32Array),
      taken: packed('candidate_taken', candidates, Int32Array),
      values: valuesOf(candidateValueColumn, candidates),
    },
  }
  checkOrder(batch, expected, after, fail)
  return batch
}

/** What no model may have to check: order of records and of times, candidates, sense of `supervisedFrom`. */
function checkOrder(
  batch: RequestBatch,
  expected: number,
  after: bigint,
  fail: (row: number, message: string) => never,
): void {
  const { history, candidates, requests, times, supervisedFrom } = batch
  let last = after
  for (let row = 0; row < requests.length; row++) {
    if (requests[row] !== expected + row) fail(row, `has the number ${requests[row]}`)
    if (times[row]! < last) fail(row, `time ${times[row]} is before that of the record in front, ${last}`)
    last = times[row]!
    if (candidates.offsets[row] === candidates.offsets[row + 1]) fail(row, 'has no candidates')
    const [first, end] = [Number(history.offsets[row]!), Number(history.offsets[row + 1]!)]
    for (let t = first; t < end; t++)
      if (history.times[t]! > last || (t > first && history.times[t]! < history.times[t - 1]!))
        fail(row, `history_time is not in order, or after the request, at entry ${t - first}`)
    if (supervisedFrom[row]! < 0 || supervisedFrom[row]! > end - first)
      fail(row, `supervised_from ${supervisedFrom[row]} is outside the history of ${end - first}`)
  }
}
