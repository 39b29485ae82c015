import { baseLogits, IdRates, type RatedTask } from '../train/id_rates.js'
import type { HostTensor } from '../train/safetensors.js'

/** Rates that the logits of a run stand on, as they were when it was exported: in `json.rates` of a bundle, those of ids in its group `rates`. */
export interface SavedRates {
  /** Of each task: positives and weight of the last impressions. */
  base: readonly (readonly [number, number])[]
  /** Whether each user and each item has rates too. */
  ids: boolean
}

/** Names of the tensors of rates of ids. */
export const RATE_TENSORS = ['rates.users', 'rates.items', 'rates.all', 'rates.rule'] as const

/** What is added to a model's logits: the base rates' logits, and how far the user's and the item's rates are from them. */
export class BaseRates {
  readonly #all: Float64Array
  /** [ids + 1, K]; null without rates of ids. */
  readonly #shifts: { users: Float64Array; items: Float64Array } | null = null

  /** @throws HstuError ERR_HSTU_CHECKPOINT where the tensors are not of these vocabularies. */
  constructor(
    tasks: readonly RatedTask[],
    { base, ids }: SavedRates,
    tensors: ReadonlyMap<string, HostTensor> | undefined,
    sizes: { users: number; items: number },
  ) {
    this.#all = baseLogits(tasks, base)
    if (!ids) return
    const rates = new IdRates(tasks, sizes)
    rates.restore(tensors)
    this.#shifts = { users: rates.shifts('users'), items: rates.shifts('items') }
  }

  /** @param items numbers of the candidates @returns [m, K] as training adds them */
  of(user: number, items: Int32Array): Float32Array {
    const K = this.#all.length
    const logits = new Float32Array(items.length * K)
    for (let i = 0; i < logits.length; i++) {
      const k = i % K
      let logit = this.#all[k]!
      if (this.#shifts)
        logit = logit + this.#shifts.users[user * K + k]! + this.#shifts.items[items[(i - k) / K]! * K + k]!
      logits[i] = logit
    }
    return logits
  }
}

/** logits + base, rounded as training rounds; the logits themselves where there are no rates. */
export function onTop(logits: Float32Array, base: Float32Array | null): Float32Array {
  return base ? logits.map((logit, i) => logit + base[i]!) : logits
}
