import { wordsOf } from '../words.js'
import type { RequestBatch } from './schema.js'

/**
 * How items and actions become tokens.
 *
 * - `'interleave'` (the paper's): x = item 0, actions 0, item 1, actions 1, ...; auxiliary rows are one token;
 * - `'add'`: one token a row, item and action embeddings added.
 */
export type ActionFusion = 'interleave' | 'add'

/**
 * Sequences of a {@link RequestBatch} as tokens, N in all. Request b owns tokens `seqOffsets[b] .. seqOffsets[b + 1]`:
 * its contextual tokens, its history, its candidates (item tokens alone).
 *
 * Token n is row `source[n]` of these, one below the other:
 *
 *     contextual [B C, d]   history [T, d]   actions [T, d]   candidates [M, d]        'interleave'
 *     contextual [B C, d]   history [T, d]                    candidates [M, d]        'add'
 */
export interface TokenLayout {
  fusion: ActionFusion
  /** C, leading tokens of every request */
  contextual: number
  /** [B + 1] */
  seqOffsets: BigInt64Array
  /** [B] K of each request */
  numTargets: Int32Array
  /** Most tokens that a request has. */
  maxSeqLen: number
  /** [N] */
  source: BigInt64Array
  /** [N] seconds: actions have their item's time, candidates and contextual tokens the request's */
  times: BigInt64Array
  /** [T] token of each history row's item: where generative training has its losses */
  historyTokens: BigInt64Array
  /** [M] token of each candidate */
  candidateTokens: BigInt64Array
}

/**
 * The tokens of a batch, in either layout.
 * @param contextual C, tokens in front; default one a contextual feature. More of them where the model makes some of its
 *   own, such as the user's: row b C + c of the contextual rows is token c of request b.
 */
export function tokenLayout(
  batch: RequestBatch,
  fusion: ActionFusion = 'interleave',
  contextual = batch.schema.contextual.length,
): TokenLayout {
  const { history, candidates } = batch
  const [B, T, M] = [batch.requests.length, history.items.length, candidates.items.length]
  const interleave = fusion === 'interleave'
  let tokens = B * contextual + T + M
  const { series } = history
  if (interleave) for (let t = 0; t < T; t++) tokens += Number(series[t] === 0)
  const layout: TokenLayout = {
    ...{ fusion, contextual, maxSeqLen: 0 },
    seqOffsets: new BigInt64Array(B + 1),
    numTargets: new Int32Array(B),
    source: new BigInt64Array(tokens),
    times: new BigInt64Array(tokens),
    historyTokens: new BigInt64Array(T),
    candidateTokens: new BigInt64Array(M),
  }
  const [source, times, historyTimes] = [wordsOf(layout.source), wordsOf(layout.times), wordsOf(history.times)]
  const [historyTokens, candidateTokens] = [wordsOf(layout.historyTokens), wordsOf(layout.candidateTokens)]
  const [historyRows, actionRows] = [B * contextual, B * contextual + T]
  const candidateRows = interleave ? actionRows + T : actionRows
  let n = 0
  for (let b = 0; b < B; b++) {
    const start = n
    const now = batch.times[b]!
    for (let c = 0; c < contextual; c++) source[2 * n++] = b * contextual + c
    layout.times.fill(now, start, n)
    for (let t = Number(history.offsets[b]!), last = Number(history.offsets[b + 1]!); t < last; t++) {
      const [low, high] = [historyTimes[2 * t]!, historyTimes[2 * t + 1]!]
      historyTokens[2 * t] = n
      source[2 * n] = historyRows + t
      times[2 * n] = low
      times[2 * n++ + 1] = high
      if (!interleave || series[t] !== 0) continue
      source[2 * n] = actionRows + t
      times[2 * n] = low
      times[2 * n++ + 1] = high
    }
    const [first, end] = [Number(candidates.offsets[b]!), Number(candidates.offsets[b + 1]!)]
    layout.times.fill(now, n, n + end - first)
    for (let m = first; m < end; m++) {
      candidateTokens[2 * m] = n
      source[2 * n++] = candidateRows + m
    }
    layout.numTargets[b] = end - first
    layout.seqOffsets[b + 1] = BigInt(n)
    layout.maxSeqLen = Math.max(layout.maxSeqLen, n - start)
  }
  return layout
}
