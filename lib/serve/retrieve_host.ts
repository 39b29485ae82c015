import { check, type HstuError } from '../errors.js'
import type { AnySequenceModel } from '../models/create.js'
import type { Tensor } from '../tensor.js'
import { type LoadedBundle, makeRetrievalModel, type RetrieverManifest } from './bundle.js'
import { chooseDevice } from './device.js'
import type { BatchHooks, Host, Progress } from './host.js'
import { idText, textIds } from './ids.js'
import type { HostOptions, ModelInfo } from './messages.js'
import type { Waiting } from './queue.js'
import type { WireRetrieval } from './request.js'
import { type RetrievalRows, retrieve } from './retrieve.js'
import type { Vocabulary } from './vocabulary.js'

/** What one retrieval gives its caller. */
export interface RetrieveReply {
  items: string[]
  scores: Float32Array
  model: string
  unknown: number
  batch: number
}

const GOLDEN_TOLERANCE = 1e-3

/** A retrieval model and its item table; every item is scored. */
export class RetrieveHost implements Host {
  readonly info: ModelInfo
  readonly rules = { ownerOf: () => '', together: () => true }
  readonly #model: AnySequenceModel
  readonly #table: Tensor
  readonly #vocabulary: Vocabulary
  readonly #unknownIds: HostOptions['unknownIds']

  private constructor(bundle: LoadedBundle<RetrieverManifest>, options: HostOptions) {
    const device = chooseDevice(options.device)
    this.#model = makeRetrievalModel(bundle, { device })
    this.#vocabulary = bundle.vocabularies[0]!
    this.#unknownIds = options.unknownIds
    try {
      this.#table = this.#model.itemEmbeddings()
    } catch (error) {
      this.#model.dispose()
      throw error
    }
    const { maxLength } = this.#model.config
    this.info = {
      ...{ model: bundle.manifest.model, device, tasks: [], schema: { actions: [], contextual: [], series: [] } },
      ...{ maxHistory: Math.min(options.maxHistory ?? maxLength, maxLength), base: 0, perRow: 1 },
      cacheOff: 'a retrieval model reads the time of the next event: its rows change with every event',
    }
  }

  static async load(
    bundle: LoadedBundle<RetrieverManifest>,
    options: HostOptions,
    progress: Progress,
  ): Promise<RetrieveHost> {
    const host = new RetrieveHost(bundle, options)
    try {
      progress('golden', 3, 4)
      host.#verify(bundle)
      progress('ready', 4, 4)
      return host
    } catch (error) {
      host.dispose()
      throw error
    }
  }

  #verify({ folder, manifest: { golden } }: LoadedBundle<RetrieverManifest>): void {
    const { items, times, time, best, scores } = golden
    const rows = this.#rows({
      ...{ items: textIds(items)!, times: times && BigInt64Array.from(times, BigInt), time: BigInt(time) },
      ...{ exclude: null, k: best.length },
    }).rows
    const found = retrieve(this.#model, [rows], best.length, this.#table)[0]!
    const wrong = scores.findIndex((score, i) => !(Math.abs(score - found.scores[i]!) <= GOLDEN_TOLERANCE))
    check(wrong < 0 && found.items.length === best.length, 'ERR_HSTU_CHECKPOINT', () => {
      return `${folder}/manifest.json: json.golden.scores[${wrong}]: the model gives ${found.scores[wrong]}, expected ${scores[wrong]}`
    })
  }

  /** Known items as numbers. */
  #rows({ items, times, time, exclude }: WireRetrieval): { rows: RetrievalRows; unknown: number } {
    const known: number[] = []
    const numbers: bigint[] = []
    const all = this.#vocabulary.numbersOf(items)
    const count = all.length
    for (let i = 0; i < count; i++) {
      const number = all[i]!
      check(
        number > 0 || this.#unknownIds !== 'error',
        'ERR_HSTU_INVALID_ARGUMENT',
        () => `request: history.items[${i}] ${idText(items, i)} is not known`,
      )
      if (number === 0) continue
      known.push(i)
      numbers.push(BigInt(number))
    }
    check(numbers.length > 0, 'ERR_HSTU_INVALID_ARGUMENT', () => 'request: no item of the history is known')
    const out = exclude && [...new Set(this.#vocabulary.numbersOf(exclude))].filter(n => n > 0)
    const rows = {
      ...{ items: BigInt64Array.from(numbers), times: times && BigInt64Array.from(known, i => times[i]!), time },
      ...(out ? { exclude: BigInt64Array.from(out, BigInt) } : {}),
    }
    return { rows, unknown: count - numbers.length }
  }

  async run(batch: readonly Waiting[], hooks: BatchHooks): Promise<Waiting[]> {
    // A batch is of one kind: with times or without, and one k.
    const kinds = new Map<string, { waiting: Waiting; rows: RetrievalRows; unknown: number }[]>()
    for (const waiting of batch) {
      const wire = waiting.wire as WireRetrieval
      try {
        const kind = `${wire.k} ${wire.times !== null}`
        kinds.set(kind, [...(kinds.get(kind) ?? []), { waiting, ...this.#rows(wire) }])
      } catch (error) {
        hooks.refuse(waiting, error as HstuError)
      }
    }
    for (const requests of kinds.values()) {
      const begin = performance.now()
      const { k } = requests[0]!.waiting.wire as WireRetrieval
      const found = retrieve(
        this.#model,
        requests.map(({ rows }) => rows),
        k,
        this.#table,
      )
      const durations = { prefill: performance.now() - begin, candidates: 0 }
      requests.forEach(({ waiting, unknown }, r) => {
        const { items, scores } = found[r]!
        const reply: RetrieveReply = {
          ...{ items: Array.from(items, item => this.#vocabulary.ids[item - 1]!), scores },
          ...{ model: this.info.model, unknown, batch: requests.length },
        }
        hooks.done(waiting, reply, durations)
      })
      const history = requests.reduce((sum, { rows }) => sum + rows.items.length, 0)
      hooks.count({ groups: requests.length, history, cached: 0, candidates: 0 })
    }
    return []
  }

  forget(): unknown {
    return { freed: 0, held: 0 }
  }

  pages(): null {
    return null
  }

  dispose(): void {
    this.#table.dispose()
    this.#model.dispose()
  }
}
