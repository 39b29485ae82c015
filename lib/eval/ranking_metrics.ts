import { check } from '../errors.js'

/** Metrics of one binary task over a set of impressions. NaN where they are not defined (one class alone, nothing at all). */
export interface BinaryMetrics {
  /** Weight of the impressions. */
  weight: number
  /** Share of positives. */
  baseRate: number
  /** Normalised entropy: mean cross-entropy / entropy of the base rate of the same set; 1 predicts the base rate. */
  ne: number
  auc: number
  /** How far off `auc` may be: 0 where it is exact. */
  aucError: number
  /** Mean of the AUC within requests that have both classes. */
  gauc: number
  /** How many of them there were, and how many had one class alone. */
  gaucRequests: number
  gaucSkipped: number
  /** Share of the groups that `gauc` is of: 1, or less where a hash chose some of too many. */
  gaucShare: number
  /** Share of impressions on the right side of p = 1/2. */
  accuracy: number
  /** Mean p / mean y. */
  calibration: number
}

/** -log p(y) of a logit, without overflow. */
export function crossEntropy(logit: number, label: number): number {
  return Math.max(logit, 0) - logit * label + Math.log1p(Math.exp(-Math.abs(logit)))
}

export const sigmoid = (logit: number) => 1 / (1 + Math.exp(-logit))

/** Normalised entropy from sums over impressions: of w CE, of w y, of w. NaN where all labels are equal. */
export function normalizedEntropy(crossEntropies: number, positives: number, weight: number): number {
  const rate = positives / weight
  const entropy = -(rate * Math.log(rate) + (1 - rate) * Math.log(1 - rate))
  return crossEntropies / weight / entropy
}

/**
 * Area under the ROC curve: the chance that a positive scores above a negative, ties counting half. NaN with one class.
 * Rows of weight 0 do not count.
 */
export function auc(scores: ArrayLike<number>, labels: ArrayLike<number>, weights?: ArrayLike<number>): number {
  const order = Array.from({ length: scores.length }, (_, i) => i).sort((a, b) => scores[a]! - scores[b]!)
  let [positives, negatives, area] = [0, 0, 0]
  for (let at = 0; at < order.length; ) {
    const score = scores[order[at]!]!
    let [up, down] = [0, 0]
    for (; at < order.length && scores[order[at]!] === score; at++) {
      const weight = weights ? weights[order[at]!]! : 1
      if (labels[order[at]!]! > 0.5) up += weight
      else down += weight
    }
    check(up + down > 0 || !Number.isNaN(score), 'ERR_HSTU_INVALID_ARGUMENT', () => 'auc: a score is NaN')
    area += up * (negatives + down / 2)
    positives += up
    negatives += down
  }
  return area / (positives * negatives)
}

/** Mean AUC over the groups that have both classes, and how many have one alone. */
export function groupedAuc(
  groups: ArrayLike<number | bigint>,
  scores: ArrayLike<number>,
  labels: ArrayLike<number>,
  weights?: ArrayLike<number>,
): { gauc: number; sum: number; groups: number; skipped: number } {
  const rows = new Map<number | bigint, number[]>()
  for (let i = 0; i < scores.length; i++) {
    if (weights && weights[i] === 0) continue
    const own = rows.get(groups[i]!)
    if (own) own.push(i)
    else rows.set(groups[i]!, [i])
  }
  let [sum, count] = [0, 0]
  for (const own of rows.values()) {
    const pick = (from: ArrayLike<number>) => own.map(i => from[i]!)
    const value = auc(pick(scores), pick(labels), weights && pick(weights))
    if (Number.isNaN(value)) continue
    sum += value
    count++
  }
  return { gauc: sum / count, sum, groups: count, skipped: rows.size - count }
}

/** All metrics of a set, exactly. @param groups of GAUC: requests or users */
export function binaryMetrics(
  logits: ArrayLike<number>,
  labels: ArrayLike<number>,
  weights: ArrayLike<number>,
  groups: ArrayLike<number | bigint>,
): BinaryMetrics {
  const sums = new Sums()
  for (let i = 0; i < logits.length; i++) sums.add(logits[i]!, labels[i]!, weights[i]!)
  const grouped = groupedAuc(groups, logits, labels, weights)
  const own = { gauc: grouped.gauc, gaucRequests: grouped.groups, gaucSkipped: grouped.skipped, gaucShare: 1 }
  return { ...sums.metrics(), auc: auc(logits, labels, weights), aucError: 0, ...own }
}

/** What NE, accuracy and calibration need, in fixed memory and exactly. */
export class Sums {
  values = new Float64Array(5) // w, w y, w p, w CE, w [right]

  add(logit: number, label: number, weight: number): void {
    if (weight === 0) return
    const v = this.values
    v[0]! += weight
    v[1]! += weight * label
    v[2]! += weight * sigmoid(logit)
    v[3]! += weight * crossEntropy(logit, label)
    v[4]! += weight * Number(logit > 0 === label > 0.5)
  }

  metrics() {
    const [w, y, p, ce, right] = this.values as unknown as [number, number, number, number, number]
    return { weight: w, baseRate: y / w, ne: normalizedEntropy(ce, y, w), accuracy: right / w, calibration: p / y }
  }
}

/** Bins of {@link ScoreBins}: logits from -16 to 16, beyond them the outer bins. */
const BINS = 1 << 14
const RANGE = 16

/** `[bin, negatives, positives]` of the bins that are not empty. */
export type ScoreBinsState = [number, number, number][]

/** AUC in fixed memory: 16,384 bins of logits, 1/512 wide, whose members tie. */
export class ScoreBins {
  readonly #weights = new Float64Array(2 * BINS)

  add(logit: number, label: number, weight: number): void {
    const bin = Math.floor(((logit + RANGE) / (2 * RANGE)) * BINS)
    this.#weights[2 * Math.max(0, Math.min(BINS - 1, bin)) + Number(label > 0.5)]! += weight
  }

  /** The AUC and how far off it may be: each pair within a bin counts 1/2 in place of 0 to 1. */
  auc(): { auc: number; aucError: number } {
    let [positives, negatives, area, within] = [0, 0, 0, 0]
    for (const [, down, up] of this.state()) {
      area += up * (negatives + down / 2)
      within += (up * down) / 2
      positives += up
      negatives += down
    }
    const pairs = positives * negatives
    return { auc: area / pairs, aucError: within / pairs }
  }

  state(): ScoreBinsState {
    const bins: ScoreBinsState = []
    for (let bin = 0; bin < BINS; bin++) {
      const [down, up] = [this.#weights[2 * bin]!, this.#weights[2 * bin + 1]!]
      if (down + up > 0) bins.push([bin, down, up])
    }
    return bins
  }

  setState(bins: ScoreBinsState): void {
    this.#weights.fill(0)
    for (const [bin, down, up] of bins) this.#weights.set([down, up], 2 * bin)
  }
}

/** State of {@link StreamingMetrics} as plain JSON. */
export interface StreamingMetricsState {
  sums: number[]
  /** Sum of the requests' AUCs, their count, those skipped. */
  gauc: [number, number, number]
  bins: ScoreBinsState
  window: { logits: number[]; labels: number[]; weights: number[]; requests: number[] }
}

/**
 * Metrics of one binary task over a stream of impressions: for life, and over the last `window` impressions.
 *
 * Memory is fixed. All but the lifetime AUC are exact; that one is of {@link ScoreBins}.
 */
export class StreamingMetrics {
  #life = new Sums()
  #gauc: [number, number, number] = [0, 0, 0]
  #bins = new ScoreBins()
  #window = { logits: [] as number[], labels: [] as number[], weights: [] as number[], requests: [] as number[] }

  constructor(readonly window: number) {
    const valid = Number.isInteger(window) && window > 0
    check(valid, 'ERR_HSTU_INVALID_ARGUMENT', () => `window must be a positive integer, got ${window}`)
  }

  /**
   * Adds impressions in the order of the stream; those of one request come together and in one call. Rows of weight 0
   * do not count. @throws HstuError ERR_HSTU_INVALID_ARGUMENT for a logit that is NaN.
   */
  update(
    logits: ArrayLike<number>,
    labels: ArrayLike<number>,
    weights: ArrayLike<number>,
    requests: ArrayLike<number>,
  ): void {
    const kept = this.#window
    const first = kept.logits.length
    for (let i = 0; i < logits.length; i++) {
      const [logit, label, weight] = [logits[i]!, labels[i]!, weights[i]!]
      check(!Number.isNaN(logit), 'ERR_HSTU_INVALID_ARGUMENT', () => `the logit of impression ${i} is NaN`)
      if (weight === 0) continue
      this.#life.add(logit, label, weight)
      this.#bins.add(logit, label, weight)
      kept.logits.push(logit)
      kept.labels.push(label)
      kept.weights.push(weight)
      kept.requests.push(requests[i]!)
    }
    const since = (array: number[]) => array.slice(first)
    const own = groupedAuc(since(kept.requests), since(kept.logits), since(kept.labels), since(kept.weights))
    this.#gauc[0] += own.sum
    this.#gauc[1] += own.groups
    this.#gauc[2] += own.skipped
    const surplus = kept.logits.length - this.window
    if (surplus > 0) for (const array of Object.values(kept)) array.splice(0, surplus)
  }

  /** Over the last `window` impressions. */
  windowed(): BinaryMetrics {
    const { logits, labels, weights, requests } = this.#window
    return binaryMetrics(logits, labels, weights, requests)
  }

  /** Over all impressions so far. */
  lifetime(): BinaryMetrics {
    const [sum, groups, skipped] = this.#gauc
    const own = { gauc: sum / groups, gaucRequests: groups, gaucSkipped: skipped, gaucShare: 1 }
    return { ...this.#life.metrics(), ...this.#bins.auc(), ...own }
  }

  /** Everything needed to go on exactly. */
  state(): StreamingMetricsState {
    const { logits, labels, weights, requests } = this.#window
    const window = { logits: [...logits], labels: [...labels], weights: [...weights], requests: [...requests] }
    return { sums: [...this.#life.values], gauc: [...this.#gauc], bins: this.#bins.state(), window }
  }

  /** Goes on from a state taken earlier. */
  setState(state: StreamingMetricsState): void {
    this.#life.values.set(state.sums)
    this.#gauc = [...state.gauc]
    this.#bins.setState(state.bins)
    const { logits, labels, weights, requests } = state.window
    this.#window = { logits: [...logits], labels: [...labels], weights: [...weights], requests: [...requests] }
  }
}
