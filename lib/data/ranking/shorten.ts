import type { Random } from '../../random.js'
import { type LengthCounts, newLengthCounts, type StochasticLength } from '../stochastic_length.js'
import { selectHistory } from './batches.js'
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
  for (let i = 0; i < targets.historyWeights.length; i++)
    if (targets.historyWeights[i]! > 0) wanted[Math.floor(i / K)] = 1
  const tokens = series.map(s => (fusion === 'interleave' && s === 0 ? 2 : 1))
  const keep = new Uint8Array(T).fill(1)
  const counts = newLengthCounts()
  for (let b = 0; b < batch.requests.length; b++) {
    const [first, end] = [Number(offsets[b]!), Number(offsets[b + 1]!)]
    const rows = { times: times.subarray(first, end), tokens: tokens.subarray(first, end) }
    const chosen = lengths.choose({ ...rows, wanted: wanted.subarray(first, end) }, randomOf(b))
    let [before, after] = [0, 0]
    for (let t = first; t < end; t++) {
      const stays = chosen ? chosen[t - first]! : 1
      keep[t] = stays
      before += tokens[t]!
      after += stays * tokens[t]!
      counts.labels += wanted[t]! * (1 - stays)
    }
    counts.sequences += 1
    counts.cut += Number(chosen !== null)
    counts.tokens += before
    counts.kept += after
    counts.squares += before ** 2
    counts.keptSquares += after ** 2
  }
  if (counts.cut === 0) return { batch, targets, counts }
  const rowsOf = (values: Float32Array) => values.filter((_, i) => keep[Math.floor(i / K)])
  const { historyLabels, historyWeights } = targets
  return {
    batch: selectHistory(batch, keep),
    targets: { ...targets, historyLabels: rowsOf(historyLabels), historyWeights: rowsOf(historyWeights) },
    counts,
  }
}
