import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'
import { describe, expect, it } from 'vitest'
import { Random } from '#lib/random.js'
import { Ranker, type RankerOptions } from '#lib/serve/ranker.js'
import type { RankRequest } from '#lib/serve/request.js'
import { memory, setMemoryLimit } from '#lib/tensor.js'
import { loadCheckpoint, saveCheckpoint } from '#lib/train/checkpoint.js'
import { error, rankerBundle, small } from './ranker_fixture.js'
import { randomRequest, writeTestBundle } from './requests.js'

const { folder, bundle, expectScores } = rankerBundle()

describe('the engine of Ranker', () => {
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

  it('knows how long the queue takes from the first answer on', async () => {
    await using ranker = await Ranker.load(bundle, { ...small, microbatch: 1 })
    const random = new Random(22)
    await ranker.rank(randomRequest(random, 10, 5))
    const running = ranker.rank(randomRequest(random, 90, 100))
    await expect(ranker.rank({ ...randomRequest(random, 10, 5), deadlineMs: 1e-3 })).rejects.toThrow(
      error('ERR_HSTU_OVERLOADED', /the queue takes about \d+ ms/),
    )
    await running
  })

  it('takes many requests with one signal, and warns of nothing', async () => {
    await using ranker = await Ranker.load(bundle, { ...small, microbatch: 1 })
    const random = new Random(23)
    const controller = new AbortController()
    const { signal } = controller
    const warnings: Error[] = []
    const warned = (warning: Error) => warnings.push(warning)
    process.on('warning', warned)
    const first = randomRequest(random, 5, 2)
    expectScores(await ranker.rank({ ...first, signal }), first)
    const all = Promise.allSettled(
      Array.from({ length: 30 }, () => ranker.rank({ ...randomRequest(random, 90, 100), signal })),
    )
    await new Promise(resolve => setTimeout(resolve, 5))
    controller.abort()
    const outcomes = await all
    process.off('warning', warned)
    expect(outcomes.filter(({ status }) => status === 'rejected').length).toBeGreaterThan(20)
    expect(warnings).toEqual([])
    expect(await ranker.stats()).toMatchObject({ queued: { requests: 0 } })
  })

  it('counts the bytes of ids as they are', async () => {
    const text = (n: number) => 'x'.repeat(n)
    await using ranker = await Ranker.load(bundle, { ...small, queue: { bytes: 50_000 }, maxBatchTokens: 100 })
    const request = (length: number) => ({ ...randomRequest(new Random(24), 10, 5), candidates: [text(length), 'b'] })
    const before = ranker.rank(randomRequest(new Random(25), 90, 100)) // so that it waits
    const running = ranker.rank(request(10_000)) // alone it is taken
    const { queued } = await ranker.stats()
    expect(queued.bytes).toBeGreaterThan(20_000)
    expect(queued.bytes).toBeLessThan(25_000)
    await Promise.all([before, running])
    const both = await Promise.allSettled([ranker.rank(request(10_000)), ranker.rank(request(20_000))])
    expect(both.map(({ status }) => status)).toEqual(['fulfilled', 'rejected'])
    expect(both[1]).toMatchObject({ reason: error('ERR_HSTU_OVERLOADED', /bytes are queued, the bound is 50000/) })
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
    await bad({ deterministic: 'no' as unknown as false }, /deterministic must be true or false, got "no"/)
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
})
