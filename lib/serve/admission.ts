import { check, HstuError } from '../errors.js'

/** What may wait or run in an engine at once; over a bound a request is refused at once with ERR_HSTU_OVERLOADED. */
export interface QueueLimits {
  /** Default 1024. */
  requests: number
  /** History rows and candidates as tokens; default 32 batches. */
  tokens: number
  /** Of the requests' arrays; default 256 MiB. */
  bytes: number
}

/** What a request costs, known before any work; the bytes of texts are a guess until they are at hand, and asked again where they exceed it. */
export interface Cost {
  tokens: number
  bytes: number
}

export interface SubmitOptions {
  /** Aborts the request: it never reaches the device, or stops between microbatches. */
  signal?: AbortSignal | undefined
  /** From now; what is late is rejected, and not computed. */
  deadlineMs?: number | undefined
}

/** Of a deadline, what the queue may take by what was measured: a request that is admitted and late anyway took another's time. */
const DEADLINE_SHARE = 0.7

/** How many of a hundred answers are to come within their expected time and the margin; how far one answer moves the margin, ms. */
const IN_TIME = 0.95
const MARGIN_STEP_MS = 1
const MOST_MARGIN_MS = 1000

/** What a request that is late is rejected with. */
export const late = (deadlineMs: number) => new HstuError('ERR_HSTU_ABORTED', `the deadline of ${deadlineMs} ms passed`)

export const aborted = (signal: AbortSignal | undefined) =>
  new HstuError('ERR_HSTU_ABORTED', 'the request was aborted', { cause: signal?.reason })

/** An error of an overload comes by the thousand, and where from is known: to find out costs most of what a refusal does. */
function withoutTrace<E extends Error>(make: () => E): E {
  const { stackTraceLimit } = Error
  Error.stackTraceLimit = 0
  try {
    return make()
  } finally {
    Error.stackTraceLimit = stackTraceLimit
  }
}

/** What an engine has at hand, and whether it takes more. */
export class Admission {
  readonly queued = { requests: 0, tokens: 0, bytes: 0 }
  /** Measured; 0 until the first result. */
  msPerToken = 0
  /** How much longer than expected all but 1 - {@link IN_TIME} of the answers take, ms: what the estimate leaves out, a caller's lag. */
  marginMs = 0

  constructor(readonly limits: QueueLimits) {}

  /** @throws HstuError ERR_HSTU_OVERLOADED with `retryAfterMs`, ERR_HSTU_ABORTED, ERR_HSTU_INVALID_ARGUMENT */
  check({ tokens, bytes }: Cost, options: SubmitOptions): void {
    const { signal, deadlineMs } = options ?? {}
    check(signal == null || typeof signal.addEventListener === 'function', 'ERR_HSTU_INVALID_ARGUMENT', () => {
      return `signal must be an AbortSignal, got ${typeof signal}`
    })
    if (signal?.aborted) throw aborted(signal)
    if (deadlineMs !== undefined) {
      const valid = typeof deadlineMs === 'number' && !Number.isNaN(deadlineMs)
      check(valid, 'ERR_HSTU_INVALID_ARGUMENT', () => `deadlineMs must be a number of milliseconds, got ${deadlineMs}`)
      if (deadlineMs <= 0) throw late(deadlineMs)
    }
    const { queued, limits } = this
    if (queued.requests + 1 > limits.requests) throw this.#full('requests', 1)
    // A request that alone is over a bound is taken where nothing else is: rows and candidates have bounds of their own.
    if (queued.requests === 0) return
    if (queued.tokens + tokens > limits.tokens) throw this.#full('tokens', tokens)
    if (queued.bytes + bytes > limits.bytes) throw this.#full('bytes', bytes)
    if (deadlineMs === undefined) return
    // Never less than a share: what is learnt in a bad moment would else stop all that could teach better.
    const room = Math.max((1 - DEADLINE_SHARE) * deadlineMs, deadlineMs - this.marginMs)
    if (this.expectedMs(tokens) > Math.min(DEADLINE_SHARE * deadlineMs, room))
      throw this.#over(`the queue takes about ${Math.ceil(this.expectedMs(0))} ms, the deadline is ${deadlineMs} ms`)
  }

  #full(name: keyof QueueLimits, own: number): HstuError {
    const { queued, limits } = this
    return this.#over(`${queued[name]} ${name} are queued, the bound is ${limits[name]} and the request has ${own}`)
  }

  #over(what: string): HstuError {
    const retryAfterMs = Math.max(1, Math.ceil(this.expectedMs(0) / 2))
    const message = `${what}; try again in ${retryAfterMs} ms`
    return withoutTrace(() => new HstuError('ERR_HSTU_OVERLOADED', message, { retryAfterMs }))
  }

  /** How long a request of so many tokens takes behind those at hand, ms. */
  expectedMs(tokens: number): number {
    return (this.queued.tokens + tokens) * this.msPerToken
  }

  /** @param overMs how much longer than expected an answer took; Infinity where it was late */
  learn(overMs: number): void {
    const step = overMs > this.marginMs ? IN_TIME : IN_TIME - 1
    this.marginMs = Math.min(
      MOST_MARGIN_MS,
      Math.max(0, this.marginMs + Math.max(MARGIN_STEP_MS, this.marginMs / 100) * step),
    )
  }

  /** @param sign 1 when a request is taken, -1 when it is settled */
  count({ tokens, bytes }: Cost, sign: 1 | -1): void {
    this.queued.requests += sign
    this.queued.tokens += sign * tokens
    this.queued.bytes += sign * bytes
  }
}
