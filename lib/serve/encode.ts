import { vocabularyBases } from '../data/ranking/ranker_inputs.js'
import { HstuError } from '../errors.js'
import type { GenerativeRankerConfig } from '../models/generative_ranker.js'
import type { WireIds, WireRequest } from './request.js'
import type { Vocabulary } from './vocabulary.js'

/** What an id that no vocabulary has becomes: an error, or the row that stands for unknown, which is counted. */
export type UnknownIds = 'error' | 'unknown-row'

/** Vocabularies in the order of `vocabularySizes`: user, contextual features, items, auxiliary series. Null: all ids are number 0. */
export interface Encoder {
  config: GenerativeRankerConfig
  vocabularies: readonly (Vocabulary | null)[]
  unknownIds: UnknownIds
}

/** Columns of `EncodedRequest.history`. */
export const TOKEN_COLUMNS = 3

/** A request as tokens. What a history's keys and values depend on is in `history`, and `start`, alone. */
export interface EncodedRequest {
  /** [h, 3] row-major: row of the table or key (-1: none), action bits (-1: none), seconds (0 for contextual tokens, which have no time). */
  history: BigInt64Array
  start: number
  /** [m] row of the table or key */
  candidates: BigInt64Array
  /** [m] seconds */
  times: BigInt64Array
  /** Ids that were not known. */
  unknown: number
}

/** h, tokens of the contextual features and the history. */
export function historyTokens({ history }: EncodedRequest): number {
  return history.length / TOKEN_COLUMNS
}

/** @throws HstuError ERR_HSTU_INVALID_ARGUMENT naming the first unknown id, where they are errors. */
export function encodeRequest(request: WireRequest, encoder: Encoder): EncodedRequest {
  const { config, vocabularies, unknownIds } = encoder
  const bases = vocabularyBases(config)
  const item = 1 + config.vocabulary.contextual.length
  let unknown = 0
  const rowOf = (f: number, id: string | bigint, name: () => string): bigint => {
    const vocabulary = vocabularies[f]
    if (!vocabulary) return bases[f]!
    const number = vocabulary.numberOf(id)
    if (number === 0) {
      unknown++
      if (unknownIds === 'error')
        throw new HstuError(
          'ERR_HSTU_INVALID_ARGUMENT',
          `request: ${name()} ${id} is not in vocabulary '${vocabulary.name}'`,
        )
    }
    return bases[f]! + BigInt(number)
  }
  const { items, series, actions, times, context } = request
  const interleave = config.fusion !== 'add'
  let tokens = item + items.length
  if (interleave) for (const s of series) tokens += Number(s === 0)
  const history = new BigInt64Array(TOKEN_COLUMNS * tokens)
  let at = 0
  const token = (row: bigint, action: bigint, time: bigint) => {
    history[at] = row
    history[at + 1] = action
    history[at + 2] = time
    at += TOKEN_COLUMNS
  }
  const none = interleave ? -1n : 0n
  token(
    rowOf(0, request.user, () => 'user'),
    none,
    0n,
  )
  context.forEach((id, c) => {
    token(id === null ? bases[c + 1]! : rowOf(c + 1, id, () => 'context'), none, 0n)
  })
  for (let i = 0; i < items.length; i++) {
    const row = rowOf(item + series[i]!, items[i]!, () => `history.items[${i}]`)
    const action = series[i] === 0 ? BigInt(actions[i]!) : 0n
    token(row, interleave ? -1n : action, times[i]!)
    if (interleave && series[i] === 0) token(-1n, action, times[i]!)
  }
  return {
    ...{ history, start: request.start, times: new BigInt64Array(request.candidates.length).fill(request.time) },
    candidates: candidateRows(request.candidates, id => rowOf(item, id, () => 'candidate')),
    unknown,
  }
}

function candidateRows(ids: WireIds, rowOf: (id: string | bigint) => bigint): BigInt64Array {
  const rows = new BigInt64Array(ids.length)
  for (let m = 0; m < rows.length; m++) rows[m] = rowOf(ids[m]!)
  return rows
}
