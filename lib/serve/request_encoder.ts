import {
  type EncodedHistory,
  type EncodedRequest,
  type Encoder,
  encodeHistory,
  encodeRequest,
  type KnownHistory,
} from './encode.js'
import { idsBegin, sameValues } from './ids.js'
import type { Waiting } from './queue.js'
import { ownerText, sameHistory, type WireRequest } from './request.js'

/** Rows of all histories that are kept, about a hundred bytes each, and what a history takes beside them. */
const MOST_ROWS = 1 << 19
const ROWS_BESIDE = 32

const ROW_BYTES = 128
/** By their texts, where these are long. */
const costOf = ({ series, items }: KnownHistory['wire']) => {
  const bytes = 'ends' in items ? items.units.byteLength : 0
  return Math.max(series.length, Math.ceil(bytes / ROW_BYTES)) + ROWS_BESIDE
}
const begins = (all: NodeJS.TypedArray, first: NodeJS.TypedArray) =>
  first.length <= all.length && sameValues(all.subarray(0, first.length), first)

/** The last encoded history of each user: the next request's begins with it, more often than not, and is not looked up again. */
export class RecentHistories {
  /** By owner, the one read longest ago first. */
  readonly #kept = new Map<string, KnownHistory & { read: number }>()
  #rows = 0

  /** @param ttlMs histories that no request has read for so long are dropped; null: never */
  constructor(
    readonly ttlMs: number | null,
    readonly mostRows = MOST_ROWS,
  ) {}

  /** What is known of a request's history, row for row. */
  find(owner: string, wire: WireRequest): KnownHistory | null {
    this.#expire()
    const found = this.#kept.get(owner)
    if (!found) return null
    const { wire: before } = found
    if (sameHistory(wire, before)) {
      this.#kept.delete(owner)
      this.#kept.set(owner, Object.assign(found, { read: performance.now() }))
      return found
    }
    const longer =
      before.start === wire.start &&
      before.context.every((id, c) => id === wire.context[c]) &&
      begins(wire.times, before.times) &&
      begins(wire.actions, before.actions) &&
      begins(wire.series, before.series) &&
      idsBegin(wire.items, before.items)
    return longer ? found : null
  }

  keep(owner: string, { candidates: _, time: __, ...wire }: WireRequest, encoded: EncodedHistory): void {
    this.forget(owner)
    this.#kept.set(owner, { wire, encoded, read: performance.now() })
    this.#rows += costOf(wire)
    for (const other of this.#kept.keys()) {
      if (this.#rows <= this.mostRows) return
      this.forget(other)
    }
  }

  forget(owner: string): void {
    const found = this.#kept.get(owner)
    if (!found) return
    this.#rows -= costOf(found.wire)
    this.#kept.delete(owner)
  }

  #expire(): void {
    if (this.ttlMs === null) return
    const before = performance.now() - this.ttlMs
    for (const [owner, { read }] of this.#kept) {
      if (read > before) return
      this.forget(owner)
    }
  }
}

/** Encodes the requests of an engine, also before their turn comes. */
export class RequestEncoder {
  readonly #recent: RecentHistories
  readonly #prepared = new WeakMap<Waiting, EncodedRequest>()

  constructor(
    readonly encoder: Encoder,
    ttlMs: number | null,
  ) {
    this.#recent = new RecentHistories(ttlMs)
  }

  prepare(waiting: Waiting): void {
    try {
      this.#prepared.set(waiting, this.encoded(waiting))
    } catch {
      // Told of when its batch is formed.
    }
  }

  /** @throws HstuError ERR_HSTU_INVALID_ARGUMENT as `encodeRequest` */
  encoded(waiting: Waiting): EncodedRequest {
    const prepared = this.#prepared.get(waiting)
    if (prepared) return prepared
    const wire = waiting.wire as WireRequest
    const owner = ownerText(wire)
    const known = this.#recent.find(owner, wire)
    const history = encodeHistory(wire, this.encoder, known)
    if (history !== known?.encoded) this.#recent.keep(owner, wire, history)
    return encodeRequest(wire, this.encoder, history)
  }

  forget(owner: Pick<WireRequest, 'tenant' | 'user'>): void {
    this.#recent.forget(ownerText(owner))
  }
}
