import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { Random } from '#lib/random.js'
import { Ranker } from '#lib/serve/ranker.js'
import type { RankRequest } from '#lib/serve/request.js'
import { error, rankerBundle, small } from './ranker_fixture.js'
import { grow, randomRequest, writeTestBundle } from './requests.js'

const { folder, bundle, expectScores } = rankerBundle()

describe('Ranker', () => {
  it('scores growing, edited and cut histories of several tenants in any company, over a cache that evicts', async () => {
    const random = new Random('engine')
    await using ranker = await Ranker.load(bundle, { ...small, maxBatchTokens: 900, cacheBytes: 1 << 18 })
    const users = Array.from({ length: 12 }, (_, u) => ({
      ...randomRequest(random, random.int(90), 1),
      ...{ user: String(u + 1), tenant: `t${u % 3}` },
    }))
    const states = new Set<string>()
    for (let round = 0; round < 25; round++) {
      const asked = Array.from({ length: 1 + random.int(10) }, () => {
        const u = random.int(users.length)
        const before = users[u]!
        const dice = random.float()
        if (dice < 0.5) before.history = grow(random, before.history, random.int(12))
        else if (dice < 0.6) (before.history.items as string[])[random.int(before.history.items.length)] = '9'
        const candidates = Array.from({ length: 1 + random.int(30) }, () => String(1 + random.int(64)))
        return { ...before, candidates, time: 2_000_000 + random.int(1000) }
      })
      const results = await Promise.all(asked.map(request => ranker.rank(request)))
      results.forEach((result, r) => {
        states.add(result.cache.state)
        expectScores(result, asked[r]!)
      })
    }
    expect([...states].sort()).toEqual(['cold', 'hit', 'partial'])
    const stats = await ranker.stats()
    expect(stats).toMatchObject({
      state: 'ready',
      failed: 0,
      rejected: 0,
      queued: { requests: 0, tokens: 0, bytes: 0 },
    })
    expect(stats.completed).toBe(stats.requests)
    expect(stats.histograms.total.count).toBe(stats.completed)
    expect(stats.pages!.evicted).toBeGreaterThan(0)
    expect(stats.pages!.held + stats.pages!.leases).toBe(0)
    expect(stats.tokens.cached).toBeGreaterThan(0)
    expect(stats.batches).toBeLessThan(stats.requests)
  })

  it('keeps histories by tenant and user, and forgets them when told to', async () => {
    await using ranker = await Ranker.load(bundle, small)
    const request = { ...randomRequest(new Random(5), 80, 20), tenant: 'a' }
    const first = await ranker.rank(request)
    expect(first.cache).toEqual({ state: 'cold', tokens: first.cache.tokens, cachedTokens: 0 })
    const again = await ranker.rank(request)
    expect(again.cache.cachedTokens).toBe(64 * Math.floor(first.cache.tokens / 64))
    expect(again.scores).toEqual(first.scores)
    expect((await ranker.rank({ ...request, tenant: 'b' })).cache.state).toBe('cold')
    expect((await ranker.rank({ ...request, context: { country: 'c3' } })).cache.state).toBe('cold')
    expect(await ranker.forgetUser(request.user, { tenant: 'c' })).toEqual({ freed: 0, held: 0 })
    expect((await ranker.forgetUser(BigInt(request.user as string), { tenant: 'a' })).freed).toBeGreaterThan(0)
    expect((await ranker.rank(request)).cache.state).toBe('cold')
    expect((await ranker.rank({ ...request, tenant: 'b' })).cache.state).not.toBe('cold')
  })

  it('puts requests of the same history together', async () => {
    await using ranker = await Ranker.load(bundle, { ...small, maxDelayMs: 100 })
    const request = randomRequest(new Random(6), 60, 9)
    const requests = [request, { ...request, time: 3_000_000 }, { ...request, candidates: ['5', '6'] }]
    const results = await Promise.all(requests.map(one => ranker.rank(one)))
    for (const [r, result] of results.entries()) expectScores(result, requests[r]!)
    expect(await ranker.stats()).toMatchObject({ batches: 1, requests: 3, groups: 1 })
  })

  it("takes ids as text, numbers and bigints, and typed arrays, which stay the caller's", async () => {
    await using ranker = await Ranker.load(bundle, small)
    const text: RankRequest = {
      ...{ user: '3', candidates: ['7', '8', '9'], time: 1_000_500 },
      history: {
        items: ['4', '5', '6'],
        times: [1_000_000, 1_000_100, 1_000_200],
        actions: [['LIKE'], [], ['LIKE', 'SHARE']],
      },
    }
    const wanted = await ranker.rank(text)
    expectScores(wanted, { ...text, history: { ...text.history, actions: [1, 0, 3] } })
    const times = BigInt64Array.of(1_000_000n, 1_000_100n, 1_000_200n)
    const items = BigInt64Array.of(4n, 5n, 6n)
    const candidates = Int32Array.of(7, 8, 9)
    const typed = { ...text, user: 3n, history: { items, times, actions: Int32Array.of(1, 0, 3) }, candidates }
    expect((await ranker.rank({ ...typed, time: 1_000_500n })).scores).toEqual(wanted.scores)
    expect([items, times, candidates].map(array => array.length)).toEqual([3, 3, 3])
    const mixed = { ...text, user: 3, candidates: ['7', 8, 9n], history: { ...text.history, items: [4, '5', 6n] } }
    expect((await ranker.rank(mixed)).scores).toEqual(wanted.scores)
  })

  it('counts ids that it does not know, or refuses them', async () => {
    const request = { ...randomRequest(new Random(8), 0, 1), user: 'nobody', candidates: ['7', 'x', 2n ** 60n] }
    const empty = { ...request, history: { items: [], times: [] } }
    {
      await using ranker = await Ranker.load(bundle, small)
      const result = await ranker.rank(empty)
      expect(result.unknownIds).toBe(3)
      expectScores(result, empty)
    }
    await using ranker = await Ranker.load(bundle, { ...small, unknownIds: 'error' })
    await expect(ranker.rank(empty)).rejects.toThrow(
      error('ERR_HSTU_INVALID_ARGUMENT', /user nobody is not in vocabulary 'user'/),
    )
    await expect(ranker.rank({ ...empty, user: '1' })).rejects.toThrow(
      error('ERR_HSTU_INVALID_ARGUMENT', /candidates\[1\] x is not in/),
    )
    expectScores(await ranker.rank({ ...empty, user: '1', candidates: ['7'] }), {
      ...empty,
      user: '1',
      candidates: ['7'],
    })
  })

  it('cuts histories by steps that do not move with every event', async () => {
    await using ranker = await Ranker.load(bundle, { ...small, maxHistory: 40 })
    const random = new Random(9)
    const request = randomRequest(random, 38, 5)
    const cached: number[] = []
    for (let k = 0; k < 14; k++) {
      request.history = grow(random, request.history, 1)
      request.time = 3_000_000
      const result = await ranker.rank(request)
      expectScores(result, request, 40)
      cached.push(result.cache.cachedTokens)
    }
    expect(cached.filter(tokens => tokens === 0).length).toBe(4) // the first request, and the cuts at 5, 10 and 15
    const { items, times, actions, series } = request.history
    const tail = (list: unknown) => (list as never[]).slice(20)
    const rest = { items: tail(items), times: tail(times), actions: tail(actions), series: tail(series), start: 20 }
    expectScores(await ranker.rank({ ...request, history: rest }), { ...request, history: rest }, 40)
  })

  it('names what is wrong with a request, and goes on', async () => {
    await using ranker = await Ranker.load(bundle, { ...small, maxCandidates: 50 })
    const good = randomRequest(new Random(10), 5, 3)
    const bad = async (change: object, message: RegExp) =>
      expect(ranker.rank({ ...good, ...change })).rejects.toThrow(error('ERR_HSTU_INVALID_ARGUMENT', message))
    const history = (change: object) => ({ history: { ...good.history, ...change } })
    await bad({ candidates: [] }, /there are no candidates/)
    await bad({ candidates: new Array(51).fill('1') }, /51 candidates are more than maxCandidates 50/)
    await bad({ candidates: 'abc' }, /candidates must be an array, got "abc"/)
    await bad(
      { candidates: ['1', 1.5] },
      /candidates\[1\] must be text, a bigint or a whole number below 2\^53, got 1.5/,
    )
    await bad({ candidates: [2n ** 64n] }, /candidates\[0\] .* is beyond 64 bits/)
    await bad({ user: null }, /user must be text/)
    await bad({ tenant: 7 }, /tenant must be text, got 7/)
    await bad({ time: Number.NaN }, /time must be a whole number of seconds, got null/)
    await bad({ context: { city: 'x' } }, /context has no feature "city"; the model's are country/)
    await bad({ history: null }, /history must be an object/)
    await bad(history({ times: [1, 2, Infinity, 4, 5] }), /history\.times\[2\] must be a whole number of seconds/)
    await bad(history({ times: [1, 2] }), /history\.times has 2 entries, history\.items 5/)
    await bad(history({ actions: [1, 2, 3, 4, 0] }), /history\.actions\[3\] must be a mask of 2 bits .*, got 4/)
    await bad(history({ actions: [[], [], ['BUY'], [], []] }), /history\.actions\[2\]: there is no action "BUY"/)
    await bad(history({ series: [0, 0, 2, 0, 0] }), /history\.series\[2\] must be 0 or the number of one of 1/)
    await bad(history({ start: -1 }), /history\.start must be a count/)
    const gone = BigInt64Array.of(1n, 2n, 3n)
    structuredClone(gone, { transfer: [gone.buffer] })
    await bad({ candidates: gone }, /candidates is detached/)
    await bad({ deadlineMs: Number.NaN }, /deadlineMs must be a number/)
    expectScores(await ranker.rank(good), good)
    expect(await ranker.stats()).toMatchObject({ state: 'ready', completed: 1 })
  })

  it('caches within a request alone where rows of a history change with what comes after them', async () => {
    const full = join(folder, 'full')
    await writeTestBundle(full, { contextualFull: true })
    await using ranker = await Ranker.load(full, small)
    expect(ranker.info.cacheOff).toMatch(/contextualFull/)
    const request = randomRequest(new Random(17), 80, 30)
    const [first, again] = [await ranker.rank(request), await ranker.rank(request)]
    expect(again.cache.state).toBe('cold')
    expect(again.scores).toEqual(first.scores)
    expect((await ranker.stats()).pages).toMatchObject({ cached: 0, held: 0 })
  })
})
