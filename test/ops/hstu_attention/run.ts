// Problems of HSTU attention put to the op, on the CPU and on CUDA; what comes is held against the oracle.
import { ok } from 'node:assert/strict'
import { record, valueAndGrad } from '#lib/autograd.js'
import { type HstuAttentionOptions, hstuAttention } from '#lib/ops/hstu_attention.js'
import { Random } from '#lib/random.js'
import { type Device, scope, Tensor, type TypedArray } from '#lib/tensor.js'
import { decoded, itOp, offsets, placed, rounded, sum } from '../../harness.js'
import { oracle, type Problem } from './oracle.js'

export type FloatName = 'float32' | 'float64' | 'bfloat16' | 'float16'

/** Where the checks of this file run at the moment. */
export let device: Device = 'cpu'

export const tensor = (data: TypedArray, shape: readonly number[] = [data.length]) =>
  Tensor.from(data, shape, { device })
export const float = (data: Float64Array, shape: readonly number[], dtype: FloatName) =>
  placed(data, shape, dtype, device)
export const starts = (lengths: readonly number[]) => tensor(offsets(lengths).data as BigInt64Array)

/** The same check on the CPU and on CUDA. */
export function everywhere(name: string, run: () => void): void {
  for (const where of ['cpu', 'cuda'] as const)
    itOp(
      'hstu_attention',
      name,
      () => {
        device = where
        try {
          run()
        } finally {
          device = 'cpu'
        }
      },
      where,
    )
}

export function rowsOf(
  data: Float64Array,
  width: number,
  lengths: readonly number[],
  from: readonly number[],
): Float64Array {
  const parts: number[] = []
  let row = 0
  lengths.forEach((length, b) => {
    for (let j = from[b]!; j < length; j++) for (let x = 0; x < width; x++) parts.push(data[(row + j) * width + x]!)
    row += length
  })
  return Float64Array.from(parts)
}

/** Pages of S slots in shuffled order, NaN where no key stands. */
export function paged(p: Problem, cached: readonly number[], S: number, dtype: FloatName, random: Random) {
  const { H, D, V } = p
  const wide = Math.max(D, V)
  const counts = cached.map(length => Math.ceil(length / S))
  const ids = random.shuffle(Array.from({ length: sum(counts) + 1 }, (_, i) => i)).slice(0, sum(counts))
  const pages = new Float64Array((ids.length + 1) * 2 * S * H * wide).fill(Number.NaN)
  let [row, page] = [0, 0]
  p.lengths.forEach((length, b) => {
    for (let j = 0; j < cached[b]!; j++)
      for (let head = 0; head < H; head++) {
        const slot = (part: number) => (((ids[page + Math.floor(j / S)]! * 2 + part) * S + (j % S)) * H + head) * wide
        for (let x = 0; x < D; x++) pages[slot(0) + x] = p.k[((row + j) * H + head) * D + x]!
        for (let x = 0; x < V; x++) pages[slot(1) + x] = p.v[((row + j) * H + head) * V + x]!
      }
    row += length
    page += counts[b]!
  })
  return {
    pages: float(pages, [ids.length + 1, 2, S, H, wide], dtype),
    pageTable: tensor(Int32Array.from(ids)),
    pageOffsets: starts(counts),
    kvLengths: tensor(Int32Array.from(cached)),
    timeOffsets: starts(p.lengths),
  }
}

export interface How {
  dtype: FloatName
  rowScales: boolean
  /** Keys in pages of this size; the last K and a few more stay jagged. */
  pageSize?: number
  random?: Random
  /** Of the bias tables, when not `dtype`. */
  tables?: FloatName
  deterministic?: boolean
}

/** What of a problem is an option and no tensor. */
export const fixedOptions = (p: Problem) =>
  ({
    maxSeqLen: p.N,
    alpha: p.alpha,
    causal: p.causal,
    maxAttnLen: p.W,
    minFullAttnSeqLen: p.F,
    targetGroupSize: p.g,
    contextualFull: p.full,
    activation: p.softmax ? 'softmax' : 'silu',
    dropout: p.dropout,
    seed: p.seed,
    offset: p.offset,
  }) satisfies Partial<HstuAttentionOptions>

export function run(p: Problem, how: How, dout: Float64Array | null) {
  const { dtype } = how
  const { H, D, V } = p
  const Tq = sum(p.queries)
  const cached = p.lengths.map((L, b) => (how.pageSize ? Math.max(0, L - p.targets[b]! - (b % 3) * 5) : 0))
  const held = p.lengths.map((L, b) => L - cached[b]!)
  const q = float(p.q, [Tq, H, D], dtype)
  const k = float(how.pageSize ? rowsOf(p.k, H * D, p.lengths, cached) : p.k, [sum(held), H, D], dtype)
  const v = float(how.pageSize ? rowsOf(p.v, H * V, p.lengths, cached) : p.v, [sum(held), H, V], dtype)
  const posW = p.pos && float(p.pos.data, [p.pos.rows, p.pos.cols], how.tables ?? dtype)
  const timeW = p.time && float(p.time.data, [p.time.rows, p.time.cols], how.tables ?? dtype)
  const same = (values: readonly number[]) => values.every(value => value === values[0])
  const options: HstuAttentionOptions = {
    seqOffsets: starts(held),
    qOffsets: p.queries.every((n, b) => n === held[b]) ? null : starts(p.queries),
    numTargets: p.targets.some(n => n > 0) ? tensor(Int32Array.from(p.targets)) : null,
    contextual: same(p.contextual) ? (p.contextual[0] ?? 0) : tensor(Int32Array.from(p.contextual)),
    posW,
    timeW,
    queryTime: p.time ? tensor(p.queryTime) : null,
    keyTime: p.time ? tensor(p.keyTime) : null,
    scale: how.rowScales ? tensor(Float32Array.from(p.scales)) : (p.scales[0] ?? 1),
    ...fixedOptions(p),
    deterministic: how.deterministic ?? true,
    ...(how.pageSize ? { paged: paged(p, cached, how.pageSize, dtype, how.random!) } : {}),
  }
  const read = decoded
  if (!dout) return { out: read(hstuAttention(q, k, v, options)), grads: [] }
  let out: Float64Array = new Float64Array()
  const params = [q, k, v, ...(posW ? [posW] : []), ...(timeW ? [timeW] : [])]
  const { grads } = valueAndGrad(params, () => {
    const y = hstuAttention(q, k, v, options)
    out = read(y)
    return record('cotangent', Tensor.zeros([1], { device }), [y], () => [float(dout, y.shape, dtype)])
  })
  return { out, grads: (grads as Tensor[]).map(read) }
}

/** Frobenius norm of the difference, relative to that of `size`; a NaN anywhere makes it NaN. */
export function errorOf(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  size: ArrayLike<number> = expected,
): number {
  ok(actual.length === expected.length, `${actual.length} elements, expected ${expected.length}`)
  let [difference, norm] = [0, 0]
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i]! - expected[i]!) ** 2
    norm += size[i]! ** 2
  }
  return norm === 0 ? Math.sqrt(difference) : Math.sqrt(difference / norm)
}

/** The 16-bit types round q, k, v's products' weights once before the second product: 2.4e-3 is what peers show in bfloat16. */
export const tolerances = { float32: 1e-5, float64: 1e-11, bfloat16: 5e-3, float16: 1e-3 }
export const gradientSlack = { float32: 1, float64: 1, bfloat16: 2.5, float16: 2.5 }

export function checkProblem(p: Problem, how: How, label: string, size = 1): void {
  const random = new Random('cotangent')
  const normal = () => Math.fround(size * random.normal())
  const dout = rounded(Float64Array.from({ length: (p.q.length / p.D) * p.V }, normal), how.dtype)
  scope(() => {
    const expected = oracle(p, how.pageSize ? null : dout)
    const actual = run(p, how, how.pageSize ? null : dout)
    const check = (name: string, got: ArrayLike<number>, want: Float64Array, size?: Float64Array) => {
      const error = errorOf(got, want, size)
      const tolerance = tolerances[how.dtype] * (name === 'out' ? 1 : gradientSlack[how.dtype])
      ok(error <= tolerance, `${name}: relative error ${error.toExponential(2)} exceeds ${tolerance} in ${label}`)
    }
    check('out', actual.out, expected.out)
    const [dq, dk, dv, ...tables] = actual.grads
    if (!dq) return
    check('dq', dq, expected.dq, p.softmax ? expected.dqSize : expected.dq)
    check('dk', dk!, expected.dk, p.softmax ? expected.dkSize : expected.dk)
    check('dv', dv!, expected.dv)
    if (p.pos) check('dpos_w', tables.shift()!, expected.dpos, expected.dposSize)
    if (p.time) check('dtime_w', tables.shift()!, expected.dtime, expected.dtimeSize)
  })
}

export const single = (): How => ({ dtype: device === 'cpu' ? 'float32' : 'bfloat16', rowScales: true })

export const range = (begin: number, end: number) =>
  Array.from({ length: Math.max(0, end - begin) }, (_, i) => begin + i)

export function equalBits(a: ArrayLike<number>, b: ArrayLike<number>, what: string): void {
  ok(a.length === b.length && Array.prototype.every.call(a, (x, i) => Object.is(x, b[i])), `${what}: bits differ`)
}

export const forward = (p: Problem, how = single()) => scope(() => run(p, how, null).out)
