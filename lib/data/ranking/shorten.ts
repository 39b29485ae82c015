import type { Random } from '../../random.js'
import { type LengthCounts, newLengthCounts, type StochasticLength } from '../stochastic_length.js'
import { keptRows, selectHistory } from './batches.js'
import type { RequestBatch, TaskTargets } from './schema.js'
import type { ActionFusion } from './sequence.js'

/**
 * Histories as Stochastic Length leaves them: an item and its actions stay or go together, in order and with their times; positions are
 * those among what stays. Of a history that is cut, rows with a loss go last.
 * @param randomOf generator of the draws for request b
 */
export function shortenHistories(
  batch: RequestBatch,
  targets: TaskTargets,
  lengths: StochasticLength,
  fusion: ActionFusion,
  randomOf: (b: number) => Random,
): { batch: RequestBatch; targets: TaskTargets; counts: LengthCounts } {
  const { offsets, times, series } = batch.history
  const T = times.length
  const K = T === 0 ? 0 : targets.historyWeights.length / T
  const wanted = new Uint8Array(T)
  const { historyLabels, historyWeights } = targets
  for (let t = 0, at = 0; t < T; t++) for (let k = 0; k < K; k++) if (historyWeights[at++]! > 0) wanted[t] = 1
  const tokens = new Uint8Array(T).fill(1)
  if (fusion === 'interleave') for (let t = 0; t < T; t++) if (series[t] === 0) tokens[t] = 2
  const keep = new Uint8Array(T).fill(1)
  const counts = newLengthCounts()
  for (let b = 0; b < batch.requests.length; b++) {
    const [first, end] = [Number(offsets[b]!), Number(offsets[b + 1]!)]
    const rows = { times: times.subarray(first, end), tokens: tokens.subarray(first, end) }
    const chosen = lengths.choose({ ...rows, wanted: wanted.subarray(first, end) }, randomOf(b))
    if (chosen) keep.set(chosen, first)
    let [before, after, labels] = [0, 0, 0]
    for (let t = first; t < end; t++) {
      const stays = keep[t]!
      before += tokens[t]!
      after += stays * tokens[t]!
      labels += wanted[t]! * (1 - stays)
    }
    counts.labels += labels
    counts.sequences += 1
    counts.cut += Number(chosen !== null)
    counts.tokens += before
    counts.kept += after
    counts.squares += before ** 2
    counts.keptSquares += after ** 2
  }
  if (counts.cut === 0) return { batch, targets, counts }
  const short = selectHistory(batch, keep)
  const rows = keptRows(keep)
  const rowsOf = (values: Float32Array) => {
    const kept = new Float32Array(rows.length * K)
    for (let i = 0, to = 0; i < rows.length; i++)
      for (let k = 0, from = rows[i]! * K; k < K; k++) kept[to++] = values[from++]!
    return kept
  }
  return {
    batch: short,
    targets: { ...targets, historyLabels: rowsOf(historyLabels), historyWeights: rowsOf(historyWeights) },
    counts,
  }
}
