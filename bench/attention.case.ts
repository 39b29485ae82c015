import { hstuAttention } from '#lib/ops/hstu_attention.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { noise } from './ceilings.js'
import { benchCase, lognormalTimes, type Measured, type Row, type Run, rowOf, timePair } from './harness.js'

const H = 4
const kTokens = 131072

interface Case {
  case: string
  D: number
  N: number
  B: number
  H: number
  dtype: string
}

const full = (D: number) =>
  [512, 1024, 2048, 4096, 8192].map(N => ({ case: 'attention.full', D, N, B: kTokens / N, H, dtype: 'bf16' }))
const jagged = (D: number) =>
  [1024, 2048, 4096, 8192].map(N => ({ case: 'attention.jagged', D, N, B: (2 * kTokens) / N, H, dtype: 'bf16' }))
const withBias = (D: number) =>
  [64, 32, 16, 4].map((B, i) => ({ case: 'attention.rab', D, N: 512 * 2 ** i, B, H, dtype: 'bf16' }))
const wide = full(256).filter(({ N }) => N === 1024 || N === 4096)
const cases: Case[] = [...[64, 128].flatMap(D => [...full(D), ...jagged(D), ...withBias(D)]), ...wide]

/** All N, or uniform in 1 .. N. */
function lengthsOf({ case: name, N, B }: Case): number[] {
  const random = new Random(0)
  return Array.from({ length: B }, () => (name === 'attention.jagged' ? 1 + random.int(N) : N))
}

const sum = (values: readonly number[]) => values.reduce((a, b) => a + b, 0)

/** With the bias from tables and times computed inside, and without; of some, softmax, which is what the peers of PyTorch compute. */
function rowsOf(c: Case, run: Run): Row[] {
  const { D, N, B } = c
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
  const times = lognormalTimes(tokens, device)
  const tables = { posW: noise(device, dtype, 4, 1, N), timeW: noise(device, dtype, 5, 1, 129) }
  const options = {
    seqOffsets: Tensor.from(BigInt64Array.from(offsets), [B + 1], { device }),
    numTargets: c.case === 'attention.jagged' ? Tensor.from(targets, [B], { device }) : null,
    ...{ maxSeqLen: N, alpha: D ** -0.5 },
  }
  const variants = [
    { bias: 'none', activation: 'silu', extra: { scale: 1 / N } },
    {
      bias: 'position and time',
      activation: 'silu',
      extra: { scale: 1 / N, ...tables, queryTime: times, keyTime: times },
    },
    { bias: 'none', activation: 'softmax', extra: { activation: 'softmax' as const } },
  ]
  return variants.flatMap(({ bias, activation, extra }) => {
    if (c.case === 'attention.rab' && bias === 'none') return []
    if (activation === 'softmax' && (c.case !== 'attention.full' || (N !== 1024 && N !== 4096))) return []
    const params = [q, k, v, ...('posW' in extra ? [extra.posW, extra.timeW] : [])]
    const seconds = timePair(c.case, () => [hstuAttention(q, k, v, { ...options, ...extra })], params, device)
    const flops = 2 * H * D * sum(lengths.map(length => length ** 2))
    const parts = seconds.map((seconds, i): Measured => {
      const work = i === 0 ? flops : 2.5 * flops
      return { seconds, work, limit: work / 1e9 / ceiling.tensorCores! }
    })
    const { dtype: _, ...shape } = c
    return [rowOf({ ...shape, tokens, bias, activation }, 'TFLOP/s', parts, run, c)]
  })
}

/**
 * Attention at the shapes of the published peers: 4 heads, bfloat16, D = V, about 131072 tokens, with the FLOPs that they count
 * (4 H D sum(L^2) / 2 forward, 2.5 times that backward). full: causal. jagged: lengths uniform in 1 .. N, 1 to 20 targets each.
 * rab: with the bias, at the shapes where a peer has one (as a matrix that it reads).
 */
benchCase('attention', {
  dtypes: ['bfloat16'],
  peerCases: cases
    .filter(c => c.case !== 'attention.rab')
    .map(c => (c.case === 'attention.jagged' ? { ...c, lengths: lengthsOf(c) } : c)),
  run: run => (run.device === 'cpu' ? [] : cases.flatMap(c => scope(() => rowsOf(c, run)))),
})
