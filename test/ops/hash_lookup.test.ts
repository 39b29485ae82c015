import { deepStrictEqual, ok } from 'node:assert/strict'
import { native } from '#lib/native.js'
import { emptyHashIndex, type HashIndex, hashLookup } from '#lib/ops/hash_lookup.js'
import { Random } from '#lib/random.js'
import { type Device, scope, Tensor } from '#lib/tensor.js'
import { describeOp, int64, itOp, throwsCode } from '../harness.js'

interface Case {
  /** Keys of the lookups, one after another; every third does not insert. */
  batches: number[]
  vocabulary: number
  rows: number
  /** Keys are multiples of this. */
  step?: number
}

const inserts = (batch: number) => batch % 3 !== 2

describeOp<Case>('hash_lookup', {
  dtypes: ['float32'],
  cudaDtypes: ['float32'],
  cases: [
    { name: 'no keys', batches: [0, 0, 0], vocabulary: 1, rows: 1 },
    { name: 'one key again and again', batches: [1, 5, 3, 1], vocabulary: 1, rows: 9 },
    { name: 'keys twice in a batch', batches: [50], vocabulary: 20, rows: 51 },
    { name: 'a full table', batches: [63, 0, 0], vocabulary: 1 << 30, rows: 64 },
    { name: 'known, new and unknown keys', batches: [100, 200, 300, 200], vocabulary: 600, rows: 601 },
    { name: 'neighbouring multiples', batches: [500, 500, 500, 500], vocabulary: 900, rows: 2000, step: 4096 },
    { name: 'past a chunk of the scan', batches: [3000, 5000, 4000, 2049], vocabulary: 9000, rows: 12_000 },
  ],
  inputs: ({ batches, vocabulary, step = 1 }, random) => {
    const total = batches.reduce((a, b) => a + b, 0)
    const key = () => step * (random.int(vocabulary) - (vocabulary >> 1))
    return { keys: int64(Array.from({ length: total }, key)) }
  },
  run: (t, { batches, rows }) => {
    const index = emptyHashIndex(rows, { device: t.keys!.device })
    let begin = 0
    const found = batches.map((size, batch) => {
      begin += size
      return hashLookup(index, t.keys!.rows(begin - size, begin), { insert: inserts(batch), tick: batch + 1 })
    })
    return [...found, index.rowKeys, index.count, index.lastUsed!]
  },
  reference: (x, { batches, rows }) => {
    const map = new Map<number, number>()
    const [rowKeys, lastUsed] = [new Float64Array(rows), new Float64Array(rows)]
    let begin = 0
    const found = batches.map((size, batch) => {
      begin += size
      return Array.from(x.keys!.subarray(begin - size, begin), key => {
        if (inserts(batch) && !map.has(key)) {
          map.set(key, map.size + 1)
          rowKeys[map.size] = key
        }
        const row = map.get(key) ?? 0
        if (row) lastUsed[row] = batch + 1
        return row
      })
    })
    return [...found, rowKeys, [map.size + 1], lastUsed]
  },
})

/** Random batches of a growing vocabulary against a Map; any 64-bit keys, 0 and the smallest among them. */
function againstMap(device: Device, batches: number, size: number): void {
  scope(() => {
    const random = new Random(11)
    const keyOf = (n: number) => {
      if (n < 3) return [0n, -1n, -(2n ** 63n)][n]!
      return BigInt.asIntN(64, (BigInt(n) << 40n) * 0x9e3779b97f4a7c15n)
    }
    const map = new Map<bigint, bigint>()
    let index = emptyHashIndex(batches * size + 1, { device })
    for (let batch = 0; batch < batches; batch++)
      scope(() => {
        const vocabulary = Math.ceil(((batch + 1) / batches) * batches * size * 0.3) + 3
        const keys = BigInt64Array.from({ length: size }, () => keyOf(random.int(vocabulary)))
        const insert = random.int(3) > 0
        const rows = hashLookup(index, Tensor.from(keys, [size], { device }), { insert, tick: batch })
        const expected = keys.map(key => {
          if (insert && !map.has(key)) map.set(key, BigInt(map.size + 1))
          return map.get(key) ?? 0n
        })
        deepStrictEqual(rows.dataSync(), expected)
      })
    deepStrictEqual(index.count.dataSync()[0], BigInt(map.size + 1))
    // The slots are made of row_keys alone: inserting those in order gives every key its row again.
    const { rowKeys } = index
    index = emptyHashIndex(rowKeys.size, { device })
    hashLookup(index, rowKeys.rows(1, map.size + 1), { insert: true })
    const keys = [...map.keys()]
    const rows = hashLookup(index, Tensor.from(BigInt64Array.from(keys), [keys.length], { device }))
    deepStrictEqual([...rows.dataSync()], [...map.values()])
    deepStrictEqual(index.rowKeys.dataSync(), rowKeys.dataSync())
  })
}
for (const device of ['cpu', 'cuda'] as const)
  itOp('hash_lookup', 'a million lookups against a Map', () => againstMap(device, 200, 5000), device)

itOp('hash_lookup', 'the same rows with any number of threads', () => {
  const random = new Random(3)
  const keys = BigInt64Array.from({ length: 50_000 }, () => BigInt(random.int(20_000)))
  const at = (threads: number) =>
    scope(() => {
      native.set_num_threads(threads)
      const index = emptyHashIndex(70_000)
      const rows = [0, 1].map(() => hashLookup(index, Tensor.from(keys), { insert: index.count.item() === 1 }))
      return [...rows, index.rowKeys, index.count].map(x => x.dataSync())
    })
  try {
    const one = at(1)
    deepStrictEqual(one[0], one[1])
    deepStrictEqual(at(2), one)
    deepStrictEqual(at(3), one)
  } finally {
    native.set_num_threads(0)
  }
})

itOp('hash_lookup', 'needs a free row a key, and without one changes nothing', () =>
  scope(() => {
    const index = emptyHashIndex(4)
    const keys = (...values: number[]) => Tensor.from(values, undefined, { dtype: 'int64' })
    hashLookup(index, keys(7, 8), { insert: true, tick: 1 })
    const state = () => Object.values(index).map(x => (x as Tensor).dataSync())
    const before = state()
    const code = 'ERR_HSTU_INVALID_ARGUMENT'
    throwsCode(
      () => hashLookup(index, keys(7, 9), { insert: true, tick: 2 }),
      code,
      /2 keys might be new, but 1 of 4 rows/,
    )
    deepStrictEqual(state(), before)
    deepStrictEqual([...hashLookup(index, keys(9, 8, 7)).dataSync()], [0n, 2n, 1n])
    deepStrictEqual([...hashLookup(index, keys(9), { insert: true }).dataSync()], [3n])
  }),
)

itOp('hash_lookup', 'names what does not fit', () =>
  scope(() => {
    const index = emptyHashIndex(10)
    ok(index.slots.size === 32)
    const at = (more: Partial<HashIndex>, keys = Tensor.zeros([1], { dtype: 'int64' })) =>
      hashLookup({ ...index, ...more }, keys)
    const code = 'ERR_HSTU_INVALID_ARGUMENT'
    const slots = (size: number) => Tensor.zeros([size], { dtype: 'int32' })
    throwsCode(
      () => at({ slots: slots(16) }),
      code,
      /slots must be a power of two of at least twice the 10 rows, got 16/,
    )
    throwsCode(() => at({ slots: slots(40) }), code, /slots must be a power of two/)
    throwsCode(() => at({ lastUsed: slots(9) }), 'ERR_HSTU_SHAPE', /lastUsed must have shape \[C=10\]/)
    throwsCode(() => at({}, slots(2)), 'ERR_HSTU_DTYPE', /keys must be int64/)
    throwsCode(() => emptyHashIndex(0), code, /an index has 1 to 2\^30 rows, got 0/)
  }),
)
