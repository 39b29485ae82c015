// The thread of an engine: takes requests as they come, forms batches, and has the model compute one after the other.
import { receiveMessageOnPort, workerData } from 'node:worker_threads'
import { HstuError } from '../errors.js'
import { native } from '../native.js'
import { late } from './admission.js'
import { AWAKE_MS } from './awake.js'
import { type BundleManifest, type LoadedBundle, readBundle } from './bundle.js'
import { Histogram } from './histogram.js'
import type { BatchHooks, Host, Progress } from './host.js'
import {
  clock,
  type EngineJob,
  type FromWorker,
  type Result,
  type Timings,
  type ToWorker,
  type WorkerStats,
  wireError,
} from './messages.js'
import { Pace } from './pace.js'
import { takeBatch, type Waiting } from './queue.js'
import { RankHost } from './rank_host.js'
import { RetrieveHost } from './retrieve_host.js'

const job = workerData as EngineJob
const { port } = job
const post = (message: FromWorker, transfer: ArrayBuffer[] = []) => port.postMessage(message, transfer)
const HINT_MS = 10
/** Of a batch, on the CPU and on CUDA. */
const BATCH_TOKENS = [2048, 65_536] as const

class Scheduler {
  readonly #queue: Waiting[] = []
  readonly #byId = new Map<number, Waiting>()
  readonly #calls: (ToWorker & { type: 'call' })[] = []
  readonly #histograms: Record<keyof Timings, Histogram> = {
    ...{ queue: new Histogram(), prefill: new Histogram(), candidates: new Histogram(), total: new Histogram() },
  }
  readonly #counts = { batches: 0, requests: 0, groups: 0, expired: 0, cancelled: 0, swaps: 0 }
  readonly #tokens = { history: 0, cached: 0, candidates: 0 }
  readonly #pace = new Pace()
  #working = false
  #closing = false
  /** Loaded beside, and how it is told of. */
  #next: { host: Host; id: number } | null = null
  /** Tokens of a batch. */
  readonly budget: number

  constructor(private host: Host) {
    this.budget = job.maxBatchTokens ?? BATCH_TOKENS[host.info.device === 'cpu' ? 0 : 1]
    port.on('message', (message: ToWorker) => {
      const waiting = this.#receive(message)
      if (waiting && this.#working) this.host.prepare?.(waiting)
      void this.#work()
    })
  }

  /** @returns the request, of a message that brings one */
  #receive(message: ToWorker): Waiting | undefined {
    if (message.type === 'submit') {
      const { id, tokens, enqueued, deadline } = message
      const wire = this.host.unpack ? this.host.unpack(message.wire) : message.wire
      const waiting = { id, wire, tokens, enqueued, deadline, cancelled: false }
      this.#queue.push(waiting)
      this.#byId.set(waiting.id, waiting)
      return waiting
    }
    if (message.type === 'cancel') {
      const waiting = this.#byId.get(message.id)
      if (waiting) waiting.cancelled = true
    } else if (message.type === 'call') this.#calls.push(message)
    else if (message.type === 'close') this.#closing = true
    return undefined
  }

  /** What came while the model was computing. */
  #drain(): void {
    for (let next = receiveMessageOnPort(port); next; next = receiveMessageOnPort(port)) this.#receive(next.message)
  }

  async #work(): Promise<void> {
    if (this.#working) return
    this.#working = true
    try {
      for (;;) {
        this.#drain()
        this.#answer()
        this.#switch()
        if (this.#closing) return this.#end()
        if (this.#queue.length === 0) {
          this.#pace.end(false) // also where what waited was cancelled or late
          await this.#stayAwake()
          if (this.#hasWork()) continue
          return
        }
        await this.#linger()
        await this.#batch()
        // Timers and files get their turn.
        await new Promise(resolve => setImmediate(resolve))
      }
    } finally {
      this.#working = false
    }
  }

  /** Stays awake a little while there is nothing to do: who gets a result often asks again, and to be woken takes long. */
  async #stayAwake(): Promise<void> {
    const until = clock() + (this.host.info.device === 'cpu' ? 0 : AWAKE_MS)
    for (; !this.#hasWork() && clock() < until; this.#drain()) await new Promise(resolve => setImmediate(resolve))
  }

  #hasWork(): boolean {
    const loaded = this.#next !== null && this.#next.host !== this.host
    return this.#queue.length + this.#calls.length > 0 || this.#closing || loaded
  }

  /** Waits a little for more requests where a batch has room. */
  async #linger(): Promise<void> {
    const full = () => this.#queue.reduce((sum, { tokens }) => sum + tokens, 0) >= this.budget
    const until = this.#queue[0]!.enqueued + job.maxDelayMs
    while (clock() < until && !full()) {
      await new Promise(resolve => setImmediate(resolve))
      this.#drain()
    }
  }

  async #batch(): Promise<void> {
    const { host } = this
    const batch = takeBatch(this.#queue, { budget: this.budget, ...host.rules }).filter(waiting => {
      // What cannot be in time any more is not begun, where another could use the time; the measure gives way, lest it stops all of them.
      const takes = this.#queue.length > 0 ? waiting.tokens * this.#pace.msPerToken : 0
      if (this.#wanted(waiting, takes)) return true
      if (this.#wanted(waiting)) this.#pace.giveWay()
      this.#refuse(waiting, late(Math.round((waiting.deadline ?? waiting.enqueued) - waiting.enqueued)))
      return false
    })
    if (batch.length === 0) return
    const begin = clock()
    const open = new Set(batch)
    const results: Result[] = []
    const settled = (waiting: Waiting) => open.delete(waiting) && this.#pace.settle(waiting.tokens)
    this.#pace.begin(begin)
    const hooks: BatchHooks = {
      wanted: waiting => {
        this.#drain()
        return this.#wanted(waiting)
      },
      done: (waiting, reply, durations) => {
        if (!settled(waiting)) return
        const now = clock()
        const timings = { queue: begin - waiting.enqueued, ...durations, total: now - waiting.enqueued }
        for (const name of Object.keys(timings) as (keyof Timings)[]) this.#histograms[name].add(timings[name])
        this.#byId.delete(waiting.id)
        results.push({ id: waiting.id, reply, timings })
      },
      tell: () => this.#tell(results),
      refuse: (waiting, error) => {
        if (settled(waiting)) this.#refuse(waiting, error)
      },
      count: ({ groups, ...tokens }) => {
        this.#counts.groups += groups
        for (const name of Object.keys(tokens) as (keyof typeof tokens)[]) this.#tokens[name] += tokens[name]
      },
    }
    try {
      const left = await host.run(batch, hooks)
      this.#tell(results)
      for (const waiting of left) open.delete(waiting)
      this.#queue.unshift(...left)
      this.#counts.batches++
      this.#counts.requests += batch.length - left.length
    } catch (error) {
      this.#tell(results)
      for (const waiting of [...open]) hooks.refuse(waiting, error as HstuError)
      if (error instanceof HstuError && error.code === 'ERR_HSTU_DEVICE_LOST')
        post({ type: 'failed', error: wireError(error) })
    }
    this.#pace.end(this.#queue.length > 0)
  }

  /** One message a batch, for each wakes the caller's thread; with how long it took, which counts for the next request. */
  #tell(results: Result[]): void {
    this.#pace.measure(clock())
    if (results.length > 0) post({ type: 'results', results: results.splice(0), msPerToken: this.#pace.msPerToken })
  }

  /** @param takes what is left to do, ms */
  #wanted({ cancelled, deadline }: Waiting, takes = 0): boolean {
    return !cancelled && (deadline === null || clock() + takes < deadline)
  }

  #refuse(waiting: Waiting, error: unknown): void {
    this.#byId.delete(waiting.id)
    if (waiting.cancelled) this.#counts.cancelled++
    else if (waiting.deadline !== null && !this.#wanted(waiting, waiting.tokens * this.#pace.msPerToken))
      this.#counts.expired++
    post({ type: 'refused', id: waiting.id, error: wireError(error) })
  }

  #answer(): void {
    const { ownerOf } = this.host.rules
    for (const call of this.#calls.splice(0)) {
      const { id, name, argument } = call // of forgetUser: what was sent before would be cached again
      const before = ({ id: own, wire }: Waiting) => own < id && ownerOf(wire) === ownerOf(argument)
      if (name === 'forget' && this.#queue.some(before)) this.#calls.push(call)
      else
        try {
          if (name === 'stats') post({ type: 'called', id, result: this.#stats() })
          else if (name === 'forget')
            post({ type: 'called', id, result: this.host.forget(argument as { tenant: string; user: string }) })
          else this.#load(id, argument as string)
        } catch (error) {
          post({ type: 'refused', id, error: wireError(error) })
        }
    }
  }

  #stats(): WorkerStats {
    const histograms = Object.entries(this.#histograms).map(([name, histogram]) => [name, histogram.summary()])
    return {
      ...{ model: this.host.info.model, ...this.#counts, tokens: { ...this.#tokens }, pages: this.host.pages() },
      histograms: Object.fromEntries(histograms),
    }
  }

  /** Loads a bundle beside the model that answers; it takes over between two batches. */
  #load(id: number, folder: string): void {
    if (this.#next)
      throw new HstuError('ERR_HSTU_OVERLOADED', 'another bundle is being loaded', { retryAfterMs: HINT_MS })
    const { host } = this
    this.#next = { host, id }
    load(folder, () => {})
      .then(next => {
        const [before, after] = [host.info, next.info].map(({ schema }) => JSON.stringify(schema))
        if (before === after) return next
        next.dispose()
        throw new HstuError(
          'ERR_HSTU_CHECKPOINT',
          `${folder}: json.schema: expected ${before}, as the model in use has, found ${after}`,
        )
      })
      .then(
        next => {
          this.#next = { host: next, id }
          void this.#work()
        },
        error => {
          this.#next = null
          post({ type: 'refused', id, error: wireError(error) })
        },
      )
  }

  #switch(): void {
    if (!this.#next || this.#next.host === this.host) return
    const { host, id } = this.#next
    this.host.dispose()
    this.host = host
    this.#next = null
    this.#counts.swaps++
    post({ type: 'ready', info: host.info, budget: this.budget })
    post({ type: 'called', id, result: host.info.model })
  }

  #end(): void {
    this.host.dispose()
    if (this.#next && this.#next.host !== this.host) this.#next.host.dispose()
    port.close()
  }
}

async function load(folder: string, progress: Progress): Promise<Host> {
  progress('read', 0, 4)
  const bundle = (await readBundle(folder)) as LoadedBundle<BundleManifest>
  const { type } = bundle.manifest
  if (type !== job.type)
    throw new HstuError(
      'ERR_HSTU_CHECKPOINT',
      `${folder}/manifest.json: json.type: expected '${job.type}', found '${type}'`,
    )
  return type === 'ranker'
    ? RankHost.load(bundle as never, job.options, progress)
    : RetrieveHost.load(bundle as never, job.options, progress)
}

if (job.options.threads !== null) native.set_num_threads(job.options.threads)
load(job.folder, (phase, done, total) => post({ type: 'progress', phase, done, total })).then(
  host => {
    const { budget } = new Scheduler(host)
    post({ type: 'ready', info: host.info, budget })
  },
  error => {
    post({ type: 'failed', error: wireError(error) })
    port.close()
  },
)
