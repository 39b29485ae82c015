import { check, HstuError } from '../errors.js'
import { onceAborted } from './aborts.js'
import { Admission, aborted, type Cost, late, type QueueLimits, type SubmitOptions } from './admission.js'
import { EngineThread } from './engine_thread.js'
import {
  clock,
  type EngineJob,
  errorOf,
  type FromWorker,
  type ModelInfo,
  type Timings,
  type WorkerStats,
} from './messages.js'
import { Turns } from './turns.js'

/** Counts since the engine was loaded. */
export interface EngineStats extends WorkerStats {
  state: EngineState
  accepted: number
  completed: number
  rejected: number
  failed: number
  queued: { requests: number; tokens: number; bytes: number }
}

/** 'ready' takes requests; 'draining' after `close`; 'failed' when its thread or device is lost. */
export type EngineState = 'ready' | 'draining' | 'closed' | 'failed'

/** What became of a request, and the model that answered it. */
export interface Answer {
  reply: unknown
  timings: Timings
  info: ModelInfo
}

interface Pending {
  cost: Cost
  /** When it is to be answered. */
  expected: number
  resolve: (answer: Answer) => void
  reject: (error: HstuError) => void
  /** Removes what was attached to signal and clock. */
  detach: () => void
}

/** A model in a thread of its own, as the caller's thread sees it: bounds, deadlines and what became of each request. */
export class Engine {
  state: EngineState = 'ready'
  /** Of the model that answers now. */
  info: ModelInfo
  readonly #thread: EngineThread
  readonly #admission: Admission
  readonly #pending = new Map<number, Pending>()
  readonly #calls = new Map<number, { resolve: (value: never) => void; reject: (error: HstuError) => void }>()
  readonly #counts = { accepted: 0, completed: 0, rejected: 0, failed: 0 }
  #next = 1
  readonly #answers = new Turns<Answer & { id: number }>(answer => this.#resolve(answer))
  #failure: HstuError | null = null
  #closing: Promise<void> | null = null
  #drained = () => {}

  private constructor(
    thread: EngineThread,
    { info, budget }: FromWorker & { type: 'ready' },
    queue: Partial<QueueLimits>,
  ) {
    this.#thread = thread
    thread.awake = info.device !== 'cpu'
    thread.receive = message => this.#receive(message)
    thread.ended = error => this.#fail(error)
    this.info = info
    this.#admission = new Admission({ requests: 1024, tokens: 32 * budget, bytes: 2 ** 28, ...queue })
  }

  /** @throws HstuError what loading threw */
  static async start(
    job: Omit<EngineJob, 'port'>,
    queue: Partial<QueueLimits>,
    onProgress?: (progress: { phase: string; done: number; total: number }) => void,
  ): Promise<Engine> {
    const thread = new EngineThread(job)
    try {
      return await new Promise<Engine>((resolve, reject) => {
        thread.ended = reject
        thread.receive = message => {
          if (message.type === 'progress') onProgress?.({ ...message })
          else if (message.type === 'failed') reject(errorOf(message.error))
          else if (message.type === 'ready') resolve(new Engine(thread, message, queue))
        }
      })
    } catch (error) {
      await thread.terminate()
      throw error
    } finally {
      thread.hold(false)
    }
  }

  /**
   * Whether a request of this cost may come now: asked before its arrays are looked at, and again where its texts are longer than thought.
   * @throws HstuError ERR_HSTU_OVERLOADED with `retryAfterMs`, ERR_HSTU_ABORTED, ERR_HSTU_DISPOSED, ERR_HSTU_DEVICE_LOST
   */
  admit(cost: Cost, options: SubmitOptions): void {
    try {
      this.#checkOpen()
      this.#admission.check(cost, options)
    } catch (error) {
      this.#counts.rejected++
      throw error
    }
  }

  /** Tells the engine's thread that a request is about to come. */
  wake(): void {
    this.#thread.wake()
  }

  /**
   * Sends a request that was admitted.
   * @param transfer memory of `wire` that goes to the engine's thread
   * @throws HstuError what it is refused with, ERR_HSTU_ABORTED, ERR_HSTU_DEVICE_LOST
   */
  submit(
    wire: unknown,
    cost: Cost,
    { signal, deadlineMs }: SubmitOptions,
    transfer: ArrayBuffer[] = [],
  ): Promise<Answer> {
    const id = this.#next++
    const enqueued = clock()
    const expected = enqueued + this.#admission.expectedMs(cost.tokens)
    this.#counts.accepted++
    this.#admission.count(cost, 1)
    return new Promise((resolve, reject) => {
      let timer: NodeJS.Timeout | undefined
      const forget = signal && onceAborted(signal, () => this.#cancel(id, aborted(signal)))
      const pending: Pending = {
        cost,
        expected,
        resolve,
        reject,
        detach: () => {
          forget?.()
          if (timer) clearTimeout(timer)
        },
      }
      this.#pending.set(id, pending)
      this.#holdOpen()
      if (this.#pending.size === 1) this.#thread.stayAwake()
      const deadline = deadlineMs === undefined ? null : enqueued + deadlineMs
      if (deadlineMs !== undefined && deadlineMs < 2 ** 31)
        timer = setTimeout(() => this.#cancel(id, late(deadlineMs), Infinity), Math.ceil(deadlineMs))
      this.#thread.post({ type: 'submit', id, wire, tokens: cost.tokens, enqueued, deadline }, transfer)
    })
  }

  #checkOpen(): void {
    if (this.#failure) throw this.#failure
    check(this.state === 'ready', 'ERR_HSTU_DISPOSED', () => 'the engine is closed')
  }

  /** Asks the engine's thread. */
  call<R>(name: 'stats' | 'forget' | 'swap', argument: unknown = null): Promise<R> {
    return new Promise((resolve, reject) => {
      this.#checkOpen()
      const id = this.#next++
      this.#calls.set(id, { resolve, reject })
      this.#holdOpen()
      this.#thread.post({ type: 'call', id, name, argument })
    })
  }

  async stats(): Promise<EngineStats> {
    const worker = await this.call<WorkerStats>('stats')
    return { state: this.state, ...this.#counts, queued: { ...this.#admission.queued }, ...worker }
  }

  /** Takes no more requests, waits for those at hand for at most `drainMs`, rejects the rest, and frees everything. */
  close({ drainMs = 5000 }: { drainMs?: number } = {}): Promise<void> {
    this.#closing ??= this.#close(drainMs)
    return this.#closing
  }

  async #close(drainMs: number): Promise<void> {
    if (this.state === 'ready') this.state = 'draining'
    if (this.#pending.size > 0 && !this.#failure) {
      let timer: NodeJS.Timeout | undefined
      const expired = new Promise<void>(resolve => {
        timer = setTimeout(resolve, drainMs)
      })
      await Promise.race([expired, new Promise<void>(resolve => (this.#drained = resolve))])
      clearTimeout(timer)
    }
    const closed = new HstuError(
      'ERR_HSTU_ABORTED',
      `the engine was closed and did not come to the request within ${drainMs} ms`,
    )
    for (const id of [...this.#pending.keys()]) this.#cancel(id, closed)
    if (this.state !== 'failed') this.state = 'closed'
    await this.#thread.close()
    for (const { reject } of this.#calls.values()) reject(closed)
    this.#calls.clear()
  }

  /** What waits for `id`, which waits no more; undefined where it was settled before. */
  #settle(id: number): Pending | undefined {
    const pending = this.#pending.get(id)
    if (!pending) return undefined
    this.#pending.delete(id)
    pending.detach()
    this.#admission.count(pending.cost, -1)
    this.#holdOpen()
    if (this.#pending.size === 0) this.#drained()
    return pending
  }

  #holdOpen(): void {
    this.#thread.hold(this.#pending.size + this.#calls.size > 0)
  }

  /** @param overMs see `Admission.learn`; 0: by no fault of the estimate */
  #cancel(id: number, error: HstuError, overMs = 0): void {
    if (!this.#pending.has(id)) return
    this.#thread.post({ type: 'cancel', id })
    this.#reject(id, error, overMs)
  }

  #reject(id: number, error: HstuError, overMs = 0): void {
    const pending = this.#settle(id)
    if (!pending) return
    // Late before the answer was due says nothing: the deadline was too short for a request alone.
    const over = Math.min(overMs, clock() - pending.expected)
    if (over > this.#admission.marginMs) this.#admission.learn(over)
    this.#counts.failed++
    pending.reject(error)
  }

  #resolve(answer: Answer & { id: number }): void {
    const pending = this.#settle(answer.id)
    if (!pending) return
    this.#admission.learn(clock() - pending.expected)
    this.#counts.completed++
    pending.resolve(answer)
  }

  #receive(message: FromWorker): void {
    if (message.type === 'results') {
      this.#admission.msPerToken = message.msPerToken
      const { info } = this
      this.#answers.add(...message.results.map(({ id, reply, timings }) => ({ id, reply, timings, info })))
    } else if (message.type === 'refused') {
      const error = errorOf(message.error)
      this.#reject(message.id, error, error.code === 'ERR_HSTU_ABORTED' ? Infinity : 0)
      this.#calls.get(message.id)?.reject(error)
      this.#calls.delete(message.id)
      this.#holdOpen()
    } else if (message.type === 'called') {
      this.#calls.get(message.id)?.resolve(message.result as never)
      this.#calls.delete(message.id)
      this.#holdOpen()
    } else if (message.type === 'ready') this.info = message.info
    else if (message.type === 'failed') this.#fail(errorOf(message.error))
  }

  /** The thread or its device is lost: everything at hand is rejected, and all that comes. */
  #fail(error: HstuError): void {
    if (this.#closing && this.state !== 'draining') return
    this.#answers.handOnAll() // what was answered before
    this.#failure ??= error
    this.state = 'failed'
    for (const id of [...this.#pending.keys()]) this.#reject(id, error)
    for (const { reject } of this.#calls.values()) reject(error)
    this.#calls.clear()
    this.#holdOpen()
  }
}
