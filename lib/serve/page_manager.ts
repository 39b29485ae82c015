import { randomBytes } from 'node:crypto'
import { check } from '../errors.js'
import { native } from '../native.js'

export interface PageManagerOptions {
  /** Pages of the pool: the first dim of the tensors that `kvAppend` writes into. */
  pages: number
  /** Tokens a page, S; usually 64 or 128. */
  pageSize: number
  /** Bytes of a page in the pool, over all layers. */
  pageBytes: number
  /** Bytes that the caller gives of each token: all that enters it (ids, actions, times). */
  tokenBytes: number
  /** Bytes of the pages that are held or cached, at most; default the pool. */
  byteLimit?: number
  /** Milliseconds after which a cached page that no request held is dropped; default never. */
  ttlMs?: number
  /** Milliseconds, whole or not; default `performance.now`. */
  clock?: () => number
  /** Key of the content hash, 16 bytes; default random. */
  secret?: Uint8Array
}

/** Whose history it is, and what else its keys and values depend on. */
export interface PageKey {
  /** Version of the model: keys and values of two versions are never mixed. */
  model: string
  tenant: string
  user: string | number | bigint
  /** Contextual values, the cut of the history: whatever the rows depend on beside the tokens. */
  seed?: ArrayBufferView
}

/** Pages and counts of a manager. */
export interface PageStatistics {
  /** Of the pool, and how many of them the byte limit allows. */
  pages: number
  limit: number
  /** These three add up to `pages`: of nobody, findable and held by no lease, held by leases. */
  free: number
  cached: number
  held: number
  leases: number
  /** Of the pages that are cached or held. */
  bytes: number
  /** Tokens that leases were acquired for, and those of them that were cached. */
  acquiredTokens: number
  cachedTokens: number
  /** Pages made findable by `commit`, and pages that another lease had made findable meanwhile. */
  committed: number
  duplicates: number
  /** Cached pages dropped for room, by age, and by `forgetUser` (with those that leases held). */
  evicted: number
  expired: number
  forgotten: number
  /** Calls that threw ERR_HSTU_OVERLOADED. */
  exhausted: number
}

/** The pages of one request. They are nobody else's to write or drop until `release`. */
export class PageLease {
  readonly #manager: PageManager
  readonly #lease: number
  #pages: Int32Array
  #released = false

  /** From `PageManager.acquire`. */
  constructor(
    manager: PageManager,
    lease: number,
    /** Tokens at the front whose keys and values are in the pages: a multiple of the page size. */
    readonly cached: number,
    pages: Int32Array,
  ) {
    this.#manager = manager
    this.#lease = lease
    this.#pages = pages
  }

  /** Of all tokens, in order: the sequence's part of `pageTable`. */
  get pages(): Int32Array {
    return this.#pages
  }

  /**
   * Takes pages for tokens after those that the lease has.
   * @throws HstuError as `PageManager.acquire`; the lease is then what it was.
   */
  append(tokens: ArrayBufferView): void {
    this.#pages = native.pages_append(this.#manager, this.#lease, bytesOf(tokens), this.#manager.now())
  }

  /**
   * Makes the full pages findable for later requests, once the ops that write their keys and values are enqueued.
   * @returns how many pages became findable; 0 where the user was forgotten meanwhile
   */
  commit(): number {
    return native.pages_commit(this.#manager, this.#lease)
  }

  /**
   * Lets go of the pages: those that were committed stay cached, the others are free. The ops that use them must be enqueued by then,
   * on the stream that all users of the pool share. May be called again.
   */
  release(): void {
    if (this.#released) return
    native.pages_release(this.#manager, this.#lease, this.#manager.now())
    this.#released = true
  }

  [Symbol.dispose](): void {
    this.release()
  }
}

/** S, tokens of a page: a power of two that the attention's key tiles divide. */
export const PAGE_SIZE = 64

/** Room for the hashes of a history's owner, key and full pages of {@link PAGE_SIZE}; with those of one that it begins with. */
export function pageHashes(tokens: number, before?: BigUint64Array): BigUint64Array {
  const hashes = new BigUint64Array(2 * (2 + Math.floor(tokens / PAGE_SIZE)))
  if (before) hashes.set(before)
  return hashes
}

const bytesOf = (view: ArrayBufferView) =>
  view instanceof DataView ? new Uint8Array(view.buffer, view.byteOffset, view.byteLength) : view

const keyOf = ({ model, tenant, user, seed }: PageKey) => ({
  ...{ model, tenant, user: typeof user === 'string' ? user : String(user), seed: bytesOf(seed ?? new Uint8Array()) },
})

/**
 * Which pages of a pool hold whose history: content-checked prefixes across requests, with eviction by age and for room. It owns no
 * memory of keys and values: `kvAppend` and `hstuAttention` take a lease's `pages` as their page table.
 *
 *     const lease = manager.acquire({ model, tenant, user, seed }, tokens)
 *     try {
 *       // compute the tokens from lease.cached on and kvAppend their keys and values
 *       lease.commit()
 *     } finally {
 *       lease.release()
 *     }
 *
 * The first full pages of `tokens` that are cached under the same model, tenant, user and seed with the same bytes are reused; an
 * edited, shortened or reordered history so falls back to what it still shares.
 */
export class PageManager {
  readonly #clock: () => number

  /** @throws HstuError ERR_HSTU_INVALID_ARGUMENT naming the option. */
  constructor(options: PageManagerOptions) {
    const { clock = () => performance.now(), ttlMs: ttl = Number.POSITIVE_INFINITY } = options
    const { byteLimit = Number.POSITIVE_INFINITY, secret = randomBytes(16), ...sizes } = options
    this.#clock = clock
    const { pages, pageSize, pageBytes, tokenBytes } = sizes
    native.pages_create(this, { pages, pageSize, pageBytes, tokenBytes, byteLimit, ttl, secret })
  }

  /** Whole milliseconds of the clock. */
  now(): number {
    const now = this.#clock()
    check(Number.isFinite(now), 'ERR_HSTU_INVALID_ARGUMENT', () => `page manager: the clock says ${now}`)
    return Math.floor(now)
  }

  /** How many of the tokens are cached: what `acquire` would find now. */
  lookup(key: PageKey, tokens: ArrayBufferView): number {
    return native.pages_lookup(this, keyOf(key), bytesOf(tokens), this.now())
  }

  /**
   * Pages for a history: the cached ones of its longest prefix, and new ones for the rest.
   * @param tokens `tokenBytes` for each token, in order
   * @param hashes of these tokens under this key, from {@link pageHashes}: what a call made of them is not made again
   * @throws HstuError ERR_HSTU_OVERLOADED where leases hold too many pages (after a `release` it may fit); ERR_HSTU_OUT_OF_MEMORY where the
   * pool, or the byte limit, is too small for these tokens alone; ERR_HSTU_INVALID_ARGUMENT for bytes that are no whole tokens.
   */
  acquire(key: PageKey, tokens: ArrayBufferView, hashes?: BigUint64Array): PageLease {
    const { lease, cached, pages } = native.pages_acquire(this, keyOf(key), bytesOf(tokens), this.now(), hashes)
    return new PageLease(this, lease, cached, pages)
  }

  /**
   * Drops all pages of a user, of every model and seed; nothing of it is found again, also not what leases commit that were acquired
   * before.
   * @returns pages `freed`, and pages that leases `held`, which are free when those are released
   */
  forgetUser(tenant: string, user: string | number | bigint): { freed: number; held: number } {
    return native.pages_forget(this, tenant, typeof user === 'string' ? user : String(user), this.now())
  }

  /** Changes the byte limit: drops cached pages, oldest first, until it holds or leases hold the rest. */
  setByteLimit(bytes: number): void {
    native.pages_set_byte_limit(this, bytes, this.now())
  }

  stats(): PageStatistics {
    return native.pages_statistics(this, this.now())
  }
}
