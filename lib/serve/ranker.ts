import { check } from '../errors.js'
import type { Device } from '../tensor.js'
import type { Cost, QueueLimits, SubmitOptions } from './admission.js'
import { type Answer, Engine, type EngineState, type EngineStats } from './engine.js'
import type { HostOptions, ModelInfo, Timings } from './messages.js'
import { packRequest, ROW_BYTES } from './packed.js'
import type { RankReply } from './rank_host.js'
import { checkRequest, type RankRequest } from './request.js'
import type { Id } from './vocabulary.js'

/** What is told while a model is loaded. */
export interface LoadProgress {
  /** 'read', 'model', 'cache', 'golden', 'ready' */
  phase: string
  done: number
  total: number
}

/** How an engine is loaded; what every engine has. */
export interface EngineOptions {
  /** 'auto' (default) takes CUDA where it is usable; an explicit 'cuda' never falls back. */
  device?: 'auto' | Device
  /** Rows of a history: the latest ones are kept. Default as in training. */
  maxHistory?: number
  /** What an id becomes that the model does not know: its row for unknown ids (default; counted in the result), or an error. */
  unknownIds?: 'error' | 'unknown-row'
  /** What may wait; see {@link QueueLimits}. */
  queue?: Partial<QueueLimits>
  /** History rows and candidates of a batch, as tokens; default 2,048 on the CPU and 65,536 on CUDA. */
  maxBatchTokens?: number
  /** How long a batch that is not full waits for more requests; default 0: batches form while the one before them is computed. */
  maxDelayMs?: number
  /** Threads of the CPU backend, which the whole process shares; default HSTU_NUM_THREADS, or one a core. */
  threads?: number
  onProgress?: (progress: LoadProgress) => void
}

/** @see Ranker.load */
export interface RankerOptions extends EngineOptions {
  /** Most candidates of a request; default 16,384. */
  maxCandidates?: number
  /** Of the cache of histories; default 256 MiB on the CPU, 2 GiB on CUDA. Taken at once. */
  cacheBytes?: number
  /** Cached histories that no request has read for so long are dropped; default never. */
  cacheTtlMs?: number
  /** Candidates of a request that are computed at once; deadlines are looked at between two. Default 1,024 on the CPU and 4,096 on CUDA. */
  microbatch?: number
  /**
   * Whether a score is bit for bit the same whatever is cached and whoever shares the batch; default true. With false the same holds within
   * twice the rounding of the model's dtype, and on Hopper attention over long histories takes less time where a batch has few rows (one
   * request, or some with a history in the cache), for a row's keys are then summed up by several processors at once: a fifth of the device
   * time of one request with 7,000 tokens and 2,048 candidates. Elsewhere both are the same.
   */
  deterministic?: boolean
}

/** The result of {@link Ranker.rank}. */
export interface RankResult {
  /** By task, in the order of the candidates: the probability of a binary task, the value of a regression task. */
  scores: Record<string, Float64Array>
  /** Version of the model that gave them. */
  model: string
  /** Whether the history was computed ('cold'), read but for what is less than a page ('hit') or both; how many of its tokens were read. */
  cache: { state: 'cold' | 'partial' | 'hit'; tokens: number; cachedTokens: number }
  /** Ids of the request that the model does not know. */
  unknownIds: number
  /** Milliseconds. */
  timings: Timings
  /** Requests that were computed together. */
  batch: number
}

/** Bytes of an id as they are reckoned beforehand: what texts have is known when they are written. */
const ID_BYTES = 40
const DEFAULT_CANDIDATES = 16_384

/** By the lengths alone, of a request that nobody has looked at. */
function costOf(request: RankRequest, { base, perRow, maxHistory }: ModelInfo): Cost {
  const length = (array: unknown) => Number((array as ArrayLike<unknown> | null | undefined)?.length) || 0
  const rows = Math.min(length(request?.history?.items), maxHistory)
  const candidates = length(request?.candidates)
  return { tokens: base + perRow * rows + candidates, bytes: ROW_BYTES * rows + ID_BYTES * (rows + candidates) }
}

function resultOf(reply: RankReply, { timings, info }: Answer): RankResult {
  const { logits, model, history, cached, state, unknown, batch } = reply
  const { tasks } = info
  const [K, m] = [tasks.length, logits.length / tasks.length]
  const scores: Record<string, Float64Array> = {}
  tasks.forEach(({ name, kind }, k) => {
    const of = new Float64Array(m)
    for (let i = 0; i < m; i++) of[i] = logits[i * K + k]!
    if (kind === 'binary') for (let i = 0; i < m; i++) of[i] = 1 / (1 + Math.exp(-of[i]!))
    scores[name] = of
  })
  const cache = { state, tokens: history, cachedTokens: cached }
  return { scores, model, cache, unknownIds: unknown, timings, batch }
}

/** The bounds that are not given, and checks of those that are. */
export function engineSettings(options: EngineOptions) {
  const {
    device = 'auto',
    maxHistory = null,
    unknownIds = 'unknown-row',
    threads = null,
    maxDelayMs = 0,
    queue = {},
  } = options
  const count = (name: string, value: number | null | undefined, least = 1) =>
    check(value == null || (Number.isSafeInteger(value) && value >= least), 'ERR_HSTU_INVALID_ARGUMENT', () => {
      return `${name} must be a whole number of at least ${least}, got ${value}`
    })
  const maxBatchTokens = options.maxBatchTokens ?? null
  for (const [name, value] of Object.entries({ maxHistory, threads, maxBatchTokens, ...queue })) count(name, value)
  check(
    maxDelayMs >= 0 && maxDelayMs <= 1000,
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `maxDelayMs must be in 0 .. 1000, got ${maxDelayMs}`,
  )
  check(['error', 'unknown-row'].includes(unknownIds), 'ERR_HSTU_INVALID_ARGUMENT', () => {
    return `unknownIds must be 'error' or 'unknown-row', got ${JSON.stringify(unknownIds)}`
  })
  const host: HostOptions = {
    ...{ device, maxHistory, unknownIds, threads, cacheBytes: null, cacheTtlMs: null, microbatch: null },
    deterministic: true,
  }
  return { host, queue, maxBatchTokens, maxDelayMs, count }
}

/**
 * A ranking model in a thread of its own: requests from anywhere in the process are checked, admitted, put together into batches and
 * scored over cached histories (M-FALCON), while the caller's event loop stays free.
 *
 *     await using ranker = await Ranker.load('bundles/rank')
 *     const { scores } = await ranker.rank({ user, history: { items, times, actions }, candidates, deadlineMs: 80 })
 *
 * A score does not depend on what is cached, on the order or number of candidates, nor on who shares the batch: bit for bit, unless
 * `deterministic: false` lets it be within the rounding of the dtype.
 */
export class Ranker {
  readonly #engine: Engine
  readonly #maxCandidates: number

  private constructor(engine: Engine, maxCandidates: number) {
    this.#engine = engine
    this.#maxCandidates = maxCandidates
  }

  /**
   * Loads the bundle in `folder` and checks that it gives its golden request the scores that it says.
   * @throws HstuError ERR_HSTU_CHECKPOINT for a bundle that is damaged or none; ERR_HSTU_INVALID_ARGUMENT for bad options;
   * ERR_HSTU_CUDA_UNAVAILABLE, ERR_HSTU_DRIVER_TOO_OLD, ERR_HSTU_OUT_OF_MEMORY
   */
  static async load(folder: string, options: RankerOptions = {}): Promise<Ranker> {
    const { maxCandidates = DEFAULT_CANDIDATES, cacheBytes, cacheTtlMs, microbatch, onProgress } = options
    const { deterministic = true } = options
    const { host, queue, maxBatchTokens, maxDelayMs, count } = engineSettings(options)
    for (const [name, value] of Object.entries({ maxCandidates, cacheBytes, cacheTtlMs, microbatch }))
      count(name, value)
    check(typeof deterministic === 'boolean', 'ERR_HSTU_INVALID_ARGUMENT', () => {
      return `deterministic must be true or false, got ${JSON.stringify(deterministic)}`
    })
    Object.assign(host, { cacheBytes: cacheBytes ?? null, cacheTtlMs: cacheTtlMs ?? null, deterministic })
    if (microbatch !== undefined) host.microbatch = microbatch
    const job = { type: 'ranker' as const, folder, options: host, maxBatchTokens, maxDelayMs }
    return new Ranker(await Engine.start(job, queue, onProgress), maxCandidates)
  }

  /** Version, device and names of the model that answers. */
  get info(): ModelInfo {
    return this.#engine.info
  }

  /** 'ready' takes requests; 'draining' and 'closed' after `close`; 'failed' when the device or the thread is lost. */
  get state(): EngineState {
    return this.#engine.state
  }

  /**
   * Scores candidates.
   * @throws HstuError ERR_HSTU_INVALID_ARGUMENT naming what is wrong with the request; ERR_HSTU_OVERLOADED at once, with `retryAfterMs`,
   * when too much is queued; ERR_HSTU_ABORTED by `signal`, when `deadlineMs` has passed or the engine was closed; ERR_HSTU_DISPOSED after
   * `close`; ERR_HSTU_OUT_OF_MEMORY; ERR_HSTU_DEVICE_LOST
   */
  async rank(request: RankRequest & SubmitOptions): Promise<RankResult> {
    const { info } = this
    const cost = costOf(request, info)
    this.#engine.admit(cost, request)
    this.#engine.wake()
    const limits = { ...info.schema, maxHistory: info.maxHistory, maxCandidates: this.#maxCandidates }
    const { packed, memories } = packRequest(checkRequest(request, limits))
    const sent = { ...cost, bytes: memories.reduce((sum, { byteLength }) => sum + byteLength, 0) }
    if (sent.bytes > cost.bytes) this.#engine.admit(sent, request)
    const answer = await this.#engine.submit(packed, sent, request, memories)
    return resultOf(answer.reply as RankReply, answer)
  }

  /** Drops everything that is cached of a user. @returns pages freed, and those that requests at hand still hold: they go with them. */
  forgetUser(user: Id, { tenant = '' }: { tenant?: string } = {}): Promise<{ freed: number; held: number }> {
    return this.#engine.call('forget', { tenant, user: String(user) })
  }

  /**
   * Loads another bundle beside the one in use, checks its golden scores, and lets it take over between two batches. Whatever fails leaves
   * the old one in use.
   * @returns the version that answers from now on
   * @throws HstuError as `load`; ERR_HSTU_CHECKPOINT also where its features or actions are others
   */
  swap(folder: string): Promise<string> {
    return this.#engine.call('swap', folder)
  }

  /** Counts, cache and histograms. */
  stats(): Promise<EngineStats> {
    return this.#engine.stats()
  }

  /** Takes no more requests, waits for those at hand for at most `drainMs` (default 5,000), rejects the rest and frees everything. */
  close(options?: { drainMs?: number }): Promise<void> {
    return this.#engine.close(options)
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }
}
