import { deepStrictEqual } from 'node:assert/strict'
import { native } from '#lib/native.js'
import { targetRank } from '#lib/ops/target_rank.js'
import { topK } from '#lib/ops/top_k.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { describeOp, int64, itOp, offsets, sum, throwsCode, type Values } from '../harness.js'

/** Small whole numbers: dot products are exact in float32 and ties are plenty. */
function whole(random: Random, shape: readonly number[], range: number): Values {
  const data = Float64Array.from({ length: shape.reduce((p, q) => p * q, 1) }, () => random.int(2 * range + 1) - range)
  return { shape, data, kind: 'float' }
}

type Case = { B: number; I: number; d: number; firstId?: number; exclude?: number; range?: number; nans?: number }

describeOp<Case>('target_rank', {
  cases: [
    { name: 'no queries', B: 0, I: 9, d: 3 },
    { name: 'no dims', B: 2, I: 9, d: 0 },
    { name: 'one item', B: 3, I: 2, d: 1, exclude: 3 },
    { name: 'row 0 counts', B: 4, I: 20, d: 3, firstId: 0, exclude: 4 },
    { name: 'rows left out', B: 4, I: 300, d: 3, firstId: 17, exclude: 40 },
    { name: 'mostly ties', B: 33, I: 700, d: 2, range: 1, exclude: 30 },
    { name: 'tile of queries and one', B: 129, I: 257, d: 7, exclude: 10 },
    { name: 'many queries', B: 400, I: 1300, d: 5, exclude: 12 },
    { name: 'items in several ranges', B: 3, I: 9001, d: 6, exclude: 200 },
    { name: 'NaN rows, some excluded', B: 60, I: 40, d: 3, exclude: 60, nans: 2 },
    { name: 'NaN queries', B: 9, I: 40, d: 3, nans: -2 },
  ],
  inputs: ({ B, I, d, range = 4, exclude, firstId = 1, nans = 0 }, random) => {
    const counts = Array.from({ length: B }, () => (exclude ? random.int(exclude + 1) : 0))
    const query = whole(random, [B, d], range)
    const table = whole(random, [I, d], range)
    for (let n = 0; n < nans; n++) table.data[(firstId + random.int(I - firstId)) * d] = Number.NaN
    for (let n = 0; n < -nans; n++) query.data[random.int(B) * d] = Number.NaN
    return {
      query,
      table,
      targetIds: int64(Array.from({ length: B }, () => firstId + random.int(I - firstId))),
      // Unsorted, with duplicates, and some that name no item; the target may be among them.
      excludeIds: exclude ? int64(Array.from({ length: sum(counts) }, () => random.int(I + 3) - 1)) : null,
      excludeOffsets: exclude ? offsets(counts) : null,
    }
  },
  run: (t, { firstId }) =>
    targetRank(t.query!, t.table!, t.targetIds!, {
      excludeIds: t.excludeIds ?? null,
      excludeOffsets: t.excludeOffsets ?? null,
      ...(firstId === undefined ? {} : { firstId }),
    }),
  reference: (x, { B, I, d, firstId = 1 }) => {
    const ranks: number[] = []
    for (let b = 0; b < B; b++) {
      const excluded = new Set(x.excludeIds?.slice(x.excludeOffsets![b]!, x.excludeOffsets![b + 1]!))
      const score = (id: number) => {
        let total = 0
        for (let j = 0; j < d; j++) total += x.query![b * d + j]! * x.table![id * d + j]!
        return total
      }
      const target = x.targetIds![b]!
      let rank = 1
      let bad = Number.isNaN(score(target))
      for (let id = firstId; id < I; id++) {
        if (id === target || excluded.has(id)) continue
        if (Number.isNaN(score(id))) bad = true
        if (score(id) >= score(target)) rank++
      }
      ranks.push(bad ? 0 : rank)
    }
    return [ranks]
  },
  tolerance: { float32: 0, float64: 0 },
})

for (const dtype of ['float32', 'float64'] as const)
  itOp('target_rank', `${dtype} copies of the target count as ties, wherever they stand`, () => {
    const random = new Random(9)
    const [B, I, d] = [67, 1009, 53]
    const table = Float64Array.from({ length: I * d }, () => random.normal())
    // Every query's target is row 5; its copies stand in full tiles, tails and other ranges.
    const copies = [1, 2, 11, 12, 13, 255, 256, 257, 512, 900, 1007, 1008]
    for (const copy of copies) table.copyWithin(copy * d, 5 * d, 6 * d)
    const query = Float64Array.from({ length: B * d }, () => random.normal())
    const tensors = [
      Tensor.from(Array.from(query), [B, d], { dtype }),
      Tensor.from(Array.from(table), [I, d], { dtype }),
    ] as const
    const with5 = targetRank(...tensors, Tensor.from(new BigInt64Array(B).fill(5n))).dataSync()
    for (const copy of copies) {
      const rank = targetRank(...tensors, Tensor.from(new BigInt64Array(B).fill(BigInt(copy)))).dataSync()
      deepStrictEqual(rank, with5, `rank of copy ${copy}`)
    }
    const excludeIds = Tensor.from(
      BigInt64Array.from({ length: B * copies.length }, (_, i) => BigInt(copies[i % copies.length]!)),
    )
    const excludeOffsets = Tensor.from(BigInt64Array.from({ length: B + 1 }, (_, b) => BigInt(b * copies.length)))
    const options = { excludeIds, excludeOffsets }
    const without = targetRank(...tensors, Tensor.from(new BigInt64Array(B).fill(5n)), options).dataSync()
    deepStrictEqual(
      [...without],
      Array.from(with5 as BigInt64Array, rank => rank - BigInt(copies.length)),
    )
  })
itOp('target_rank', 'agrees with top_k, and does not depend on threads or batch-mates', () => {
  const random = new Random(10)
  const [B, I, d] = [150, 2111, 24]
  const query = Tensor.from(
    Float32Array.from({ length: B * d }, () => random.normal()),
    [B, d],
  )
  const table = Tensor.from(
    Float32Array.from({ length: I * d }, () => random.normal()),
    [I, d],
  )
  const best = topK(query, table, 100).ids.dataSync() as BigInt64Array
  const target = Tensor.from(BigInt64Array.from({ length: B }, (_, b) => best[b * 100 + (b % 100)]!))
  const expected = BigInt64Array.from({ length: B }, (_, b) => BigInt((b % 100) + 1))
  for (const threads of [1, 2, 3]) {
    native.set_num_threads(threads)
    try {
      deepStrictEqual(
        scope(() => targetRank(query, table, target).dataSync()),
        expected,
      )
    } finally {
      native.set_num_threads(0)
    }
  }
  for (const b of [0, 64, 149])
    deepStrictEqual(targetRank(query.rows(b, b + 1), table, target.rows(b, b + 1)).dataSync()[0], expected[b])
})
itOp('target_rank', 'names what does not fit', () => {
  const query = Tensor.zeros([2, 3])
  const table = Tensor.zeros([5, 3])
  const ids = (...values: bigint[]) => Tensor.from(BigInt64Array.from(values))
  const code = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(() => targetRank(query, table, ids(1n, 5n)), code, /target_ids\[1\] = 5 is outside 1\.\.4/)
  throwsCode(() => targetRank(query, table, ids(0n, 1n)), code, /target_ids\[0\] = 0 is outside 1\.\.4/)
  throwsCode(() => targetRank(query, table, ids(1n)), 'ERR_HSTU_SHAPE', /targetIds .*B=2.*int64\[1\]/)
  throwsCode(() => targetRank(query, table, ids(1n, 2n), { excludeOffsets: ids(0n, 0n, 0n) }), code, /go together/)
  throwsCode(
    () => targetRank(query, Tensor.zeros([5, 3], { dtype: 'float64' }), ids(1n, 2n)),
    'ERR_HSTU_DTYPE',
    /table is float64/,
  )
})
