import { check, HstuError } from '../errors.js'
import { embedding } from '../ops/embedding.js'
import { hashLookup } from '../ops/hash_lookup.js'
import { rowwiseAdagrad } from '../ops/rowwise_adagrad.js'
import { Philox } from '../philox.js'
import { scope, Tensor, type TensorOptions } from '../tensor.js'
import {
  type KeptRows,
  leastRecentlyUsed,
  loadTable,
  makeTable,
  type SavedTensors,
  type TableTensors,
  tableTensors,
  takeRows,
} from './table_rows.js'

export interface EmbeddingTableConfig {
  /** d, width of a row. */
  dim: number
  /** Rows to begin with, row 0 included. Default 1024. */
  rows?: number
  /** The table doubles up to this many rows. Default 2^30. */
  maxRows?: number
  /**
   * What happens to new keys once all of `maxRows` are given: 'error' (default), 'evict' the rows that were longest not used, or 'skip':
   * they are counted and share row 0.
   */
  whenFull?: 'error' | 'evict' | 'skip'
  /** Share of the rows that an eviction frees at least, for each moves all of the table. Default 0.1. */
  evictShare?: number
  /** Called after each eviction. */
  onEvict?: (report: EvictionReport) => void
  /** Standard deviation of a new row, uniform around 0. Default 0.02. */
  initStd?: number
  /** Key of the generator that new rows are drawn from. Default 0. */
  seed?: bigint
}

/** What an eviction took away. */
export interface EvictionReport {
  /** Number of the lookup that needed room. */
  tick: number
  /** Longest not used first; where that is equal, the smaller row first. */
  keys: BigInt64Array
  /** For each key, the lookup that used it last. */
  lastUsed: Int32Array
  /** Keys left. */
  kept: number
}

/** Rows that a lookup gave. An eviction moves rows, so those of before are refused from then on. */
export interface TableRows {
  /** int64 [T] */
  ids: Tensor
  generation: number
}

/** Plain JSON beside the tensors of a checkpoint. */
export interface EmbeddingTableState {
  tick: number
  generation: number
  evicted: number
  skipped: number
  /** Of the generator of new rows; decimal. */
  seed: string
  offset: string
}

/**
 * Embeddings of 64-bit keys that come and go: a hash table whose rows are an ordinary matrix with room to spare, trained by row-wise
 * Adagrad. Rows are given in the order in which keys first appear, new rows are drawn from one Philox stream: with the same lookups the
 * same bits on every device, and after a restored checkpoint as without the stop. Row 0 stands for keys that have none; it begins as 0.
 *
 *     const rows = table.lookup(keys, { insert: true })
 *     const x = table.embed(rows)                                    // [T, d], a parameter of this step
 *     const { grads } = valueAndGrad({ x, ...dense }, () => loss(x))
 *     table.step(rows, grads.x, lr)
 */
export class EmbeddingTable {
  /** `weights` [C, d], `accumulator` [C] and the index of C rows. Replaced when the table grows or evicts. */
  tensors: TableTensors
  /** Keys evicted, and positions of new keys that found no room, so far. */
  evicted = 0
  skipped = 0
  #tick = 0
  #generation = 0
  /** At least the rows given: how far one can go without asking the device. */
  #atMost = 1
  readonly #philox: Philox

  constructor(
    readonly config: EmbeddingTableConfig,
    readonly options: TensorOptions = {},
  ) {
    const { dim, rows = 1024, maxRows = 2 ** 30, evictShare = 0.1, initStd = 0.02, seed = 0n } = config
    const valid = (holds: boolean, what: string) =>
      check(holds, 'ERR_HSTU_INVALID_ARGUMENT', () => `EmbeddingTable: ${what}`)
    valid(Number.isInteger(dim) && dim > 0, `dim must be a positive integer, got ${dim}`)
    valid(
      Number.isInteger(maxRows) && maxRows > 1 && maxRows <= 2 ** 30,
      `maxRows must be in 2 .. 2^30, got ${maxRows}`,
    )
    valid(Number.isInteger(rows) && rows > 0 && rows <= maxRows, `rows must be in 1 .. ${maxRows}, got ${rows}`)
    valid(evictShare >= 0 && evictShare < 1, `evictShare must be in [0, 1), got ${evictShare}`)
    valid(initStd > 0 && Number.isFinite(initStd), `initStd must be above 0, got ${initStd}`)
    this.#philox = new Philox(seed)
    this.tensors = this.#make(rows, null)
  }

  /** Keys that have a row. */
  get size(): number {
    return this.#given() - 1
  }

  /** Rows, given or not, row 0 included. */
  get rows(): number {
    return this.tensors.rowKeys.size
  }

  /**
   * The rows of keys; 0 for a key that has none. With `insert` (training) such keys get one, the table grows or evicts where it must, and
   * the rows count as used; without, nothing changes.
   * @param keys int64 [T], any values
   * @throws HstuError ERR_HSTU_INVALID_ARGUMENT when new keys find no room.
   */
  lookup(keys: Tensor, { insert = false } = {}): TableRows {
    if (insert) {
      this.#tick += 1
      const fits = this.#makeRoom(keys)
      const ids = hashLookup(this.tensors, keys, { insert: fits, tick: this.#tick })
      if (fits) this.#atMost += keys.size
      return { ids, generation: this.#generation }
    }
    return { ids: hashLookup({ ...this.tensors, lastUsed: null }, keys), generation: this.#generation }
  }

  /** The rows' values, [T, d]. Outside `valueAndGrad` they are a parameter of their own, whose gradient `step` takes. */
  embed(rows: TableRows): Tensor {
    this.#checkRows(rows)
    return embedding(this.tensors.weights, rows.ids)
  }

  /** One step of row-wise Adagrad on the rows. @param gradient [T, d] */
  step(rows: TableRows, gradient: Tensor, lr: number, eps = 1e-8): void {
    this.#checkRows(rows)
    rowwiseAdagrad(this.tensors.weights, this.tensors.accumulator, gradient, rows.ids, { lr, eps })
  }

  /** All there is to go on exactly from here: tensors and plain JSON of a checkpoint. */
  state(): { tensors: Record<string, Tensor>; json: EmbeddingTableState } {
    const { evicted, skipped } = this
    return {
      tensors: Object.fromEntries(tableTensors.map(name => [name, this.tensors[name]])),
      json: {
        ...{ tick: this.#tick, generation: this.#generation, evicted, skipped },
        ...{ seed: `${this.#philox.seed}`, offset: `${this.#philox.offset}` },
      },
    }
  }

  /**
   * Goes on from a state taken earlier.
   * @throws HstuError ERR_HSTU_CHECKPOINT when a tensor is missing or of another shape, or the seed another; the table is then unchanged.
   */
  restore(tensors: SavedTensors, json: EmbeddingTableState): void {
    const { tick, generation, evicted, skipped, seed, offset } = json
    const whole = [tick, generation, evicted, skipped].every(Number.isSafeInteger) && /^\d+$/.test(offset)
    check(whole && seed === `${this.#philox.seed}`, 'ERR_HSTU_CHECKPOINT', () => {
      return `EmbeddingTable: expected the state of a table with seed ${this.#philox.seed}, found ${JSON.stringify(json)}`
    })
    const made = loadTable(tensors, this.config.dim, this.options)
    this.#replace(made)
    this.#given()
    this.#tick = tick
    this.#generation = generation
    this.evicted = evicted
    this.skipped = skipped
    this.#philox.offset = BigInt(offset)
  }

  dispose(): void {
    for (const tensor of Object.values(this.tensors)) tensor?.dispose()
  }

  /** Rows given, asked of the device. */
  #given(): number {
    this.#atMost = this.tensors.count.item()
    return this.#atMost
  }

  #checkRows({ generation }: TableRows): void {
    check(generation === this.#generation, 'ERR_HSTU_INVALID_ARGUMENT', () => {
      return 'EmbeddingTable: these rows are of before an eviction: look all keys of a step up in one call'
    })
  }

  /** A table of `rows` rows: those of `kept`, of which `given` have keys, then new ones. */
  #make(rows: number, kept: KeptRows | null, given = 1): TableTensors {
    const { dim, initStd = 0.02 } = this.config
    const bound = initStd * Math.sqrt(3)
    const draw = (count: number) => ({ bound, ...this.#philox.draw(count * dim) })
    return makeTable(rows, dim, kept, given, draw, this.options)
  }

  #replace(made: TableTensors): void {
    this.dispose()
    this.tensors = made
  }

  /** Grows or evicts until all new keys among `keys` have room. Returns whether they may be inserted as they are; else they have been. */
  #makeRoom(keys: Tensor): boolean {
    const { maxRows = 2 ** 30, whenFull = 'error' } = this.config
    if (this.#atMost + keys.size <= this.rows) return true
    let given = this.#given()
    if (given + keys.size > this.rows && this.rows < maxRows)
      this.#replace(this.#make(Math.min(maxRows, Math.max(2 * this.rows, given + keys.size)), this.tensors, given))
    if (given + keys.size <= this.rows) return true
    // Nearly full for good: which keys are new is found out first. Those that are not count as used from here on.
    const fresh = scope(() => {
      const found = hashLookup(this.tensors, keys, { tick: this.#tick }).dataSync() as BigInt64Array
      return (keys.dataSync() as BigInt64Array).filter((_, t) => found[t] === 0n)
    })
    let wanted = BigInt64Array.from(new Set(fresh))
    if (wanted.length > this.rows - given) {
      if (whenFull === 'evict') given = this.#evict(wanted.length - (this.rows - given), given)
      else if (whenFull === 'skip') {
        wanted = wanted.subarray(0, this.rows - given)
        const inserted = new Set(wanted)
        this.skipped += fresh.reduce((sum, key) => sum + (inserted.has(key) ? 0 : 1), 0)
      } else
        throw new HstuError(
          'ERR_HSTU_INVALID_ARGUMENT',
          `EmbeddingTable: ${wanted.length} new keys, but ${this.rows - given} of maxRows ${maxRows} are free; raise maxRows or set whenFull`,
        )
    }
    const { device } = keys
    scope(
      () =>
        void hashLookup(this.tensors, Tensor.from(wanted, undefined, { device }), { insert: true, tick: this.#tick }),
    )
    this.#atMost = given + wanted.length
    return false
  }

  /** Frees at least `needed` rows: the longest not used, those of this lookup never. Returns the rows given then. */
  #evict(needed: number, given: number): number {
    const { evictShare = 0.1, onEvict } = this.config
    const lastUsed = (this.tensors.lastUsed!.dataSync() as Int32Array).subarray(0, given)
    const rowKeys = this.tensors.rowKeys.dataSync() as BigInt64Array
    const { gone, kept } = leastRecentlyUsed(lastUsed, this.#tick, Math.max(needed, Math.ceil(evictShare * this.rows)))
    check(gone.length >= needed, 'ERR_HSTU_INVALID_ARGUMENT', () => {
      return `EmbeddingTable: one lookup has ${needed - gone.length} keys more than the ${this.rows} rows of maxRows hold`
    })
    const made = scope(() => this.#make(this.rows, takeRows(this.tensors, kept, rowKeys, lastUsed), kept.length))
    this.#replace(made)
    this.#generation += 1
    this.evicted += gone.length
    onEvict?.({
      tick: this.#tick,
      keys: BigInt64Array.from(gone, row => rowKeys[row]!),
      lastUsed: Int32Array.from(gone, row => lastUsed[row]!),
      kept: kept.length - 1,
    })
    return kept.length
  }
}
