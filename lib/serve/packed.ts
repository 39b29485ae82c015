import { textsIn, type WireIds } from './ids.js'
import type { WireRequest } from './request.js'

/** What crosses threads costs by its objects and their names: a request as one list, its arrays by their memory. */
export type PackedRequest = readonly [
  tenant: string,
  user: string | bigint,
  time: bigint,
  context: (string | bigint | null)[],
  start: number,
  rows: number,
  columns: ArrayBufferLike,
  items: ArrayBufferLike,
  itemTexts: number,
  candidates: ArrayBufferLike,
  candidateTexts: number,
]

const bufferOf = (ids: WireIds) => ('ends' in ids ? ids.ends : ids).buffer
/** How many texts; -1 where the ids are numbers. */
const textsOf = (ids: WireIds) => ('ends' in ids ? ids.ends.length : -1)

/** A request of `checkRequest`, whose arrays lie in memories of their own. */
export function packRequest({ tenant, user, time, context, start, times, items, candidates }: WireRequest): {
  packed: PackedRequest
  memories: ArrayBuffer[]
} {
  const [columns, item, candidate] = [times.buffer, bufferOf(items), bufferOf(candidates)]
  const [itemTexts, candidateTexts] = [textsOf(items), textsOf(candidates)]
  return {
    packed: [tenant, user, time, context, start, times.length, columns, item, itemTexts, candidate, candidateTexts],
    memories: [columns, item, candidate] as ArrayBuffer[],
  }
}

const idsIn = (memory: ArrayBufferLike, texts: number): WireIds =>
  texts < 0 ? new BigInt64Array(memory) : textsIn(memory, texts)

/** Of a row's time, actions and series. */
export const ROW_BYTES = 8 + 4 + 1

/** Times, actions and series of `rows` rows as they lie in a memory. */
export const columnsIn = (memory: ArrayBufferLike, rows: number) => ({
  times: new BigInt64Array(memory, 0, rows),
  actions: new Int32Array(memory, 8 * rows, rows),
  series: new Uint8Array(memory, 12 * rows, rows),
})

/** The request that was packed. */
export function unpackRequest(packed: PackedRequest): WireRequest {
  const [tenant, user, time, context, start, rows, columns, items, itemTexts, candidates, candidateTexts] = packed
  const { times, actions, series } = columnsIn(columns, rows)
  const [item, candidate] = [idsIn(items, itemTexts), idsIn(candidates, candidateTexts)]
  return { tenant, user, start, items: item, times, actions, series, candidates: candidate, context, time }
}
