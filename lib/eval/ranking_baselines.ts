import type { RequestBatch } from '../data/ranking/schema.js'
import { type RankingTask, taskTargets } from '../data/ranking/tasks.js'
import { type BinaryMetrics, binaryMetrics, sigmoid } from './ranking_metrics.js'

/** A model that predicts one binary task before it learns from it, an impression at a time. */
export interface OnlineBaseline {
  readonly name: string
  /** Logit of an impression, from what was learnt so far. */
  predict(user: bigint, item: bigint): number
  /** Learns from an impression whose label came. */
  update(user: bigint, item: bigint, label: number): void
}

const logit = (p: number) => Math.log(p / (1 - p))

/** Smoothed rates of keys: (positives + strength p) / (count + strength), p the rate of all. */
class Rates {
  #of = new Map<bigint, [number, number]>()
  // One positive of two to begin with: no rate is ever 0 or 1.
  #all: [number, number] = [1, 2]

  constructor(readonly strength: number) {}

  base(): number {
    return this.#all[0] / this.#all[1]
  }

  rate(key: bigint): number {
    const [positives, count] = this.#of.get(key) ?? [0, 0]
    return (positives + this.strength * this.base()) / (count + this.strength)
  }

  update(key: bigint, label: number): void {
    const own = this.#of.get(key)
    if (own) {
      own[0] += label
      own[1]++
    } else this.#of.set(key, [label, 1])
    this.#all[0] += label
    this.#all[1]++
  }
}

/** The rate of everything so far. */
export function baseRate(): OnlineBaseline {
  const rates = new Rates(1)
  return {
    name: 'running base rate',
    predict: () => logit(rates.base()),
    update: (_, item, label) => rates.update(item, label),
  }
}

/** The item's rate so far, smoothed towards the base rate by `strength` impressions. */
export function itemPopularity(strength = 10): OnlineBaseline {
  const items = new Rates(strength)
  return {
    name: 'smoothed item popularity',
    predict: (_, item) => logit(items.rate(item)),
    update: (_, item, label) => items.update(item, label),
  }
}

/** logit(user rate) + logit(item rate) - logit(base rate). */
export function additiveLogit(userStrength = 10, itemStrength = 20): OnlineBaseline {
  const [users, items] = [new Rates(userStrength), new Rates(itemStrength)]
  return {
    name: 'additive logit of user and item rates',
    predict: (user, item) => logit(users.rate(user)) + logit(items.rate(item)) - logit(items.base()),
    update: (user, item, label) => {
      users.update(user, label)
      items.update(item, label)
    },
  }
}

export interface LogisticOptions {
  /** Adagrad's step; default 0.4 */
  lr?: number
  /** Weight decay of the weights that an impression names; default 0.03 */
  l2?: number
  /** Running means of user and item as two more features; default false */
  means?: boolean
  userStrength?: number
  itemStrength?: number
}

/**
 * Online logistic regression on one weight a user, one an item and an intercept, by Adagrad (Duchi et al. 2011).
 * With `means`, besides, the logits of the smoothed user and item rates less that of the base rate, with weights of their own.
 */
export function logisticRegression(options: LogisticOptions = {}): OnlineBaseline {
  const { lr = 0.4, l2 = 0.03, means = false, userStrength = 10, itemStrength = 20 } = options
  const [users, items] = [new Map<bigint, Float64Array>(), new Map<bigint, Float64Array>()]
  const rates = { users: new Rates(userStrength), items: new Rates(itemStrength) }
  // Each weight with its sum of squared gradients.
  const fixed = Float64Array.of(0, 0, 0, 0, 0, 0)
  const own = (of: Map<bigint, Float64Array>, key: bigint) => {
    let weight = of.get(key)
    if (!weight) of.set(key, (weight = new Float64Array(2)))
    return weight
  }
  const features = (user: bigint, item: bigint): [number, number] => {
    const base = logit(rates.items.base())
    return means ? [logit(rates.users.rate(user)) - base, logit(rates.items.rate(item)) - base] : [0, 0]
  }
  const score = (user: bigint, item: bigint, [x, y]: [number, number]) =>
    fixed[0]! + (users.get(user)?.[0] ?? 0) + (items.get(item)?.[0] ?? 0) + fixed[2]! * x + fixed[4]! * y
  const step = (weight: Float64Array, at: number, gradient: number) => {
    if (gradient === 0) return
    weight[at + 1]! += gradient * gradient
    weight[at]! -= (lr * gradient) / Math.sqrt(weight[at + 1]! + 1e-8)
  }
  return {
    name: `logistic regression, ids${means ? ' and running means' : ''}`,
    predict: (user, item) => score(user, item, features(user, item)),
    update(user, item, label) {
      const x = features(user, item)
      const error = sigmoid(score(user, item, x)) - label
      const [u, i] = [own(users, user), own(items, item)]
      step(fixed, 0, error)
      step(u, 0, error + l2 * u[0]!)
      step(i, 0, error + l2 * i[0]!)
      step(fixed, 2, error * x[0])
      step(fixed, 4, error * x[1])
      rates.users.update(user, label)
      rates.items.update(item, label)
    },
  }
}

/** The baselines that every report of a ranker holds. */
export const onlineBaselines = (): OnlineBaseline[] => [
  baseRate(),
  itemPopularity(),
  additiveLogit(),
  logisticRegression(),
  logisticRegression({ means: true }),
]

/** @see evaluateBaselines */
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
        const user = batch.users[b]!
        const rows: number[] = []
        for (let m = Number(offsets[b]!); m < Number(offsets[b + 1]!); m++)
          if (weights[m * binary.length + k]! > 0) rows.push(m)
        if (batch.requests[b]! >= from)
          for (const m of rows) {
            run.logits.push(run.model.predict(user, items[m]!))
            run.labels.push(labels[m * binary.length + k]!)
            run.groups.push(gaucBy === 'user' ? user : BigInt(batch.requests[b]!))
          }
        for (const m of rows) run.model.update(user, items[m]!, labels[m * binary.length + k]!)
      }
    }
  }
  return runs.map(({ task, model, logits, labels, groups }) => ({
    task: task.name,
    baseline: model.name,
    metrics: binaryMetrics(logits, labels, new Float32Array(logits.length).fill(1), groups),
  }))
}
