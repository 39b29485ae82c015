import { HstuError } from '#lib/errors.js'
import { native } from '#lib/native.js'
import { hstuAttention } from '#lib/ops/hstu_attention.js'
import { kvAppend } from '#lib/ops/kv_append.js'
import { kvGather } from '#lib/ops/kv_gather.js'
import { Random } from '#lib/random.js'
import {
  PAGE_SIZE,
  type PageKey,
  type PageLease,
  PageManager,
  type PageManagerOptions,
  pageHashes,
} from '#lib/serve/page_manager.js'
import { scope, Tensor } from '#lib/tensor.js'

let time = 0
const make = (options: Partial<PageManagerOptions> = {}) =>
  new PageManager({ pages: 8, pageSize: 2, pageBytes: 100, tokenBytes: 8, clock: () => time, ...options })
const words = (...values: number[]) => BigInt64Array.from(values.map(BigInt))
const alice: PageKey = { model: 'm1', tenant: 'shop', user: 'alice' }

/** Acquires, commits, releases; what was cached. */
function use(manager: PageManager, key: PageKey, tokens: BigInt64Array): number {
  using lease = manager.acquire(key, tokens)
  lease.commit()
  return lease.cached
}

const failing = (fn: () => unknown, code: string, message: RegExp) => {
  const thrown = (() => {
    try {
      return fn()
    } catch (error) {
      return error
    }
  })()
  expect(thrown).toBeInstanceOf(HstuError)
  expect(thrown).toMatchObject({ code, message: expect.stringMatching(message) })
}

beforeEach(() => {
  time = 1000.7
})

describe('page manager', () => {
  it('finds the whole pages of the longest prefix', () => {
    const manager = make()
    expect(use(manager, alice, words(1, 2, 3, 4, 5))).toBe(0)
    expect(manager.lookup(alice, words(1, 2, 3, 4, 5))).toBe(4)
    expect(use(manager, alice, words(1, 2, 3, 4, 5, 6, 7))).toBe(4)
    expect(use(manager, alice, words(1, 2, 3, 4, 5, 6))).toBe(6)
    expect(use(manager, alice, words(1, 2, 9, 4, 5, 6))).toBe(2) // edited
    expect(use(manager, alice, words(2, 1, 3, 4))).toBe(0) // reordered
    expect(use(manager, alice, words(1, 2, 3))).toBe(2) // shortened
    expect(use(manager, alice, words())).toBe(0)
  })

  it('makes no hash twice of a history that is known, and goes on from those of one that it begins with', () => {
    const manager = make({ pages: 64, pageSize: PAGE_SIZE })
    const tokens = words(...Array.from({ length: 10 * PAGE_SIZE }, (_, k) => k))
    const [short, long] = [tokens.subarray(0, 3 * PAGE_SIZE + 5), tokens]
    const acquired = (all: BigInt64Array, hashes?: BigUint64Array) => {
      using lease = manager.acquire(alice, all, hashes)
      lease.commit()
      return lease.cached
    }
    const known = pageHashes(short.length)
    expect(acquired(short, known)).toBe(0)
    expect([known.length, known.every(word => word !== 0n)]).toEqual([2 * (2 + 3), true])
    expect(acquired(short)).toBe(3 * PAGE_SIZE)
    const grown = pageHashes(long.length, known)
    expect(grown.subarray(0, known.length)).toEqual(known)
    expect(acquired(long, grown)).toBe(3 * PAGE_SIZE)
    const own = pageHashes(long.length)
    expect(acquired(long, own)).toBe(10 * PAGE_SIZE)
    expect(own).toEqual(grown)
    const [wrong] = [Uint8Array.from({ length: 40 }).subarray(1)]
    failing(() => acquired(long, wrong as never), 'ERR_HSTU_INVALID_ARGUMENT', /hashes must be of 64 bits each/)
  })

  it('keeps models, tenants, users and seeds apart, to the last code unit', () => {
    const manager = make({ pages: 64 })
    const tokens = words(1, 2)
    const keys: PageKey[] = [
      alice,
      { ...alice, model: 'm2' },
      { ...alice, tenant: 'shop2' },
      { ...alice, user: 'bob' },
      { ...alice, seed: Float64Array.of(1) },
      { ...alice, seed: new Uint8Array(1) },
      { ...alice, tenant: 'sho', user: 'palice' },
      { ...alice, user: '\ud800' },
      { ...alice, user: '\ud801' },
      { ...alice, user: 'a'.repeat(1000) },
      { ...alice, user: `${'a'.repeat(999)}b` },
      { ...alice, user: 2n ** 53n },
      { ...alice, user: 2n ** 53n + 1n },
    ]
    for (const key of keys) expect(use(manager, key, tokens)).toBe(0)
    for (const key of keys) expect(use(manager, key, tokens)).toBe(2)
    expect(use(manager, { ...alice, user: '9007199254740993' }, tokens)).toBe(2) // the same user as a string
    expect(use(manager, { ...alice, seed: new DataView(Float64Array.of(1).buffer) }, tokens)).toBe(2)
  })

  it('hands out pages that nobody else has, and gives them back', () => {
    const manager = make()
    const a = manager.acquire(alice, words(1, 2, 3))
    const b = manager.acquire({ ...alice, user: 'bob' }, words(1, 2, 3, 4, 5))
    expect(new Set([...a.pages, ...b.pages]).size).toBe(5)
    a.append(words(4, 5, 6, 7))
    expect(a.pages).toHaveLength(4)
    expect(a.commit()).toBe(3)
    failing(
      () => a.append(words(8, 9, 10, 11)),
      'ERR_HSTU_OVERLOADED',
      /2 pages more are wanted, 1 are free or cached; 2 leases hold 7 of 8/,
    )
  })

  it('says when there is no room now, and when there never is', () => {
    const manager = make({ pages: 4 })
    const a = manager.acquire(alice, words(1, 2, 3, 4, 5, 6))
    const other = { ...alice, user: 'bob' }
    failing(
      () => manager.acquire(other, words(1, 2, 3, 4)),
      'ERR_HSTU_OVERLOADED',
      /2 pages more are wanted, 1 are free or cached; 1 leases hold 3 of 4/,
    )
    failing(
      () => manager.acquire(other, new BigInt64Array(9)),
      'ERR_HSTU_OUT_OF_MEMORY',
      /take 5 pages of 2 tokens, the pool has 4/,
    )
    expect(manager.stats()).toMatchObject({ exhausted: 1, leases: 1, held: 3, free: 1, cached: 0, bytes: 300 })
    a.release()
    expect(manager.acquire(other, words(1, 2, 3, 4)).pages).toHaveLength(2)
  })

  it('drops the oldest first, the end of a chain before its beginning', () => {
    const manager = make({ pages: 4 })
    use(manager, alice, words(1, 2, 3, 4))
    use(manager, { ...alice, user: 'bob' }, words(1, 2, 3, 4))
    use(manager, { ...alice, user: 'carol' }, words(1, 2))
    expect(manager.lookup(alice, words(1, 2, 3, 4))).toBe(2)
    expect(manager.lookup({ ...alice, user: 'bob' }, words(1, 2, 3, 4))).toBe(4)
    expect(manager.stats()).toMatchObject({ evicted: 1, cached: 4, free: 0, committed: 5 })
    manager.setByteLimit(250)
    expect(manager.stats()).toMatchObject({ evicted: 3, cached: 2, free: 2, limit: 2 })
    expect(manager.lookup({ ...alice, user: 'carol' }, words(1, 2))).toBe(2)
  })

  it('drops what nobody held for the time to live', () => {
    const manager = make({ ttlMs: 50 })
    use(manager, alice, words(1, 2))
    const lease = manager.acquire({ ...alice, user: 'bob' }, words(1, 2))
    lease.commit()
    time += 49
    expect(manager.lookup(alice, words(1, 2))).toBe(2) // looking is not using
    time += 1
    expect(manager.lookup(alice, words(1, 2))).toBe(0)
    time += 1000
    lease.release()
    expect(manager.stats()).toMatchObject({ expired: 1, cached: 1 })
    time -= 5000 // a clock that goes back does no harm
    expect(manager.lookup({ ...alice, user: 'bob' }, words(1, 2))).toBe(2)
  })

  it('forgets a user, also what is under way', () => {
    const manager = make()
    use(manager, alice, words(1, 2))
    use(manager, { ...alice, model: 'm2', seed: words(7) }, words(1, 2))
    use(manager, { ...alice, tenant: 'other' }, words(1, 2))
    const lease = manager.acquire(alice, words(1, 2, 3, 4))
    expect(manager.forgetUser('shop', 'alice')).toEqual({ freed: 1, held: 2 })
    expect(manager.forgetUser('shop', 'alice')).toEqual({ freed: 0, held: 0 })
    expect(lease.commit()).toBe(0)
    expect(manager.stats()).toMatchObject({ held: 2, cached: 1, forgotten: 3 })
    lease.release()
    expect(manager.stats()).toMatchObject({ held: 0, cached: 1, free: 7 })
    expect(manager.lookup(alice, words(1, 2))).toBe(0)
    expect(manager.lookup({ ...alice, tenant: 'other' }, words(1, 2))).toBe(2)
    expect(use(manager, alice, words(1, 2))).toBe(0)
    expect(use(manager, alice, words(1, 2))).toBe(2) // a new start
  })

  it('names bad input', () => {
    const wrong = 'ERR_HSTU_INVALID_ARGUMENT'
    failing(() => make({ pages: 0 }), wrong, /pages must be 1 to 2\^30, got 0/)
    failing(() => make({ pageSize: 1.5 }), wrong, /pageSize must be a whole number, got 1.5/)
    failing(() => make({ pageBytes: Number.NaN }), wrong, /pageBytes must be a whole number/)
    failing(() => make({ tokenBytes: -1 }), wrong, /tokenBytes must be 1 to/)
    failing(() => make({ tokenBytes: '8' as unknown as number }), wrong, /tokenBytes must be a number/)
    failing(() => make({ ttlMs: 0 }), wrong, /ttl must be at least 1/)
    failing(() => make({ byteLimit: -1 }), wrong, /byteLimit must be 0 or more/)
    failing(() => make({ secret: new Uint8Array(15) }), wrong, /secret must have 16 bytes, got 15/)
    const manager = make()
    failing(() => manager.acquire(alice, new Uint8Array(9)), wrong, /9 bytes are no whole tokens of 8/)
    failing(() => manager.acquire(alice, [1] as unknown as Uint8Array), wrong, /tokens must be a typed array/)
    failing(
      () => manager.acquire({ ...alice, tenant: 1 as unknown as string }, words(1)),
      wrong,
      /tenant must be a string/,
    )
    const detached = words(1, 2)
    structuredClone(detached.buffer, { transfer: [detached.buffer] })
    failing(() => manager.acquire(alice, detached), wrong, /tokens is of a buffer that is detached/)
    failing(() => manager.setByteLimit(-1), wrong, /byteLimit must be 0 or more/)
    const lease = manager.acquire(alice, words(1, 2))
    lease.release()
    lease.release()
    failing(() => lease.commit(), wrong, /there is no lease 1, it was released or never was/)
    failing(() => lease.append(words(1)), wrong, /there is no lease 1/)
    failing(() => make({ clock: () => Number.NaN }).stats(), wrong, /the clock says NaN/)
    for (const object of [{}, null, 3, Tensor])
      failing(() => native.pages_statistics(object as object, 0), wrong, /not a page manager/)
    expect(manager.stats()).toMatchObject({ leases: 0, free: 8 })
  })
})

/** Keys and values of a token are a function of it alone, as the first layer's are. */
function rowsOf(tokens: BigInt64Array, salt: number, dim: number): Float32Array {
  const rows = new Float32Array(tokens.length * dim)
  tokens.forEach((token, t) => {
    for (let i = 0; i < dim; i++) rows[t * dim + i] = Math.sin(Number(token) * (i + 1) + salt)
  })
  return rows
}

it('attention over leased pages has the bits of attention without a cache, whatever the cache went through', () => {
  const [S, pool, H, D, V] = [4, 14, 2, 8, 6]
  const random = new Random(3)
  const manager = make({ pages: pool, pageSize: S })
  const pages = Tensor.from(new Float32Array(pool * 2 * S * H * D).fill(Number.NaN), [pool, 2, S, H, D])
  const histories = Array.from({ length: 5 }, () => words())
  const starts = (...lengths: number[]) => {
    let total = 0n
    return Tensor.from(BigInt64Array.from([0n, ...lengths.map(n => (total += BigInt(n)))]))
  }
  const ints = (...values: number[]) => Tensor.from(Int32Array.from(values))
  const change = (history: BigInt64Array) => {
    const next = [...history]
    const kind = random.int(6)
    if (kind === 0) next.length = random.int(next.length + 1)
    else if (kind === 1 && next.length > 0) next[random.int(next.length)] = BigInt(random.int(50))
    else for (let n = random.int(6); n >= 0 && next.length < 27; n--) next.push(BigInt(random.int(50)))
    return BigInt64Array.from(next)
  }
  let hits = 0
  for (let step = 0; step < 400; step++)
    scope(() => {
      const user = random.int(histories.length)
      const tokens = (histories[user] = change(histories[user]!))
      if (random.int(40) === 0) manager.forgetUser('shop', user)
      const lease: PageLease = manager.acquire({ model: 'm1', tenant: 'shop', user }, tokens)
      hits += lease.cached
      const [length, targets] = [tokens.length, 3]
      const fresh = length - lease.cached
      const paged = (held: number) => ({
        ...{ pages, pageTable: ints(...lease.pages), pageOffsets: starts(lease.pages.length), kvLengths: ints(held) },
      })
      const tensor = (from: BigInt64Array, salt: number, dim: number) =>
        Tensor.from(rowsOf(from, salt, H * dim), [from.length, H, dim])
      const delta = tokens.slice(lease.cached)
      const seqOffsets = starts(fresh)
      kvAppend(tensor(delta, 1, D), tensor(delta, 2, V), { seqOffsets, paged: paged(lease.cached) })
      lease.commit()

      const candidates = words(...Array.from({ length: targets }, () => random.int(50)))
      const all = BigInt64Array.from([...tokens, ...candidates])
      const q = tensor(all, 3, D)
      const options = { scale: 1 / 30, maxSeqLen: 30, numTargets: ints(targets) }
      const [k, v] = [tensor(all, 1, D), tensor(all, 2, V)]
      const whole = hstuAttention(q, k, v, { ...options, seqOffsets: starts(all.length) })
      const cached = hstuAttention(q.rows(length, all.length), k.rows(length, all.length), v.rows(length, all.length), {
        ...{ ...options, seqOffsets: starts(targets), paged: paged(length) },
      })
      expect(cached.dataSync()).toEqual(whole.rows(length, all.length).dataSync())
      const back = kvGather(paged(length), { seqOffsets: starts(length), rows: length, keyDim: D, valueDim: V })
      expect(back.k.dataSync()).toEqual(k.rows(0, length).dataSync())
      expect(back.v.dataSync()).toEqual(v.rows(0, length).dataSync())
      lease.release()
    })
  pages.dispose()
  expect(hits).toBeGreaterThan(1000)
  const { evicted, forgotten, held, leases } = manager.stats()
  expect(evicted).toBeGreaterThan(100)
  expect(forgotten).toBeGreaterThan(5)
  expect({ held, leases }).toEqual({ held: 0, leases: 0 })
})
