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
  if (interleave) for (const series of history.series) tokens += Number(series === 0)
  const layout: TokenLayout = {
    ...{ fusion, contextual, maxSeqLen: 0 },
    seqOffsets: new BigInt64Array(B + 1),
    numTargets: new Int32Array(B),
    source: new BigInt64Array(tokens),
    times: new BigInt64Array(tokens),
    historyTokens: new BigInt64Array(T),
    candidateTokens: new BigInt64Array(M),
  }
  const { source, times } = layout
  const sourceWords = new Int32Array(source.buffer) // low word, high word: no bigint a token
  const [historyRows, actionRows] = [B * contextual, B * contextual + T]
  const candidateRows = interleave ? actionRows + T : actionRows
  let n = 0
  const token = (row: number, time: bigint) => {
    sourceWords[2 * n] = row
    times[n] = time
    return BigInt(n++)
  }
  for (let b = 0; b < B; b++) {
    const start = n
    const now = batch.times[b]!
    for (let c = 0; c < contextual; c++) token(b * contextual + c, now)
    for (let t = Number(history.offsets[b]!); t < Number(history.offsets[b + 1]!); t++) {
      layout.historyTokens[t] = token(historyRows + t, history.times[t]!)
      if (interleave && history.series[t] === 0) token(actionRows + t, history.times[t]!)
    }
    const [first, end] = [Number(candidates.offsets[b]!), Number(candidates.offsets[b + 1]!)]
    for (let m = first; m < end; m++) layout.candidateTokens[m] = token(candidateRows + m, now)
    layout.numTargets[b] = end - first
    layout.seqOffsets[b + 1] = BigInt(n)
    layout.maxSeqLen = Math.max(layout.maxSeqLen, n - start)
  }
  return layout
}
