import { vocabularyBases } from '../data/ranking/ranker_inputs.js'
import { HstuError } from '../errors.js'
import type { GenerativeRankerConfig } from '../models/generative_ranker.js'
import type { BaseRates } from './base_rates.js'
import { idCount, idText, type WireIds } from './ids.js'
import { pageHashes } from './page_manager.js'
import type { WireHistory, WireRequest } from './request.js'
import type { Vocabulary } from './vocabulary.js'
import { Words } from './words.js'

/** What an id that no vocabulary has becomes: an error, or the row that stands for unknown, which is counted. */
export type UnknownIds = 'error' | 'unknown-row'

/** Vocabularies in the order of `vocabularySizes`: user, contextual features, items, auxiliary series. Null: all ids are number 0. */
export interface Encoder {
  config: GenerativeRankerConfig
  vocabularies: readonly (Vocabulary | null)[]
  unknownIds: UnknownIds
  /** What the logits stand on; null where they stand on nothing. */
  rates?: BaseRates | null
}

/** Columns of `EncodedRequest.history`. */
export const TOKEN_COLUMNS = 3

/** A request as tokens. What a history's keys and values depend on is in `history`, and `start`, alone. */
export interface EncodedRequest {
  /** [h, 3] row-major: row of the table or key (-1: none), action bits (-1: none), seconds (0 for contextual tokens, which have no time). */
  history: BigInt64Array
  start: number
  /** Of its pages, for the cache that finds them; left out where none does. */
  hashes?: BigUint64Array | undefined
  /** Its columns, [h] each. */
  content: BigInt64Array
  actions: BigInt64Array
  times: BigInt64Array
  /** [m] row of the table or key */
  candidates: BigInt64Array
  /** [m] seconds */
  candidateTimes: BigInt64Array
  /** [m, K] what is added to the candidates' logits; null for nothing. */
  base: Float32Array | null
  /** Ids that were not known. */
  unknown: number
}

/** h, tokens of the contextual features and the history. */
export function historyTokens({ times }: EncodedRequest): number {
  return times.length
}

/** The columns of a history's tokens. */
export type EncodedHistory = Pick<EncodedRequest, 'history' | 'content' | 'actions' | 'times' | 'hashes' | 'unknown'>

/** A history that was encoded, and what of. */
export interface KnownHistory {
  wire: WireHistory
  encoded: EncodedHistory
}

/** Numbers of ids; those that are unknown are counted, or an error. */
class Numbers {
  unknown = 0

  constructor(readonly encoder: Encoder) {}

  of(f: number, id: string | bigint, where: string): number {
    const number = this.encoder.vocabularies[f]?.numberOf(id) ?? 0
    if (number === 0) this.#missed(f, where, () => String(id))
    return number
  }

  /** Of the ids from `first` on, all of one vocabulary. */
  all(f: number, ids: WireIds, array: string, first = 0): Int32Array {
    const numbers = this.encoder.vocabularies[f]?.numbersOf(ids, first)
    if (!numbers) return new Int32Array(idCount(ids) - first)
    for (let i = 0; i < numbers.length; i++)
      if (numbers[i] === 0) this.#missed(f, `${array}[${i + first}]`, () => idText(ids, i + first))
    return numbers
  }

  #missed(f: number, where: string, id: () => string): void {
    const vocabulary = this.encoder.vocabularies[f]
    if (!vocabulary) return
    this.unknown++
    if (this.encoder.unknownIds !== 'error') return
    const message = `request: ${where} ${id()} is not in vocabulary '${vocabulary.name}'`
    throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', message)
  }
}

/** Numbers of a history's rows from `first` on, each of its series' vocabulary. */
function rowNumbers({ items, series }: WireRequest, item: number, first: number, numbers: Numbers): Int32Array {
  if (!series.some(s => s !== 0)) return numbers.all(item, items, 'history.items', first)
  return Int32Array.from(series.subarray(first), (s, i) =>
    numbers.of(item + s, idText(items, i + first), `history.items[${i + first}]`),
  )
}

// A base has nothing below 2^31 but what a dense table's rows take, and numbers stay below it: a row is low + number, and high.
const basesByConfig = new WeakMap<GenerativeRankerConfig, { low: number; high: number }[]>()
function basesOf(config: GenerativeRankerConfig): { low: number; high: number }[] {
  const known = basesByConfig.get(config)
  if (known) return known
  const made = vocabularyBases(config).map(base => ({ low: Number(base & 0xffffffffn), high: Number(base >> 32n) }))
  basesByConfig.set(config, made)
  return made
}

/**
 * The tokens of a request's history.
 * @param known a history of the same user in the same context that it begins with
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT naming the first unknown id, where they are errors
 */
export function encodeHistory(
  request: WireRequest,
  encoder: Encoder,
  known: KnownHistory | null = null,
): EncodedHistory {
  const { config } = encoder
  const { series, actions, context } = request
  const [bases, numbers] = [basesOf(config), new Numbers(encoder)]
  const [item, rows] = [1 + config.vocabulary.contextual.length, series.length]
  const interleave = config.fusion !== 'add'
  const first = known?.wire.series.length ?? 0
  if (known && first === rows) return known.encoded
  let acted = 0
  if (interleave) for (let i = first; i < rows; i++) acted += Number(series[i] === 0)
  let t = known ? known.encoded.times.length : 0
  const h = known ? t + rows - first + acted : item + rows + acted
  const [tokens, content, bitsOf, seconds] = [new Words(TOKEN_COLUMNS * h), new Words(h), new Words(h), new Words(h)]
  if (known) {
    const { encoded } = known
    numbers.unknown = encoded.unknown
    tokens.values.set(encoded.history)
    content.values.set(encoded.content)
    bitsOf.values.set(encoded.actions)
    seconds.values.set(encoded.times)
  }
  const times = Words.of(request.times)
  /** @param i history row whose time is the token's; -1: contextual */
  const token = (f: number, number: number, bits: number, i: number) => {
    const { low, high } = bases[f] ?? NONE
    tokens.put(TOKEN_COLUMNS * t, low + number, high)
    content.put(t, low + number, high)
    tokens.put(TOKEN_COLUMNS * t + 1, bits, bits < 0 ? -1 : 0)
    bitsOf.put(t, bits, bits < 0 ? -1 : 0)
    if (i >= 0) {
      tokens.copy(TOKEN_COLUMNS * t + 2, times, i)
      seconds.copy(t, times, i)
    }
    t++
  }
  const none = interleave ? -1 : 0
  if (!known) {
    token(0, config.vocabulary.users > 0 ? numbers.of(0, request.user, 'user') : 0, none, -1)
    context.forEach((id, c) => {
      token(c + 1, id === null ? 0 : numbers.of(c + 1, id, `context[${c}]`), none, -1)
    })
  }
  const own = rowNumbers(request, item, first, numbers)
  for (let i = first; i < rows; i++) {
    const s = series[i]!
    const bits = s === 0 ? actions[i]! : 0
    token(item + s, own[i - first]!, interleave ? -1 : bits, i)
    if (interleave && s === 0) token(-1, 0, bits, i)
  }
  return {
    history: tokens.values,
    content: content.values,
    actions: bitsOf.values,
    times: seconds.values,
    hashes: pageHashes(h, known?.encoded.hashes),
    unknown: numbers.unknown,
  }
}

/** @throws HstuError as {@link encodeHistory} */
export function encodeRequest(
  request: WireRequest,
  encoder: Encoder,
  history = encodeHistory(request, encoder),
): EncodedRequest {
  const { config, rates } = encoder
  const numbers = new Numbers(encoder)
  // A model that knows no users may stand on their rates.
  const user = numbers.of(0, request.user, 'user')
  if (config.vocabulary.users > 0) numbers.unknown = 0 // counted with the history
  const item = 1 + config.vocabulary.contextual.length
  const rows = numbers.all(item, request.candidates, 'candidates')
  const M = rows.length
  const targets = new Words(M)
  const { low, high } = basesOf(config)[item]!
  for (let m = 0; m < M; m++) targets.put(m, low + rows[m]!, high)
  return {
    history: history.history,
    start: request.start,
    hashes: history.hashes,
    content: history.content,
    actions: history.actions,
    times: history.times,
    unknown: history.unknown + numbers.unknown,
    candidates: targets.values,
    base: rates?.of(user, rows) ?? null,
    candidateTimes: new BigInt64Array(M).fill(request.time),
  }
}

/** Of a token without a row. */
const NONE = { low: -1, high: -1 }
