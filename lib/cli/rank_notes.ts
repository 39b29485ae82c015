import type { RankTrainer } from '../train/rank_trainer.js'
import { count, counted, percent } from './output.js'

/** Of 'hash' embeddings: rows, ids that have one, and what the bound cost. */
export function tableReport({ table }: RankTrainer) {
  return table && { rows: table.rows, ids: table.size, evicted: table.evicted, skipped: table.skipped }
}

/** A line for each option that left something out. */
export function notes(trainer: RankTrainer): string[] {
  const { sparsity, sampled } = trainer
  const lines: string[] = []
  if (sparsity) {
    const { alpha, selection, cut, sequences, bound, maxTokens, meanLength, meanKept, labels } = sparsity
    lines.push(
      `Stochastic Length ${alpha} (${selection}): ${count(cut)} of ${counted(sequences, 'history', 'histories')} cut to ${bound} of at most ` +
        `${maxTokens} tokens, on average ${meanLength.toFixed(1)} to ${meanKept.toFixed(1)}; sparsity ${percent(sparsity.sparsity)} ` +
        `(${percent(sparsity.padding)} without it); ${counted(labels, 'row')} with a loss left out`,
    )
  }
  if (sampled) lines.push(`learnt from ${count(sampled.trained)} of ${counted(sampled.requests, 'request')}`)
  const { evicted = 0, skipped = 0, ids = 0 } = tableReport(trainer) ?? {}
  if (evicted + skipped > 0)
    lines.push(`embeddings: ${counted(ids, 'id')}; ${count(evicted)} evicted, ${count(skipped)} times no room`)
  return lines
}
