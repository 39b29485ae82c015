import { concatBatches, hideItems, sliceBatch, truncateHistory } from '../data/ranking/batches.js'
import type { RequestBatch, TaskTargets } from '../data/ranking/schema.js'
import { shortenHistories } from '../data/ranking/shorten.js'
import { type RankingTask, taskTargets } from '../data/ranking/tasks.js'
import {
  type LengthCounts,
  newLengthCounts,
  type SparsityReport,
  StochasticLength,
  sparsityReport,
} from '../data/stochastic_length.js'
import { check } from '../errors.js'
import { Random } from '../random.js'
import { baseLogits, IdRates } from './id_rates.js'
import type { RankOptions } from './rank_options.js'
import type { HostTensor } from './safetensors.js'

/** Requests at full length, with targets of the candidates. */
export interface Predicted {
  batch: RequestBatch
  candidates: TaskTargets
  /** What logits are learnt on top of; null without `baseRateWindow`. */
  base: BaseLogits | null
}

/** Logits from what was known before a step. */
export interface BaseLogits {
  /** [K] of each task's base rate, 0 of a regression. */
  all: Float64Array
  /** [M, K] of the candidates. */
  candidates: Float64Array
}

/** What a step does with the requests that were read: all of them may be predicted. */
export interface RankWork extends Predicted {
  /** Those that are learnt from, shortened; null for none. */
  learn: { batch: RequestBatch; targets: TaskTargets; base: BaseLogits | null } | null
  /** To be called once the step is made. */
  commit: () => void
}

/** Plain JSON beside the tensor `trained` of a checkpoint. */
export interface RankFeedState {
  lengths: LengthCounts | null
  sampled: { requests: number; trained: number } | null
  /** Of each task: positives and weight of the last impressions, each counting a little less than the one after it. */
  baseRates: [number, number][] | null
}

/**
 * Chooses which requests are learnt from, with which labels and how much of their histories. Every draw is a function of seed, pass and
 * number of the request: a run that is resumed draws the same.
 */
export class RankFeed {
  readonly #random: Random
  readonly #lengths: StochasticLength | null
  /** [users + 1] number of each user's last request that was learnt from in this pass, -1 for none; null where nobody asks. */
  readonly #trained: Int32Array | null
  /** Of `idRates`. */
  readonly #rates: IdRates | null
  #state: RankFeedState

  /** @param sizes the highest numbers of users and items */
  constructor(
    readonly options: RankOptions,
    readonly tasks: readonly RankingTask[],
    readonly fusion: 'interleave' | 'add',
    sizes: { users: number; items: number },
  ) {
    const { stochasticLength: alpha, lengthSelection, maxHistory, supervise, userRate, learnEvery } = options
    const maxTokens = maxHistory * (fusion === 'interleave' ? 2 : 1)
    this.#random = new Random(options.seed)
    this.#lengths = alpha > 0 && maxTokens > 0 ? new StochasticLength(alpha, maxTokens, lengthSelection) : null
    this.#trained = supervise === 'new' ? new Int32Array(sizes.users + 1).fill(-1) : null
    this.#rates = options.idRates ? new IdRates(tasks, sizes) : null
    this.#state = {
      lengths: this.#lengths && newLengthCounts(),
      sampled: userRate > 0 || learnEvery > 0 ? { requests: 0, trained: 0 } : null,
      baseRates: options.baseRateWindow > 0 ? tasks.map(() => [0, 0]) : null,
    }
  }

  /** A pass begins: labels are new again. */
  begin(): void {
    this.#trained?.fill(-1)
    this.#rates?.clear()
  }

  /** How much shorter histories became; null without Stochastic Length. */
  get sparsity(): SparsityReport | null {
    return this.#lengths && sparsityReport(this.#state.lengths!, this.#lengths)
  }

  /** Requests read and learnt from; null where all are. */
  get sampled(): RankFeedState['sampled'] {
    return this.#state.sampled
  }

  /** Of the requests of a batch, as the rates stand; null without `baseRateWindow`. */
  baseOf(batch: RequestBatch): BaseLogits | null {
    const { baseRates } = this.#state
    if (!baseRates) return null
    const all = baseLogits(this.tasks, baseRates)
    const K = all.length
    const candidates = new Float64Array(batch.candidates.items.length * K).map((_, i) => all[i % K]!)
    this.#rates?.addTo(candidates, batch)
    return { all, candidates }
  }

  /** @throws HstuError ERR_HSTU_DATA for a user beyond the records' vocabulary. */
  work(read: RequestBatch, pass: number): RankWork {
    const { options, tasks, fusion } = this
    const batch = truncateHistory(read, options.maxHistory)
    const candidates = taskTargets(batch, tasks)
    const base = this.baseOf(batch)
    const chosen = this.#chosen(batch, pass)
    const whole = chosen.length === batch.requests.length
    const some = whole ? batch : concatRequests(batch, chosen)
    const after = this.#trained && this.#lastTrained(some)
    const state = structuredClone(this.#state)
    if (state.sampled) {
      state.sampled.requests += batch.requests.length
      state.sampled.trained += chosen.length
    }
    if (state.baseRates) countRates(state.baseRates, candidates, options.baseRateWindow)
    let learn: RankWork['learn'] = null
    if (chosen.length > 0) {
      const asked = { supervise: options.supervise, ...(after ? { after: after.before } : {}) }
      const targets = options.supervise === 'candidates' ? candidates : taskTargets(some, tasks, asked)
      learn = { batch: some, targets, base: whole ? base : this.baseOf(some) }
      if (this.#lengths) {
        const root = this.#random.fork(`length ${pass}`)
        const short = shortenHistories(some, targets, this.#lengths, fusion, b => root.fork(some.requests[b]!))
        for (const name of Object.keys(short.counts) as (keyof LengthCounts)[])
          state.lengths![name] += short.counts[name]
        learn = { ...learn, ...short }
      }
      if (options.idDropout > 0) {
        const root = this.#random.fork(`hide ${pass}`)
        learn = { ...learn, batch: hideItems(learn.batch, options.idDropout, b => root.fork(some.requests[b]!)) }
      }
    }
    const commit = () => {
      this.#state = state
      this.#rates?.count(batch, candidates)
      after?.now.forEach((request, user) => {
        this.#trained![user] = request
      })
    }
    return { batch, candidates, base, learn, commit }
  }

  /**
   * With `userRate` each impression sends its user's sequence of n rows with rate c / n, all impressions of a request at once; with
   * `learnEvery` the sequence goes as soon as so many of its labels are new, at first in a pass after a random number of them.
   */
  #chosen(batch: RequestBatch, pass: number): number[] {
    const { userRate, learnEvery } = this.options
    const all = Array.from(batch.requests, (_, b) => b)
    if (learnEvery > 0) {
      const root = this.#random.fork(`every ${pass}`)
      const last = new Map<number, number>()
      return all.filter(b => {
        const user = this.#user(batch, b)
        const after = last.get(user) ?? this.#trained![user]!
        const wanted = after < 0 ? 1 + root.fork(user).int(learnEvery) : learnEvery
        const learnt = newLabels(batch, b, after, wanted) >= wanted
        if (learnt) last.set(user, batch.requests[b]!)
        return learnt
      })
    }
    if (userRate === 0) return all
    const root = this.#random.fork(`user ${pass}`)
    return all.filter(b => root.fork(batch.requests[b]!).float() < sendRate(batch, b, userRate))
  }

  #lastTrained(batch: RequestBatch): { before: Int32Array; now: Map<number, number> } {
    const now = new Map<number, number>()
    const before = Int32Array.from(batch.users, (_, b) => {
      const user = this.#user(batch, b)
      const last = now.get(user) ?? this.#trained![user]!
      now.set(user, batch.requests[b]!)
      return last
    })
    return { before, now }
  }

  #user({ users, requests }: RequestBatch, b: number): number {
    const [user, count] = [Number(users[b]!), this.#trained!.length]
    check(user >= 0 && user < count, 'ERR_HSTU_DATA', () => {
      return `request ${requests[b]}: user number ${users[b]} is not in the records' 0 .. ${count - 1}`
    })
    return user
  }

  /** Everything needed to go on exactly. */
  state(): { json: RankFeedState; tensors: Record<string, HostTensor> } {
    const trained = this.#trained?.slice()
    return {
      json: this.#state,
      tensors: {
        ...(trained ? { trained: { dtype: 'int32', shape: [trained.length], data: trained } } : {}),
        ...this.#rates?.tensors(),
      },
    }
  }

  /** Goes on from a state taken earlier. @throws HstuError ERR_HSTU_CHECKPOINT where it is of other options. */
  restore(json: RankFeedState, tensors: ReadonlyMap<string, HostTensor> | undefined): void {
    const trained = tensors?.get('trained')?.data
    const same = (a: unknown, b: unknown) => (a == null) === (b == null)
    const fits =
      json && (['lengths', 'sampled', 'baseRates'] as const).every(name => same(json[name], this.#state[name]))
    check(Boolean(fits) && trained?.length === this.#trained?.length, 'ERR_HSTU_CHECKPOINT', () => {
      return 'what was learnt from is not told as the options need it'
    })
    this.#state = structuredClone(json)
    this.#trained?.set(trained as Int32Array)
    this.#rates?.restore(tensors)
  }
}

/** Adds a step's impressions, each worth exp(-1 / window) of the next. */
function countRates(rates: [number, number][], { labels, weights }: TaskTargets, window: number): void {
  const K = rates.length
  rates.forEach((own, k) => {
    for (let i = k; i < labels.length; i += K) {
      const kept = Math.exp(-weights[i]! / window)
      own[0] = kept * own[0] + weights[i]! * labels[i]!
      own[1] = kept * own[1] + weights[i]!
    }
  })
}

/** Candidates of request b and rows of its history that were candidates after request `after`; counted as far as `enough`. */
function newLabels({ history, candidates }: RequestBatch, b: number, after: number, enough: number): number {
  let count = Number(candidates.offsets[b + 1]! - candidates.offsets[b]!)
  for (let t = Number(history.offsets[b + 1]!) - 1; t >= Number(history.offsets[b]!) && count < enough; t--)
    count += Number(history.requests[t]! > after)
  return count
}

/** Chance that request b is learnt from: of K impressions each sends the user's sequence, n rows with them, with rate c / n. */
export function sendRate({ history, candidates }: RequestBatch, b: number, c: number): number {
  const K = Number(candidates.offsets[b + 1]! - candidates.offsets[b]!)
  const n = Number(history.offsets[b + 1]! - history.offsets[b]!) + K
  return Math.min(1, (c * K) / n)
}

function concatRequests(batch: RequestBatch, chosen: readonly number[]): RequestBatch {
  if (chosen.length === 0) return sliceBatch(batch, 0, 0)
  return concatBatches(chosen.map(b => sliceBatch(batch, b, b + 1)))
}
