import { describe, expect, it } from 'vitest'
import { Random } from '#lib/random.js'
import { Histogram } from '#lib/serve/histogram.js'
import { takeBatch, type Waiting } from '#lib/serve/queue.js'
import { historyCut } from '#lib/serve/request.js'
import { Vocabulary } from '#lib/serve/vocabulary.js'

interface Wire {
  owner: string
  history: number
}
const rules = {
  ownerOf: (wire: unknown) => (wire as Wire).owner,
  together: (a: unknown, b: unknown) => (a as Wire).history === (b as Wire).history,
}
const waiting = (id: number, owner: string, history: number, tokens: number): Waiting => ({
  ...{ id, tokens, wire: { owner, history } satisfies Wire, enqueued: 0, deadline: null, cancelled: false },
})

describe('takeBatch', () => {
  it('takes requests in order up to the budget, one that is larger alone', () => {
    const queue = [waiting(1, 'a', 1, 500), waiting(2, 'b', 1, 60), waiting(3, 'c', 1, 60), waiting(4, 'd', 1, 30)]
    const take = () => takeBatch(queue, { budget: 100, ...rules }).map(({ id }) => id)
    expect(take()).toEqual([1])
    expect(take()).toEqual([2, 4])
    expect(take()).toEqual([3])
    expect(take()).toEqual([])
  })

  it("never has two histories of one owner in a batch, nor an owner's requests out of order, and loses none", () => {
    const random = new Random('queue')
    for (let round = 0; round < 300; round++) {
      const all = Array.from({ length: random.int(30) }, (_, id) =>
        waiting(id, String(random.int(6)), random.int(3), 1 + random.int(60)),
      )
      const queue = [...all]
      const taken: number[] = []
      while (queue.length > 0) {
        const head = queue[0]!.id
        const batch = takeBatch(queue, { budget: 100, ...rules })
        expect(batch[0]!.id).toBe(head)
        const histories = new Map<string, number>()
        for (const { wire } of batch) {
          const { owner, history } = wire as Wire
          expect(histories.get(owner) ?? history).toBe(history)
          histories.set(owner, history)
        }
        const tokens = batch.reduce((sum, one) => sum + one.tokens, 0)
        expect(tokens <= 100 || batch.length === 1).toBe(true)
        taken.push(...batch.map(({ id }) => id))
      }
      expect([...taken].sort((a, b) => a - b)).toEqual(all.map(({ id }) => id))
      for (const owner of ['0', '1', '2', '3', '4', '5']) {
        const own = taken.filter(id => (all[id]!.wire as Wire).owner === owner)
        expect(own).toEqual([...own].sort((a, b) => a - b))
      }
    }
  })
})

describe('historyCut', () => {
  it('leaves at most maxHistory rows, at least 7 / 8 of them, and moves by steps', () => {
    for (const most of [1, 7, 8, 40, 1024]) {
      const cuts = new Set<number>()
      for (let total = 0; total < 3 * most + 20; total++) {
        const cut = historyCut(total, most)
        expect(total - cut).toBeLessThanOrEqual(most)
        expect(total - cut).toBeGreaterThan(Math.min(total, most) - Math.max(1, most >> 3) - 1)
        cuts.add(cut)
      }
      expect(cuts.size).toBeLessThanOrEqual(1 + Math.ceil((2 * most + 20) / Math.max(1, most >> 3)))
    }
  })
})

describe('Histogram', () => {
  it('has the quantiles of what it was given, within a bucket', () => {
    const histogram = new Histogram()
    expect(histogram.summary()).toEqual({ count: 0, sum: 0, max: 0, p50: 0, p90: 0, p99: 0 })
    const random = new Random('histogram')
    const values = Array.from({ length: 5000 }, () => Math.exp(6 * random.float() - 3))
    for (const value of values) histogram.add(value)
    values.sort((a, b) => a - b)
    const { count, sum, max, p50, p99 } = histogram.summary()
    expect(count).toBe(5000)
    expect(sum).toBeCloseTo(
      values.reduce((a, b) => a + b, 0),
      6,
    )
    expect(max).toBe(values.at(-1))
    for (const [found, q] of [
      [p50, 0.5],
      [p99, 0.99],
    ] as const) {
      const ratio = found / values[Math.floor(q * 5000)]!
      expect(ratio).toBeGreaterThan(0.99)
      expect(ratio).toBeLessThan(1.2)
    }
  })
})

describe('Vocabulary', () => {
  it('finds ids as text and as whole numbers, also beyond 2^53, and takes no digits for a number that writes itself otherwise', () => {
    const big = String(2n ** 53n + 1n)
    const vocabulary = new Vocabulary('item', ['7', '007', '-3', big, 'x', '0'])
    expect([7n, -3n, 2n ** 53n + 1n, 0n].map(id => vocabulary.numberOf(id))).toEqual([1, 3, 4, 6])
    expect(['7', '007', big, 'x', 'y'].map(id => vocabulary.numberOf(id))).toEqual([1, 2, 4, 5, 0])
    expect([2n ** 53n, 8n].map(id => vocabulary.numberOf(id))).toEqual([0, 0])
  })
})
