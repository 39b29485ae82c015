import { monitorEventLoopDelay } from 'node:perf_hooks'
import { HstuError } from '../errors.js'
import { Random } from '../random.js'
import type { BundleSchema } from './bundle.js'
import type { Ranker, RankResult } from './ranker.js'
import type { RankRequest } from './request.js'

/** What requests of a load are made of. */
export interface LoadSetting {
  items: readonly string[]
  users: number
  /** Users are drawn with probability 1 / rank^zipf. */
  zipf: number
  /** Rows of a history at first: uniform around this, by half of it. */
  history: number
  candidates: number
  /** Mean of the events that a user has between two requests (mixed). */
  growth: number
  schema: BundleSchema
  seed: number | string
}

/**
 * How histories stand to the cache: 'cold' is a user never seen before, 'hit' one whose history has not changed, 'mixed' users by their
 * popularity whose histories grow.
 */
export type LoadMode = 'cold' | 'hit' | 'mixed'

/** What a load was answered with. Milliseconds; from the time at which a request was due, not from when it was sent. */
export interface LoadReport {
  mode: LoadMode
  /** Requests a second: offered, and answered within the bound. */
  rate: number
  goodput: number
  requests: number
  completed: number
  /** Refused at once, and given up when their deadline passed. */
  refused: number
  late: number
  p50: number
  p90: number
  p99: number
  max: number
  /** Of refusals, from the call. */
  refusalP99: number
  /** Of the tokens of all histories. */
  cachedShare: number
  eventLoopDelayP99: number
  seconds: number
}

/** Values at shares of the sorted list; 0 of an empty one. */
function quantiles(values: number[], shares: readonly number[]): number[] {
  values.sort((a, b) => a - b)
  return shares.map(q => values[Math.min(values.length - 1, Math.floor(q * values.length))] ?? 0)
}

/** Exponential: the time between two events of a Poisson process of rate 1. */
const exponential = (random: Random) => -Math.log(1 - random.float())

/** Rows of a user; a request has them as they are at the time, so they are never changed but replaced. */
interface History {
  items: readonly string[]
  times: readonly number[]
  actions: readonly number[]
  start: number
}

/** A history is given back as this many times its first length: a service, too, sends no more than the model reads. */
const MOST_GROWTH = 2

/** Users with histories, and the requests that they make. */
export class LoadSource {
  readonly #random: Random
  readonly #histories: (History | undefined)[] = []
  readonly #cumulative: number[]
  #fresh = 0
  /** Seconds of the histories' own time. */
  #now = 1_000_000_000

  constructor(readonly setting: LoadSetting) {
    this.#random = new Random(`load:${setting.seed}`)
    let sum = 0
    this.#cumulative = Array.from({ length: setting.users }, (_, rank) => (sum += (rank + 1) ** -setting.zipf))
  }

  #user(): number {
    const at = this.#random.float() * this.#cumulative.at(-1)!
    let [low, high] = [0, this.#cumulative.length - 1]
    while (low < high) {
      const middle = (low + high) >> 1
      if (this.#cumulative[middle]! < at) low = middle + 1
      else high = middle
    }
    return low
  }

  #item = () => this.setting.items[this.#random.int(this.setting.items.length)]!

  #extended(history: History, rows: number): History {
    const { schema, history: mean } = this.setting
    const [items, times, actions] = [history.items.slice(), history.times.slice(), history.actions.slice()]
    for (let k = 0; k < rows; k++) {
      items.push(this.#item())
      times.push(this.#now)
      actions.push(this.#random.int(2 ** Math.min(schema.actions.length, 20)))
      this.#now += this.#random.int(60)
    }
    const over = items.length > MOST_GROWTH * mean ? items.length - mean : 0
    return {
      ...{ items: items.slice(over), times: times.slice(over), actions: actions.slice(over) },
      start: history.start + over,
    }
  }

  #historyOf(user: number): History {
    const none: History = { items: [], times: [], actions: [], start: 0 }
    return (this.#histories[user] ??= this.#extended(none, Math.round(this.setting.history * (0.5 + this.#random.float())))) // biome-ignore format: one line
  }

  next(mode: LoadMode): RankRequest {
    const { candidates, growth, users } = this.setting
    const user = mode === 'cold' ? this.#fresh++ % users : this.#user()
    let history = this.#historyOf(user)
    if (mode === 'mixed') {
      let events = 0
      for (let t = exponential(this.#random); t < growth; t += exponential(this.#random)) events++
      if (events > 0) this.#histories[user] = history = this.#extended(history, events)
    }
    // What the cache knows goes by the user: the same history of another one is computed.
    return {
      ...{ user: mode === 'cold' ? `cold-${this.#fresh}` : `load-${user}`, history, time: this.#now },
      candidates: Array.from({ length: candidates }, this.#item),
    }
  }

  /** One request of every user, the most popular last: what is to be in the cache when 'hit' begins. */
  *everyone(): Generator<RankRequest> {
    for (let user = this.setting.users - 1; user >= 0; user--)
      yield { user: `load-${user}`, history: this.#historyOf(user), candidates: [this.#item()], time: this.#now }
  }
}

/** Sends requests one after the other. @returns medians of what a request takes, and of what of it is not the model's, ms */
export async function measureAlone(ranker: Ranker, source: LoadSource, mode: LoadMode, requests: number) {
  const [totals, overheads]: [number[], number[]] = [[], []]
  for (let k = 0; k < requests; k++) {
    const request = source.next(mode)
    const begin = performance.now()
    const { timings } = await ranker.rank(request)
    const total = performance.now() - begin
    totals.push(total)
    overheads.push(total - timings.prefill - timings.candidates)
  }
  return { latencyP50: quantiles(totals, [0.5])[0]!, overheadP50: quantiles(overheads, [0.5])[0]! }
}

/** Requests a second with `width` of them always under way. */
export async function measureCapacity(ranker: Ranker, source: LoadSource, mode: LoadMode, seconds: number, width = 32) {
  const begin = performance.now()
  let done = 0
  const worker = async () => {
    while (performance.now() - begin < 1e3 * seconds) {
      await ranker.rank(source.next(mode))
      done++
    }
  }
  await Promise.all(Array.from({ length: width }, worker))
  return done / ((performance.now() - begin) / 1e3)
}

/**
 * Open loop: requests are due by a Poisson process, whatever became of those before them.
 * @param rate requests a second
 * @param boundMs deadline of each request, and the latency that counts as good
 */
export async function offerLoad(
  ranker: Ranker,
  source: LoadSource,
  { mode, rate, seconds, boundMs }: { mode: LoadMode; rate: number; seconds: number; boundMs: number },
): Promise<LoadReport> {
  const random = new Random(`arrivals:${source.setting.seed}:${mode}:${rate}`)
  const delay = monitorEventLoopDelay({ resolution: 1 })
  const [latencies, refusals]: [number[], number[]] = [[], []]
  const counts = { requests: 0, refused: 0, late: 0 }
  const tokens = { all: 0, cached: 0 }
  const open = new Set<Promise<void>>()
  const answered = (due: number, { cache }: RankResult) => {
    latencies.push(performance.now() - due)
    tokens.all += cache.tokens
    tokens.cached += cache.cachedTokens
  }
  const rejected = (sent: number, error: unknown) => {
    if (!(error instanceof HstuError)) throw error
    if (error.code === 'ERR_HSTU_OVERLOADED') {
      counts.refused++
      refusals.push(performance.now() - sent)
    } else if (error.code === 'ERR_HSTU_ABORTED') counts.late++
    else throw error
  }
  // Made before, so that the load is the engine's alone.
  const plan: { at: number; request: RankRequest }[] = []
  for (let at = 0; (at += (1e3 * exponential(random)) / rate) < 1e3 * seconds; )
    plan.push({ at, request: source.next(mode) })
  delay.enable()
  const begin = performance.now()
  for (const { at, request } of plan) {
    const due = begin + at
    // By timers, so that waiting takes no processor; what is overdue is sent at once, but the event loop gets its turn.
    do
      await new Promise(resolve =>
        due > performance.now() ? setTimeout(resolve, due - performance.now()) : setImmediate(resolve),
      )
    while (performance.now() < due)
    const sent = performance.now()
    counts.requests++
    const deadlineMs = boundMs - (sent - due)
    const call: Promise<void> = ranker
      .rank({ ...request, deadlineMs })
      .then(
        result => answered(due, result),
        error => rejected(sent, error),
      )
      .finally(() => open.delete(call))
    open.add(call)
  }
  await Promise.all(open)
  const took = (performance.now() - begin) / 1e3
  delay.disable()
  const good = latencies.filter(latency => latency <= boundMs).length
  const [p50, p90, p99, max] = quantiles(latencies, [0.5, 0.9, 0.99, 1]) as [number, number, number, number]
  return {
    ...{ mode, rate, goodput: good / took, ...counts, completed: latencies.length, p50, p90, p99, max },
    ...{ refusalP99: quantiles(refusals, [0.99])[0]!, cachedShare: tokens.cached / Math.max(1, tokens.all) },
    ...{ eventLoopDelayP99: delay.percentile(99) / 1e6, seconds: took },
  }
}
