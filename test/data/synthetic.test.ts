import { describe, expect, it } from 'vitest'
import { evalBatch, trainBatch } from '#lib/data/dataset.js'
import { inspectDataset } from '#lib/data/inspect.js'
import { syntheticStream } from '#lib/data/synthetic.js'
import { Random } from '#lib/random.js'
import { handmade } from './files.js'

describe('Random', () => {
  it('is xoshiro128**: its first numbers from the state 1 2 3 4', () => {
    const random = new Random(0)
    random.setState({ algorithm: 'xoshiro128**', key: 0, words: [1, 2, 3, 4] })
    expect(Array.from({ length: 5 }, () => random.uint32())).toEqual(xoshiro([1, 2, 3, 4], 5))
    expect(xoshiro([1, 2, 3, 4], 2)).toEqual([11520, 0])
  })

  it('never changes its streams', () => {
    const random = new Random(42)
    expect([random.uint32(), random.uint32(), random.int(1000)]).toMatchInlineSnapshot(`
      [
        330693337,
        174533646,
        59,
      ]
    `)
    expect(new Random('42').uint32()).not.toBe(new Random(42).uint32())
  })

  it('goes on exactly from a state that went through JSON', () => {
    const random = new Random('resume')
    random.normal()
    const state = JSON.parse(JSON.stringify(random.state()))
    const wanted = [random.float(), random.normal(), random.int(7), random.fork('x').uint32()]
    const other = new Random(0)
    other.setState(state)
    expect([other.float(), other.normal(), other.int(7), other.fork('x').uint32()]).toEqual(wanted)
    expect(() => other.setState({ ...state, words: [0, 0, 0, 0] })).toThrow(RangeError)
    expect(() => other.setState({ ...state, words: [1.5, 0, 0, 0] })).toThrow(RangeError)
  })

  it('forks by label, whatever was drawn before', () => {
    const random = new Random(1)
    const before = random.fork('a').uint32()
    random.uint32()
    expect(random.fork('a').uint32()).toBe(before)
    expect(random.fork('b').uint32()).not.toBe(before)
    expect(random.fork('a').fork('b').uint32()).not.toBe(random.fork('b').fork('a').uint32())
  })

  it('has the moments it should have', () => {
    const random = new Random(7)
    const n = 100_000
    const mean = (draw: () => number) => Array.from({ length: n }, draw).reduce((sum, x) => sum + x, 0) / n
    expect(mean(() => random.float())).toBeCloseTo(0.5, 2)
    expect(Math.abs(mean(() => random.normal()))).toBeLessThan(0.015)
    expect(Math.abs(mean(() => random.normal() ** 2) - 1)).toBeLessThan(0.03)
    const counts = new Int32Array(6)
    for (let k = 0; k < n; k++) counts[random.int(6)]!++
    for (const count of counts) expect(Math.abs(count - n / 6)).toBeLessThan(6 * Math.sqrt(n / 6))
    expect(random.int(1)).toBe(0)
    expect(() => random.int(0)).toThrow(RangeError)
    expect([...random.shuffle(new Int32Array([1, 2, 3, 4, 5]))].sort()).toEqual([1, 2, 3, 4, 5])
  })
})

/** The reference code of the paper in BigInt. */
function xoshiro(seed: number[], count: number): number[] {
  const s = seed.map(BigInt)
  const mask = 0xffffffffn
  const rotate = (x: bigint, k: bigint) => ((x << k) | (x >> (32n - k))) & mask
  return Array.from({ length: count }, () => {
    const result = (rotate((s[1]! * 5n) & mask, 7n) * 9n) & mask
    const t = (s[1]! << 9n) & mask
    s[2]! ^= s[0]!
    s[3]! ^= s[1]!
    s[1]! ^= s[2]!
    s[0]! ^= s[3]!
    s[2]! ^= t
    s[3] = rotate(s[3]!, 11n)
    return Number(result)
  })
}

describe('syntheticStream', () => {
  const small = { numItems: 500, numCategories: 20, recordLength: 32, numRecords: 4000, seed: 3 }

  it('is a function of its options; times change no item', () => {
    const one = syntheticStream(small)
    const two = syntheticStream({ ...small, times: true })
    expect(two.dataset.items).toEqual(one.dataset.items)
    expect(syntheticStream({ ...small, seed: 4 }).dataset.items).not.toEqual(one.dataset.items)
    expect(one.dataset.times).toBeNull()
    expect([one.trainRecords.length, one.testRecords.length, one.testRecords[0]]).toEqual([3600, 400, 3600])
  })

  it('has up to five categories a record and releases items gradually', () => {
    const { dataset, categoryOf } = syntheticStream(small)
    const latest = (from: number, to: number) =>
      dataset.items.subarray(from * 32, to * 32).reduce((a, b) => Math.max(a, b))
    for (let r = 0; r < dataset.numUsers; r++) {
      const used = new Set(Array.from(dataset.items.subarray(r * 32, r * 32 + 32), item => categoryOf[item]))
      expect(used.size).toBeLessThanOrEqual(5)
    }
    expect(latest(0, 40)).toBeLessThanOrEqual(203)
    expect(latest(1900, 2000)).toBeGreaterThan(330)
    expect(latest(1900, 2000)).toBeLessThanOrEqual(350)
    expect(latest(3900, 4000)).toBeGreaterThan(490)
  })

  it("agrees with its oracle's expectation on the targets drawn", () => {
    const stream = syntheticStream({ ...small, numRecords: 40_000 })
    const { hr10, hr50, drawnHr10, drawnHr50 } = stream.oracle()
    expect(Math.abs(hr10 - drawnHr10)).toBeLessThan(0.025)
    expect(Math.abs(hr50 - drawnHr50)).toBeLessThan(0.025)
    expect(stream.oracleHitRate(500).expected).toBeCloseTo(1, 10)
    expect(stream.popularity().hr10).toBeLessThan(hr10 / 3)
  })

  it('reaches the oracle known for the demo sizes, within a few seconds', () => {
    const start = performance.now()
    const stream = syntheticStream()
    expect(performance.now() - start).toBeLessThan(5000)
    expect(stream.oracle().hr10).toBeGreaterThan(0.172)
    expect(stream.oracle().hr10).toBeLessThan(0.182)
  })

  it('fits the batch builders', () => {
    const { dataset, testRecords } = syntheticStream(small)
    const train = trainBatch(dataset, [0, 1], { maxLength: 32, protocol: 'all' })
    expect(train.maxLength).toBe(31)
    expect(train.targets[30]).toBe(BigInt(dataset.items[31]!))
    const test = evalBatch(dataset, testRecords.subarray(0, 2), { maxLength: 32, stage: 'test', filterSeen: 'none' })
    expect(test.targetIds[0]).toBe(BigInt(dataset.items[3600 * 32 + 31]!))
  })

  it('has times in order whose gaps tell whether the category stays', () => {
    const { dataset, categoryOf } = syntheticStream({ ...small, times: true })
    const times = dataset.times!
    for (let row = 1; row < times.length; row++) {
      if (row % 32 === 0) continue
      const gap = times[row]! - times[row - 1]!
      const stays = categoryOf[dataset.items[row]!] === categoryOf[dataset.items[row - 1]!]
      if (gap <= 0n || (stays && gap > 7200n)) expect.fail(`row ${row}: ${gap} s after the one before`)
    }
  })

  it('refuses sizes that it cannot serve', () => {
    expect(() => syntheticStream({ numItems: 100, numCategories: 50 })).toThrow(/2.5/)
    expect(() => syntheticStream({ recordLength: 0 })).toThrow(/recordLength/)
  })
})

describe('inspectDataset', () => {
  it('describes lengths, times and popularity', () => {
    const data = handmade([
      [1, 2, 3, 4, 1],
      [1, 2, 1],
      [1, 3, 2, 3],
    ])
    data.times![1] = data.times![0]!
    data.ratings = Float32Array.from({ length: 12 }, (_, k) => k % 5)
    const report = inspectDataset(data, 2)
    expect(report).toMatchObject({ users: 3, items: 4, actions: 12, density: 1 })
    expect(report.length).toEqual({ min: 3, mean: 4, median: 4, max: 5 })
    expect(report.lengthHistogram).toEqual([
      { from: 2, to: 3, users: 1 },
      { from: 4, to: 7, users: 2 },
    ])
    expect(report.time).toEqual({ first: 0, last: 2030, days: 2030 / 86_400, equalNeighbours: 1 / 9 })
    expect(report.popularItems).toEqual([
      { id: 'i1', count: 5, share: 5 / 12 },
      { id: 'i2', count: 3, share: 0.25 },
    ])
    // counts 1 3 3 5: mean absolute difference 24 / 16, over twice the mean 3
    expect(report.popularityGini).toBeCloseTo(0.25, 10)
    expect(report.rating).toMatchObject({ min: 0, max: 4 })
    expect(JSON.parse(JSON.stringify(report))).toEqual(report)
  })
})
