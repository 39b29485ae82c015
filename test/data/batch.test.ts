import { describe, expect, it } from 'vitest'
import {
  epochBatches,
  evalBatch,
  evaluableUsers,
  itemCounts,
  requestBatch,
  splitBounds,
  trainableUsers,
  trainBatch,
} from '#lib/data/dataset.js'
import { toInputs, toTargets } from '#lib/data/inputs.js'
import { HstuError } from '#lib/errors.js'
import { Random } from '#lib/random.js'
import { memory, scope } from '#lib/tensor.js'
import { handmade } from './files.js'

const data = handmade([
  [1, 2, 3, 4, 5, 6],
  [7, 8, 9],
  [2, 3, 2, 4, 3],
])

describe('splitting', () => {
  it("'valid' trains up to s_{T-3}, 'paper' up to s_{T-2}", () => {
    expect(splitBounds(data, 0, 'valid')).toEqual({ start: 0, trainEnd: 4, valid: 4, test: 5 })
    expect(splitBounds(data, 2, 'paper')).toEqual({ start: 9, trainEnd: 13, valid: -1, test: 13 })
    expect(() => splitBounds(data, 3)).toThrow(HstuError)
  })

  it('leaves users without a next action to learn from out of training, not out of evaluation', () => {
    expect([...trainableUsers(data, 'valid')]).toEqual([0, 2])
    expect([...trainableUsers(data, 'paper')]).toEqual([0, 1, 2])
    expect([...evaluableUsers(data, 'valid')]).toEqual([0, 1, 2])
  })

  it('counts items of the training part alone', () => {
    expect([...itemCounts(data)]).toEqual([0, 1, 3, 3, 2, 1, 1, 1, 1, 1])
    expect([...itemCounts(data, 'valid')]).toEqual([0, 1, 3, 2, 1, 0, 0, 1, 0, 0])
    expect([...itemCounts(data, 1)]).toEqual([...itemCounts(data, 'paper')])
  })
})

describe('trainBatch', () => {
  it('keeps the last maxLength actions before the last training target', () => {
    const batch = trainBatch(data, [2, 1, 0], { maxLength: 2, protocol: 'valid' })
    expect([...batch.users]).toEqual([2, 0])
    expect([...batch.offsets]).toEqual([0n, 2n, 4n])
    expect([...batch.ids]).toEqual([2n, 3n, 2n, 3n])
    expect([...batch.targets]).toEqual([3n, 2n, 3n, 4n])
    expect([...batch.weights]).toEqual([1, 1, 1, 1])
    expect([...batch.times!]).toEqual([2000n, 2010n, 10n, 20n])
    expect([...batch.queryTimes!]).toEqual([2010n, 2020n, 20n, 30n])
    expect([...batch.lastRows]).toEqual([1n, 3n])
    expect(batch.maxLength).toBe(2)
  })

  it("ends one action later under 'paper', two under 'all'", () => {
    const lastTarget = (protocol: 'valid' | 'paper' | 'all') =>
      trainBatch(data, [0], { maxLength: 10, protocol }).targets.at(-1)
    expect([lastTarget('valid'), lastTarget('paper'), lastTarget('all')]).toEqual([4n, 5n, 6n])
  })

  it('has no times without times, and refuses nonsense', () => {
    const batch = trainBatch(handmade([[1, 2, 3, 4]], false), [0], { maxLength: 10 })
    expect([batch.times, batch.queryTimes]).toEqual([null, null])
    expect(() => trainBatch(data, [0], { maxLength: 0 })).toThrow(/maxLength/)
    expect(() => trainBatch(data, [9], { maxLength: 1 })).toThrow(/user 9/)
    expect(trainBatch(data, [], { maxLength: 1 }).ids).toHaveLength(0)
  })
})

describe('evalBatch', () => {
  it('ranks s_{T-2} at validation and s_{T-1} at test', () => {
    const valid = evalBatch(data, [0, 1], { maxLength: 3, stage: 'valid' })
    expect([...valid.ids]).toEqual([2n, 3n, 4n, 7n])
    expect([...valid.targetIds]).toEqual([5n, 8n])
    expect([...valid.weights]).toEqual([0, 0, 1, 1])
    const test = evalBatch(data, [0, 1], { maxLength: 3, stage: 'test' })
    expect([...test.ids]).toEqual([3n, 4n, 5n, 7n, 8n])
    expect([...test.targetIds]).toEqual([6n, 9n])
    expect([...test.queryTimes!]).toEqual([30n, 40n, 50n, 1010n, 1020n])
    expect(test.lastRows.reduce((ok, row, b) => ok && test.targets[Number(row)] === test.targetIds[b], true)).toBe(true)
    expect(() => evalBatch(data, [0], { maxLength: 3, stage: 'valid', protocol: 'paper' })).toThrow(/paper/)
  })

  it('excludes the kept history once each, never the target', () => {
    const history = evalBatch(data, [2, 0], { maxLength: 4, stage: 'test' })
    // user 2: history 2 3 2 4, target 3, which is in the history
    expect([...history.excludeIds]).toEqual([2n, 4n, 2n, 3n, 4n, 5n])
    expect([...history.excludeOffsets]).toEqual([0n, 2n, 6n])
    const all = evalBatch(data, [0], { maxLength: 1, stage: 'valid', filterSeen: 'all' })
    expect([...all.excludeIds]).toEqual([1n, 2n, 3n, 4n, 6n])
    const none = evalBatch(data, [0, 1], { maxLength: 1, stage: 'valid', filterSeen: 'none' })
    expect([...none.excludeIds]).toEqual([])
    expect([...none.excludeOffsets]).toEqual([0n, 0n, 0n])
  })

  it('never shows the model the target or anything after it', () => {
    for (const stage of ['valid', 'test'] as const) {
      const batch = evalBatch(data, [0, 1, 2], { maxLength: 99, stage })
      batch.users.forEach((u, b) => {
        const rows = Number(batch.offsets[b + 1]! - batch.offsets[b]!)
        expect(rows).toBe(data.offsets[u + 1]! - data.offsets[u]! - (stage === 'valid' ? 2 : 1))
      })
    }
  })
})

describe('requestBatch', () => {
  it('takes the whole history and asks at the given time, else at that of the last action', () => {
    const batch = requestBatch(data, [1, 0], { maxLength: 2 })
    expect([...batch.ids]).toEqual([8n, 9n, 5n, 6n])
    expect([...batch.targets]).toEqual([9n, 0n, 6n, 0n])
    expect([...batch.queryTimes!]).toEqual([1020n, 1020n, 50n, 50n])
    expect([...batch.excludeIds]).toEqual([8n, 9n, 5n, 6n])
    expect([...batch.weights]).toEqual([0, 0, 0, 0])
    const later = requestBatch(data, [1, 0], { maxLength: 2, queryTimes: [5000, 6000n] })
    expect([...later.queryTimes!]).toEqual([1020n, 5000n, 50n, 6000n])
    expect(() => requestBatch(data, [1, 0], { maxLength: 2, queryTimes: [1] })).toThrow(/queryTimes/)
  })
})

describe('epochBatches', () => {
  it('gives every user once, in an order that the generator alone decides', () => {
    const epoch = (seed: number) => {
      const random = new Random(seed)
      return [...epochBatches(10, 4, () => random.float())].map(users => [...users])
    }
    expect(epoch(1)).toEqual(epoch(1))
    expect(epoch(1)).not.toEqual(epoch(2))
    expect(epoch(1).map(users => users.length)).toEqual([4, 4, 2])
    expect(epoch(1).flat().sort()).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    expect([...epochBatches([5, 3, 9], 2)].map(users => [...users])).toEqual([[5, 3], [9]])
    expect(() => [...epochBatches(3, 0)]).toThrow(/batchSize/)
  })
})

describe('toInputs and toTargets', () => {
  const batch = () => trainBatch(data, [0, 1], { maxLength: 10, protocol: 'all' })

  it('take ids up to numItems', () => {
    scope(() => {
      expect(toInputs(batch(), {}, 9).ids.size).toBe(batch().ids.length)
      expect(toTargets(batch(), {}, 9).targets.size).toBe(batch().targets.length)
    })
  })

  it('name the first id that the model does not have, and make nothing', () => {
    const before = memory()
    const wrong = (id: bigint) => {
      const made = batch()
      made.ids[3] = made.targets[3] = id
      return made
    }
    for (const id of [10n, -1n, 1n << 32n, 2n ** 62n]) {
      const message = new RegExp(`\\[3\\] is ${id}, the model has items 1 to 9`)
      expect(() => toInputs(wrong(id), {}, 9)).toThrow(message)
      expect(() => toTargets(wrong(id), {}, 9)).toThrow(message)
    }
    expect(memory()).toEqual(before)
  })
})
