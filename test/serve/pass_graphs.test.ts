import { describe, expect, it } from 'vitest'
import { Random } from '#lib/random.js'
import { encodeRequest, historyTokens } from '#lib/serve/encode.js'
import { Falcon } from '#lib/serve/falcon.js'
import { bucketOf, type PassShape } from '#lib/serve/pass.js'
import { PassGraphs } from '#lib/serve/pass_graphs.js'
import { memory, scope, Tensor } from '#lib/tensor.js'
import { randomRequest, stirred, wireOf } from './requests.js'

const shape = (tokens: number, more: Partial<PassShape> = {}): PassShape => ({
  ...{
    tokens,
    asked: 10,
    candidates: 9,
    sequences: 1,
    keys: 0,
    pages: 0,
    contentRows: 0,
    actionRows: 0,
    longest: tokens,
  },
  ...{ first: true, writes: false, ...more },
})
const values = (first: bigint) => ({ words: BigInt64Array.of(first, 2n, 3n), used: 2, numbers: Int32Array.of(4) })
/** 2 x words[0]. */
const twice = (words: Tensor) => {
  const both = scope(() => Tensor.from([Number(words.dataSync()[0])]))
  both.write(Float32Array.of(2 * Number(words.dataSync()[0])))
  return both
}

describe('graphs of passes', () => {
  it('run again with other values, and give up those least recently used', () => {
    const before = memory()
    const graphs = new PassGraphs('cpu', 1)
    const run = (tokens: number, first: bigint) => graphs.run(shape(tokens), values(first), twice).dataSync()[0]
    expect([run(30_000, 1n), run(30_000, 5n), run(20_000, 7n), run(10_000, 9n)]).toEqual([2, 10, 14, 18])
    expect(graphs.size).toBe(3)
    expect(run(30_000, 6n)).toBe(12)
    expect(run(15_000, 8n)).toBe(16) // in place of the one of 20,000 tokens
    expect(graphs.size).toBe(3)
    expect([run(10_000, 3n), run(30_000, 2n)]).toEqual([6, 4])
    const failing = () => graphs.run(shape(7), values(1n), () => { throw new Error('no') }) // biome-ignore format: one line
    expect(failing).toThrow('no')
    graphs.dispose()
    expect(graphs.size).toBe(0)
    expect(memory()).toEqual(before)
  })

  it('have shapes that hold what they are for', () => {
    const random = new Random(4)
    for (let n = 0; n < 2000; n++) {
      const candidates = 1 + random.int(3000)
      const first = random.float() < 0.7
      const sequences = 1 + random.int(40)
      const fresh = first ? sequences + random.int(2000) : 0
      const exact = shape(fresh + candidates, {
        ...{ candidates, sequences, first, asked: candidates + (first ? sequences : 0) },
        ...(random.float() < 0.5 ? { keys: fresh + candidates + random.int(9000), pages: 1 + random.int(300) } : {}),
      })
      const bucket = bucketOf(exact)
      // The tokens that are over belong to one more sequence, the last of whose rows are asked.
      expect(bucket.tokens - exact.tokens).toBeGreaterThanOrEqual(bucket.asked - exact.asked)
      expect(bucket.asked).toBeGreaterThanOrEqual(exact.asked)
      expect(bucket.sequences).toBeGreaterThan(exact.sequences)
      if (exact.keys > 0) expect(bucket.keys).toBeGreaterThanOrEqual(exact.keys + bucket.tokens - exact.tokens)
      expect(bucket.pages).toBeGreaterThanOrEqual(exact.pages)
      expect(bucket.tokens - exact.tokens).toBeLessThan(64 + (exact.tokens > 3800 ? 256 : 128))
      if (!first) expect(bucket.tokens).toBe(bucket.asked)
    }
  })

  it('are made beforehand for what is asked most, and change no score', async () => {
    const before = memory()
    const { model, encoder } = stirred({})
    const [warm, plain] = [true, false].map(graphs => new Falcon(model, null, 16, 200, { graphs }))
    await warm!.warmUp(700)
    const random = new Random(9)
    const request = encodeRequest(wireOf(randomRequest(random, 200, 64)), encoder)
    const pages = Int32Array.from({ length: Math.ceil(historyTokens(request) / 16) }, (_, k) => k)
    const score = async (falcon: Falcon) => {
      const cold = await falcon.score([{ request, pages, cached: 0, stored: 0 }], { microbatch: 20 })
      const stored = historyTokens(request) - 3
      const hit = await falcon.score([{ request, pages, cached: stored, stored }], { microbatch: 64 })
      return [...cold.logits, ...hit.logits]
    }
    expect(await score(warm!)).toEqual(await score(plain!))
    warm!.trim()
    expect(await score(warm!)).toEqual(await score(plain!))
    for (const falcon of [warm!, plain!]) falcon.dispose()
    model.dispose()
    expect(memory()).toEqual(before)
  })
})
