/** Cut-offs that reports hold. */
export const METRIC_KS = [1, 5, 10, 50, 100, 200, 500] as const

/** Means over users: `hr@K`, `ndcg@K` for each cut-off, `mrr`, and `users`, how many there were. */
export type Metrics = Record<`${'hr' | 'ndcg'}@${(typeof METRIC_KS)[number]}` | 'mrr' | 'users', number>

/**
 * Metrics of one held-out item a user.
 *
 * HR@K = [rank <= K], NDCG@K = [rank <= K] / log2(rank + 1), MRR = 1 / rank.
 * @param ranks 1-based
 */
export function rankingMetrics(ranks: ArrayLike<number>): Metrics {
  const metrics = { users: ranks.length, mrr: 0 } as Metrics
  for (const k of METRIC_KS) {
    let hits = 0
    let gain = 0
    for (let i = 0; i < ranks.length; i++) {
      if (ranks[i]! > k) continue
      hits++
      gain += 1 / Math.log2(ranks[i]! + 1)
    }
    metrics[`hr@${k}`] = hits / ranks.length
    metrics[`ndcg@${k}`] = gain / ranks.length
  }
  for (let i = 0; i < ranks.length; i++) metrics.mrr += 1 / ranks[i]! / ranks.length
  return metrics
}
