import { deepStrictEqual, ok } from 'node:assert/strict'
import { native } from '#lib/native.js'
import { topK } from '#lib/ops/top_k.js'
import { Random } from '#lib/random.js'
import { type Dtype, scope, Tensor } from '#lib/tensor.js'
import { describeOp, int64, itOp, normal, offsets, sum, throwsCode, type Values } from '../harness.js'

/** Small whole numbers: dot products are exact in float32 and ties are plenty. */
function whole(random: Random, shape: readonly number[], range: number): Values {
  const data = Float64Array.from({ length: shape.reduce((p, q) => p * q, 1) }, () => random.int(2 * range + 1) - range)
  return { shape, data, kind: 'float' }
}

type Case = { B: number; I: number; d: number; k: number; firstId?: number; exclude?: number; range?: number }

describeOp<Case>('top_k', {
  cases: [
    { name: 'no queries', B: 0, I: 9, d: 3, k: 2 },
    { name: 'no items', B: 2, I: 1, d: 3, k: 2 },
    { name: 'an empty table', B: 2, I: 0, d: 3, k: 2 },
    { name: 'no dims', B: 2, I: 9, d: 0, k: 3 },
    { name: 'one item', B: 3, I: 2, d: 1, k: 1 },
    { name: 'more wanted than there are', B: 5, I: 8, d: 4, k: 11, exclude: 6 },
    { name: 'row 0 counts', B: 4, I: 20, d: 3, k: 5, firstId: 0 },
    { name: 'rows left out', B: 4, I: 300, d: 3, k: 5, firstId: 17, exclude: 40 },
    { name: 'mostly ties', B: 33, I: 700, d: 2, k: 40, range: 1, exclude: 30 },
    { name: 'all equal', B: 3, I: 2100, d: 2, k: 300, range: 0 },
    { name: 'tile of queries and one', B: 129, I: 257, d: 7, k: 9, exclude: 10 },
    { name: 'many queries', B: 400, I: 1300, d: 5, k: 20, exclude: 12 },
    { name: 'items in several ranges', B: 3, I: 9001, d: 6, k: 50, exclude: 200 },
    { name: 'a long list in several ranges', B: 2, I: 17001, d: 3, k: 1000, exclude: 500 },
  ],
  inputs: ({ B, I, d, range = 4, exclude }, random) => {
    const counts = Array.from({ length: B }, () => (exclude ? random.int(exclude + 1) : 0))
    return {
      query: whole(random, [B, d], range),
      table: whole(random, [I, d], range),
      // Unsorted, with duplicates, and some that name no item.
      excludeIds: exclude ? int64(Array.from({ length: sum(counts) }, () => random.int(I + 3) - 1)) : null,
      excludeOffsets: exclude ? offsets(counts) : null,
    }
  },
  run: (t, { k, firstId }) => {
    const { scores, ids } = topK(t.query!, t.table!, k, {
      excludeIds: t.excludeIds ?? null,
      excludeOffsets: t.excludeOffsets ?? null,
      ...(firstId === undefined ? {} : { firstId }),
    })
    return [scores, ids]
  },
  reference: (x, { B, I, d, k, firstId = 1 }) => {
    const scores: number[] = []
    const ids: number[] = []
    for (let b = 0; b < B; b++) {
      const excluded = new Set(x.excludeIds?.slice(x.excludeOffsets![b]!, x.excludeOffsets![b + 1]!))
      const all: { id: number; score: number }[] = []
      for (let id = firstId; id < I; id++) {
        let score = 0
        for (let j = 0; j < d; j++) score += x.query![b * d + j]! * x.table![id * d + j]!
        if (!excluded.has(id)) all.push({ id, score: score + 0 })
      }
      all.sort((p, q) => q.score - p.score || p.id - q.id)
      for (let n = 0; n < k; n++) {
        scores.push(all[n]?.score ?? Number.NEGATIVE_INFINITY)
        ids.push(all[n]?.id ?? -1)
      }
    }
    return [scores, ids]
  },
  tolerance: { float32: 0, float64: 0 },
})

const tensorOf = (values: Values, dtype: Dtype) =>
  Tensor.from(dtype === 'float64' ? values.data : Float32Array.from(values.data as Float64Array), values.shape)

for (const dtype of ['float32', 'float64'] as const)
  itOp('top_k', `${dtype} does not depend on threads or batch-mates, and finds every score it reports`, () => {
    const random = new Random(7)
    const [B, I, d, k] = [301, 3001, 37, 60]
    const queryValues = normal(random, [B, d])
    const query = tensorOf(queryValues, dtype)
    const table = tensorOf(normal(random, [I, d]), dtype)
    const read = ({ scores, ids }: { scores: Tensor; ids: Tensor }) => [scores.dataSync(), ids.dataSync()] as const
    const all = read(topK(query, table, k))
    for (const threads of [1, 2, 3]) {
      native.set_num_threads(threads)
      try {
        deepStrictEqual(
          scope(() => read(topK(query, table, k))),
          all,
        )
      } finally {
        native.set_num_threads(0)
      }
    }
    for (const row of [0, 31, 32, 128, 300]) {
      const alone = scope(() => read(topK(query.rows(row, row + 1), table, k)))
      deepStrictEqual(alone[0], all[0].slice(row * k, (row + 1) * k), `row ${row} alone`)
      deepStrictEqual(alone[1], all[1].slice(row * k, (row + 1) * k), `row ${row} alone`)
    }
    const everything = read(topK(query.rows(3, 4), table, I - 1, { firstId: 1 }))
    deepStrictEqual(everything[0].slice(0, k), all[0].slice(3 * k, 4 * k), 'a longer list begins with the same')
    deepStrictEqual(new Set(everything[1] as BigInt64Array).size, I - 1)
  })
itOp('top_k', 'equal rows of the table score equally and stand in order of id', () => {
  const random = new Random(8)
  const row = Float32Array.from({ length: 50 }, () => random.normal())
  const table = new Float32Array(2999 * 50)
  for (let i = 0; i < 2999; i++) table.set(row, i * 50)
  const query = Float32Array.from({ length: 7 * 50 }, () => random.normal())
  const { scores, ids } = topK(Tensor.from(query, [7, 50]), Tensor.from(table, [2999, 50]), 2998)
  ok(ids.dataSync().every((id, i) => id === BigInt(1 + (i % 2998))))
  const found = scores.dataSync()
  ok(found.every((score, i) => Object.is(score, found[i - (i % 2998)])))
})
itOp('top_k', 'a NaN score counts as -infinity', () => {
  const items = [0, 2, Number.NaN, Number.NEGATIVE_INFINITY, -3, Number.POSITIVE_INFINITY, Number.NaN]
  for (const dtype of ['float32', 'float64'] as const) {
    const query = Tensor.from([1], [1, 1], { dtype })
    const table = Tensor.from(items, [7, 1], { dtype })
    const { scores, ids } = topK(query, table, 7)
    const infinity = Number.POSITIVE_INFINITY
    deepStrictEqual([...scores.dataSync()], [infinity, 2, -3, -infinity, -infinity, -infinity, -infinity])
    deepStrictEqual([...ids.dataSync()], [5n, 1n, 4n, 2n, 3n, 6n, -1n])
  }
})
itOp('top_k', 'names what does not fit', () => {
  const query = Tensor.zeros([2, 3])
  const table = Tensor.zeros([5, 3])
  const ids = Tensor.from(BigInt64Array.of(1n, 2n))
  const excludeOffsets = Tensor.from(BigInt64Array.of(0n, 1n, 3n))
  throwsCode(() => topK(query, Tensor.zeros([5, 4]), 1), 'ERR_HSTU_SHAPE', /top_k: table .*d=3.*float32\[5, 4\]/)
  throwsCode(() => topK(query, table, 0), 'ERR_HSTU_INVALID_ARGUMENT', /k must be an integer >= 1, got 0/)
  throwsCode(() => topK(query, table, 1, { firstId: -1 }), 'ERR_HSTU_INVALID_ARGUMENT', /firstId/)
  throwsCode(() => topK(query, table, 1, { excludeIds: ids }), 'ERR_HSTU_INVALID_ARGUMENT', /go together/)
  const options = { excludeIds: ids, excludeOffsets }
  throwsCode(() => topK(query, table, 1, options), 'ERR_HSTU_INVALID_ARGUMENT', /exclude_offsets ends with 3 .* 2 rows/)
  throwsCode(
    () => topK(query, table, 1, { excludeIds: ids, excludeOffsets: ids }),
    'ERR_HSTU_SHAPE',
    /excludeOffsets .*\[3\]/,
  )
})
