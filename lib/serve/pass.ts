import type { CachedHistory } from '../layers/hstu_layer.js'
import type { PassInputs, RankerInference } from '../models/ranker_inference.js'
import { kvAppend } from '../ops/kv_append.js'
import type { Tensor } from '../tensor.js'
import { type EncodedRequest, historyTokens } from './encode.js'
import { numberFields, PassMemory, type PassShape, type PassValues, places, wordFields } from './pass_memory.js'
import { Words } from './words.js'

export { PassMemory, type PassShape, type PassValues }

/** A request, and what of its history is in pages. */
export interface Slot {
  request: EncodedRequest
  /** Pages of the whole history, in order; null: none are kept, and the candidates must be one microbatch. */
  pages: Int32Array | null
  /** Leading tokens of the history that are read from the pages: all that they hold, but for the last one, whose output is wanted. */
  cached: number
  /** Leading tokens that the pages hold: those after them are written. */
  stored: number
}

/** Candidates `first .. end - 1` of a slot, with the history that is not in pages yet, or behind all of it. */
export interface Part {
  slot: Slot
  /** Of the slot among those that are scored together. */
  index: number
  from: number
  first: number
  end: number
}

/** Candidates of a part. */
export const partRows = ({ first, end }: Part) => end - first

const sum = <T>(list: readonly T[], of: (item: T) => number) => list.reduce((total, item) => total + of(item), 0)
const power = (n: number, least: number) => 2 ** Math.ceil(Math.log2(Math.max(n, least)))
const multiple = (n: number, of: number) => Math.ceil(n / of) * of

const freshOf = ({ slot, from }: Part) => historyTokens(slot.request) - from
const keysOf = ({ slot, first, end }: Part) => historyTokens(slot.request) + end - first
/** Tokens that are written to pages: the first of those that are fresh. */
const writtenOf = ({ slot, from }: Part) =>
  slot.pages ? Math.max(0, historyTokens(slot.request) - Math.max(slot.stored, from)) : 0
const pagesOf = (part: Part) => (part.from > 0 || writtenOf(part) > 0 ? part.slot.pages!.length : 0)

/** The shape of a pass as it is. */
export function shapeOf(parts: readonly Part[], inference: RankerInference): PassShape {
  const fresh = sum(parts, freshOf)
  const candidates = sum(parts, partRows)
  const made = (of: (request: EncodedRequest) => BigInt64Array, ofCandidates: boolean) =>
    (ofCandidates ? candidates : 0) + sum(parts, ({ slot, from }) => new Words(of(slot.request).subarray(from)).there())
  return {
    tokens: fresh + candidates,
    asked: candidates + sum(parts, part => Number(freshOf(part) > 0)),
    candidates,
    sequences: parts.length,
    keys: parts.some(({ from }) => from > 0) ? sum(parts, keysOf) : 0,
    pages: sum(parts, pagesOf),
    contentRows: inference.content ? 0 : made(request => request.content, true),
    actionRows: inference.actions ? 0 : made(request => request.actions, inference.model.config.fusion === 'add'),
    longest: parts.reduce((most, part) => Math.max(most, keysOf(part)), 0),
    first: fresh > 0,
    writes: parts.some(part => writtenOf(part) > 0),
  }
}

/**
 * A shape for many passes: sizes rounded up, and a last sequence, of targets alone, that has the tokens which nobody asked for. A row's bits
 * do not depend on what stands beside it.
 */
export function bucketOf(shape: PassShape): PassShape {
  const asked = multiple(shape.asked, 64)
  const least = shape.tokens + asked - shape.asked
  const tokens = shape.first ? multiple(least, least > 4096 ? 256 : least > 1024 ? 128 : 64) : asked
  const keys = shape.keys && power(shape.keys + tokens - shape.tokens, 1024)
  return {
    tokens,
    asked,
    candidates: asked,
    sequences: power(shape.sequences + 1, 2),
    keys,
    pages: shape.pages && power(shape.pages, 64),
    contentRows: shape.contentRows && tokens,
    actionRows: shape.actionRows && tokens,
    longest: Math.max(keys, tokens),
    first: shape.first,
    writes: shape.writes,
  }
}

/** The arrays of a pass in a shape that holds it. */
export function fillPass(
  parts: readonly Part[],
  shape: PassShape,
  inference: RankerInference,
  memory = new PassMemory(),
): PassValues {
  const { model } = inference
  const { words, numbers, of, views, counts: narrow } = memory.take(shape, Boolean(model.config.positions))
  const { seqOffsets, askedOffsets, groups, pageOffsets, timeOffsets, states, askedRows, predicted, positions } = views
  const { askedTimes, queryTimes, keyTimes, content, actions } = of
  const { numTargets, kvLengths, counts, pageTable } = narrow
  const pending = model.config.fusion !== 'add' ? -1n : inference.actions ? 1n << BigInt(model.config.actions) : PENDING
  let [n, r, m, k, p] = [0, 0, 0, 0, 0]
  const ends = (b: number) => {
    seqOffsets.put(b + 1, n, 0)
    askedOffsets.put(b + 1, r, 0)
    groups.put(b + 1, m, 0)
    pageOffsets.put(b + 1, p, 0)
    if (shape.keys) timeOffsets.put(b + 1, k, 0)
  }
  parts.forEach((part, b) => {
    const { slot, index, from, first, end } = part
    const { request } = slot
    const h = historyTokens(request)
    const [fresh, rows] = [h - from, end - first]
    const state = Number(fresh > 0)
    const times = request.candidateTimes.subarray(first, end)
    content.set(request.content.subarray(from), n)
    content.set(request.candidates.subarray(first, end), n + fresh)
    actions.set(request.actions.subarray(from), n)
    actions.fill(pending, n + fresh, n + fresh + rows)
    queryTimes.set(request.times.subarray(from), n)
    queryTimes.set(times, n + fresh)
    if (model.config.positions) {
      positions.count(n, from, fresh)
      for (let i = 0; i < rows; i++) positions.put(n + fresh + i, h, 0)
    }
    if (shape.keys) {
      keyTimes.set(request.times, k)
      keyTimes.set(times, k + h)
      k += h + rows
    }
    states.put(b, shape.first ? r : index, 0)
    askedRows.count(r, n + fresh - state, rows + state)
    askedTimes.set(request.times.subarray(h - state), r)
    askedTimes.set(times, r + state)
    predicted.count(m, r + state, rows)
    numTargets[b] = rows
    kvLengths[b] = from
    counts[b] = writtenOf(part)
    const pages = pagesOf(part)
    if (pages > 0) pageTable.set(slot.pages!, p)
    ;[n, r, m, p] = [n + fresh + rows, r + rows + state, m + rows, p + pages]
    ends(b)
  })
  // What is over: the last sequence's, as targets, of which the last ones are asked.
  const { tokens: N, asked: R, candidates: M, sequences: B } = shape
  for (let b = parts.length; b < B - 1; b++) ends(b)
  if (B > parts.length) {
    content.fill(-1n, n)
    actions.fill(-1n, n)
    askedRows.count(r, N - (R - r), R - r)
    numTargets[B - 1] = N - n
    if (shape.keys) keyTimes.fill(0n, k, (k += N - n))
    ;[n, r, m] = [N, R, M]
    ends(B - 1)
  }
  if (!inference.content) numberRows(content, of.contentFrom)
  if (!inference.actions) numberRows(actions, of.actionsFrom)
  return { words, used: words.length - keyTimes.length + k, numbers }
}

/** The actions of a candidate, where they are no row of a table. */
const PENDING = -2n

/** Puts what the tokens' rows are made from in their order into `from`, and into `ids` where each token's row is among them. */
function numberRows(ids: BigInt64Array, from: BigInt64Array): void {
  let row = 0
  for (let t = 0; t < ids.length; t++) {
    if (ids[t] === -1n) continue
    from[row] = ids[t] === PENDING ? -1n : ids[t]!
    ids[t] = BigInt(row++)
  }
}

/** The tensors of a pass as views of its two arrays on the device, and a cache a layer. @param pages of each layer */
export function bindPass(
  words: Tensor,
  numbers: Tensor,
  shape: PassShape,
  { model, content, actions }: RankerInference,
  pages: readonly Tensor[],
): { inputs: PassInputs; layers: CachedHistory[]; states: Tensor } {
  const wide = places(wordFields(shape, Boolean(model.config.positions)))
  const narrow = places(numberFields(shape))
  const of = (name: keyof typeof wide.of) => words.rows(...wide.of[name])
  const count = (name: keyof typeof narrow.of) => numbers.rows(...narrow.of[name])
  const [queryTimes, seqOffsets, states] = [of('queryTimes'), of('seqOffsets'), of('states')]
  const table = { pageTable: count('pageTable'), pageOffsets: of('pageOffsets'), kvLengths: count('kvLengths') }
  const paged = shape.keys > 0 ? { ...table, timeOffsets: of('timeOffsets') } : null
  const counts = count('counts')
  const [keys, values]: [Tensor[], Tensor[]] = [[], []]
  const layers = pages.map(own => ({
    paged: paged && { ...paged, pages: own },
    append: (k: Tensor, v: Tensor) => {
      // Written at once when the last layer's are there: no layer reads what this pass writes.
      if (shape.writes && keys.push(k) + values.push(v) === 2 * pages.length)
        kvAppend(keys, values, { seqOffsets, counts, paged: { ...table, pages } })
    },
  }))
  const inputs: PassInputs = {
    ...{ seqOffsets, queryTimes, times: shape.keys > 0 ? of('keyTimes') : queryTimes, maxSeqLen: shape.longest },
    ...{ numTargets: count('numTargets'), contextual: 1 + model.config.vocabulary.contextual.length },
    content: { ids: of('content'), from: content ? null : of('contentFrom') },
    actions: { ids: of('actions'), from: actions ? null : of('actionsFrom') },
    positions: model.config.positions ? of('positions') : null,
    asked: { rows: of('askedRows'), offsets: of('askedOffsets'), queryTimes: of('askedTimes') },
    ...{ predicted: of('predicted'), groups: of('groups'), states: shape.first ? states : null },
  }
  return { inputs, layers, states }
}
