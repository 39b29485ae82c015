import { monitorEventLoopDelay } from 'node:perf_hooks'
import { HstuError } from '../errors.js'
import { Random } from '../random.js'
import type { SubmitOptions } from './admission.js'
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
  /** Not sent: the load's thread came to them when they were late already. An overload is of `requests`, not of these. */
  unsent: number
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
  /** How late requests were sent: the caller's own thread, which is also the load's. */
  lagP99: number
  /** Of the tokens of all histories. */
  cachedShare: number
  /** Of the caller's thread, from the timer that was due to its turn. */
  eventLoopDelayP99: number
  /** By how much the process's resident memory grew from the second quarter of the load to the last one, MiB. */
  memoryGrowth: number
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

const LISTS = 256
/** A history is given back as this many times its first length: a service, too, sends no more than the model reads. */
const MOST_GROWTH = 2

/** Users with histories, and the requests that they make. */
export class LoadSource {
  readonly #random: Random
  readonly #histories: (History | undefined)[] = []
  readonly #cumulative: number[]
  readonly #names: string[] = []
  /** Requests ask for one of these: what a load costs is to be the engine's. */
  readonly #candidates: readonly (readonly string[])[]
  /** Users who were answered since their last request: who is refused has seen nothing to act upon. */
  readonly #answered = new Set<string>()
  #fresh = 0
  /** Seconds of the histories' own time. */
  #now = 1_000_000_000

  constructor(readonly setting: LoadSetting) {
    this.#random = new Random(`load:${setting.seed}`)
    let sum = 0
    this.#cumulative = Array.from({ length: setting.users }, (_, rank) => (sum += (rank + 1) ** -setting.zipf))
    const list = () => Array.from({ length: setting.candidates }, this.#item)
    this.#candidates = Array.from({ length: LISTS }, list)
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

  /** @param deadlineMs of the request; none where it is left out */
  next(mode: LoadMode, deadlineMs?: number): RankRequest & SubmitOptions {
    const { growth, users } = this.setting
    const user = mode === 'cold' ? this.#fresh++ % users : this.#user()
    let history = this.#historyOf(user)
    const name = mode === 'cold' ? `cold-${this.#fresh}` : this.#nameOf(user)
    if (mode === 'mixed' && this.#answered.delete(name)) {
      let events = 0
      for (let t = exponential(this.#random); t < growth; t += exponential(this.#random)) events++
      if (events > 0) this.#histories[user] = history = this.#extended(history, events)
    }
    // What the cache knows goes by the user: the same history of another one is computed.
    const candidates = this.#candidates[this.#random.int(LISTS)]!
    return { user: name, history, candidates, time: this.#now, deadlineMs }
  }

  /** Made once: a load of many requests a second is to be the engine's work, not this one's. */
  #nameOf(user: number): string {
    return (this.#names[user] ??= `load-${user}`)
  }

  answered({ user }: RankRequest): void {
    this.#answered.add(user as string)
  }

  /** One request of every user, the most popular last: what is to be in the cache when 'hit' begins. */
  *everyone(): Generator<RankRequest> {
    for (let user = this.setting.users - 1; user >= 0; user--)
      yield { user: this.#nameOf(user), history: this.#historyOf(user), candidates: [this.#item()], time: this.#now }
  }
}

/**
 * Sends requests one after the other, as many at least and for so long.
 * @returns medians of what a request takes, and of what of it is not the model's, ms
 */
export async function measureAlone(
  ranker: Ranker,
  source: LoadSource,
  mode: LoadMode,
  { requests, seconds }: { requests: number; seconds: number },
) {
  const [totals, overheads]: [number[], number[]] = [[], []]
  for (const end = performance.now() + 1e3 * seconds; totals.length < requests || performance.now() < end; ) {
    const request = source.next(mode)
    const begin = performance.now()
    const { timings } = await ranker.rank(request)
    source.answered(request)
    const total = performance.now() - begin
    totals.push(total)
    overheads.push(total - timings.prefill - timings.candidates)
  }
  const [overheadP50, overheadP99] = quantiles(overheads, [0.5, 0.99]) as [number, number]
  return { latencyP50: quantiles(totals, [0.5])[0]!, overheadP50, overheadP99 }
}

/** Requests a second with `width` of them always under way. */
export async function measureCapacity(ranker: Ranker, source: LoadSource, mode: LoadMode, seconds: number, width = 32) {
  const begin = performance.now()
  let done = 0
  const worker = async () => {
    while (performance.now() - begin < 1e3 * seconds) {
      const request = source.next(mode)
      await ranker.rank(request)
      source.answered(request)
      done++
    }
  }
  await Promise.all(Array.from({ length: width }, worker))
  return done / ((performance.now() - begin) / 1e3)
}

const MIB = 2 ** 20
const RESOLUTION_MS = 1
/** How long requests that are overdue are sent one after the other. */
const TURN_MS = 0.5

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
  const delay = monitorEventLoopDelay({ resolution: RESOLUTION_MS })
  const [latencies, refusals, lags, memory]: [number[], number[], number[], number[]] = [[], [], [], []]
  const counts = { requests: 0, unsent: 0, refused: 0, late: 0 }
  const tokens = { all: 0, cached: 0 }
  const answered = (due: number, { cache }: RankResult) => {
    latencies.push(performance.now() - due)
    tokens.all += cache.tokens
    tokens.cached += cache.cachedTokens
  }
  const failures: unknown[] = []
  const rejected = (sent: number, error: unknown) => {
    const code = error instanceof HstuError ? error.code : null
    if (code === 'ERR_HSTU_OVERLOADED') {
      counts.refused++
      refusals.push(performance.now() - sent)
    } else if (code === 'ERR_HSTU_ABORTED') counts.late++
    else failures.push(error)
  }
  let open = 0
  let drained = () => {}
  const settled = () => {
    if (--open === 0) drained()
  }
  const sampler = setInterval(() => memory.push(process.memoryUsage.rss()), 20)
  delay.enable()
  const begin = performance.now()
  let [turn, sent] = [begin, begin]
  for (let due = begin; (due += (1e3 * exponential(random)) / rate) < begin + 1e3 * seconds; ) {
    // By timers, so that waiting takes no processor; what is overdue is sent at once, but the event loop gets its turn.
    while ((sent = performance.now()) < due || sent - turn > TURN_MS) {
      const wait = due - sent
      await new Promise(resolve => (wait > 0 ? setTimeout(resolve, wait) : setImmediate(resolve)))
      turn = performance.now()
    }
    if (sent - due >= boundMs) {
      counts.unsent++
      continue
    }
    const request = source.next(mode, boundMs - (sent - due))
    lags.push(sent - due)
    counts.requests++
    open++
    const [dueAt, sentAt] = [due, sent]
    ranker.rank(request).then(
      result => {
        source.answered(request)
        answered(dueAt, result)
        settled()
      },
      error => {
        rejected(sentAt, error)
        settled()
      },
    )
  }
  if (open > 0) await new Promise<void>(resolve => (drained = resolve))
  if (failures.length > 0) throw failures[0]
  const took = (performance.now() - begin) / 1e3
  delay.disable()
  clearInterval(sampler)
  const mean = (from: number, to: number) => {
    const of = memory.slice(Math.floor(from * memory.length), Math.ceil(to * memory.length))
    return of.reduce((sum, bytes) => sum + bytes, 0) / Math.max(1, of.length) / MIB
  }
  const good = latencies.filter(latency => latency <= boundMs).length
  const [p50, p90, p99, max] = quantiles(latencies, [0.5, 0.9, 0.99, 1]) as [number, number, number, number]
  return {
    ...{ mode, rate, goodput: good / took, ...counts, completed: latencies.length, p50, p90, p99, max },
    ...{ refusalP99: quantiles(refusals, [0.99])[0]!, cachedShare: tokens.cached / Math.max(1, tokens.all) },
    ...{ lagP99: quantiles(lags, [0.99])[0]!, memoryGrowth: mean(0.75, 1) - mean(0.25, 0.5) },
    ...{ eventLoopDelayP99: Math.max(0, delay.percentile(99) / 1e6 - RESOLUTION_MS), seconds: took },
  }
}
