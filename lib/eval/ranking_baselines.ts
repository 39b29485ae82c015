import type { RequestBatch } from '../data/ranking/schema.js'
import { type RankingTask, taskTargets } from '../data/ranking/tasks.js'
import { type Impression, logit, Rates, recency, runningMeans, similarHistory } from './baseline_features.js'
import { logisticRegression } from './logistic_baseline.js'
import { type BinaryMetrics, binaryMetrics } from './ranking_metrics.js'

/** A model that predicts one binary task before it learns from it, an impression at a time. */
export interface OnlineBaseline {
  readonly name: string
  /** Logit of an impression, from what was learnt so far. */
  predict(impression: Impression): number
  /** Learns from an impression whose label came. */
  update(impression: Impression, label: number): void
}

/** The rate of everything so far. */
export function baseRate(): OnlineBaseline {
  const rates = new Rates(1)
  return {
    name: 'running base rate',
    predict: () => logit(rates.base()),
    update: ({ item }, label) => rates.update(item, label),
  }
}

/** The item's rate so far, smoothed towards the base rate by `strength` impressions. */
export function itemPopularity(strength = 10): OnlineBaseline {
  const items = new Rates(strength)
  return {
    name: 'smoothed item popularity',
    predict: ({ item }) => logit(items.rate(item)),
    update: ({ item }, label) => items.update(item, label),
  }
}

/** logit(user rate) + logit(item rate) - logit(base rate). */
export function additiveLogit(userStrength = 10, itemStrength = 20): OnlineBaseline {
  const [users, items] = [new Rates(userStrength), new Rates(itemStrength)]
  return {
    name: 'additive logit of user and item rates',
    predict: ({ user, item }) => logit(users.rate(user)) + logit(items.rate(item)) - logit(items.base()),
    update: ({ user, item }, label) => {
      users.update(user, label)
      items.update(item, label)
    },
  }
}

/** The baselines that every report of a ranker holds. */
export const onlineBaselines = (): OnlineBaseline[] => [
  baseRate(),
  itemPopularity(),
  additiveLogit(),
  logisticRegression(),
  logisticRegression({ features: [runningMeans()] }),
  logisticRegression({ lr: 0.2, l2: 0.05, features: [runningMeans(), similarHistory()] }),
  logisticRegression({ lr: 0.1, l2: 0.1, features: [runningMeans(), similarHistory(), recency()] }),
]

/** Metrics of one baseline on one task; see `evaluateBaselines`. */
export interface BaselineReport {
  task: string
  baseline: string
  metrics: BinaryMetrics
}

/**
 * Predicts each request, then learns from it, in the order of the records.
 *
 * @param from number of the first request that counts in the metrics
 * @param gaucBy what GAUC groups by: requests, or users where most requests have one candidate
 */
export async function evaluateBaselines(
  batches: AsyncIterable<RequestBatch>,
  tasks: readonly RankingTask[],
  options: { from: number; gaucBy?: 'request' | 'user'; baselines?: () => OnlineBaseline[] },
): Promise<BaselineReport[]> {
  const { from, gaucBy = 'request', baselines = onlineBaselines } = options
  const binary = tasks.filter(task => task.kind === 'binary')
  const runs = binary.flatMap(task =>
    baselines().map(model => ({ task, model, logits: [] as number[], labels: [] as number[], groups: [] as bigint[] })),
  )
  for await (const batch of batches) {
    const { labels, weights } = taskTargets(batch, binary)
    const { offsets, items } = batch.candidates
    for (const run of runs) {
      const k = binary.indexOf(run.task)
      for (let b = 0; b < batch.requests.length; b++) {
        const [user, time] = [batch.users[b]!, batch.times[b]!]
        const shown = (m: number): Impression => ({ user, item: items[m]!, time })
        const rows: number[] = []
        for (let m = Number(offsets[b]!); m < Number(offsets[b + 1]!); m++)
          if (weights[m * binary.length + k]! > 0) rows.push(m)
        if (batch.requests[b]! >= from)
          for (const m of rows) {
            run.logits.push(run.model.predict(shown(m)))
            run.labels.push(labels[m * binary.length + k]!)
            run.groups.push(gaucBy === 'user' ? user : BigInt(batch.requests[b]!))
          }
        for (const m of rows) run.model.update(shown(m), labels[m * binary.length + k]!)
      }
    }
  }
  return runs.map(({ task, model, logits, labels, groups }) => ({
    task: task.name,
    baseline: model.name,
    metrics: binaryMetrics(logits, labels, new Float32Array(logits.length).fill(1), groups),
  }))
}
