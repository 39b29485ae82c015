import { hstuAttention } from '#lib/ops/hstu_attention.js'
import { Random } from '#lib/random.js'
import { type Device, scope, Tensor } from '#lib/tensor.js'
import { noise } from './ceilings.js'
import { benchCase, lognormalSeconds, type Measured, type Row, type Run, rowOf, timePair } from './harness.js'

const H = 4
const kTokens = 131072

/** The case as a peer has it. */
interface Shape {
  case: string
  D: number
  N: number
  B: number
  H: number
  dtype: string
}

interface Case extends Shape {
  /** 1 to 20 a sequence. */
  targets?: boolean
  /** Of the biased call: gaps lognormal, all equal, or the lognormal ones shuffled within each sequence. */
  times?: 'lognormal' | 'equal' | 'unsorted'
  /** Of the backward; default true. */
  deterministic?: false
  /** Default silu. */
  activation?: 'softmax'
}

const full = (D: number, N: number): Case => ({ case: 'attention.full', D, N, B: kTokens / N, H, dtype: 'bf16' })
const jagged = (D: number): Case[] =>
  [1024, 2048, 4096, 8192].map(N => ({ ...full(D, N), case: 'attention.jagged', B: (2 * kTokens) / N, targets: true }))
const withBias = (D: number): Case[] =>
  [64, 32, 16, 4].map((B, i) => ({ ...full(D, 512 * 2 ** i), case: 'attention.rab', B }))
/** Compared with the plain rows of the same run. */
const variants = (D: number, N: number): Case[] => [
  { ...full(D, N), targets: true },
  { ...full(D, N), deterministic: false },
  { ...full(D, N), times: 'equal' },
  { ...full(D, N), times: 'unsorted' },
]
const cases: Case[] = [
  ...[64, 128].flatMap(D => [
    ...[256, 512, 1024, 2048, 4096, 8192].map(N => full(D, N)),
    ...[1024, 4096, 8192].flatMap(N => variants(D, N)),
    ...[1024, 4096].map((N): Case => ({ ...full(D, N), activation: 'softmax' })),
    ...jagged(D),
    ...withBias(D),
  ]),
  ...[1024, 4096].map(N => full(256, N)),
]

/** All N, or uniform in 1 .. N. */
function lengthsOf({ case: name, N, B }: Case): number[] {
  const random = new Random(0)
  return Array.from({ length: B }, () => (name === 'attention.jagged' ? 1 + random.int(N) : N))
}

const sum = (values: readonly number[]) => values.reduce((a, b) => a + b, 0)

/** int64 [tokens], on the device. */
function timesOf({ times = 'lognormal' }: Case, lengths: readonly number[], device: Device): Tensor {
  const data = lognormalSeconds(sum(lengths))
  const random = new Random(3)
  let start = 0
  for (const length of lengths) {
    const part = data.subarray(start, (start += length))
    if (times === 'equal') part.fill(part[0]!)
    if (times === 'unsorted') random.shuffle(part)
  }
  return Tensor.from(data, [data.length], { device })
}

/** With the bias from tables and times computed inside, and without. */
function rowsOf(c: Case, run: Run): Row[] {
  const { case: name, D, N, B, H, dtype: _, targets: withTargets = false, ...variant } = c
  const shape: Shape = { case: name, D, N, B, H, dtype: 'bf16' }
  const { device, dtype, ceiling } = run
  const lengths = lengthsOf(c)
  const tokens = sum(lengths)
  const random = new Random(2)
  const targets = Int32Array.from(lengths, length => Math.min(length, 1 + random.int(20)))
  const [q, k, v] = [
    noise(device, dtype, 1, tokens, H, D),
    noise(device, dtype, 2, tokens, H, D),
    noise(device, dtype, 3, tokens, H, D),
  ]
  const offsets = [0n]
  for (const length of lengths) offsets.push(offsets.at(-1)! + BigInt(length))
  const times = timesOf(c, lengths, device)
  const tables = { posW: noise(device, dtype, 4, 1, N), timeW: noise(device, dtype, 5, 1, 129) }
  const options = {
    seqOffsets: Tensor.from(BigInt64Array.from(offsets), [B + 1], { device }),
    numTargets: withTargets ? Tensor.from(targets, [B], { device }) : null,
    ...{ maxSeqLen: N, alpha: D ** -0.5, deterministic: c.deterministic ?? true },
    ...(c.activation ? { activation: c.activation } : { scale: 1 / N }),
  }
  const biases = {
    none: {},
    'position and time': { ...tables, queryTime: times, keyTime: times },
  }
  return Object.entries(biases).flatMap(([bias, extra]) => {
    if (bias === 'none' ? name === 'attention.rab' || c.times : c.activation) return []
    const params = [q, k, v, ...('posW' in extra ? [extra.posW, extra.timeW] : [])]
    const seconds = timePair(c.case, () => [hstuAttention(q, k, v, { ...options, ...extra })], params, device)
    const flops = 2 * H * D * sum(lengths.map(length => length ** 2))
    const parts = seconds.map((seconds, i): Measured => {
      const work = i === 0 ? flops : 2.5 * flops
      return { seconds, work, limit: work / 1e9 / ceiling.tensorCores! }
    })
    const told = { ...(withTargets ? { targets: '1 to 20' } : {}), ...variant }
    return [rowOf({ ...shape, ...told, tokens, bias }, 'TFLOP/s', parts, run, shape)]
  })
}

/**
 * Attention at the shapes of the published peers: 4 heads, bfloat16, D = V, about 131072 tokens, with the FLOPs that they count
 * (4 H D sum(L^2) / 2 forward, 2.5 times that backward). full: causal; also with 1 to 20 targets a sequence, with a backward that is not
 * deterministic, with equal and unsorted times, and softmax, which is what those of PyTorch compute. jagged: lengths uniform in 1 .. N, 1 to 20 targets each. rab: with the bias, at the
 * shapes where a peer has one (as a matrix that it reads).
 */
benchCase('attention', {
  dtypes: ['bfloat16'],
  peerCases: cases
    .filter(c => c.case === 'attention.jagged' || (c.case === 'attention.full' && Object.keys(c).length === 6))
    .map(c => (c.case === 'attention.jagged' ? { ...c, lengths: lengthsOf(c) } : c)),
  run: run => (run.device === 'cpu' ? [] : cases.flatMap(c => scope(() => rowsOf(c, run)))),
})
