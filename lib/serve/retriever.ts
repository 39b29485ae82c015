import type { SubmitOptions } from './admission.js'
import { Engine, type EngineState, type EngineStats } from './engine.js'
import { idBytes } from './ids.js'
import type { ModelInfo, Timings } from './messages.js'
import { type EngineOptions, engineSettings } from './ranker.js'
import { checkRetrieval, type RetrieveRequest } from './request.js'
import type { RetrieveReply } from './retrieve_host.js'

/** The result of {@link Retriever.retrieve}. */
export interface RetrieveResult {
  /** Ids of items, best first; fewer than k where fewer are left. */
  items: string[]
  /** Their scores, best first. */
  scores: Float32Array
  /** Version of the model that gave them. */
  model: string
  /** Items of the history that the model does not know: they are left out. */
  unknownIds: number
  timings: Timings
  batch: number
}

/** Of a row's id and time, as they are reckoned beforehand. */
const ROW_BYTES = 48

/**
 * A retrieval model in a thread of its own: the best next items of a history among all, exactly.
 *
 *     await using retriever = await Retriever.load('bundles/retrieval')
 *     const { items } = await retriever.retrieve({ history: { items, times }, k: 100 })
 */
export class Retriever {
  readonly #engine: Engine

  private constructor(engine: Engine) {
    this.#engine = engine
  }

  /** Loads the bundle in `folder`. @throws HstuError as `Ranker.load` */
  static async load(folder: string, options: EngineOptions = {}): Promise<Retriever> {
    const { host, queue, maxBatchTokens, maxDelayMs } = engineSettings(options)
    const job = { type: 'retriever' as const, folder, options: host, maxBatchTokens, maxDelayMs }
    return new Retriever(await Engine.start(job, queue, options.onProgress))
  }

  /** Version and device of the model that answers. */
  get info(): ModelInfo {
    return this.#engine.info
  }

  /** As of `Ranker`. */
  get state(): EngineState {
    return this.#engine.state
  }

  /**
   * The `k` items with the highest scores, less those of the history, or `exclude`. Ties go to the item that the model met first.
   * @throws HstuError as `Ranker.rank`
   */
  async retrieve(request: RetrieveRequest & SubmitOptions): Promise<RetrieveResult> {
    const { maxHistory } = this.info
    const length = (array: unknown) => Number((array as ArrayLike<unknown> | null | undefined)?.length) || 0
    const rows = Math.min(maxHistory, length(request?.history?.items))
    const cost = { tokens: rows, bytes: ROW_BYTES * (rows + length(request?.exclude)) }
    this.#engine.admit(cost, request)
    const wire = checkRetrieval(request, maxHistory)
    const { items, times, exclude } = wire
    const sent = { ...cost, bytes: idBytes(items) + (times?.byteLength ?? 0) + (exclude ? idBytes(exclude) : 0) }
    if (sent.bytes > cost.bytes) this.#engine.admit(sent, request)
    const { reply, timings } = await this.#engine.submit(wire, sent, request)
    const { items: best, scores, model, unknown, batch } = reply as RetrieveReply
    return { items: best, scores, model, unknownIds: unknown, timings, batch }
  }

  /** As of `Ranker`. */
  swap(folder: string): Promise<string> {
    return this.#engine.call('swap', folder)
  }

  /** As of `Ranker`. */
  stats(): Promise<EngineStats> {
    return this.#engine.stats()
  }

  /** As of `Ranker`. */
  close(options?: { drainMs?: number }): Promise<void> {
    return this.#engine.close(options)
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }
}
