import { toDevice } from '../data/inputs.js'
import type { EmbeddingTable } from '../layers/embedding_table.js'
import { computeDtype } from '../layers/precision.js'
import type { GenerativeRanker, GenerativeRankerConfig } from '../models/generative_ranker.js'
import { embedding } from '../ops/embedding.js'
import { scope, Tensor, unscoped } from '../tensor.js'
import { historyTokens } from './encode.js'
import { assemblePass, type Part, partRows, type Slot } from './pass.js'

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

/**
 * M-FALCON (Zhai et al. 2024, section 3.4 and appendix H): a request's candidates are scored in microbatches, the first of which computes
 * the history and keeps its keys and values in pages; the others compute their own rows alone. Every score is that of [history, candidate].
 */
export class Falcon {
  /** Keys and values of each layer, [P, 2, S, H, max(D, V)]. */
  readonly pages: readonly Tensor[]

  /**
   * @param table rows of 'hash' embeddings
   * @param pageSize S, tokens of a page
   * @throws HstuError ERR_HSTU_OUT_OF_MEMORY
   */
  constructor(
    readonly model: GenerativeRanker,
    readonly table: EmbeddingTable | null,
    readonly pageSize: number,
    pageCount: number,
  ) {
    const shape = [pageCount, 2, pageSize, model.config.heads, Math.max(model.config.qkDim, model.config.vDim)]
    const options = { ...model.options, dtype: computeDtype(model.options.precision ?? 'float32', model.options) }
    const made: Tensor[] = []
    try {
      for (let i = 0; i < model.config.layers; i++) made.push(unscoped(() => Tensor.zeros(shape, options)))
    } catch (error) {
      for (const tensor of made) tensor.dispose()
      throw error
    }
    this.pages = made
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
  async score(slots: readonly Slot[], { microbatch, passRows = microbatch, wanted }: ScoreOptions): Promise<Scored> {
    const begin = performance.now()
    const complete = slots.map(() => true)
    let first = begin
    const K = this.model.config.tasks.length
    const logits = slots.map(({ request }) => new Float32Array(request.candidates.length * K))
    const end = ({ request }: Slot, first: number) => Math.min(first + microbatch, request.candidates.length)
    const parts = slots.map(slot => ({ slot, from: slot.cached, first: 0, end: end(slot, 0) }))
    const { states, values } = this.#pass(parts, null)
    const pending: Promise<void>[] = []
    const take = (done: readonly Part[], index: readonly number[], read: Promise<ArrayLike<number>>) => {
      const placed = read.then(data => place(done, index, data))
      placed.catch(() => {}) // told where it is awaited
      pending.push(placed)
    }
    const place = (done: readonly Part[], index: readonly number[], data: ArrayLike<number>) => {
      let row = 0
      done.forEach(({ first, end }, p) => {
        for (let i = first * K; i < end * K; i++) logits[index[p]!]![i] = data[row++]!
      })
    }
    try {
      take(parts, [...slots.keys()], values)
      const timed = values.then(() => {
        first = performance.now()
      })
      timed.catch(() => {})
      const rest = slots.flatMap((slot, s) => {
        const chunks: { part: Part; s: number }[] = []
        const from = historyTokens(slot.request)
        for (let first = end(slot, 0); first < slot.request.candidates.length; first = end(slot, first))
          chunks.push({ part: { slot, from, first, end: end(slot, first) }, s })
        return chunks
      })
      for (let at = 0; at < rest.length; ) {
        // Two passes are under way at most: what is not wanted any more never reaches the device.
        if (pending.length > 1) await pending[pending.length - 2]
        const pass: typeof rest = []
        for (let rows = 0; at < rest.length && (rows === 0 || rows + partRows(rest[at]!.part) <= passRows); at++) {
          const chunk = rest[at]!
          if (!complete[chunk.s] || (wanted && !wanted(chunk.part.slot))) {
            complete[chunk.s] = false
            continue
          }
          pass.push(chunk)
          rows += partRows(chunk.part)
        }
        if (pass.length === 0) continue
        const index = pass.map(({ s }) => s)
        const of = pass.map(({ part }) => part)
        take(of, index, this.#pass(of, { states, index }).values)
      }
      await Promise.all(pending)
      return { logits, complete, prefill: first - begin, candidates: performance.now() - first }
    } finally {
      states.dispose()
    }
  }

  /** One pass through the model. `known` has the states of earlier passes, and the row of each part among them. */
  #pass(parts: readonly Part[], known: { states: Tensor; index: readonly number[] } | null) {
    const { model, table } = this
    const { states, values } = unscoped(() =>
      scope(() => {
        const { inputs, layers } = assemblePass(parts, model, this.pages)
        const before =
          known && embedding(known.states, toDevice(BigInt64Array.from(known.index, BigInt), model.options))
        const embedded = table ? [table.embed(table.lookup(inputs.ids))] : []
        const { logits, states } = model.resume(inputs, layers, before, ...embedded)
        return { values: { data: logits.data() as Promise<Float32Array> }, states: known ? null : states }
      }),
    )
    return { states: states!, values: values.data }
  }

  /** Frees the pages. */
  dispose(): void {
    for (const tensor of this.pages) tensor.dispose()
  }
}
