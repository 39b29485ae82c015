/** An item that was shown to a user. */
export interface Impression {
  user: bigint
  item: bigint
  /** Seconds. */
  time: bigint
}

export const logit = (p: number) => Math.log(p / (1 - p))

/** Smoothed rates of keys: (positives + strength p) / (count + strength), p the rate of all. */
export class Rates {
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

/** Numbers that a linear model reads beside ids; learnt online like it. */
export interface FeatureGroup {
  readonly name: string
  /** Of an impression, from what was learnt so far; always the same count. */
  of(impression: Impression): number[]
  /** Learns from an impression whose label came. */
  update(impression: Impression, label: number): void
}

/** Logits of the smoothed rates of user and item less that of the base rate. */
export function runningMeans(userStrength = 10, itemStrength = 20): FeatureGroup {
  const [users, items] = [new Rates(userStrength), new Rates(itemStrength)]
  return {
    name: 'running means',
    of: ({ user, item }) => {
      const base = logit(items.base())
      return [logit(users.rate(user)) - base, logit(items.rate(item)) - base]
    },
    update: ({ user, item }, label) => {
      users.update(user, label)
      items.update(item, label)
    },
  }
}

export interface SimilarHistoryOptions {
  /** Labelled impressions kept of a user: the latest. Default 200. */
  history?: number
  /** Users in common that halve a similarity. Default 100. */
  shrink?: number
  /** Similarity that the sum of the history's is smoothed by. Default 1. */
  smooth?: number
}

/**
 * Item-based neighbours: what the user did with items j like i, as residuals e_j = label_j - rate_j, weighted by similarity,
 *
 *     s_ij = sum e_i e_j / (v (n_ij + shrink))             over the n_ij pairs that users were shown, v the mean of e^2
 *     feature = sum_j s_ij e_j / (smooth + sum_j |s_ij|)
 *
 * Memory grows with the pairs of items that some user was shown, `history` of them an impression at most.
 */
export function similarHistory(options: SimilarHistoryOptions = {}): FeatureGroup {
  const { history: most = 200, shrink = 100, smooth = 1 } = options
  const items = new Rates(20)
  const histories = new Map<bigint, { item: number; residual: number }[]>()
  const pairs = new Map<number, Map<number, { sum: number; count: number }>>() // the lower number first
  const squares = { sum: 1, count: 4 }
  return {
    name: 'similarity-weighted history',
    of({ user, item }) {
      let [sum, all] = [0, smooth]
      const own = Number(item)
      for (const { item: other, residual } of histories.get(user) ?? []) {
        const pair = pairs.get(Math.min(own, other))?.get(Math.max(own, other))
        if (!pair) continue
        const similarity = (pair.sum / (pair.count + shrink)) * (squares.count / squares.sum)
        sum += similarity * residual
        all += Math.abs(similarity)
      }
      return [sum / all]
    },
    update({ user, item }, label) {
      const residual = label - items.rate(item)
      const own = Number(item)
      const history = histories.get(user) ?? []
      for (const { item: other, residual: past } of history) {
        if (other === own) continue
        const [low, high] = [Math.min(own, other), Math.max(own, other)]
        let row = pairs.get(low)
        if (!row) pairs.set(low, (row = new Map()))
        const pair = row.get(high)
        if (pair) {
          pair.sum += residual * past
          pair.count++
        } else row.set(high, { sum: residual * past, count: 1 })
      }
      history.push({ item: own, residual })
      if (history.length > most) history.shift()
      histories.set(user, history)
      squares.sum += residual * residual
      squares.count++
      items.update(item, label)
    },
  }
}

/**
 * log(1 + hours) since the item was first shown, log(1 + times) the user was shown it before, and the user's rate over the last
 * impressions (each counts `share`, the ones before it the rest) as a logit less that of the rate of all.
 */
export function recency(share = 0.05): FeatureGroup {
  const first = new Map<bigint, bigint>()
  const users = new Map<bigint, { rate: number; seen: Map<bigint, number> }>()
  const all = new Rates(0)
  return {
    name: 'recency',
    of({ user, item, time }) {
      const base = all.base()
      const { rate = base, seen } = users.get(user) ?? {}
      const hours = Number(time - (first.get(item) ?? time)) / 3600
      return [Math.log1p(hours), Math.log1p(seen?.get(item) ?? 0), logit(0.9 * rate + 0.1 * base) - logit(base)]
    },
    update({ user, item, time }, label) {
      if (!first.has(item)) first.set(item, time)
      const own = users.get(user) ?? { rate: all.base(), seen: new Map() }
      own.rate += share * (label - own.rate)
      own.seen.set(item, (own.seen.get(item) ?? 0) + 1)
      users.set(user, own)
      all.update(item, label)
    },
  }
}
