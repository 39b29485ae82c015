import type { BaselineReport } from '../eval/ranking_baselines.js'
import type { BinaryMetrics } from '../eval/ranking_metrics.js'
import type { TaskMetrics } from '../train/rank_metrics.js'
import { metric, table } from './output.js'

/** A row a task and model, the ranker last. */
export function resultTable(ranker: TaskMetrics, baselines: readonly BaselineReport[] = []): string {
  const row = (task: string, model: string, m: BinaryMetrics) => [
    ...[task, model, metric(m.ne), metric(m.auc), metric(m.gauc), m.calibration.toFixed(3), metric(m.baseRate)],
  ]
  const rows = Object.entries(ranker).flatMap(([task, metrics]) =>
    'ne' in metrics
      ? [
          ...baselines
            .filter(other => other.task === task)
            .map(({ baseline, metrics }) => row(task, baseline, metrics)),
          row(task, 'GenerativeRanker', metrics),
        ]
      : [[task, 'GenerativeRanker', `MSE ${metrics.mse.toPrecision(4)}`, `MAE ${metrics.mae.toPrecision(4)}`]],
  )
  return table(['task', 'model', 'NE', 'AUC', 'GAUC', 'calibration', 'base rate'], rows, [0, 1])
}
