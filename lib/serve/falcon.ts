import { HstuError } from '../errors.js'
import type { EmbeddingTable } from '../layers/embedding_table.js'
import type { GenerativeRanker, GenerativeRankerConfig } from '../models/generative_ranker.js'
import { RankerInference } from '../models/ranker_inference.js'
import { embedding } from '../ops/embedding.js'
import { scope, Tensor, unscoped } from '../tensor.js'
import { type EncodedRequest, historyTokens, TOKEN_COLUMNS } from './encode.js'
import {
  bindPass,
  bucketOf,
  fillPass,
  type Part,
  PassMemory,
  type PassShape,
  partRows,
  type Slot,
  shapeOf,
} from './pass.js'
import { PassGraphs } from './pass_graphs.js'

/** Why a row that is cached for one request would not be the row of the next one; null where it is. */
export function whyNotCacheable({ contextualFull = false }: GenerativeRankerConfig): string | null {
  // Times are those of each row itself, and no layer has a window: both hold of every GenerativeRanker.
  return contextualFull ? 'contextualFull: the contextual rows, and all that see them, change with every event' : null
}

export interface ScoreOptions {
  /** b: candidates of a request that are computed at once. */
  microbatch: number
  /** Candidates, over all requests, of a pass after the first; default `microbatch`. */
  passRows?: number
  /** Asked before every pass but the first: requests that are not wanted any more are left out of it. */
  wanted?: (slot: Slot) => boolean
  /** Whether this thread waits for a short last pass, for it has nothing else to do; default true. */
  wait?: boolean
}

/** What `Falcon.score` returns. */
export interface Scored {
  /** [m, K] of each slot */
  logits: Float32Array[]
  /** Of each slot; false where it was not wanted any more before all was computed. */
  complete: boolean[]
  /** Milliseconds: the histories with the first microbatches, all others. */
  prefill: number
  candidates: number
}

/** Requests that are scored at once: more are scored one part after the other. */
const MOST_SLOTS = 1024
/**
 * Tokens of a pass that is launched as a graph: what has more takes longer on the device than the host takes to launch it. Of one request
 * alone, whose shapes come again, more.
 */
const GRAPH_TOKENS = 4096
const GRAPH_TOKENS_ALONE = 16_384
/** Tokens of a pass that this thread waits for: for a longer one it sleeps. */
const WAIT_TOKENS = 16_384
/** Requests whose graphs are captured when a model is loaded. */
const WARM_CANDIDATES = [64, 256, 1024]
const WARM_FRESH = [2, 40]

/**
 * M-FALCON (Zhai et al. 2024, section 3.4 and appendix H): a request's candidates are scored in microbatches, the first of which computes
 * the history and keeps its keys and values in pages; the others compute their own rows alone. Every score is that of [history, candidate].
 */
export class Falcon {
  /** Keys and values of each layer, [P, 2, S, H, max(D, V)]. */
  readonly pages: readonly Tensor[]
  readonly #inference: RankerInference
  /** y_s W_s of the requests that are being scored, [2 MOST_SLOTS, hidden]: made by the first pass, read by the others. */
  readonly #states: Tensor
  readonly #graphs: PassGraphs | null
  readonly #memory = new PassMemory()
  /** Until the score before is done. */
  #free: Promise<unknown> = Promise.resolve()

  /**
   * @param table rows of 'hash' embeddings
   * @param pageSize S, tokens of a page
   * @param options.graphs whether small passes are launched as CUDA graphs, by buckets of their shapes; default on CUDA
   * @param options.sightings how often a shape comes until it is captured; default 2
   * @param options.deterministic whether a score's bits do not depend on the pass, default true; else it is the same within the rounding of the dtype
   * @throws HstuError ERR_HSTU_OUT_OF_MEMORY
   */
  constructor(
    readonly model: GenerativeRanker,
    table: EmbeddingTable | null,
    readonly pageSize: number,
    pageCount: number,
    {
      graphs = (model.options.device ?? 'cpu') !== 'cpu',
      sightings,
      deterministic = true,
    }: { graphs?: boolean; sightings?: number; deterministic?: boolean } = {},
  ) {
    const { config, options, parameters } = model
    const made: Tensor[] = []
    let inference: RankerInference | null = null
    try {
      inference = new RankerInference(model, table, deterministic)
      const shape = [pageCount, 2, pageSize, config.heads, Math.max(config.qkDim, config.vDim)]
      for (let i = 0; i < config.layers; i++)
        made.push(unscoped(() => Tensor.zeros(shape, { ...options, dtype: inference!.dtype })))
      const {
        dtype,
        shape: [, hidden],
      } = parameters.state!
      this.#states = unscoped(() => Tensor.zeros([2 * MOST_SLOTS, hidden!], { ...options, dtype }))
    } catch (error) {
      inference?.dispose()
      for (const tensor of made) tensor.dispose()
      throw error
    }
    this.#inference = inference
    this.pages = made
    this.#graphs = graphs ? new PassGraphs(options.device ?? 'cpu', sightings) : null
  }

  /** Bytes of a page, over all layers. */
  static pageBytes(
    { layers, heads, qkDim, vDim }: GenerativeRankerConfig,
    pageSize: number,
    elementBytes: number,
  ): number {
    return layers * 2 * pageSize * heads * Math.max(qkDim, vDim) * elementBytes
  }

  /**
   * Scores each slot's candidates; afterwards every slot's pages hold its whole history.
   * @throws HstuError what the device throws, among it ERR_HSTU_OUT_OF_MEMORY; the pages may then hold anything beyond what they held
   */
  async score(slots: readonly Slot[], options: ScoreOptions): Promise<Scored> {
    const before = this.#free
    let done = () => {}
    this.#free = new Promise<void>(resolve => (done = resolve))
    await before
    try {
      const all: Scored = { logits: [], complete: [], prefill: 0, candidates: 0 }
      for (let first = 0; first < slots.length; first += MOST_SLOTS) {
        const part = await this.#score(slots.slice(first, first + MOST_SLOTS), options)
        all.logits.push(...part.logits)
        all.complete.push(...part.complete)
        all.prefill += part.prefill
        all.candidates += part.candidates
      }
      return all
    } finally {
      done()
    }
  }

  async #score(
    slots: readonly Slot[],
    { microbatch, passRows = microbatch, wanted, wait = true }: ScoreOptions,
  ): Promise<Scored> {
    const begin = performance.now()
    const complete = slots.map(() => true)
    let first = begin
    const K = this.model.config.tasks.length
    const logits = slots.map(({ request }) => new Float32Array(request.candidates.length * K))
    const end = ({ request }: Slot, first: number) => Math.min(first + microbatch, request.candidates.length)
    const parts = slots.map((slot, index): Part => ({ slot, index, from: slot.cached, first: 0, end: end(slot, 0) }))
    const pending: Promise<void>[] = []
    const take = (done: readonly Part[], read: Promise<Float32Array>) => {
      const placed = read.then(data => place(done, data))
      placed.catch(() => {}) // told where it is awaited
      pending.push(placed)
      return placed
    }
    const place = (done: readonly Part[], data: Float32Array) => {
      let row = 0
      for (const { index, first, end } of done) {
        const count = (end - first) * K
        logits[index]!.set(data.subarray(row, row + count), first * K)
        row += count
      }
    }
    const more = slots.some((slot, index) => parts[index]!.end < slot.request.candidates.length)
    const timed = take(parts, this.#pass(parts, wait && !more)).then(() => {
      first = performance.now()
    })
    timed.catch(() => {})
    const rest = slots.flatMap((slot, index) => {
      const chunks: Part[] = []
      const from = historyTokens(slot.request)
      for (let first = end(slot, 0); first < slot.request.candidates.length; first = end(slot, first))
        chunks.push({ slot, index, from, first, end: end(slot, first) })
      return chunks
    })
    for (let at = 0; at < rest.length; ) {
      // Two passes are under way at most: what is not wanted any more never reaches the device.
      if (pending.length > 1) await pending[pending.length - 2]
      const pass: Part[] = []
      for (let rows = 0; at < rest.length && (rows === 0 || rows + partRows(rest[at]!) <= passRows); at++) {
        const chunk = rest[at]!
        if (!complete[chunk.index] || (wanted && !wanted(chunk.slot))) {
          complete[chunk.index] = false
          continue
        }
        pass.push(chunk)
        rows += partRows(chunk)
      }
      if (pass.length > 0) take(pass, this.#pass(pass, wait && at === rest.length))
    }
    await Promise.all(pending)
    return { logits, complete, prefill: first - begin, candidates: performance.now() - first }
  }

  /**
   * One pass through the model: the logits of its candidates, part after part.
   * @param wait whether this thread waits for a short one: to be woken takes as long
   */
  #pass(parts: readonly Part[], wait: boolean): Promise<Float32Array> {
    const exact = shapeOf(parts, this.#inference)
    const short = exact.tokens <= (parts.length === 1 ? GRAPH_TOKENS_ALONE : GRAPH_TOKENS)
    const waits = wait && exact.tokens <= WAIT_TOKENS
    // Those that nobody asked for too: to leave them out takes longer.
    const read = (logits: Tensor) => {
      const data = waits ? Promise.resolve(logits.dataSync()) : logits.data()
      return { data: data as Promise<Float32Array> }
    }
    return scope(() => {
      const shape = this.#graphs && short ? bucketOf(exact) : exact
      const values = fillPass(parts, shape, this.#inference, this.#memory)
      if (shape !== exact) return read(this.#graphs!.run(shape, values, (...on) => this.#compute(shape, ...on)))
      const { device = 'cpu' } = this.model.options
      const { words, numbers } = values
      return read(
        this.#compute(shape, Tensor.from(words, undefined, { device }), Tensor.from(numbers, undefined, { device })),
      )
    }).data
  }

  #compute(shape: PassShape, words: Tensor, numbers: Tensor): Tensor {
    const { inputs, layers, states } = bindPass(words, numbers, shape, this.#inference, this.pages)
    const known = shape.first ? null : embedding(this.#states, states)
    const into = known ? null : this.#states.rows(0, shape.sequences)
    return this.#inference.run(inputs, layers, known, into).logits
  }

  /**
   * Captures the graphs of what is asked most: one user with a cached history of up to `tokens` tokens, and few new ones. For pages that
   * nobody has: they are written. Where memory is short there are none ahead.
   */
  async warmUp(tokens: number): Promise<void> {
    try {
      if (this.#graphs) await this.#capture(tokens)
    } catch (error) {
      if (!(error instanceof HstuError && error.code === 'ERR_HSTU_OUT_OF_MEMORY')) throw error
      this.trim()
    }
  }

  async #capture(tokens: number): Promise<void> {
    for (let next = 512; ; next *= 2) {
      const h = Math.min(next, tokens)
      const pages = Int32Array.from({ length: Math.ceil(h / this.pageSize) }, (_, k) => k)
      for (const fresh of WARM_FRESH.filter(fresh => fresh < h))
        for (const candidates of WARM_CANDIDATES) {
          const [row, asked] = [new BigInt64Array(h), new BigInt64Array(candidates)]
          const request: EncodedRequest = {
            ...{ history: new BigInt64Array(TOKEN_COLUMNS * h), content: row, actions: row, times: row, start: 0 },
            ...{ candidates: asked, candidateTimes: asked, base: null, unknown: 0 },
          }
          const stored = h - fresh
          for (let sighting = 0; sighting < this.#graphs!.sightings; sighting++)
            await this.score([{ request, pages, stored, cached: stored }], { microbatch: candidates })
        }
      if (h === tokens) return
    }
  }

  /** Gives back what is kept for later passes. */
  trim(): void {
    this.#graphs?.dispose()
  }

  /** Frees the pages and all that was made for passes. */
  dispose(): void {
    this.#graphs?.dispose()
    this.#inference.dispose()
    for (const tensor of [...this.pages, this.#states]) tensor.dispose()
  }
}
