import { check } from '../errors.js'
import { auc, type BinaryMetrics, groupedAuc, ScoreBins, type ScoreBinsState, Sums } from './ranking_metrics.js'

/** Of a regression task over impressions; NaN where there are none. */
export interface RegressionMetrics {
  weight: number
  mse: number
  mae: number
}

/** Impressions that are kept: up to so many, all metrics are exact. */
export const KEPT_IMPRESSIONS = 2 ** 19

/** Plain JSON of {@link CountedMetrics}. */
export interface CountedState {
  /** Impressions so far, and how often the groups kept were halved. */
  impressions: number
  halvings: number
  /** One entry a task. */
  tasks: { sums: number[]; bins: ScoreBinsState; gauc: [number, number, number] }[]
}

/** [R, K] of the binary tasks, and [R] of groups. */
export interface KeptRows {
  logits: Float64Array
  labels: Float32Array
  weights: Float32Array
  groups: BigInt64Array
}

/**
 * Metrics of several tasks over all impressions that come by, in bounded memory. NE, accuracy, calibration, squared error and GAUC within
 * requests are exact. AUC and GAUC within users are exact for the first `keep` impressions; beyond them AUC is of bins, with a bound on
 * its error, and GAUC of a share of the users, chosen by a hash and with all of their impressions.
 */
export class CountedMetrics {
  readonly #tasks: { sums: Sums; bins: ScoreBins; gauc: [number, number, number]; errors: Float64Array }[]
  readonly #binary: number[]
  #impressions = 0
  #halvings = 0
  #size = 0
  #rows: KeptRows

  constructor(
    readonly kinds: readonly ('binary' | 'regression')[],
    readonly gaucBy: 'request' | 'user',
    readonly keep: number = KEPT_IMPRESSIONS,
  ) {
    const valid = Number.isInteger(keep) && keep > 0
    check(valid, 'ERR_HSTU_INVALID_ARGUMENT', () => `keep must be a positive integer, got ${keep}`)
    this.#binary = kinds.flatMap((kind, k) => (kind === 'binary' ? [k] : []))
    this.#tasks = kinds.map(() => ({
      ...{ sums: new Sums(), bins: new ScoreBins(), gauc: [0, 0, 0], errors: new Float64Array(3) },
    }))
    this.#rows = this.#room(0)
  }

  #room(rows: number): KeptRows {
    const K = this.#binary.length
    return {
      ...{ logits: new Float64Array(rows * K), labels: new Float32Array(rows * K) },
      ...{ weights: new Float32Array(rows * K), groups: new BigInt64Array(rows) },
    }
  }

  /**
   * Adds impressions, those of a request in one call.
   * @param logits [M, K] of binary tasks, values of regression tasks
   * @param labels [M, K]
   * @param weights [M, K]
   * @param groups [M] users or requests, as `gaucBy` says
   */
  update(
    logits: ArrayLike<number>,
    labels: ArrayLike<number>,
    weights: ArrayLike<number>,
    groups: BigInt64Array,
  ): void {
    const [M, K] = [groups.length, this.kinds.length]
    this.#tasks.forEach(({ sums, bins, gauc, errors }, k) => {
      for (let m = 0; m < M; m++) {
        const [x, y, w] = [logits[m * K + k]!, labels[m * K + k]!, weights[m * K + k]!]
        if (w === 0) continue
        if (this.kinds[k] === 'regression') addError(errors, x - y, w)
        else {
          sums.add(x, y, w)
          bins.add(x, y, w)
        }
      }
      if (this.gaucBy === 'user' || this.kinds[k] === 'regression') return
      const column = (of: ArrayLike<number>) => Float64Array.from(groups, (_, m) => of[m * K + k]!)
      const own = groupedAuc(groups, column(logits), column(labels), column(weights))
      gauc[0] += own.sum
      gauc[1] += own.groups
      gauc[2] += own.skipped
    })
    this.#impressions += M
    this.#keepRows(logits, labels, weights, groups)
  }

  #keepRows(logits: ArrayLike<number>, labels: ArrayLike<number>, weights: ArrayLike<number>, groups: BigInt64Array) {
    const exact = this.#impressions <= this.keep
    if (!exact && this.gaucBy === 'request') {
      this.#rows = this.#room(0)
      this.#size = 0
      return
    }
    const [K, columns] = [this.kinds.length, this.#binary]
    if (this.#size + groups.length > this.#rows.groups.length) {
      const grown = this.#room(Math.max(1024, 2 * (this.#size + groups.length)))
      for (const name of ['logits', 'labels', 'weights', 'groups'] as const) grown[name].set(this.#rows[name] as never)
      this.#rows = grown
    }
    for (let m = 0; m < groups.length; m++) {
      if (!stays(groups[m]!, this.#halvings)) continue
      columns.forEach((k, column) => {
        const [from, to] = [m * K + k, this.#size * columns.length + column]
        this.#rows.logits[to] = logits[from]!
        this.#rows.labels[to] = labels[from]!
        this.#rows.weights[to] = weights[from]!
      })
      this.#rows.groups[this.#size++] = groups[m]!
    }
    while (this.#size > this.keep) this.#halve()
  }

  /** Drops about half of the groups. */
  #halve(): void {
    const [{ logits, labels, weights, groups }, K] = [this.#rows, this.#binary.length]
    this.#halvings += 1
    let size = 0
    for (let row = 0; row < this.#size; row++) {
      if (!stays(groups[row]!, this.#halvings)) continue
      for (const of of [logits, labels, weights]) of.copyWithin(size * K, row * K, (row + 1) * K)
      groups[size++] = groups[row]!
    }
    this.#size = size
  }

  /** One entry a task. */
  metrics(): (BinaryMetrics | RegressionMetrics)[] {
    const [rows, K] = [this.#kept(), this.#binary.length]
    return this.#tasks.map(({ sums, bins, gauc, errors }, k) => {
      if (this.kinds[k] === 'regression') return regression(errors)
      const column = (of: ArrayLike<number>) =>
        Float64Array.from(rows.groups, (_, row) => of[row * K + this.#binary.indexOf(k)]!)
      const [logits, labels, weights] = [column(rows.logits), column(rows.labels), column(rows.weights)]
      const area = this.#impressions <= this.keep ? { auc: auc(logits, labels, weights), aucError: 0 } : bins.auc()
      const [sum, count, skipped] = gauc
      const own =
        this.gaucBy === 'request'
          ? { gauc: sum / count, groups: count, skipped }
          : groupedAuc(rows.groups, logits, labels, weights)
      return {
        ...{ ...sums.metrics(), ...area, gauc: own.gauc, gaucRequests: own.groups, gaucSkipped: own.skipped },
        gaucShare: 2 ** -this.#halvings,
      }
    })
  }

  #kept(): KeptRows {
    const [{ logits, labels, weights, groups }, n] = [this.#rows, this.#size]
    const K = this.#binary.length
    return {
      ...{ logits: logits.slice(0, n * K), labels: labels.slice(0, n * K) },
      ...{ weights: weights.slice(0, n * K), groups: groups.slice(0, n) },
    }
  }

  /** Everything needed to go on exactly. */
  state(): { json: CountedState; rows: KeptRows } {
    const tasks = this.#tasks.map(({ sums, bins, gauc, errors }, k) => {
      const values = this.kinds[k] === 'regression' ? errors : sums.values
      return { sums: [...values], bins: bins.state(), gauc: [...gauc] as [number, number, number] }
    })
    return { json: { impressions: this.#impressions, halvings: this.#halvings, tasks }, rows: this.#kept() }
  }

  /** Goes on from a state taken earlier. @throws HstuError ERR_HSTU_CHECKPOINT where it is of other tasks. */
  setState(json: CountedState, rows: KeptRows): void {
    const [n, K] = [rows.groups?.length ?? -1, this.#binary.length]
    const whole = [rows.logits, rows.labels, rows.weights].every(of => of?.length === n * K)
    check(whole && json?.tasks?.length === this.kinds.length, 'ERR_HSTU_CHECKPOINT', () => {
      return `the counted metrics are not those of ${this.kinds.length} tasks`
    })
    json.tasks.forEach((saved, k) => {
      const task = this.#tasks[k]!
      const values = this.kinds[k] === 'regression' ? task.errors : task.sums.values
      values.set(saved.sums)
      task.bins.setState(saved.bins)
      task.gauc = [...saved.gauc]
    })
    this.#impressions = json.impressions
    this.#halvings = json.halvings
    this.#rows = rows
    this.#size = n
  }
}

/** Whether a group is among the 2^-halvings that a hash of its number chooses. */
function stays(group: bigint, halvings: number): boolean {
  if (halvings === 0) return true
  const hash = BigInt.asUintN(64, (group ^ (group >> 29n)) * 0x9e3779b97f4a7c15n)
  return Number(hash >> 32n) < 2 ** (32 - halvings)
}

function addError(errors: Float64Array, difference: number, weight: number): void {
  errors[0]! += weight
  errors[1]! += weight * difference ** 2
  errors[2]! += weight * Math.abs(difference)
}

function regression([weight, squares, distances]: Float64Array): RegressionMetrics {
  return { weight: weight!, mse: squares! / weight!, mae: distances! / weight! }
}
