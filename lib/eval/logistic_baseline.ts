import type { FeatureGroup, Impression } from './baseline_features.js'
import type { OnlineBaseline } from './ranking_baselines.js'
import { sigmoid } from './ranking_metrics.js'

export interface LogisticOptions {
  /** Adagrad's step; default 0.4 */
  lr?: number
  /** Weight decay of the weights that an impression names; default 0.03 */
  l2?: number
  /** Features beside the ids, with weights of their own. */
  features?: readonly FeatureGroup[]
}

/**
 * Online logistic regression on one weight a user, one an item, one a feature and an intercept, by Adagrad (Duchi et al. 2011).
 */
export function logisticRegression(options: LogisticOptions = {}): OnlineBaseline {
  const { lr = 0.4, l2 = 0.03, features = [] } = options
  const [users, items] = [new Map<bigint, Float64Array>(), new Map<bigint, Float64Array>()]
  // Each weight with its sum of squared gradients: the intercept, then the features.
  let fixed: Float64Array | null = null
  const own = (of: Map<bigint, Float64Array>, key: bigint) => {
    let weight = of.get(key)
    if (!weight) of.set(key, (weight = new Float64Array(2)))
    return weight
  }
  const inputs = (impression: Impression) => [1, ...features.flatMap(group => group.of(impression))]
  const score = ({ user, item }: Impression, x: readonly number[]) => {
    const weights = (fixed ??= new Float64Array(2 * x.length))
    return x.reduce(
      (sum, value, i) => sum + weights[2 * i]! * value,
      (users.get(user)?.[0] ?? 0) + (items.get(item)?.[0] ?? 0),
    )
  }
  const step = (weight: Float64Array, at: number, gradient: number) => {
    if (gradient === 0) return
    weight[at + 1]! += gradient * gradient
    weight[at]! -= (lr * gradient) / Math.sqrt(weight[at + 1]! + 1e-8)
  }
  return {
    name: ['logistic regression, ids', ...features.map(group => group.name)].join(' + '),
    predict: impression => score(impression, inputs(impression)),
    update(impression, label) {
      const x = inputs(impression)
      const error = sigmoid(score(impression, x)) - label
      const [u, i] = [own(users, impression.user), own(items, impression.item)]
      step(u, 0, error + l2 * u[0]!)
      step(i, 0, error + l2 * i[0]!)
      x.forEach((value, k) => {
        step(fixed!, 2 * k, error * value)
      })
      for (const group of features) group.update(impression, label)
    },
  }
}
