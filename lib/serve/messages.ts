import type { MessagePort } from 'node:worker_threads'
import { HstuError, type HstuErrorCode } from '../errors.js'
import type { BundleSchema } from './bundle.js'
import type { HistogramSummary } from './histogram.js'
import type { PageStatistics } from './page_manager.js'

/** Milliseconds that all threads of the process agree on. */
const { timeOrigin } = performance
export const clock = (): number => timeOrigin + performance.now()

/** What an engine's thread is started with. */
export interface EngineJob {
  /** To the caller's thread. A port of its own, for both threads look into it while they wait. */
  port: MessagePort
  type: 'ranker' | 'retriever'
  folder: string
  options: HostOptions
  /** Tokens of a batch (null: by the device), and how long one that is not full waits for more, ms. */
  maxBatchTokens: number | null
  maxDelayMs: number
}

/** What a model is loaded with; see `RankerOptions`. */
export interface HostOptions {
  device: string
  maxHistory: number | null
  cacheBytes: number | null
  cacheTtlMs: number | null
  /** null: by the device. */
  microbatch: number | null
  deterministic: boolean
  unknownIds: 'error' | 'unknown-row'
  /** Of the CPU backend, which is the process's; null: as it is. */
  threads: number | null
}

/** A request that was admitted. */
export interface Submitted {
  id: number
  wire: unknown
  /** An upper bound of what it costs. */
  tokens: number
  enqueued: number
  /** By `clock`; null: none. */
  deadline: number | null
}

/** To the engine's thread. */
export type ToWorker =
  | ({ type: 'submit' } & Submitted)
  | { type: 'cancel'; id: number }
  | { type: 'call'; id: number; name: 'stats' | 'forget' | 'swap'; argument: unknown }
  /** A request is about to come. */
  | { type: 'wake' }
  | { type: 'close' }

/** What is told of a loaded model. */
export interface ModelInfo {
  model: string
  device: string
  schema: BundleSchema
  tasks: readonly { name: string; kind: 'binary' | 'regression' }[]
  maxHistory: number
  /** Tokens of a request of n history rows are at most base + perRow n. */
  base: number
  perRow: number
  /** Why histories are cached within a request only; null where they are kept for the next one. */
  cacheOff: string | null
}

/** How long a request took, ms. */
export interface Timings {
  /** From the call to the begin of its batch. */
  queue: number
  /** Of its batch: history and first microbatch, other microbatches. */
  prefill: number
  candidates: number
  /** From the call to the result. */
  total: number
}

export interface WireError {
  code: HstuErrorCode
  message: string
  retryAfterMs: number | null
}

/** An error of any kind as one that crosses threads. */
export function wireError(error: unknown): WireError {
  if (error instanceof HstuError) return { code: error.code, message: error.message, retryAfterMs: error.retryAfterMs }
  // A defect of ours: the request's, not the engine's.
  const text = error instanceof Error ? (error.stack ?? error.message) : String(error)
  return {
    code: 'ERR_HSTU_INVALID_ARGUMENT',
    message: `the engine could not compute the request: ${text}`,
    retryAfterMs: null,
  }
}

/** The error that {@link wireError} was made of. */
export const errorOf = ({ code, message, retryAfterMs }: WireError): HstuError =>
  new HstuError(code, message, retryAfterMs === null ? {} : { retryAfterMs })

/** Of a request that was computed. */
export interface Result {
  id: number
  reply: unknown
  timings: Timings
}

/** From the engine's thread. */
export type FromWorker =
  | { type: 'progress'; phase: string; done: number; total: number }
  | { type: 'ready'; info: ModelInfo; budget: number }
  | { type: 'results'; results: Result[]; msPerToken: number }
  | { type: 'refused'; id: number; error: WireError }
  | { type: 'called'; id: number; result: unknown }
  | { type: 'failed'; error: WireError }

/** Counted in the engine's thread. */
export interface WorkerStats {
  model: string
  batches: number
  /** Requests, and groups of the same history among them: fewer where requests of a user were put together. */
  requests: number
  groups: number
  expired: number
  cancelled: number
  swaps: number
  tokens: { history: number; cached: number; candidates: number }
  /** Of the cache of histories; null of a model that has none. */
  pages: PageStatistics | null
  histograms: Record<keyof Timings, HistogramSummary>
}
