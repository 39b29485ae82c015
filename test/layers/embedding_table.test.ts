import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { reshape, valueAndGrad } from '#lib/autograd.js'
import { HstuError } from '#lib/errors.js'
import { EmbeddingTable, type EmbeddingTableConfig, type EvictionReport } from '#lib/layers/embedding_table.js'
import { native } from '#lib/native.js'
import { mseLoss } from '#lib/ops/mse_loss.js'
import { Random } from '#lib/random.js'
import { type Device, memory, scope, Tensor } from '#lib/tensor.js'
import { loadCheckpoint, saveCheckpoint } from '#lib/train/checkpoint.js'

const devices: Device[] = native.backend().cuda.usable ? ['cpu', 'cuda'] : ['cpu']
const keysOf = (...values: (number | bigint)[]) => Tensor.from(BigInt64Array.from(values, BigInt))
const rowsOf = (table: EmbeddingTable, keys: Tensor, insert = true) =>
  Array.from(table.lookup(keys, { insert }).ids.dataSync(), Number)

/** Runs `fn` in a scope with a table that is disposed of, and expects no memory left over. */
function withTable(config: EmbeddingTableConfig, fn: (table: EmbeddingTable) => void): void {
  const before = memory()
  scope(() => {
    const table = new EmbeddingTable(config)
    try {
      fn(table)
    } finally {
      table.dispose()
    }
  })
  expect(memory()).toEqual(before)
}

it('gives rows in order of first appearance, 0 to keys it does not know, and looking them up changes nothing', () =>
  withTable({ dim: 3, rows: 8 }, table => {
    expect(rowsOf(table, keysOf(5, 9), false)).toEqual([0, 0])
    expect(rowsOf(table, keysOf(9, 5, 9, -1))).toEqual([1, 2, 1, 3])
    const bits = () => Object.values(table.state().tensors).map(x => x.dataSync())
    const before = bits()
    const json = table.state().json
    expect(rowsOf(table, keysOf(7, 5, 0), false)).toEqual([0, 2, 0])
    expect(bits()).toEqual(before)
    expect(table.state().json).toEqual(json)
    expect(table.size).toBe(3)
    const x = table.embed(table.lookup(keysOf(7, 5))).dataSync()
    expect([...x.slice(0, 3)]).toEqual([0, 0, 0])
    for (const value of x.slice(3)) expect(Math.abs(Number(value))).toBeLessThan(0.02 * Math.sqrt(3))
    expect(new Set(Array.from(x.slice(3), Number)).size).toBe(3)
  }))

it('trains the rows that a step touched, and no other', () =>
  withTable({ dim: 2, rows: 16 }, table => {
    const before = table.embed(table.lookup(keysOf(1, 2, 3), { insert: true })).dataSync()
    const rows = table.lookup(keysOf(3, 1, 3), { insert: true })
    const x = table.embed(rows)
    const { grads } = valueAndGrad({ x }, () => mseLoss(reshape(x, [6]), Tensor.zeros([6])))
    for (const [i, g] of grads.x.dataSync().entries()) expect(g).toBeCloseTo(Number(x.dataSync()[i]) / 3, 6)
    table.step(rows, Tensor.from([1, 0, 0, 1, 1, 0], [3, 2]), 0.5)
    const after = table.embed(table.lookup(keysOf(1, 2, 3))).dataSync()
    // Key 3 stands twice: g = (2, 0), mean square 2. Key 1: g = (0, 1), mean square .5.
    const expected = [before[0]!, Number(before[1]) - 0.5 / Math.sqrt(0.5), before[2]!, before[3]!]
    expected.push(Number(before[4]) - 1 / Math.sqrt(2), before[5]!)
    for (const [i, value] of expected.entries()) expect(Number(after[i])).toBeCloseTo(Number(value), 6)
    expect([after[0], after[2], after[3], after[5]]).toEqual([before[0], before[2], before[3], before[5]])
  }))

it('keeps every value while it grows, from one row', () =>
  withTable({ dim: 4, rows: 1 }, table => {
    const seen = new Map<number, string>()
    for (let key = 0; key < 300; key++) {
      const x = table.embed(table.lookup(keysOf(key), { insert: true })).dataSync()
      seen.set(key, `${x}`)
    }
    expect(table.rows).toBe(512)
    expect(new Set(seen.values()).size).toBe(300)
    for (const [key, x] of seen) expect(`${table.embed(table.lookup(keysOf(key))).dataSync()}`).toBe(x)
  }))

it('the same keys in other batches give other growth but the same rows', () =>
  withTable({ dim: 2, rows: 2 }, one => {
    const two = new EmbeddingTable({ dim: 2, rows: 500 })
    const keys = Array.from({ length: 400 }, (_, i) => (i * 37) % 211)
    const rows = keys.flatMap(key => rowsOf(one, keysOf(key)))
    expect(rowsOf(two, keysOf(...keys))).toEqual(rows)
    expect([one.rows, two.rows]).toEqual([256, 500])
    two.dispose()
  }))

it('evicts what was longest not used, reports it, and refuses rows of before', () => {
  const reports: EvictionReport[] = []
  const config = {
    dim: 1,
    rows: 2,
    maxRows: 6,
    whenFull: 'evict',
    evictShare: 0.3,
    onEvict: (r: EvictionReport) => reports.push(r),
  } as const
  withTable(config, table => {
    const old = table.lookup(keysOf(10, 11, 12, 13), { insert: true })
    rowsOf(table, keysOf(14, 10))
    expect(reports).toEqual([])
    const values = table.embed(table.lookup(keysOf(10, 13, 14))).dataSync()
    table.step(old, Tensor.from([0, 0, 0, 0], [4, 1]), 1)
    expect(rowsOf(table, keysOf(15, 14))).toEqual([4, 3]) // 11 and 12 went: 10, 13, 14, 15
    expect(reports).toEqual([{ tick: 3, keys: BigInt64Array.of(11n, 12n), lastUsed: Int32Array.of(1, 1), kept: 3 }])
    expect(table.evicted).toBe(2)
    expect(table.embed(table.lookup(keysOf(10, 13, 14))).dataSync()).toEqual(values)
    expect(rowsOf(table, keysOf(11, 12), false)).toEqual([0, 0])
    expect(() => table.embed(old)).toThrow(/these rows are of before an eviction/)
    expect(() => table.step(old, Tensor.zeros([4, 1]), 1)).toThrow(HstuError)
  })
})

it('never evicts a key of the same lookup, and says when one lookup does not fit', () =>
  withTable({ dim: 1, rows: 4, maxRows: 4, whenFull: 'evict', evictShare: 0.9 }, table => {
    rowsOf(table, keysOf(1, 2, 3))
    expect(rowsOf(table, keysOf(1, 4, 1))).toEqual([1, 2, 1])
    expect(rowsOf(table, keysOf(4, 1, 5))).toEqual([2, 1, 3])
    expect(() => table.lookup(keysOf(5, 6, 7, 8), { insert: true })).toThrow(
      /one lookup has 1 keys more than the 4 rows/,
    )
    expect(rowsOf(table, keysOf(4, 1, 5), false)).toEqual([2, 1, 3])
  }))

it('skips and counts new keys that find no room', () =>
  withTable({ dim: 1, rows: 2, maxRows: 4, whenFull: 'skip' }, table => {
    expect(rowsOf(table, keysOf(1, 2))).toEqual([1, 2])
    expect(rowsOf(table, keysOf(3, 4, 3, 4, 4, 1))).toEqual([3, 0, 3, 0, 0, 1])
    expect(table.skipped).toBe(3)
    expect(rowsOf(table, keysOf(4, 3))).toEqual([0, 3])
    expect(table.skipped).toBe(4)
    expect(table.size).toBe(3)
  }))

it('says that a full table has no room, and goes on', () =>
  withTable({ dim: 1, rows: 2, maxRows: 4 }, table => {
    rowsOf(table, keysOf(1, 2))
    expect(() => table.lookup(keysOf(3, 4, 5, 4), { insert: true })).toThrow(
      expect.objectContaining({
        code: 'ERR_HSTU_INVALID_ARGUMENT',
        message: expect.stringMatching(/3 new keys, but 1 of maxRows 4 are free/),
      }),
    )
    expect(rowsOf(table, keysOf(3, 2, 3, 1, 2, 3))).toEqual([3, 2, 3, 1, 2, 3])
  }))

it.runIf(devices.length > 1)('gives the same rows and the same new values on CUDA, through growth and evictions', () =>
  scope(() => {
    const config = { dim: 5, rows: 3, maxRows: 300, whenFull: 'evict' as const, seed: 3n }
    const random = new Random(8)
    const batches = Array.from({ length: 40 }, (_, step) =>
      BigInt64Array.from({ length: random.int(200) }, () => BigInt(6 * step + random.int(150))),
    )
    const [cpu, cuda] = devices.map(device => {
      const table = new EmbeddingTable(config, { device })
      for (const keys of batches)
        scope(() => void table.lookup(Tensor.from(keys, undefined, { device }), { insert: true }))
      const { tensors, json } = table.state()
      const values = Object.entries(tensors).map(([name, x]) => [name, x.dataSync()])
      table.dispose()
      return { json, ...Object.fromEntries(values) }
    })
    expect(cuda).toEqual(cpu)
    expect(cpu!.json.evicted).toBeGreaterThan(0)
  }),
)

it('goes on from a checkpoint with the same bits', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'hstu-table-'))
  const config = { dim: 3, rows: 4, maxRows: 40, whenFull: 'evict' as const, seed: 5n }
  const run = (table: EmbeddingTable, from: number, to: number) => {
    for (let step = from; step < to; step++)
      scope(() => {
        const random = new Random(step)
        const keys = Array.from({ length: 12 }, () => step + random.int(20))
        const rows = table.lookup(keysOf(...keys), { insert: true })
        const gradient = Float32Array.from({ length: 36 }, () => random.normal())
        table.step(rows, Tensor.from(gradient, [12, 3]), 0.1)
      })
  }
  const bits = (table: EmbeddingTable) => {
    const { tensors, json } = table.state()
    return { json, tensors: Object.fromEntries(Object.entries(tensors).map(([name, x]) => [name, x.dataSync()])) }
  }
  const [whole, first, second] = [0, 0, 0].map(() => new EmbeddingTable(config))
  try {
    run(whole!, 0, 60)
    for (const stop of [1, 30]) {
      run(first!, stop === 1 ? 0 : 1, stop)
      const { tensors, json } = first!.state()
      await saveCheckpoint(folder, stop, { kind: 'table', tensors: { table: tensors }, json: { table: json } })
    }
    const loaded = await loadCheckpoint(folder)
    second!.restore(loaded.tensors.table!, loaded.json.table as never)
    expect(bits(second!)).toEqual(bits(first!))
    run(second!, 30, 60)
    expect(bits(second!)).toEqual(bits(whole!))
    expect(whole!.evicted).toBeGreaterThan(0)
  } finally {
    for (const table of [whole, first, second]) table!.dispose()
    await rm(folder, { recursive: true })
  }
})

it('refuses a checkpoint of another table and stays as it is', () =>
  withTable({ dim: 2, rows: 4 }, table =>
    withTable({ dim: 3, rows: 4 }, other => {
      rowsOf(table, keysOf(8))
      const saved = (of: EmbeddingTable) => {
        const { tensors, json } = of.state()
        return [
          new Map(Object.entries(tensors).map(([name, x]) => [name, { shape: x.shape, data: x.dataSync() }])),
          json,
        ] as const
      }
      const code = { code: 'ERR_HSTU_CHECKPOINT' }
      expect(() => table.restore(...saved(other))).toThrow(
        expect.objectContaining({
          ...code,
          message: expect.stringMatching(/expected weights of shape \[4, 2\], found \[4, 3\]/),
        }),
      )
      const [tensors, json] = saved(table)
      tensors.delete('lastUsed')
      expect(() => table.restore(tensors, json)).toThrow(expect.objectContaining(code))
      const [more] = saved(table)
      more.set('count', { shape: [1], data: BigInt64Array.of(9n) })
      expect(() => table.restore(more, json)).toThrow(/9 of 4 rows are given/)
      for (const wrong of [{ seed: '1' }, { offset: 'x' }, { tick: 0.5 }])
        expect(() => table.restore(saved(table)[0], { ...json, ...wrong })).toThrow(
          /expected the state of a table with seed 0/,
        )
      expect(rowsOf(table, keysOf(8), false)).toEqual([1])
    }),
  ))

it('names a bad setting', () => {
  const make = (config: Partial<EmbeddingTableConfig>) => () => new EmbeddingTable({ dim: 2, ...config })
  expect(make({ dim: 0 })).toThrow(/dim must be a positive integer, got 0/)
  expect(make({ rows: 0 })).toThrow(/rows must be in 1 \.\. /)
  expect(make({ rows: 9, maxRows: 8 })).toThrow(/rows must be in 1 \.\. 8, got 9/)
  expect(make({ maxRows: 2 ** 31 })).toThrow(/maxRows must be in 2 \.\. 2\^30/)
  expect(make({ evictShare: 1 })).toThrow(/evictShare/)
  expect(make({ initStd: Number.NaN })).toThrow(/initStd/)
})
