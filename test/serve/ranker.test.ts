import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { Random } from '#lib/random.js'
import { trainingLogits } from '#lib/serve/golden.js'
import { Ranker, type RankerOptions, type RankResult } from '#lib/serve/ranker.js'
import type { RankRequest } from '#lib/serve/request.js'
import { memory, setMemoryLimit } from '#lib/tensor.js'
import { loadCheckpoint, saveCheckpoint } from '#lib/train/checkpoint.js'
import { buildIfMissing, temporaryFolder } from '../cli/process.js'
import { config, grow, randomRequest, schema, stirred, wireOf, writeTestBundle } from './requests.js'

const folder = temporaryFolder()
const bundle = join(folder, 'bundle')
const parts = stirred({})
afterAll(() => parts.model.dispose())
beforeAll(async () => {
  buildIfMissing()
  await writeTestBundle(bundle)
})

const small: RankerOptions = { device: 'cpu', threads: 1, cacheBytes: 4 << 20, microbatch: 7 }
const error = (code: string, message: RegExp) =>
  expect.objectContaining({ name: 'HstuError', code, message: expect.stringMatching(message) })

/** The scores that the candidates have alone, by the training path. */
function scoresOf(request: RankRequest, maxHistory = 100): Record<string, number[]> {
  const K = config.tasks.length
  const logits = trainingLogits(parts, [wireOf(request, maxHistory)], parts.encoder, schema)
  const of = (k: number) => Array.from({ length: logits.length / K }, (_, m) => logits[m * K + k]!)
  return { like: of(0).map(z => 1 / (1 + Math.exp(-z))), watch: of(1) }
}

function expectScores(result: RankResult, request: RankRequest, maxHistory = 100): void {
  const plain = Object.fromEntries(Object.entries(result.scores).map(([task, scores]) => [task, Array.from(scores)]))
  expect(plain).toEqual(scoresOf(request, maxHistory))
}

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

  it('refuses what is over the bounds of its queue at once, with a hint, and loses nothing', async () => {
    await using ranker = await Ranker.load(bundle, { ...small, queue: { requests: 8 } })
    const random = new Random(11)
    await ranker.rank(randomRequest(random, 10, 5)) // measures
    const requests = Array.from({ length: 60 }, () => randomRequest(random, 80, 20))
    const begin = performance.now()
    let slowest = 0
    const outcomes = await Promise.allSettled(
      requests.map(request =>
        ranker.rank(request).catch(refusal => {
          slowest = Math.max(slowest, performance.now() - begin)
          throw refusal
        }),
      ),
    )
    const refused = outcomes.filter(outcome => outcome.status === 'rejected')
    expect(refused.length).toBe(52)
    for (const { reason } of refused) {
      expect(reason).toEqual(error('ERR_HSTU_OVERLOADED', /8 requests are queued, the bound is 8/))
      expect(reason.retryAfterMs).toBeGreaterThan(0)
    }
    expect(slowest).toBeLessThan(1000)
    for (const [r, outcome] of outcomes.entries())
      if (outcome.status === 'fulfilled') expectScores(outcome.value, requests[r]!)
    expect(await ranker.stats()).toMatchObject({
      accepted: 9,
      completed: 9,
      rejected: 52,
      queued: { requests: 0, tokens: 0 },
    })
    await using narrow = await Ranker.load(bundle, { ...small, queue: { tokens: 300 } })
    const big = randomRequest(random, 100, 400)
    const both = await Promise.allSettled([narrow.rank(big), narrow.rank(big)])
    expect(both.map(({ status }) => status)).toEqual(['fulfilled', 'rejected']) // alone it is taken
  })

  it("leaves the caller's timers their turns, however much comes back and whatever callers do with it", async () => {
    await using ranker = await Ranker.load(bundle, small)
    const random = new Random(21)
    const requests = Array.from({ length: 24 }, () => randomRequest(random, 5, 1))
    const end = performance.now() + 600
    let [results, since, most] = [0, 0, 0]
    const timer = setInterval(() => {
      most = Math.max(most, results - since)
      since = results
    }, 5)
    const caller = async (request: RankRequest) => {
      while (performance.now() < end) {
        await ranker.rank(request)
        results++
        for (const until = performance.now() + 1; performance.now() < until; );
      }
    }
    await Promise.all(requests.map(caller))
    clearInterval(timer)
    expect(results).toBeGreaterThan(100)
    // Five of a millisecond each until the timer is due, and two turns of sixteen.
    expect(Math.max(most, results - since)).toBeLessThan(48)
  })

  it('gives up what is aborted or late, in the queue and between microbatches', async () => {
    await using ranker = await Ranker.load(bundle, { ...small, microbatch: 1 })
    const random = new Random(12)
    const long = randomRequest(random, 90, 1000)
    const controller = new AbortController()
    const early = new AbortController()
    early.abort()
    const aborted = error('ERR_HSTU_ABORTED', /the request was aborted/)
    await expect(ranker.rank({ ...long, signal: early.signal })).rejects.toThrow(aborted)
    await expect(ranker.rank({ ...long, deadlineMs: 0 })).rejects.toThrow(
      error('ERR_HSTU_ABORTED', /deadline of 0 ms passed/),
    )
    const running = ranker.rank({ ...long, signal: controller.signal })
    const queued = ranker.rank({ ...randomRequest(random, 9, 4), deadlineMs: 30 })
    const late = expect(queued).rejects.toThrow(error('ERR_HSTU_ABORTED', /deadline of 30 ms passed/))
    const stopped = expect(running).rejects.toThrow(aborted)
    await new Promise(resolve => setTimeout(resolve, 60))
    const begin = performance.now()
    controller.abort(new Error('enough'))
    await Promise.all([late, stopped])
    const next = randomRequest(random, 10, 3)
    expectScores(await ranker.rank(next), next)
    const whole = performance.now() - begin
    const again = performance.now()
    expectScores(await ranker.rank({ ...long, time: 4_000_000 }), { ...long, time: 4_000_000 })
    expect(whole).toBeLessThan((performance.now() - again) / 2) // the rest of the long request was not computed
    expect(await ranker.stats()).toMatchObject({ completed: 2, failed: 2, rejected: 2, cancelled: 2 })
  })

  it('swaps to another bundle between batches, and stays with the old one when that cannot be', async () => {
    const [other, wrong, damaged] = ['other', 'wrong', 'damaged'].map(name => join(folder, name)) as [
      string,
      string,
      string,
    ]
    await writeTestBundle(other, { activation: 'softmax' }, 'test-2')
    const { json, tensors, files } = await loadCheckpoint(bundle)
    const groups = { model: Object.fromEntries(tensors.model!) }
    const golden = json.golden as { logits: number[] }
    const logits = golden.logits.map((z, i) => (i === 3 ? z + 1 : z))
    await saveCheckpoint(wrong, 0, {
      kind: 'bundle',
      tensors: groups,
      json: { ...json, golden: { ...golden, logits } },
      files,
    })
    await saveCheckpoint(damaged, 0, { kind: 'bundle', tensors: groups, json, files })
    const file = readdirSync(damaged).find(name => name.startsWith('model'))!
    const bytes = readFileSync(join(damaged, file))
    bytes[bytes.length - 9]! ^= 1
    writeFileSync(join(damaged, file), bytes)
    const message = /json\.golden\.logits\[3\]: the model gives/
    await expect(Ranker.load(wrong, small)).rejects.toThrow(error('ERR_HSTU_CHECKPOINT', message))

    const ranker = await Ranker.load(bundle, small)
    const random = new Random(13)
    const request = randomRequest(random, 70, 20)
    expectScores(await ranker.rank(request), request)
    await expect(ranker.swap(wrong)).rejects.toThrow(error('ERR_HSTU_CHECKPOINT', message))
    await expect(ranker.swap(damaged)).rejects.toThrow(error('ERR_HSTU_CHECKPOINT', /damaged/))
    await expect(ranker.swap(join(folder, 'none'))).rejects.toThrow(
      error('ERR_HSTU_CHECKPOINT', /expected a checkpoint/),
    )
    const still = await ranker.rank(request)
    expect([still.model, still.cache.state]).toEqual(['test-1', 'hit'])
    expectScores(still, request)
    const swapped = ranker.swap(other)
    const during = await Promise.all(Array.from({ length: 30 }, () => ranker.rank(request)))
    expect(await swapped).toBe('test-2')
    const after = await ranker.rank(request)
    expect([after.model, ranker.info.model]).toEqual(['test-2', 'test-2'])
    for (const result of during) expect(result.scores).toEqual(result.model === 'test-1' ? still.scores : after.scores)
    expect(after.scores).not.toEqual(still.scores)
    expect((await ranker.stats()).swaps).toBe(1)
    await ranker.close()
  })

  it('drains when it is closed, then refuses', async () => {
    const ranker = await Ranker.load(bundle, small)
    const random = new Random(14)
    const requests = Array.from({ length: 10 }, () => randomRequest(random, 60, 20))
    const results = Promise.all(requests.map(request => ranker.rank(request)))
    const closing = ranker.close()
    await expect(ranker.rank(requests[0]!)).rejects.toThrow(error('ERR_HSTU_DISPOSED', /closed/))
    for (const [r, result] of (await results).entries()) expectScores(result, requests[r]!)
    await closing
    expect(ranker.state).toBe('closed')
    await ranker.close()
    await expect(ranker.stats()).rejects.toThrow(error('ERR_HSTU_DISPOSED', /closed/))

    const hasty = await Ranker.load(bundle, { ...small, microbatch: 1 })
    const long = hasty.rank(randomRequest(random, 90, 1000))
    const lost = expect(long).rejects.toThrow(
      error('ERR_HSTU_ABORTED', /was closed and did not come to the request within 1 ms/),
    )
    await hasty.close({ drainMs: 1 })
    await lost
  })

  it('tells when memory ran out, and goes on when there is some', async () => {
    await using ranker = await Ranker.load(bundle, { ...small, maxHistory: 4000, cacheBytes: 16 << 20 })
    const request = randomRequest(new Random(15), 3000, 800)
    setMemoryLimit(memory('cpu').used + 65_536, 'cpu')
    try {
      await expect(ranker.rank(request)).rejects.toThrow(error('ERR_HSTU_OUT_OF_MEMORY', /bytes/))
    } finally {
      setMemoryLimit(Infinity, 'cpu')
    }
    expectScores(await ranker.rank(request), request, 4000)
    expect((await ranker.stats()).pages).toMatchObject({ held: 0, leases: 0 })
  })

  it('rejects everything, at hand and to come, when its thread is lost', async () => {
    const started: Worker[] = []
    const unref = Worker.prototype.unref
    Worker.prototype.unref = function (this: Worker) {
      started.push(this)
      unref.call(this)
    }
    const ranker = await Ranker.load(bundle, { ...small, microbatch: 1 })
    Worker.prototype.unref = unref
    const random = new Random(18)
    const lost = error('ERR_HSTU_DEVICE_LOST', /the engine's thread ended/)
    const waiting = Array.from({ length: 5 }, () =>
      expect(ranker.rank(randomRequest(random, 90, 500))).rejects.toThrow(lost),
    )
    await new Promise(resolve => setTimeout(resolve, 20))
    await started[0]!.terminate()
    await Promise.all(waiting)
    expect(ranker.state).toBe('failed')
    await expect(ranker.rank(randomRequest(random, 1, 1))).rejects.toThrow(lost)
    await expect(ranker.stats()).rejects.toThrow(lost)
    await ranker.close()
  })

  it('leaves the event loop of its caller free', async () => {
    await using ranker = await Ranker.load(bundle, { ...small, microbatch: 1024 })
    const random = new Random(16)
    let most = 0
    let last = performance.now()
    const timer = setInterval(() => {
      most = Math.max(most, performance.now() - last)
      last = performance.now()
    }, 1)
    for (let k = 0; k < 6; k++) await ranker.rank(randomRequest(random, 90, 2000))
    clearInterval(timer)
    const { histograms } = await ranker.stats()
    expect(histograms.total.max).toBeGreaterThan(most)
  })

  it('says what is wrong with its options', async () => {
    const load = (options: RankerOptions) => Ranker.load(bundle, { ...small, ...options })
    const bad = (options: RankerOptions, message: RegExp) =>
      expect(load(options)).rejects.toThrow(error('ERR_HSTU_INVALID_ARGUMENT', message))
    await bad({ maxHistory: 0 }, /maxHistory must be a whole number of at least 1, got 0/)
    await bad({ cacheBytes: 1000 }, /cacheBytes 1000 holds no history of maxHistory 100: it takes \d+ bytes/)
    await bad({ microbatch: 1.5 }, /microbatch must be a whole number/)
    await bad({ unknownIds: 'clamp' as 'error' }, /unknownIds must be 'error' or 'unknown-row', got "clamp"/)
    await bad({ maxDelayMs: -1 }, /maxDelayMs must be in 0 \.\. 1000, got -1/)
    await bad({ queue: { tokens: 0 } }, /tokens must be a whole number of at least 1, got 0/)
    await expect(Ranker.load(join(folder, 'none'), small)).rejects.toThrow(
      error('ERR_HSTU_CHECKPOINT', /expected a checkpoint/),
    )
    const progress: string[] = []
    await using ranker = await load({ onProgress: ({ phase }) => progress.push(phase) })
    expect(progress).toEqual(['read', 'model', 'cache', 'golden', 'ready'])
    expect(ranker.info).toMatchObject({ model: 'test-1', device: 'cpu', cacheOff: null, maxHistory: 100 })
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
