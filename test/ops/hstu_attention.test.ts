import { ok } from 'node:assert/strict'
import { record, valueAndGrad } from '#lib/autograd.js'
import { native } from '#lib/native.js'
import { type HstuAttentionOptions, hstuAttention } from '#lib/ops/hstu_attention.js'
import { Random } from '#lib/random.js'
import { type Device, scope, Tensor, type TypedArray } from '#lib/tensor.js'
import { decoded, describeOp, int32, int64, itOp, offsets, placed, rounded, sum, throwsCode } from '../harness.js'

// ---- The oracle: float64, from the specification alone ------------------------------------------------------------------

interface Table {
  rows: number
  cols: number
  data: Float64Array
}

/** One call in logical form: keys of a sequence stand together wherever the op finds them; queries are its last `queries` rows. */
interface Problem {
  H: number
  D: number
  V: number
  lengths: number[]
  queries: number[]
  targets: number[]
  contextual: number[]
  W: number
  F: number
  g: number
  causal: boolean
  full: boolean
  alpha: number
  scales: Float64Array
  softmax: boolean
  dropout: number
  seed: bigint
  offset: bigint
  N: number
  q: Float64Array
  k: Float64Array
  v: Float64Array
  pos: Table | null
  time: Table | null
  queryTime: BigInt64Array
  keyTime: BigInt64Array
}

function sees(p: Problem, b: number, i: number, j: number): boolean {
  const h = p.lengths[b]! - p.targets[b]!
  const C = Math.min(p.contextual[b]!, h)
  const group = (x: number) => Math.floor((x - h) / p.g)
  if (i < h) {
    if (p.full && i < C) return j < h
    if (p.causal ? j > i : j >= h) return false
    return p.W === 0 || Math.abs(i - j) <= p.W || j < C || i >= h - p.F
  }
  if (j >= h) return group(j) === group(i) && j <= i
  return p.W === 0 || p.F > 0 || h - j <= p.W || j < C
}

/** ceil(exp(0.301 k)), k = 1 to 145, in fixed point of 300 bits: doubles are off by one from 1e12 on. */
const thresholds: bigint[] = []
const one = 1n << 300n
let factor = 0n
for (let n = 0n, term = one; term > 0n; term = (term * 301n) / (1000n * ++n)) factor += term
for (let power = factor; thresholds.length < 145; power = (power * factor) / one) thresholds.push(power / one + 1n)
const thresholdNumbers = Float64Array.from(thresholds, Number)

/** Number of k >= 1 with |a - b| >= ceil(exp(0.301 k)). */
function bucketOf(a: bigint, b: bigint): number {
  const d = a > b ? a - b : b - a
  if (d > 1n << 50n) return thresholds.filter(threshold => d >= threshold).length
  const small = Number(d)
  let [low, high] = [0, 145]
  while (low < high) {
    const middle = (low + high) >> 1
    if (small >= thresholdNumbers[middle]!) low = middle + 1
    else high = middle
  }
  return low
}

const mask64 = (1n << 64n) - 1n
const mask32 = 0xffffffffn

/** Philox4x32-10 of the paper, word by word. */
function philox(key: bigint, counter: bigint): number[] {
  let [k0, k1] = [key & mask32, (key >> 32n) & mask32]
  let c = [counter & mask32, (counter >> 32n) & mask32, 0n, 0n]
  for (let round = 0; round < 10; round++) {
    const a = 0xd2511f53n * c[0]!
    const b = 0xcd9e8d57n * c[2]!
    c = [(b >> 32n) ^ c[1]! ^ k0, b & mask32, (a >> 32n) ^ c[3]! ^ k1, a & mask32]
    k0 = (k0 + 0x9e3779b9n) & mask32
    k1 = (k1 + 0xbb67ae85n) & mask32
  }
  return c.map(Number)
}

/**
 * Output and gradients. The sizes are what float32 errors are measured against where terms cancel: for the tables sums of |dS|; for
 * softmax dS = P (dP - D) may itself be the small difference of large terms, so there |dP| + |D| stands for it.
 */
function oracle(p: Problem, dout: Float64Array | null) {
  const { H, D, V, q, k, v } = p
  const out = new Float64Array((q.length / D) * V)
  const [dq, dk, dv] = [new Float64Array(q.length), new Float64Array(k.length), new Float64Array(v.length)]
  const [dqSize, dkSize] = [new Float64Array(q.length), new Float64Array(k.length)]
  const [dpos, dposSize] = [new Float64Array(p.pos?.data.length ?? 0), new Float64Array(p.pos?.data.length ?? 0)]
  const [dtime, dtimeSize] = [new Float64Array(p.time?.data.length ?? 0), new Float64Array(p.time?.data.length ?? 0)]
  const [s, w, keep] = [new Float64Array(p.N), new Float64Array(p.N), new Float64Array(p.N)]
  const [seen, posAt, timeAt] = [new Int32Array(p.N), new Int32Array(p.N), new Int32Array(p.N)]
  let [key0, query0] = [0, 0]
  p.lengths.forEach((L, b) => {
    const h = L - p.targets[b]!
    const C = Math.min(p.contextual[b]!, h)
    for (let row = 0; row < p.queries[b]!; row++) {
      const i = row + L - p.queries[b]!
      let n = 0
      for (let j = 0; j < L; j++) if (sees(p, b, i, j)) seen[n++] = j
      for (let x = 0; x < n; x++) {
        const j = seen[x]!
        posAt[x] = p.pos ? Math.min(Math.abs(Math.min(i, h) - Math.min(j, h)), p.pos.cols - 1) : 0
        timeAt[x] = -1
        if (p.time && i >= C && j >= C)
          timeAt[x] = Math.min(bucketOf(p.queryTime[query0 + row]!, p.keyTime[key0 + j]!), p.time.cols - 1)
      }
      for (let head = 0; head < H; head++) {
        const qi = ((query0 + row) * H + head) * D
        const oi = ((query0 + row) * H + head) * V
        const posRow = p.pos && p.pos.rows > 1 ? head * p.pos.cols : 0
        const timeRow = p.time && p.time.rows > 1 ? head * p.time.cols : 0
        for (let x = 0; x < n; x++) {
          const kj = ((key0 + seen[x]!) * H + head) * D
          let score = 0
          for (let d = 0; d < D; d++) score += q[qi + d]! * k[kj + d]!
          score *= p.alpha
          if (p.pos) score += p.pos.data[posRow + posAt[x]!]!
          if (timeAt[x]! >= 0) score += p.time!.data[timeRow + timeAt[x]!]!
          s[x] = score
          keep[x] = 1
          if (p.dropout > 0) {
            const element = (BigInt(b * H + head) * BigInt(p.N) + BigInt(i)) * BigInt(p.N) + BigInt(seen[x]!)
            const word = philox(p.seed, (p.offset + element / 4n) & mask64)[Number(element % 4n)]!
            keep[x] = word >= Math.floor(p.dropout * 2 ** 32) ? 1 / (1 - p.dropout) : 0
          }
        }
        let scale = p.scales[query0 + row]!
        if (p.softmax) {
          scale = 1
          let most = -Infinity
          let total = 0
          for (let x = 0; x < n; x++) most = Math.max(most, s[x]!)
          for (let x = 0; x < n; x++) total += w[x] = Math.exp(s[x]! - most)
          for (let x = 0; x < n; x++) w[x]! /= total
        } else for (let x = 0; x < n; x++) w[x] = s[x]! / (1 + Math.exp(-s[x]!))
        for (let x = 0; x < n; x++) {
          const vj = ((key0 + seen[x]!) * H + head) * V
          const weight = scale * w[x]! * keep[x]!
          for (let d = 0; d < V; d++) out[oi + d]! += weight * v[vj + d]!
        }
        if (!dout) continue
        let mean = 0
        if (p.softmax) for (let d = 0; d < V; d++) mean += dout[oi + d]! * out[oi + d]!
        for (let x = 0; x < n; x++) {
          const kj = ((key0 + seen[x]!) * H + head) * D
          const vj = ((key0 + seen[x]!) * H + head) * V
          let dw = 0
          for (let d = 0; d < V; d++) dw += dout[oi + d]! * v[vj + d]!
          dw *= scale * keep[x]!
          const sig = 1 / (1 + Math.exp(-s[x]!))
          const ds = p.softmax ? w[x]! * (dw - mean) : dw * sig * (1 + s[x]! * (1 - sig))
          const size = p.softmax ? w[x]! * (Math.abs(dw) + Math.abs(mean)) : Math.abs(ds)
          const weight = scale * w[x]! * keep[x]!
          for (let d = 0; d < V; d++) dv[vj + d]! += weight * dout[oi + d]!
          for (let d = 0; d < D; d++) {
            dq[qi + d]! += p.alpha * ds * k[kj + d]!
            dk[kj + d]! += p.alpha * ds * q[qi + d]!
            if (!p.softmax) continue
            dqSize[qi + d]! += p.alpha * size * k[kj + d]!
            dkSize[kj + d]! += p.alpha * size * q[qi + d]!
          }
          if (p.pos) {
            dpos[posRow + posAt[x]!]! += ds
            dposSize[posRow + posAt[x]!]! += size
          }
          if (timeAt[x]! >= 0) {
            dtime[timeRow + timeAt[x]!]! += ds
            dtimeSize[timeRow + timeAt[x]!]! += size
          }
        }
      }
    }
    key0 += L
    query0 += p.queries[b]!
  })
  return { out, dq, dk, dv, dpos, dtime, dqSize, dkSize, dposSize, dtimeSize }
}

// ---- Running the op on a problem ------------------------------------------------------------------------------------------

type FloatName = 'float32' | 'float64' | 'bfloat16' | 'float16'

/** Where the checks of this file run at the moment. */
let device: Device = 'cpu'

const tensor = (data: TypedArray, shape: readonly number[] = [data.length]) => Tensor.from(data, shape, { device })
const float = (data: Float64Array, shape: readonly number[], dtype: FloatName) => placed(data, shape, dtype, device)
const starts = (lengths: readonly number[]) => tensor(offsets(lengths).data as BigInt64Array)

/** The same check on the CPU and on CUDA. */
function everywhere(name: string, run: () => void): void {
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

function rowsOf(data: Float64Array, width: number, lengths: readonly number[], from: readonly number[]): Float64Array {
  const parts: number[] = []
  let row = 0
  lengths.forEach((length, b) => {
    for (let j = from[b]!; j < length; j++) for (let x = 0; x < width; x++) parts.push(data[(row + j) * width + x]!)
    row += length
  })
  return Float64Array.from(parts)
}

/** Pages of S slots in shuffled order, NaN where no key stands. */
function paged(p: Problem, cached: readonly number[], S: number, dtype: FloatName, random: Random) {
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

interface How {
  dtype: FloatName
  rowScales: boolean
  /** Keys in pages of this size; the last K and a few more stay jagged. */
  pageSize?: number
  random?: Random
  /** Of the bias tables, when not `dtype`. */
  tables?: FloatName
  deterministic?: boolean
}

function run(p: Problem, how: How, dout: Float64Array | null) {
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
    maxSeqLen: p.N,
    qOffsets: p.queries.every((n, b) => n === held[b]) ? null : starts(p.queries),
    numTargets: p.targets.some(n => n > 0) ? tensor(Int32Array.from(p.targets)) : null,
    contextual: same(p.contextual) ? (p.contextual[0] ?? 0) : tensor(Int32Array.from(p.contextual)),
    posW,
    timeW,
    queryTime: p.time ? tensor(p.queryTime) : null,
    keyTime: p.time ? tensor(p.keyTime) : null,
    scale: how.rowScales ? tensor(Float32Array.from(p.scales)) : (p.scales[0] ?? 1),
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
function errorOf(actual: ArrayLike<number>, expected: ArrayLike<number>, size: ArrayLike<number> = expected): number {
  ok(actual.length === expected.length, `${actual.length} elements, expected ${expected.length}`)
  let [difference, norm] = [0, 0]
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i]! - expected[i]!) ** 2
    norm += size[i]! ** 2
  }
  return norm === 0 ? Math.sqrt(difference) : Math.sqrt(difference / norm)
}

/** The 16-bit types round q, k, v's products' weights once before the second product: 2.4e-3 is what peers show in bfloat16. */
const tolerances = { float32: 1e-5, float64: 1e-11, bfloat16: 5e-3, float16: 1e-3 }
const gradientSlack = { float32: 1, float64: 1, bfloat16: 2.5, float16: 2.5 }

function checkProblem(p: Problem, how: How, label: string, size = 1): void {
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

// ---- Cases ------------------------------------------------------------------------------------------------------------------

const levels = {
  D: [16, 25, 32, 50, 64, 128, 256],
  V: [16, 25, 32, 50, 64, 128, 256],
  H: [1, 2, 4],
  contextual: ['none', 'one', 'some', 'mixed', 'more than h'],
  targets: ['none', 'one', 'some', 'mixed', 'all'],
  W: [0, 1, 7, 64, 200],
  F: [0, 5],
  g: [1, 2, 5],
  causal: [true, true, false],
  full: [false, true],
  pos: ['none', 'shared', 'per head'],
  time: ['none', 'shared', 'per head'],
  P: [1, 40, 300],
  NB: [0, 5, 40, 128, 200],
  times: ['sorted', 'sorted', 'equal', 'unsorted', 'far'],
  size: [1, 10],
  rowScales: [false, true],
  delta: [0, 0, 1, 8, 160],
  pageSize: [0, 0, 0, 64, 128],
  softmax: [false, false, true],
  dropout: [0, 0, 0.3],
  alpha: ['one', 'root'],
  dtype: ['float32', 'float32', 'float32', 'float64'],
} as const
type Choice = Omit<{ -readonly [K in keyof typeof levels]: (typeof levels)[K][number] }, 'dtype'> & { dtype: FloatName }

const names = Object.keys(levels) as (keyof Choice)[]
const pick = <T>(random: Random, values: readonly T[]): T => values[random.int(values.length)]!

/** Cases in a fixed order; each is the best of eight draws at covering pairs of levels not yet covered. */
function* cover(count: number): Generator<Choice> {
  const random = new Random('hstu_attention cover')
  const covered = new Set<string>()
  const pairs = (choice: Choice) =>
    names.flatMap((a, i) => names.slice(i + 1).map(b => `${a}=${choice[a]},${b}=${choice[b]}`))
  for (let n = 0; n < count; n++) {
    let best: Choice | undefined
    let most = -1
    for (let draw = 0; draw < 8; draw++) {
      const choice = Object.fromEntries(
        names.map(name => [name, pick(random, levels[name] as readonly unknown[])]),
      ) as Choice
      const fresh = pairs(choice).filter(pair => !covered.has(pair)).length
      if (fresh > most) [best, most] = [choice, fresh]
    }
    for (const pair of pairs(best!)) covered.add(pair)
    yield best!
  }
}

function timesOf(kind: Choice['times'], length: number, random: Random): bigint[] {
  if (kind === 'equal') return Array<bigint>(length).fill(1_700_000_000n)
  if (kind === 'far') return Array.from({ length }, () => BigInt(random.int(2 ** 31)) << BigInt(random.int(31)))
  const times = Array.from({ length }, () => 1_600_000_000n + BigInt(Math.floor(Math.exp(random.float() * 18))))
  return kind === 'sorted' ? times.sort((a, b) => (a < b ? -1 : a > b ? 1 : 0)) : times
}

function problemOf(c: Choice, lengths: number[], random: Random): Problem {
  const { D, V, H } = c
  const targets = lengths.map((L, b) => {
    const some = { none: 0, one: 1, some: 7, mixed: [0, 3, 40][b % 3]!, all: L }[c.targets]
    return Math.min(L, some)
  })
  const contextual = lengths.map((L, b) => {
    return { none: 0, one: 1, some: 4, mixed: b % 4, 'more than h': L - targets[b]! + 2 }[c.contextual]
  })
  const queries = lengths.map(L => (c.delta ? Math.min(L, c.delta) : L))
  const [Tk, Tq] = [sum(lengths), sum(queries)]
  const values = (n: number, scale: number) => {
    return rounded(
      Float64Array.from({ length: n }, () => scale * random.normal()),
      c.dtype,
    )
  }
  const alpha = c.alpha === 'one' ? 1 : 1 / Math.sqrt(D)
  const spread = Math.sqrt(c.size / (alpha * Math.sqrt(D)))
  const table = (kind: Choice['pos'], cols: number): Table | null => {
    if (kind === 'none') return null
    const rows = kind === 'shared' ? 1 : H
    return { rows, cols, data: values(rows * cols, 0.5) }
  }
  const keyTime = BigInt64Array.from(lengths.flatMap(L => timesOf(c.times, L, random)))
  const queryTime = new BigInt64Array(Tq)
  let [key, query] = [0, 0]
  lengths.forEach((L, b) => {
    // Retrieval's query times: the next key's; the last row's is the request's.
    for (let i = L - queries[b]!; i < L; i++)
      queryTime[query++] = keyTime[key + Math.min(i + 1, L - 1)]! + (i + 1 === L ? 77n : 0n)
    key += L
  })
  const constant = Math.fround(1 / 256)
  return {
    H,
    D,
    V,
    lengths,
    queries,
    targets,
    contextual,
    W: c.W,
    F: c.F,
    g: c.g,
    causal: c.causal,
    full: c.full,
    alpha,
    scales: Float64Array.from({ length: Tq }, () => (c.rowScales ? Math.fround(0.01 + random.float()) : constant)),
    softmax: c.softmax,
    dropout: c.softmax ? c.dropout : 0,
    seed: 0x1234_5678_9abcn,
    offset: 1n << 33n,
    N: Math.max(0, ...lengths) + random.int(3),
    q: values(Tq * H * D, spread),
    k: values(Tk * H * D, spread),
    v: values(Tk * H * V, 1),
    pos: table(c.pos, c.P),
    time: table(c.time, c.NB + 1),
    queryTime,
    keyTime,
  }
}

const short = [0, 1, 63, 64, 65, 99, 128]

function checkChoice(c: Choice, n: number): void {
  const random = new Random(`hstu_attention ${n}`)
  let lengths = Array.from({ length: 1 + random.int(4) }, () => pick(random, short))
  if (n % 5 === 0) lengths.push(257)
  if (n % 40 === 7) lengths = [1111, 0, 65]
  if (n % 200 === 11) lengths = [3, 2000]
  const long = sum(lengths) > 1000
  const choice = long || c.dropout > 0 ? { ...c, H: 1 as const, D: long ? pick(random, [16, 25] as const) : c.D } : c
  const p = problemOf(choice, lengths, random)
  const how: How = { dtype: c.dtype, rowScales: c.rowScales, ...(c.pageSize ? { pageSize: c.pageSize, random } : {}) }
  checkProblem(p, how, `case ${n}: ${JSON.stringify({ ...choice, lengths })}`)
}

const total = Number(process.env.HSTU_ATTENTION_CASES ?? 400)
const choices = [...cover(total)]
for (let begin = 0; begin < total; begin += 25)
  everywhere(`against the oracle, cases ${begin} to ${Math.min(total, begin + 25) - 1}`, () => {
    for (let n = begin; n < Math.min(total, begin + 25); n++) {
      const dtype =
        device === 'cpu' ? choices[n]!.dtype : (['bfloat16', 'float32', 'bfloat16', 'float16'] as const)[n % 4]!
      checkChoice({ ...choices[n]!, dtype }, n)
    }
  })

// ---- Small cases with finite differences ------------------------------------------------------------------------------------

type Small = Partial<Choice> & { lengths: number[] }
const plain: Choice = {
  ...(Object.fromEntries(names.map(name => [name, levels[name][0]])) as Choice),
  D: 16,
  V: 25,
}

function smallProblem(c: Small, data?: Record<string, Float64Array>): Problem {
  const p = problemOf({ ...plain, P: 40, NB: 40, ...c, dtype: 'float64' }, c.lengths, new Random(JSON.stringify(c)))
  p.scales.forEach((scale, i) => {
    p.scales[i] = Math.fround(scale)
  })
  if (!data) return p
  const table = (old: Table | null, now?: Float64Array) => old && { ...old, data: now! }
  return { ...p, q: data.q!, k: data.k!, v: data.v!, pos: table(p.pos, data.pos), time: table(p.time, data.time) }
}

describeOp<Small>('hstu_attention', {
  cases: [
    { name: 'no sequences', lengths: [] },
    { name: 'only empty sequences', lengths: [0, 0] },
    { name: 'one token', lengths: [1] },
    { name: 'silu', lengths: [3, 0, 9] },
    { name: 'bias', lengths: [5, 33], pos: 'shared', time: 'shared', H: 2 },
    {
      name: 'bias per head, contextual',
      lengths: [12, 7],
      pos: 'per head',
      time: 'per head',
      H: 2,
      contextual: 'mixed',
    },
    { name: 'targets', lengths: [6, 20], targets: 'some', pos: 'shared', time: 'shared', g: 2 },
    { name: 'all targets', lengths: [1, 6], targets: 'all', pos: 'shared', time: 'shared', g: 5 },
    { name: 'window', lengths: [40], W: 7, F: 5, contextual: 'some', pos: 'shared' },
    { name: 'not causal', lengths: [11, 2], causal: false, W: 1, time: 'shared', rowScales: true },
    { name: 'delta', lengths: [10, 4], delta: 8, alpha: 'root' },
    { name: 'softmax', lengths: [5, 12], softmax: true, pos: 'shared', targets: 'one' },
    {
      name: 'softmax with dropout',
      lengths: [9, 6],
      softmax: true,
      dropout: 0.3,
      time: 'shared',
      H: 2,
      targets: 'mixed',
    },
    { name: 'contextual rows see all', lengths: [9], full: true, contextual: 'some', targets: 'one' },
  ],
  inputs: c => {
    const p = smallProblem(c)
    const values = (data: Float64Array, shape: number[]) => ({ shape, data: data.slice(), kind: 'float' as const })
    return {
      q: values(p.q, [sum(p.queries), p.H, p.D]),
      k: values(p.k, [sum(p.lengths), p.H, p.D]),
      v: values(p.v, [sum(p.lengths), p.H, p.V]),
      pos: p.pos && values(p.pos.data, [p.pos.rows, p.pos.cols]),
      time: p.time && values(p.time.data, [p.time.rows, p.time.cols]),
      seqOffsets: offsets(p.lengths),
      qOffsets: offsets(p.queries),
      numTargets: int32(p.targets),
      contextual: int32(p.contextual),
      queryTime: int64([...p.queryTime]),
      keyTime: int64([...p.keyTime]),
      scale: { shape: [p.scales.length], data: p.scales, kind: 'float32' },
    }
  },
  run: (t, c) => {
    const p = smallProblem(c)
    return hstuAttention(t.q!, t.k!, t.v!, {
      seqOffsets: t.seqOffsets!,
      qOffsets: t.qOffsets!,
      maxSeqLen: p.N,
      numTargets: t.numTargets!,
      contextual: t.contextual!,
      posW: t.pos ?? null,
      timeW: t.time ?? null,
      queryTime: t.queryTime!,
      keyTime: t.keyTime!,
      scale: t.scale!,
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
    })
  },
  reference: (x, c) => [oracle(smallProblem(c, x), null).out],
  gradients: ['q', 'k', 'v', 'pos', 'time'],
})

// ---- Invariances, bit for bit -----------------------------------------------------------------------------------------------

const single = (): How => ({ dtype: device === 'cpu' ? 'float32' : 'bfloat16', rowScales: true })
const bases: [string, Partial<Choice>][] = [
  ['silu', { pos: 'shared', time: 'shared', H: 2, rowScales: true, D: 50, V: 50 }],
  [
    'silu with a window',
    { pos: 'per head', time: 'shared', H: 2, W: 64, contextual: 'some', rowScales: true, D: 25, V: 32 },
  ],
  ['silu with a window and full rows', { pos: 'shared', W: 7, F: 5, contextual: 'one', rowScales: true, D: 64, V: 25 }],
  ['softmax', { softmax: true, pos: 'shared', time: 'per head', H: 2, W: 64, contextual: 'some', rowScales: true }],
]

function take(p: Problem, name: 'q' | 'k' | 'v', rows: readonly number[]): Float64Array {
  const width = p.H * (name === 'v' ? p.V : p.D)
  return Float64Array.from(rows.flatMap(row => [...p[name].subarray(row * width, (row + 1) * width)]))
}

/** The problem of one sequence with the keys `keys` and the query rows `rows` (rows of the original). */
function select(p: Problem, keys: readonly number[], rows: readonly number[], targets: number): Problem {
  const times = (from: BigInt64Array, at: readonly number[]) => BigInt64Array.from(at.map(i => from[i]!))
  return {
    ...p,
    lengths: [keys.length],
    queries: [rows.length],
    targets: [targets],
    q: take(p, 'q', rows),
    k: take(p, 'k', keys),
    v: take(p, 'v', keys),
    scales: Float64Array.from(rows.map(i => p.scales[i]!)),
    queryTime: times(p.queryTime, rows),
    keyTime: times(p.keyTime, keys),
  }
}

const range = (begin: number, end: number) => Array.from({ length: Math.max(0, end - begin) }, (_, i) => begin + i)

function equalRows(
  p: Problem,
  a: ArrayLike<number>,
  rowA: number,
  b: ArrayLike<number>,
  rowB: number,
  what: string,
): void {
  const width = p.H * p.V
  for (let x = 0; x < width; x++)
    ok(Object.is(a[rowA * width + x], b[rowB * width + x]), `${what}: row ${rowB} differs at ${x}`)
}

function equalBits(a: ArrayLike<number>, b: ArrayLike<number>, what: string): void {
  ok(a.length === b.length && Array.prototype.every.call(a, (x, i) => Object.is(x, b[i])), `${what}: bits differ`)
}

const forward = (p: Problem, how = single()) => scope(() => run(p, how, null).out)

for (const [name, base] of bases) {
  const make = (c: Partial<Choice>, lengths: number[]) =>
    problemOf({ ...plain, P: 40, NB: 40, ...base, ...c, dtype: 'float32' }, lengths, new Random(`bits ${name}`))

  everywhere(`${name}: targets permuted or taken in chunks`, () => {
    for (const g of [1, 2, 5] as const) {
      const [h, K] = [131, 60]
      const p = { ...make({ g }, [h + K]), targets: [K] }
      const whole = forward(p)
      const groups = new Random(3).shuffle(range(0, K / g))
      const order = groups.flatMap(group => range(h + group * g, h + group * g + g))
      const all = [...range(0, h), ...order]
      const permuted = forward(select(p, all, all, K))
      all.forEach((row, at) => {
        equalRows(p, permuted, at, whole, row, `g=${g} permuted`)
      })
      for (const chunk of [order.slice(0, g), order.slice(g, 7 * g)]) {
        const some = forward(select(p, [...range(0, h), ...chunk], chunk, chunk.length))
        chunk.forEach((row, at) => {
          equalRows(p, some, at, whole, row, `g=${g} chunk`)
        })
      }
    }
  })

  everywhere(`${name}: queries in chunks, each with the keys up to its end`, () => {
    const p = make({}, [300])
    if (p.F > 0) return // the last F rows change with the length
    const whole = forward(p)
    for (const [begin, end] of [
      [0, 1],
      [0, 33],
      [33, 34],
      [40, 200],
      [200, 300],
      [299, 300],
    ] as const) {
      const chunk = forward(select(p, range(0, end), range(begin, end), 0))
      for (let i = begin; i < end; i++) equalRows(p, chunk, i - begin, whole, i, `rows ${begin} to ${end}`)
    }
  })

  everywhere(`${name}: batch-mates, also full of NaN`, () => {
    const p = { ...make({}, [70, 0, 257, 19]), contextual: [4, 4, 4, 4], targets: [5, 0, 40, 0] }
    const whole = forward(p)
    let row = 0
    p.lengths.forEach((L, b) => {
      const rows = range(row, row + L)
      const alone = forward({ ...select(p, rows, rows, p.targets[b]!), contextual: [4] })
      rows.forEach((i, at) => {
        equalRows(p, alone, at, whole, i, `sequence ${b} alone`)
      })
      row += L
    })
    const poisoned = { ...p, q: p.q.slice(), k: p.k.slice(), v: p.v.slice() }
    poisoned.q.fill(Number.NaN, 70 * p.H * p.D, 327 * p.H * p.D)
    poisoned.k.fill(Number.NaN, 70 * p.H * p.D, 327 * p.H * p.D)
    poisoned.v.fill(Number.NaN, 70 * p.H * p.V, 327 * p.H * p.V)
    const near = forward(poisoned)
    for (const i of [...range(0, 70), ...range(327, 346)]) equalRows(p, near, i, whole, i, 'beside NaN')
    ok(Number.isNaN(near[200 * p.H * p.V]), 'NaN in its own sequence')
  })

  everywhere(`${name}: float32 tables beside q, k, v of any dtype`, () => {
    const p = { ...make({}, [70, 0, 257]), targets: [5, 0, 40] }
    const dout = Float64Array.from({ length: (p.q.length / p.D) * p.V }, (_, i) => Math.sin(i))
    const { dtype } = single()
    const table = (from: Table | null) => from && { ...from, data: rounded(from.data, dtype) }
    const exact = { ...p, pos: table(p.pos), time: table(p.time) }
    const [narrow, wide] = ([dtype, 'float32'] as const).map(tables =>
      scope(() => run(exact, { ...single(), tables }, dout)),
    ) as [ReturnType<typeof run>, ReturnType<typeof run>]
    equalBits(wide.out, narrow.out, 'out')
    for (const i of [0, 1, 2]) equalBits(wide.grads[i]!, narrow.grads[i]!, `gradient ${i}`)
  })

  everywhere(`${name}: paged or jagged`, () => {
    for (const delta of [0, 8] as const) {
      const p = { ...make({ delta }, [70, 0, 257, 128]), targets: [5, 0, 40, 8] }
      const jagged = forward(p)
      for (const pageSize of [16, 64, 128, 100]) {
        equalBits(forward(p, { ...single(), pageSize, random: new Random(pageSize) }), jagged, `pages of ${pageSize}`)
      }
    }
  })

  itOp('hstu_attention', `${name}: any number of threads, and again`, () => {
    const p = { ...make({}, [70, 0, 257, 128, 600]), targets: [5, 0, 40, 8, 0] }
    const dout = Float64Array.from({ length: (p.q.length / p.D) * p.V }, (_, i) => Math.sin(i))
    const results = [1, 2, 3, 3].map(threads => {
      native.set_num_threads(threads)
      return scope(() => run(p, single(), dout))
    })
    native.set_num_threads(0)
    for (const { out, grads } of results.slice(1)) {
      equalBits(out, results[0]!.out, 'out')
      grads.forEach((gradient, i) => {
        equalBits(gradient, results[0]!.grads[i]!, `gradient ${i}`)
      })
    }
  })
}

everywhere('not deterministic: keys of few rows in several parts, the same ones each time', () => {
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  const bias = { pos: 'shared', time: 'per head' } as const
  const shapes: [Partial<Choice>, number[], number?][] = [
    [{ D: 128, V: 128, H: 2, delta: 8 }, [2600, 0, 900, 40]],
    [{ D: 128, V: 128, delta: 160, targets: 'mixed', g: 2, contextual: 'some', ...bias }, [0, 1700, 1], 64],
    [{ D: 128, V: 64, targets: 'some', ...bias }, [700, 70]],
    [{ D: 64, V: 32, delta: 8, targets: 'some', time: 'shared' }, [3000], 128],
    [{ D: 64, V: 64, full: true, contextual: 'some', targets: 'some' }, [800, 5]],
    [{ D: 256, V: 256, delta: 160, W: 64, F: 5, contextual: 'some', targets: 'one' }, [1500, 0], 64],
    [{ D: 256, V: 128, delta: 8, causal: false, pos: 'shared' }, [2000, 1, 65]],
  ]
  for (const [n, [choice, lengths, pageSize]] of shapes.entries()) {
    const c: Choice = { ...plain, ...choice, alpha: 'root', dtype }
    const p = problemOf(c, lengths, new Random(`not deterministic ${n}`))
    const how = (): How => ({
      ...{ dtype, rowScales: n % 2 === 0, deterministic: false },
      ...(pageSize ? { pageSize, random: new Random(n) } : {}),
    })
    checkProblem(p, how(), `shape ${n}`)
    equalBits(forward(p, how()), forward(p, how()), `shape ${n} again`)
    if (device === 'cpu') equalBits(forward(p, how()), forward(p, { ...how(), deterministic: true }), `shape ${n}`)
  }
})

everywhere('every bucket edge, up to differences of 63 bits', () => {
  // v = 1 and q = 0: the output is silu of the bucket's own entry.
  const edges = thresholds.filter(t => t < 1n << 52n).flatMap(t => [t - 1n, t, t + 1n])
  const far = range(53, 63).flatMap(bits => [1n << BigInt(bits), (3n << BigInt(bits)) / 2n])
  const times = BigInt64Array.from([0n, 1n, ...edges, ...far])
  scope(() => {
    const L = times.length
    const out = hstuAttention(
      Tensor.zeros([1, 1, 1]),
      Tensor.zeros([L, 1, 1]),
      Tensor.from(new Float32Array(L).fill(1), [L, 1, 1]),
      {
        seqOffsets: Tensor.from(BigInt64Array.of(0n, BigInt(L))),
        qOffsets: Tensor.from(BigInt64Array.of(0n, 1n)),
        maxSeqLen: L,
        scale: 1,
        queryTime: Tensor.from(BigInt64Array.of(0n)),
        keyTime: Tensor.from(times),
        timeW: Tensor.from(
          Float32Array.from({ length: 201 }, (_, i) => 20 + i),
          [1, 201],
        ),
      },
    )
    const want = sum(Array.from(times, t => 20 + bucketOf(t, 0n)))
    ok(Math.abs(out.item() - want) < 0.5, `sum of buckets is ${out.item()}, expected ${want}`)
  })
})

everywhere('gradients where P and the cotangent are large or small, in float16 too', () => {
  const dtype = device === 'cpu' ? 'float32' : 'float16'
  const scaled = (data: Float64Array, factor: number) => data.map(x => factor * x)
  for (const [softmax, bias] of [false, true].flatMap(x => (['shared', 'none'] as const).map(y => [x, y] as const))) {
    const choice: Choice = { ...plain, D: 64, V: 64, H: 2, pos: bias, time: bias, targets: 'some', softmax }
    const p = problemOf({ ...choice, alpha: 'root', dtype }, [130, 70], new Random('range'))
    const how: How = { dtype, rowScales: false, tables: 'float32' } // whose gradients pass the range of float16
    const [wideQ, wideK] = [scaled(p.q, 32), scaled(p.k, 32)] // and alpha so much smaller: dq and dk stay in range, dS does not
    const large = { ...p, q: wideQ, k: wideK, v: scaled(p.v, 32), alpha: p.alpha / 1024 }
    checkProblem(large, how, 'large dout v', 2048)
    const [q, k, v] = [p.q, p.k, p.v].map(x => scaled(x, 2 ** -12)) as [Float64Array, Float64Array, Float64Array]
    const scales = p.scales.map(() => 1)
    checkProblem({ ...p, q, k, v, scales, alpha: 2 ** 24 * p.alpha }, how, 'small dout v', 2 ** -12)
    const tiny = { ...p, v: scaled(p.v, 2 ** 20), scales: p.scales.map(() => 2 ** -128) }
    checkProblem(tiny, { dtype: 'float32', rowScales: true }, 'tiny scales', 2 ** 20)
  }
})

everywhere('alpha 0, or next to nothing: the bias alone', () => {
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  for (const [alpha, softmax] of [0, 1e-30].flatMap(x => [false, true].map(y => [x, y] as const))) {
    const choice: Choice = {
      ...plain,
      D: 64,
      V: 64,
      H: 2,
      pos: 'shared',
      time: 'per head',
      targets: 'some',
      softmax,
      dtype,
    }
    const p = problemOf(choice, [130, 70], new Random('alpha'))
    checkProblem({ ...p, alpha }, { dtype, rowScales: false }, `alpha ${alpha}`)
  }
})

everywhere('no bias, in each head dim and 16-bit type: kernels of their own', () => {
  const dtypes: FloatName[] = device === 'cpu' ? ['float32'] : ['bfloat16', 'float16']
  const shapes: Partial<Choice>[] = [
    { causal: false },
    { W: 64, F: 5, contextual: 'some', g: 2 },
    { full: true, contextual: 'mixed', W: 7 },
  ]
  for (const [n, D] of ([32, 64, 128, 256] as const).entries())
    for (const [dtype, softmax] of dtypes.flatMap(x => [false, true].map(y => [x, y] as const))) {
      const choice: Choice = { ...plain, D, V: D === 32 ? 16 : D, H: 2, targets: 'mixed', ...shapes[n % 3], softmax }
      const p = problemOf({ ...choice, alpha: 'root', dtype }, [1, 65, 257, 130], new Random(`no bias ${D}`))
      checkProblem(p, { dtype, rowScales: n % 2 === 0 }, `${dtype} D ${D}${softmax ? ' softmax' : ''}`)
    }
})

everywhere('a bias table too large for sums of its own for every tile of keys', () => {
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  const p = problemOf({ ...plain, H: 4, V: 16, dtype }, Array<number>(20).fill(10), new Random('tables'))
  const cols = 2 ** 20
  const data = rounded(
    Float64Array.from({ length: 4 * cols }, (_, x) => Math.sin(x)),
    dtype,
  )
  checkProblem({ ...p, pos: { rows: 4, cols, data } }, { dtype, rowScales: false }, 'P = 2^20')
})

everywhere('geometry out of range: an error, or on CUDA without HSTU_DEBUG=1 limited', () => {
  scope(() => {
    const rows = Float64Array.from({ length: 12 * 2 * 16 }, (_, i) => Math.sin(i))
    const [q, k, v] = [1, 2, 3].map(n =>
      float(
        rounded(
          rows.map(x => n * x),
          'float32',
        ),
        [12, 2, 16],
        'float32',
      ),
    ) as [Tensor, Tensor, Tensor]
    const attend = (options: Partial<HstuAttentionOptions>) => {
      let out: Float64Array = new Float64Array()
      const { grads } = valueAndGrad([q, k, v], () => {
        const base = { seqOffsets: starts([5, 7]), maxSeqLen: 7, scale: 1, targetGroupSize: 3 }
        const y = hstuAttention(q, k, v, { ...base, ...options })
        out = decoded(y)
        return record('cotangent', Tensor.zeros([1], { device }), [y], () => [float(rows, [12, 2, 16], 'float32')])
      })
      return [out, ...(grads as Tensor[]).map(decoded)]
    }
    const targets = (...counts: number[]) => ({ numTargets: tensor(Int32Array.from(counts)) })
    const cases: [Partial<HstuAttentionOptions>, RegExp, Partial<HstuAttentionOptions>, number][] = [
      [targets(9, 2), /sequence 0 has 9 targets but 5 keys/, targets(5, 2), 12],
      [targets(-1, 2), /sequence 0 has -1 targets but 5 keys/, targets(0, 2), 12],
      [{ maxSeqLen: 6 }, /sequence 1 has 7 keys, max_seq_len is 6/, {}, 5],
      [{ qOffsets: starts([6, 6]) }, /sequence 0 has 6 queries but only 5 keys/, {}, 5],
    ]
    for (const [wrong, message, limited, alike] of cases) {
      if (device === 'cpu' || process.env.HSTU_DEBUG === '1') {
        throwsCode(() => attend(wrong), 'ERR_HSTU_INVALID_ARGUMENT', message)
        continue
      }
      const [got, want] = [attend(wrong), attend(limited)]
      const count = alike * 2 * 16
      got.forEach((values, i) => {
        equalBits(values.subarray(0, count), want[i]!.subarray(0, count), `${message} ${i}`)
      })
    }
  })
})

// ---- Errors -----------------------------------------------------------------------------------------------------------------

const call = (options: Partial<HstuAttentionOptions>, L = 3) =>
  hstuAttention(Tensor.zeros([L, 2, 4]), Tensor.zeros([L, 2, 4]), Tensor.zeros([L, 2, 5]), {
    seqOffsets: Tensor.from(BigInt64Array.of(0n, BigInt(L))),
    maxSeqLen: L,
    scale: 1,
    ...options,
  })

itOp('hstu_attention', 'errors name the argument', () => {
  const invalid = 'ERR_HSTU_INVALID_ARGUMENT'
  throwsCode(() => call({ numTargets: Tensor.from(Int32Array.of(4)) }), invalid, /sequence 0 has 4 targets but 3 keys/)
  throwsCode(() => call({ maxSeqLen: 2 }), invalid, /sequence 0 has 3 keys, max_seq_len is 2/)
  throwsCode(() => call({ scale: undefined as unknown as number }), invalid, /scale is required for silu/)
  throwsCode(() => call({ dropout: 0.5 }), invalid, /dropout 0.5/)
  throwsCode(() => call({ targetGroupSize: 0 }), invalid, /targetGroupSize 0 is no count/)
  throwsCode(() => call({ timeW: Tensor.zeros([1, 5]) }), invalid, /timeW needs queryTime and keyTime/)
  throwsCode(
    () => call({ posW: Tensor.zeros([3, 5]) }),
    invalid,
    /posW must have shape \[1 or 2, at least 1\], got \[3, 5\]/,
  )
  throwsCode(
    () => call({ numTargets: Tensor.zeros([2], { dtype: 'int32' }) }),
    'ERR_HSTU_SHAPE',
    /numTargets .*int32\[2\]/,
  )
  throwsCode(() => call({ numTargets: Tensor.zeros([1]) }), 'ERR_HSTU_DTYPE', /numTargets must be int32/)
  const [q, k] = [Tensor.zeros([3, 2, 4]), Tensor.zeros([3, 1, 4])]
  const options = { seqOffsets: Tensor.zeros([2], { dtype: 'int64' }), maxSeqLen: 3, scale: 1 }
  throwsCode(() => hstuAttention(q, k, k, options), 'ERR_HSTU_SHAPE', /hstu_attention: k .*H=2.*float32\[3, 1, 4\]/)
  for (const tensor of [q, k, options.seqOffsets]) tensor.dispose()
})

itOp('hstu_attention', 'a cache takes no gradient, and its page table is checked', () => {
  const cache = (page: number) => ({
    pages: Tensor.zeros([2, 2, 4, 2, 5]),
    pageTable: Tensor.from(Int32Array.of(page)),
    pageOffsets: Tensor.from(BigInt64Array.of(0n, 1n)),
    kvLengths: Tensor.from(Int32Array.of(3)),
  })
  throwsCode(() => call({ paged: cache(2), maxSeqLen: 9 }), 'ERR_HSTU_INVALID_ARGUMENT', /page 2 of 2/)
  const w = Tensor.zeros([1, 4])
  const tracked = () => valueAndGrad([w], () => call({ paged: cache(1), maxSeqLen: 9, posW: w }))
  throwsCode(tracked, 'ERR_HSTU_INVALID_ARGUMENT', /paged history takes no gradient/)
  w.dispose()
})
