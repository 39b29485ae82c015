import { vocabularyBases } from '../data/ranking/ranker_inputs.js'
import { HstuError } from '../errors.js'
import type { GenerativeRankerConfig } from '../models/generative_ranker.js'
import type { BaseRates } from './base_rates.js'
import { IdReader, idCount, idText } from './ids.js'
import type { WireRequest } from './request.js'
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

/** @throws HstuError ERR_HSTU_INVALID_ARGUMENT naming the first unknown id, where they are errors. */
export function encodeRequest(request: WireRequest, encoder: Encoder): EncodedRequest {
  const { config, vocabularies, unknownIds } = encoder
  // A base has nothing below 2^31 but what a dense table's rows take, and numbers stay below it: a row is low + number, and high.
  const bases = vocabularyBases(config).map(base => ({ low: Number(base & 0xffffffffn), high: Number(base >> 32n) }))
  const item = 1 + config.vocabulary.contextual.length
  let unknown = 0
  const unknownId = (id: string, where: string, vocabulary: string) => {
    unknown++
    if (unknownIds !== 'error') return
    throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', `request: ${where} ${id} is not in vocabulary '${vocabulary}'`)
  }
  const numberOf = (f: number, id: string | bigint, where: string): number => {
    const vocabulary = vocabularies[f]
    const number = vocabulary?.numberOf(id) ?? 0
    if (vocabulary && number === 0) unknownId(String(id), where, vocabulary.name)
    return number
  }
  const numberAt = (f: number, reader: IdReader, i: number, array: string): number => {
    const vocabulary = vocabularies[f]
    const number = vocabulary?.numberAt(reader, i) ?? 0
    if (vocabulary && number === 0) unknownId(idText(reader.ids, i), `${array}[${i}]`, vocabulary.name)
    return number
  }
  const { series, actions, context } = request
  const [items, candidates] = [new IdReader(request.items), new IdReader(request.candidates)]
  const [rows, M] = [series.length, idCount(request.candidates)]
  const interleave = config.fusion !== 'add'
  let acted = 0
  if (interleave) for (const s of series) acted += Number(s === 0)
  const h = item + rows + acted
  const columns = {
    content: new Words(h),
    actions: new Words(h),
    times: new Words(h),
  }
  const tokens = new Words(TOKEN_COLUMNS * h)
  const times = Words.of(request.times)
  let t = 0
  /** @param i history row whose time is the token's; -1: contextual */
  const token = (f: number, number: number, bits: number, i: number) => {
    const { low, high } = bases[f] ?? NONE
    tokens.put(TOKEN_COLUMNS * t, low + number, high)
    columns.content.put(t, low + number, high)
    tokens.put(TOKEN_COLUMNS * t + 1, bits, bits < 0 ? -1 : 0)
    columns.actions.put(t, bits, bits < 0 ? -1 : 0)
    if (i >= 0) {
      tokens.copy(TOKEN_COLUMNS * t + 2, times, i)
      columns.times.copy(t, times, i)
    }
    t++
  }
  const none = interleave ? -1 : 0
  // A model that knows no users may stand on their rates.
  const user = numberOf(0, request.user, 'user')
  token(0, config.vocabulary.users > 0 ? user : 0, none, -1)
  context.forEach((id, c) => {
    token(c + 1, id === null ? 0 : numberOf(c + 1, id, `context[${c}]`), none, -1)
  })
  for (let i = 0; i < rows; i++) {
    const s = series[i]!
    const bits = s === 0 ? actions[i]! : 0
    token(item + s, numberAt(item + s, items, i, 'history.items'), interleave ? -1 : bits, i)
    if (interleave && s === 0) token(-1, 0, bits, i)
  }
  const [targets, numbers] = [new Words(M), new Int32Array(M)]
  const { low, high } = bases[item]!
  for (let m = 0; m < M; m++) {
    numbers[m] = numberAt(item, candidates, m, 'candidates')
    targets.put(m, low + numbers[m]!, high)
  }
  return {
    ...{ history: tokens.values, start: request.start, unknown },
    ...{ content: columns.content.values, actions: columns.actions.values, times: columns.times.values },
    ...{ candidates: targets.values, base: encoder.rates?.of(user, numbers) ?? null },
    candidateTimes: new BigInt64Array(M).fill(request.time),
  }
}

/** Of a token without a row. */
const NONE = { low: -1, high: -1 }
