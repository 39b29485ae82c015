import type { HstuError } from '../errors.js'
import type { ModelInfo } from './messages.js'
import type { PageStatistics } from './page_manager.js'
import type { BatchRules, Waiting } from './queue.js'

/** How a batch tells what became of its requests; each is told of once. */
export interface BatchHooks {
  /** Whether the caller still waits and the deadline has not passed; reads what the caller's thread has sent meanwhile. */
  wanted(waiting: Waiting): boolean
  /** @param durations of the batch, ms */
  done(waiting: Waiting, reply: unknown, durations: { prefill: number; candidates: number }): void
  /** Callers are told now of what is done: what is left to do for it can wait. */
  tell(): void
  refuse(waiting: Waiting, error: HstuError): void
  count(what: { groups: number; history: number; cached: number; candidates: number }): void
}

/** A model in the engine's thread, and how its requests are computed. */
export interface Host {
  readonly info: ModelInfo
  readonly rules: Omit<BatchRules, 'budget'>
  /** A request as it crossed threads, as one that can be looked at. */
  unpack?(wire: unknown): unknown
  /** What can be done for a request while it waits and the device computes others. */
  prepare?(waiting: Waiting): void
  /**
   * Computes a batch.
   * @returns requests that did not fit in: they are for the next batch
   * @throws HstuError what none of them can be blamed for: the device is lost
   */
  run(batch: readonly Waiting[], hooks: BatchHooks): Promise<Waiting[]>
  /** Drops what is cached of a user. */
  forget(owner: { tenant: string; user: string }): unknown
  /** Of the cache; null where there is none. */
  pages(): PageStatistics | null
  dispose(): void
}

export type Progress = (phase: string, done: number, total: number) => void
