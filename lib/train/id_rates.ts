import type { RequestBatch, TaskTargets } from '../data/ranking/schema.js'
import { check } from '../errors.js'
import type { HostTensor } from './safetensors.js'

/** Impressions of the base rate that a user's and an item's rate begin with, and what stays of a sum when the next impression joins it. */
const strengths = { users: 5, items: 20 }
const memory = { users: 0.99, items: 1, all: 1 }
/** What saved sums must have been counted by. */
const rule = Float64Array.of(strengths.users, strengths.items, memory.users)

/** A regression has no rate. */
export interface RatedTask {
  kind: 'binary' | 'regression'
}

/** [K] logits of the tasks' base rates, from positives and weight of each; 0 of a regression. No rate is ever 0 or 1. */
export function baseLogits(tasks: readonly RatedTask[], rates: readonly (readonly [number, number])[]): Float64Array {
  const logit = ([positives, weight]: readonly [number, number]) => Math.log((positives + 1) / (weight - positives + 1))
  return Float64Array.from(rates, (own, k) => (tasks[k]!.kind === 'binary' ? logit(own) : 0))
}

/**
 * Positives and weight of each user, each item and of all, task by task, over a stream of impressions. A user's are those of the last hundred
 * or so: what a user does changes.
 */
export class IdRates {
  readonly #K: number
  /** [ids + 1, K, 2], and [K, 2] of all. */
  readonly #sums: Record<'users' | 'items' | 'all', Float64Array>

  constructor(
    readonly tasks: readonly RatedTask[],
    sizes: { users: number; items: number },
  ) {
    const K = (this.#K = tasks.length)
    const of = (rows: number) => new Float64Array(rows * K * 2)
    this.#sums = { users: of(sizes.users + 1), items: of(sizes.items + 1), all: of(1) }
  }

  clear(): void {
    for (const sums of Object.values(this.#sums)) sums.fill(0)
  }

  /**
   * Adds to the logits of a batch's candidates, [M, K], those of its smoothed user and item rates less twice that of the rate of all; nothing
   * to a regression.
   * @throws HstuError ERR_HSTU_DATA for a number beyond the records' vocabulary.
   */
  addTo(logits: Float64Array, batch: RequestBatch): void {
    const K = this.#K
    const base = this.#base()
    for (const [which, id, m] of this.#ids(batch))
      for (let k = 0; k < K; k++) logits[m * K + k]! += this.#shift(which, id, k, base[k]!)
  }

  /** What {@link addTo} adds for each user, or each item: [ids + 1, K]. */
  shifts(which: 'users' | 'items'): Float64Array {
    const K = this.#K
    const base = this.#base()
    return new Float64Array(this.#sums[which].length / 2).map((_, i) =>
      this.#shift(which, Math.floor(i / K), i % K, base[i % K]!),
    )
  }

  /** [K] of all impressions; one positive of two to begin with. */
  #base(): number[] {
    const { all } = this.#sums
    return this.tasks.map((_, k) => (all[2 * k]! + 1) / (all[2 * k + 1]! + 2))
  }

  #shift(which: 'users' | 'items', id: number, k: number, base: number): number {
    if (this.tasks[k]!.kind !== 'binary') return 0
    const logit = (p: number) => Math.log(p / (1 - p))
    const at = 2 * (id * this.#K + k)
    const [positives, weight] = [this.#sums[which][at]!, this.#sums[which][at + 1]!]
    return logit((positives + strengths[which] * base) / (weight + strengths[which])) - logit(base)
  }

  /** Adds what became of a batch's candidates. */
  count(batch: RequestBatch, { labels, weights }: TaskTargets): void {
    const K = this.#K
    const add = (which: keyof typeof memory, at: number, i: number) => {
      const [sums, kept] = [this.#sums[which], weights[i]! > 0 ? memory[which] : 1]
      sums[at] = kept * sums[at]! + weights[i]! * labels[i]!
      sums[at + 1] = kept * sums[at + 1]! + weights[i]!
    }
    for (const [which, id, m] of this.#ids(batch)) for (let k = 0; k < K; k++) add(which, 2 * (id * K + k), m * K + k)
    for (let i = 0; i < labels.length; i++) add('all', 2 * (i % K), i)
  }

  /** The user and the item of each candidate. */
  *#ids({ users, candidates }: RequestBatch): Generator<['users' | 'items', number, number]> {
    for (let m = 0; m < candidates.items.length; m++) {
      const pairs = { users: users[Number(candidates.requestIndex[m]!)]!, items: candidates.items[m]! }
      for (const which of ['users', 'items'] as const) {
        const [id, count] = [Number(pairs[which]), this.#sums[which].length / (2 * this.#K)]
        check(
          id >= 0 && id < count,
          'ERR_HSTU_DATA',
          () => `${which}: number ${id} is not in the records' 0 .. ${count - 1}`,
        )
        yield [which, id, m]
      }
    }
  }

  /** Everything needed to go on exactly. */
  tensors(): Record<string, HostTensor> {
    const of = Object.entries(this.#sums).map(([name, sums]) => {
      return [`rates.${name}`, { dtype: 'float64', shape: [sums.length], data: sums.slice() }] as const
    })
    return { ...Object.fromEntries(of), 'rates.rule': { dtype: 'float64', shape: [rule.length], data: rule.slice() } }
  }

  /** Goes on from tensors taken earlier. @throws HstuError ERR_HSTU_CHECKPOINT where they are of other records, or counted by another rule. */
  restore(tensors: ReadonlyMap<string, HostTensor> | undefined): void {
    for (const [name, sums] of Object.entries(this.#sums)) {
      const data = tensors?.get(`rates.${name}`)?.data
      check(data instanceof Float64Array && data.length === sums.length, 'ERR_HSTU_CHECKPOINT', () => {
        return `the rates of ${name} are not those of the records`
      })
      sums.set(data as Float64Array)
    }
    const own = tensors?.get('rates.rule')?.data
    const same = own instanceof Float64Array && own.length === rule.length && own.every((x, i) => x === rule[i])
    check(same, 'ERR_HSTU_CHECKPOINT', () => {
      return `the rates of ids were counted by another rule (${own ? [...own] : 'of an earlier version'}) than this version's (${[...rule]}): train anew`
    })
  }
}
