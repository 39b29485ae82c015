import { deepStrictEqual } from 'node:assert/strict'
import { valueAndGrad } from '#lib/autograd.js'
import { type HstuAttentionOptions, hstuAttention } from '#lib/ops/hstu_attention.js'
import { kvAppend } from '#lib/ops/kv_append.js'
import { Random } from '#lib/random.js'
import { type Device, type Dtype, scope, Tensor } from '#lib/tensor.js'
import {
  describeOp,
  int32,
  itOp,
  normal,
  offsets,
  sameBits,
  sum,
  throwsCode,
  toTensors,
  type Values,
} from '../harness.js'

/** Tokens held before, new tokens, of which only `counts` are written; H heads of D and V, pages of S slots of which the tensor has two more than are in use. */
type Case = { held: number[]; fresh: number[]; counts?: number[]; H: number; D: number; V: number; S: number }

const nans = (shape: readonly number[]) => new Float64Array(shape.reduce((a, b) => a * b, 1)).fill(Number.NaN)
const pagesOf = (tokens: number, S: number) => Math.ceil(tokens / S)

/** Page tables over shuffled pages, a page more than needed for every third sequence. */
function tables({ held, fresh, S }: Pick<Case, 'held' | 'fresh' | 'S'>, random: Random) {
  const counts = held.map((n, b) => pagesOf(n + fresh[b]!, S) + (b % 3 === 0 ? 1 : 0))
  const pages = sum(counts) + 2
  const ids = random.shuffle(Array.from({ length: pages }, (_, page) => page)).slice(0, sum(counts))
  return { pages, pageTable: int32(ids), pageOffsets: offsets(counts), kvLengths: int32(held) }
}

const pagedOf = (t: Record<string, Tensor>) => ({
  pages: t.pages!,
  pageTable: t.pageTable!,
  pageOffsets: t.pageOffsets!,
  kvLengths: t.kvLengths!,
})

describeOp<Case>('kv_append', {
  cases: [
    { name: 'no sequences', held: [], fresh: [], H: 2, D: 4, V: 4, S: 4 },
    { name: 'nothing new', held: [3, 0], fresh: [0, 0], H: 2, D: 4, V: 4, S: 4 },
    { name: 'a prefill', held: [0, 0, 0], fresh: [9, 0, 4], H: 2, D: 8, V: 8, S: 4 },
    { name: 'after a partly full page', held: [5, 3, 8, 0], fresh: [6, 1, 1, 3], H: 1, D: 16, V: 16, S: 4 },
    { name: 'D below V', held: [1, 7], fresh: [4, 9], H: 3, D: 5, V: 12, S: 8 },
    { name: 'D above V', held: [1, 7], fresh: [4, 9], H: 3, D: 25, V: 7, S: 8 },
    { name: 'pages of one slot', held: [2, 0], fresh: [3, 2], H: 2, D: 2, V: 3, S: 1 },
    { name: 'one head of one', held: [0, 2], fresh: [3, 1], H: 1, D: 1, V: 1, S: 2 },
    { name: 'no heads', held: [0, 2], fresh: [3, 1], H: 0, D: 4, V: 4, S: 2 },
    {
      name: 'the first rows alone',
      held: [5, 3, 0, 2],
      fresh: [6, 4, 9, 0],
      counts: [6, 0, 3, 0],
      H: 2,
      D: 16,
      V: 12,
      S: 4,
    },
    { name: 'past one task', held: [0, 130, 63], fresh: [700, 1, 260], H: 4, D: 64, V: 64, S: 64 },
  ],
  inputs: (c, random) => {
    const { pages, ...rest } = tables(c, random)
    return {
      pages: normal(random, [pages, 2, c.S, c.H, Math.max(c.D, c.V)]),
      k: normal(random, [sum(c.fresh), c.H, c.D]),
      v: normal(random, [sum(c.fresh), c.H, c.V]),
      seqOffsets: offsets(c.fresh),
      counts: c.counts ? int32(c.counts) : null,
      ...rest,
    }
  },
  run: t => {
    kvAppend(t.k!, t.v!, { seqOffsets: t.seqOffsets!, paged: pagedOf(t), counts: t.counts ?? null })
    return t.pages!
  },
  reference: (x, { held, fresh, counts = fresh, H, D, V, S }) => {
    const pages = Float64Array.from(x.pages!)
    const wide = Math.max(D, V)
    let row = 0
    fresh.forEach((count, b) => {
      for (let r = 0; r < count; r++, row++) {
        if (r >= counts[b]!) continue
        const position = held[b]! + r
        const page = x.pageTable![x.pageOffsets![b]! + Math.floor(position / S)]!
        const at = (part: number, h: number) => (((page * 2 + part) * S + (position % S)) * H + h) * wide
        for (let h = 0; h < H; h++) {
          for (let i = 0; i < D; i++) pages[at(0, h) + i] = x.k![(row * H + h) * D + i]!
          for (let i = 0; i < V; i++) pages[at(1, h) + i] = x.v![(row * H + h) * V + i]!
        }
      }
    })
    return [pages]
  },
  tolerance: { float32: 0, float64: 0 },
})

itOp('kv_append', 'gives the same bits with any number of threads', () => {
  const c = { held: [0, 130, 63], fresh: [700, 1, 260], H: 4, D: 32, V: 32, S: 64 }
  sameBits(() => {
    const random = new Random(7)
    const { pages, ...rest } = tables(c, random)
    const shape = [sum(c.fresh), c.H, c.D]
    const t = toTensors(
      { k: normal(random, shape), v: normal(random, shape), seqOffsets: offsets(c.fresh), ...rest },
      'float32',
    )
    const paged = { ...pagedOf(t), pages: Tensor.zeros([pages, 2, c.S, c.H, c.D]) }
    kvAppend(t.k!, t.v!, { seqOffsets: t.seqOffsets!, paged })
    return paged.pages
  })
})

const starts = (lengths: readonly number[], device: Device = 'cpu') => {
  let total = 0n
  return Tensor.from(BigInt64Array.from([0n, ...lengths.map(n => (total += BigInt(n)))]), undefined, { device })
}
const ints = (values: readonly number[], device: Device = 'cpu') =>
  Tensor.from(Int32Array.from(values), undefined, { device })
const table = (ids: readonly number[], counts: readonly number[], held: readonly number[], device: Device = 'cpu') => ({
  pageTable: ints(ids, device),
  pageOffsets: starts(counts, device),
  kvLengths: ints(held, device),
})

const samples: [Dtype, Uint16Array][] = [
  ['bfloat16', Uint16Array.of(0x3fc0, 0x8000, 0x7fc1, 0x0001)],
  ['float16', Uint16Array.of(0x3e00, 0x8000, 0x7e01, 0x0001)],
]
for (const [dtype, bits] of samples)
  itOp('kv_append', `moves ${dtype} bit by bit`, () => {
    const pages = Tensor.zeros([1, 2, 2, 1, 2], { dtype })
    const k = Tensor.from(bits.slice(0, 2), [1, 1, 2], { dtype })
    const v = Tensor.from(bits.slice(2), [1, 1, 2], { dtype })
    kvAppend(k, v, { seqOffsets: starts([1]), paged: { pages, ...table([0], [1], [1]) } })
    deepStrictEqual(pages.dataSync(), Uint16Array.of(0, 0, bits[0]!, bits[1]!, 0, 0, bits[2]!, bits[3]!))
  })

/** Rows `from` to `to` of each sequence of a jagged [T, ...] tensor. */
function part(x: Tensor, lengths: readonly number[], from: readonly number[], to: readonly number[]): Tensor {
  const [, ...rest] = x.shape
  const width = rest.reduce((a, b) => a * b, 1)
  const data = x.dataSync()
  const rows = data.slice(0, width * sum(to.map((n, b) => n - from[b]!)))
  let [row, filled] = [0, 0]
  lengths.forEach((length, b) => {
    const taken = data.subarray((row + from[b]!) * width, (row + to[b]!) * width)
    rows.set(taken as never, filled)
    filled += taken.length
    row += length
  })
  return Tensor.from(rows, [rows.length / width, ...rest], x)
}

type Attention = Pick<HstuAttentionOptions, 'contextual' | 'maxAttnLen' | 'targetGroupSize' | 'activation'>
type Cached = Pick<Case, 'H' | 'D' | 'V' | 'S'> & {
  dtype: 'float32' | 'bfloat16' | 'float16'
  device: Device
  attention: Attention
}

/**
 * Histories grow into the cache step by step: the new rows attend over the cache with their own keys beside it, then with all keys
 * in pages; at the end come the targets. Every row must have the bits of one call without a cache.
 */
function cachedEqualsUncached({ H, D, V, S, dtype, device, attention }: Cached): void {
  const [history, targets, steps] = [
    [65, 0, 131, 1, 64],
    [4, 6, 0, 2, 10],
    [13, 64, 1, 200],
  ]
  const random = new Random(S + D)
  const lengths = history.map((h, b) => h + targets[b]!)
  const rows = (dim: number) => normal(random, [sum(lengths), H, dim])
  const inputs = { q: rows(D), k: rows(D), v: rows(V), posW: normal(random, [H, 37]), timeW: normal(random, [1, 21]) }
  const { q, k, v, posW, timeW } = toTensors(inputs, dtype, device)
  const clock = lengths.map(length => {
    let t = 1_700_000_000
    return Array.from({ length }, () => BigInt((t += random.int(5000))))
  })
  const times = (from: readonly number[], to: readonly number[]) =>
    Tensor.from(BigInt64Array.from(clock.flatMap((row, b) => row.slice(from[b], to[b]))), undefined, { device })
  const zeros = history.map(() => 0)
  const shared = { ...attention, posW, timeW, scale: 1 / 200, alpha: 0.3, maxSeqLen: Math.max(...lengths) }
  const all = { seqOffsets: starts(lengths, device), numTargets: ints(targets, device) }
  const whole = hstuAttention(q!, k!, v!, {
    ...shared,
    ...all,
    queryTime: times(zeros, lengths),
    keyTime: times(zeros, lengths),
  })

  const counts = history.map(h => pagesOf(h, S))
  const ids = random.shuffle(Array.from({ length: sum(counts) + 3 }, (_, i) => i)).slice(0, sum(counts))
  const shape = [ids.length + 3, 2, S, H, Math.max(D, V)]
  const { pages } = toTensors({ pages: { shape, data: nans(shape), kind: 'float' } satisfies Values }, dtype, device)
  const check = (
    from: readonly number[],
    to: readonly number[],
    held: readonly number[],
    numTargets: readonly number[],
  ) => {
    const out = hstuAttention(part(q!, lengths, from, to), part(k!, lengths, held, to), part(v!, lengths, held, to), {
      ...shared,
      seqOffsets: starts(
        to.map((n, b) => n - held[b]!),
        device,
      ),
      qOffsets: starts(
        to.map((n, b) => n - from[b]!),
        device,
      ),
      numTargets: ints(numTargets, device),
      queryTime: times(from, to),
      keyTime: times(zeros, to),
      paged: { pages: pages!, ...table(ids, counts, held, device), timeOffsets: starts(to, device) },
    })
    deepStrictEqual(
      out.dataSync(),
      part(whole, lengths, from, to).dataSync(),
      `rows ${from} to ${to}, ${held} in pages of ${S}`,
    )
  }
  let held = zeros
  for (const step of steps) {
    const to = history.map((h, b) => Math.min(h, held[b]! + step + 3 * b))
    check(held, to, held, zeros)
    const seqOffsets = starts(
      to.map((n, b) => n - held[b]!),
      device,
    )
    const paged = { pages: pages!, ...table(ids, counts, held, device) }
    kvAppend(part(k!, lengths, held, to), part(v!, lengths, held, to), { seqOffsets, paged })
    check(held, to, to, zeros)
    held = to
  }
  deepStrictEqual(held, history, 'the steps reach the whole history')
  check(history, lengths, history, targets)
}

const kinds: Record<string, Attention> = {
  plain: {},
  'contextual, window, groups': { contextual: 3, maxAttnLen: 19, targetGroupSize: 2 },
  softmax: { activation: 'softmax' },
}
const dims = [
  { D: 16, V: 16 },
  { D: 25, V: 32 },
  { D: 64, V: 20 },
  { D: 128, V: 96 },
]
for (const [name, attention] of Object.entries(kinds))
  for (const device of ['cpu', 'cuda'] as const) {
    const dtypes = device === 'cpu' ? (['float32'] as const) : (['float32', 'bfloat16', 'float16'] as const)
    const run = () => {
      for (const S of [1, 7, 16, 64, 128])
        for (const dim of dims)
          for (const dtype of dtypes) scope(() => cachedEqualsUncached({ H: 2, ...dim, S, dtype, device, attention }))
    }
    itOp('kv_append', `cached equals uncached bit for bit, ${name}`, run, device)
  }

itOp('kv_append', 'names what does not fit', () => {
  const append = (ids: number[], counts: number[], held: number[], fresh: number[]) => () => {
    const k = Tensor.zeros([sum(fresh), 2, 3])
    kvAppend(k, k, {
      seqOffsets: starts(fresh),
      paged: { pages: Tensor.zeros([4, 2, 2, 2, 3]), ...table(ids, counts, held) },
    })
  }
  const wrong = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(
    append([0, 4], [1, 1], [0, 1], [1, 1]),
    wrong,
    /kv_append: page_table\[1\] = 4 of sequence 1 is outside 0..3/,
  )
  throwsCode(append([0, -1], [1, 1], [0, 0], [1, 1]), wrong, /page_table\[1\] = -1/)
  throwsCode(append([0, 1], [1, 1], [0, 2], [1, 1]), wrong, /sequence 1 has 1 pages, but 3 tokens take 2 of 2 slots/)
  throwsCode(append([0, 1, 0], [2, 1], [1, 1], [2, 1]), wrong, /page 0 would be written twice, by sequences 0 and 1/)
  throwsCode(append([3, 3], [2], [0], [3]), wrong, /page 3 would be written twice, by sequences 0 and 0/)
  throwsCode(append([0, 1], [1, 2], [0, 0], [1, 1]), wrong, /page_offsets\[2\] = 3 are no range of the 2 entries/)
  throwsCode(append([0, 1], [3, -2], [0, 0], [0, 1]), wrong, /page_offsets\[1\] = 3 and page_offsets\[2\] = 1/)
  throwsCode(append([0, 1], [1, 1], [0, -1], [1, 1]), wrong, /kv_lengths\[1\] = -1 is negative/)
  const counted = (...counts: number[]) => {
    const k = Tensor.zeros([3, 2, 3])
    const paged = { pages: Tensor.zeros([4, 2, 2, 2, 3]), ...table([0, 1], [1, 1], [0, 0]) }
    return () => kvAppend(k, k, { seqOffsets: starts([2, 1]), paged, counts: ints(counts) })
  }
  throwsCode(counted(1, 2), wrong, /kv_append: counts\[1\] = 2, sequence 1 has 1 rows/)
  throwsCode(counted(-1, 0), wrong, /counts\[0\] = -1, sequence 0 has 2 rows/)
  throwsCode(counted(1), 'ERR_HSTU_SHAPE', /counts must have shape \[2\]/)
  append([0, 0], [1, 1], [1, 2], [1, 0])() // a shared page that nobody writes to a second time
  const pages = Tensor.zeros([4, 2, 2, 2, 3])
  const k = Tensor.zeros([1, 2, 3])
  const call =
    (change: object, key = k, value = k) =>
    () =>
      kvAppend(key, value, { seqOffsets: starts([1]), paged: { pages, ...table([0], [1], [0]), ...change } })
  throwsCode(
    call({ pages: Tensor.zeros([4, 2, 2, 2, 4]) }),
    'ERR_HSTU_SHAPE',
    /pages must have shape .*got float32\[4, 2, 2, 2, 4\]/,
  )
  throwsCode(call({ pages: Tensor.zeros([4, 2, 0, 2, 3]) }), wrong, /at least one slot/)
  throwsCode(
    call({ pages: Tensor.zeros([4, 2, 2, 2, 3], { dtype: 'float64' }) }),
    'ERR_HSTU_DTYPE',
    /k is float32, pages is float64/,
  )
  throwsCode(
    call({ kvLengths: Tensor.zeros([2], { dtype: 'int32' }) }),
    'ERR_HSTU_SHAPE',
    /kvLengths must have shape \[1\]/,
  )
  throwsCode(call({ kvLengths: Tensor.zeros([1], { dtype: 'int64' }) }), 'ERR_HSTU_DTYPE', /kvLengths must be int32/)
  throwsCode(call({}, k, Tensor.zeros([2, 2, 3])), 'ERR_HSTU_SHAPE', /v must have shape/)
  throwsCode(
    call({ pages: Tensor.zeros([4, 2, 2, 2, 3], { dtype: 'int32' }) }),
    'ERR_HSTU_DTYPE',
    /pages must have a float dtype/,
  )
  const tracked = () =>
    valueAndGrad([k], () => {
      call({})()
      return k
    })
  throwsCode(tracked, wrong, /kv_append changes tensors in place/)
})
