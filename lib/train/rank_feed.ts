import { concatBatches, sliceBatch, truncateHistory } from '../data/ranking/batches.js'
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
import type { RankOptions } from './rank_options.js'
import type { HostTensor } from './safetensors.js'

/** Requests at full length, with targets of the candidates. */
export interface Predicted {
  batch: RequestBatch
  candidates: TaskTargets
}

/** What a step does with the requests that were read: all of them may be predicted. */
export interface RankWork extends Predicted {
  /** Those that are learnt from, shortened; null for none. */
  learn: { batch: RequestBatch; targets: TaskTargets } | null
  /** To be called once the step is made. */
  commit: () => void
}

/** Plain JSON beside the tensor `trained` of a checkpoint. */
export interface RankFeedState {
  lengths: LengthCounts | null
  sampled: { requests: number; trained: number } | null
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
  #state: RankFeedState

  /** @param users the highest number of a user */
  constructor(
    readonly options: RankOptions,
    readonly tasks: readonly RankingTask[],
    readonly fusion: 'interleave' | 'add',
    users: number,
  ) {
    const { stochasticLength: alpha, lengthSelection, maxHistory, supervise, userRate } = options
    const maxTokens = maxHistory * (fusion === 'interleave' ? 2 : 1)
    this.#random = new Random(options.seed)
    this.#lengths = alpha > 0 && maxTokens > 0 ? new StochasticLength(alpha, maxTokens, lengthSelection) : null
    this.#trained = supervise === 'new' ? new Int32Array(users + 1).fill(-1) : null
    this.#state = {
      lengths: this.#lengths && newLengthCounts(),
      sampled: userRate > 0 ? { requests: 0, trained: 0 } : null,
    }
  }

  /** A pass begins: labels are new again. */
  begin(): void {
    this.#trained?.fill(-1)
  }

  /** How much shorter histories became; null without Stochastic Length. */
  get sparsity(): SparsityReport | null {
    return this.#lengths && sparsityReport(this.#state.lengths!, this.#lengths)
  }

  /** Requests read and learnt from; null where all are. */
  get sampled(): RankFeedState['sampled'] {
    return this.#state.sampled
  }

  /** @throws HstuError ERR_HSTU_DATA for a user beyond the records' vocabulary. */
  work(read: RequestBatch, pass: number): RankWork {
    const { options, tasks, fusion } = this
    const batch = truncateHistory(read, options.maxHistory)
    const candidates = taskTargets(batch, tasks)
    const chosen = this.#chosen(batch, pass)
    const whole = chosen.length === batch.requests.length
    const some = whole ? batch : concatRequests(batch, chosen)
    const after = this.#trained && this.#lastTrained(some)
    const state = structuredClone(this.#state)
    if (state.sampled) {
      state.sampled.requests += batch.requests.length
      state.sampled.trained += chosen.length
    }
    let learn: RankWork['learn'] = null
    if (chosen.length > 0) {
      const asked = { supervise: options.supervise, ...(after ? { after: after.before } : {}) }
      const targets = options.supervise === 'candidates' ? candidates : taskTargets(some, tasks, asked)
      learn = { batch: some, targets }
      if (this.#lengths) {
        const root = this.#random.fork(`length ${pass}`)
        const short = shortenHistories(some, targets, this.#lengths, fusion, b => root.fork(some.requests[b]!))
        for (const name of Object.keys(short.counts) as (keyof LengthCounts)[])
          state.lengths![name] += short.counts[name]
        learn = short
      }
    }
    const commit = () => {
      this.#state = state
      after?.now.forEach((request, user) => {
        this.#trained![user] = request
      })
    }
    return { batch, candidates, learn, commit }
  }

  /** Each impression sends its user's sequence of n rows with rate c / n, all impressions of a request at once. */
  #chosen(batch: RequestBatch, pass: number): number[] {
    const { userRate } = this.options
    const all = Array.from(batch.requests, (_, b) => b)
    if (userRate === 0) return all
    const root = this.#random.fork(`user ${pass}`)
    return all.filter(b => root.fork(batch.requests[b]!).float() < sendRate(batch, b, userRate))
  }

  #lastTrained(batch: RequestBatch): { before: Int32Array; now: Map<number, number> } {
    const now = new Map<number, number>()
    const before = Int32Array.from(batch.users, (id, b) => {
      const user = Number(id)
      check(user >= 0 && user < this.#trained!.length, 'ERR_HSTU_DATA', () => {
        return `request ${batch.requests[b]}: user number ${id} is not in the records' 0 .. ${this.#trained!.length - 1}`
      })
      const last = now.get(user) ?? this.#trained![user]!
      now.set(user, batch.requests[b]!)
      return last
    })
    return { before, now }
  }

  /** Everything needed to go on exactly. */
  state(): { json: RankFeedState; tensors: Record<string, HostTensor> } {
    const trained = this.#trained?.slice()
    return {
      json: this.#state,
      tensors: trained ? { trained: { dtype: 'int32', shape: [trained.length], data: trained } } : {},
    }
  }

  /** Goes on from a state taken earlier. @throws HstuError ERR_HSTU_CHECKPOINT where it is of other options. */
  restore(json: RankFeedState, tensors: ReadonlyMap<string, HostTensor> | undefined): void {
    const trained = tensors?.get('trained')?.data
    const same = (a: unknown, b: unknown) => (a == null) === (b == null)
    const fits = json && same(json.lengths, this.#state.lengths) && same(json.sampled, this.#state.sampled)
    check(Boolean(fits) && trained?.length === this.#trained?.length, 'ERR_HSTU_CHECKPOINT', () => {
      return 'what was learnt from is not told as the options need it'
    })
    this.#state = structuredClone(json)
    this.#trained?.set(trained as Int32Array)
  }
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
