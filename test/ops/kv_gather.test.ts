import { deepStrictEqual } from 'node:assert/strict'
import { kvAppend } from '#lib/ops/kv_append.js'
import { kvGather } from '#lib/ops/kv_gather.js'
import { Random } from '#lib/random.js'
import { Tensor } from '#lib/tensor.js'
import { describeOp, int32, itOp, normal, offsets, sum, throwsCode, toTensors } from '../harness.js'

/** Tokens held, and how many of them are read back. */
type Case = { held: number[]; rows: number[]; H: number; D: number; V: number; S: number }

describeOp<Case>('kv_gather', {
  cases: [
    { name: 'no sequences', held: [], rows: [], H: 2, D: 4, V: 4, S: 4 },
    { name: 'only empty sequences', held: [0, 5], rows: [0, 0], H: 2, D: 4, V: 4, S: 4 },
    { name: 'whole histories', held: [9, 0, 4, 1], rows: [9, 0, 4, 1], H: 2, D: 8, V: 8, S: 4 },
    { name: 'their beginnings', held: [9, 3, 4], rows: [5, 3, 1], H: 1, D: 16, V: 16, S: 4 },
    { name: 'D below V', held: [4, 9], rows: [4, 9], H: 3, D: 5, V: 12, S: 8 },
    { name: 'D above V', held: [4, 9], rows: [4, 9], H: 3, D: 25, V: 7, S: 8 },
    { name: 'pages of one slot', held: [3, 2], rows: [3, 2], H: 2, D: 2, V: 3, S: 1 },
    { name: 'no features', held: [3], rows: [3], H: 2, D: 0, V: 3, S: 2 },
    { name: 'past one task', held: [700, 131, 323], rows: [700, 130, 323], H: 4, D: 64, V: 64, S: 64 },
  ],
  inputs: ({ held, rows, H, D, V, S }, random) => {
    const counts = held.map(n => Math.ceil(n / S))
    const shared = Math.max(1, sum(counts) - 1) // a page may stand in several tables
    return {
      pages: normal(random, [shared, 2, S, H, Math.max(D, V)]),
      seqOffsets: offsets(rows),
      pageTable: int32(Array.from({ length: sum(counts) }, () => random.int(shared))),
      pageOffsets: offsets(counts),
      kvLengths: int32(held),
    }
  },
  run: (t, { rows, D, V }) => {
    const paged = { pages: t.pages!, pageTable: t.pageTable!, pageOffsets: t.pageOffsets!, kvLengths: t.kvLengths! }
    const { k, v } = kvGather(paged, { seqOffsets: t.seqOffsets!, rows: sum(rows), keyDim: D, valueDim: V })
    return [k, v]
  },
  reference: (x, { rows, H, D, V, S }) => {
    const read = (part: number, dim: number) =>
      rows.flatMap((count, b) =>
        Array.from({ length: count * H * dim }, (_, n) => {
          const [position, h, i] = [Math.floor(n / (H * dim)), Math.floor(n / dim) % H, n % dim]
          const page = x.pageTable![x.pageOffsets![b]! + Math.floor(position / S)]!
          return x.pages![(((page * 2 + part) * S + (position % S)) * H + h) * Math.max(D, V) + i]!
        }),
      )
    return [read(0, D), read(1, V)]
  },
  tolerance: { float32: 0, float64: 0 },
})

const starts = (lengths: readonly number[]) => toTensors({ x: offsets(lengths) }, 'float32').x!
const table = (ids: readonly number[], counts: readonly number[], held: readonly number[]) => ({
  pageTable: Tensor.from(Int32Array.from(ids)),
  pageOffsets: starts(counts),
  kvLengths: Tensor.from(Int32Array.from(held)),
})

itOp('kv_gather', 'brings back what kv_append wrote, in any steps', () => {
  for (const dtype of ['float32', 'float64'] as const)
    for (const S of [1, 3, 64]) {
      const random = new Random(S)
      const steps = [
        [3, 0, 70],
        [0, 2, 1],
        [64, 5, 0],
      ]
      const total = [67, 7, 71]
      const counts = total.map(n => Math.ceil(n / S))
      const ids = random.shuffle(Array.from({ length: sum(counts) }, (_, i) => i))
      const pages = Tensor.zeros([ids.length, 2, S, 2, 5], { dtype })
      const rows: number[][][] = total.map(() => [])
      let held = [0, 0, 0]
      for (const fresh of steps) {
        const { k, v } = toTensors(
          { k: normal(random, [sum(fresh), 2, 4]), v: normal(random, [sum(fresh), 2, 5]) },
          dtype,
        )
        kvAppend(k!, v!, { seqOffsets: starts(fresh), paged: { pages, ...table(ids, counts, held) } })
        const [keys, values] = [k!.dataSync() as Float64Array, v!.dataSync() as Float64Array]
        let t = 0
        fresh.forEach((count, b) => {
          for (let r = 0; r < count; r++, t++)
            rows[b]!.push([...keys.subarray(t * 8, t * 8 + 8), ...values.subarray(t * 10, t * 10 + 10)])
        })
        held = held.map((n, b) => n + fresh[b]!)
      }
      const options = { seqOffsets: starts(total), rows: sum(total), keyDim: 4, valueDim: 5 }
      const { k, v } = kvGather({ pages, ...table(ids, counts, held) }, options)
      deepStrictEqual(
        [...(k.dataSync() as Float64Array)],
        rows.flat().flatMap(row => row.slice(0, 8)),
      )
      deepStrictEqual(
        [...(v.dataSync() as Float64Array)],
        rows.flat().flatMap(row => row.slice(8)),
      )
    }
})

itOp('kv_gather', 'names what does not fit', () => {
  const pages = Tensor.zeros([4, 2, 2, 2, 3])
  const gather =
    (ids: number[], counts: number[], held: number[], rows: number[], change: object = {}) =>
    () =>
      kvGather(
        { pages, ...table(ids, counts, held) },
        { seqOffsets: starts(rows), rows: sum(rows), keyDim: 3, valueDim: 2, ...change },
      )
  const wrong = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(gather([0], [1], [1], [2]), wrong, /kv_gather: 2 rows of sequence 0 are asked for, kv_lengths has 1/)
  throwsCode(gather([0, 4], [2], [4], [4]), wrong, /page_table\[1\] = 4 of sequence 0 is outside 0..3/)
  throwsCode(gather([0], [1], [3], [3]), wrong, /sequence 0 has 1 pages, but 3 tokens take 2 of 2 slots/)
  throwsCode(gather([0], [1], [1], [1], { rows: 2 }), wrong, /seq_offsets ends with 1 .* 2 rows/)
  throwsCode(gather([0], [1], [1], [1], { rows: -1 }), wrong, /rows -1 is no count/)
  throwsCode(
    gather([0], [1], [1], [1], { keyDim: 2 }),
    'ERR_HSTU_SHAPE',
    /pages must have shape .*, 2\], got float32\[4, 2, 2, 2, 3\]/,
  )
  throwsCode(
    gather([0], [1], [1], [1], { seqOffsets: starts([1, 0]) }),
    'ERR_HSTU_SHAPE',
    /pageOffsets must have shape/,
  )
  throwsCode(
    gather([0], [1], [1], [1], { seqOffsets: Tensor.zeros([2]) }),
    'ERR_HSTU_DTYPE',
    /seqOffsets must be int64/,
  )
})
