import { valueAndGrad } from '#lib/autograd.js'
import { hstuAttention } from '#lib/ops/hstu_attention.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { placed } from '../test/harness.js'
import { benchCase, benchDevice, headOf, round, timed } from './harness.js'

const H = 4
const TOKENS = 131072

/** N(0, 1) from a million draws, repeated: a gigabyte of fresh ones would take longer than the bench. */
function values(size: number, seed: number): Float64Array {
  const random = new Random(seed)
  const block = Float64Array.from({ length: 2 ** 20 - 3 }, () => random.normal())
  return Float64Array.from({ length: size }, (_, i) => block[i % block.length]!)
}

/**
 * The full causal cases of the published peers: B N = 131072 tokens, 4 heads, bfloat16, D = V, with the FLOPs that they count
 * (4 H D sum(L^2) / 2, backward 2.5 times that); lognormal gaps between times (median 600 s, sigma 2) for the bias.
 */
benchCase('hstu_attention_h200', (_, dtype) => {
  const device = benchDevice()
  if (device === 'cpu' || dtype !== 'bfloat16') return []
  return [64, 128].flatMap(D =>
    [1024, 4096].flatMap(N =>
      scope(() => {
        const B = TOKENS / N
        const random = new Random(0)
        const make = (seed: number) => placed(values(TOKENS * H * D, seed), [TOKENS, H, D], dtype, device)
        const [q, k, v, ones] = [make(1), make(2), make(3), make(4)] as const
        const offsets = BigInt64Array.from({ length: B + 1 }, (_, b) => BigInt(b * N))
        const seqOffsets = Tensor.from(offsets, [B + 1], { device })
        let time = 1_600_000_000
        const gaps = Array.from({ length: TOKENS }, () =>
          BigInt((time += Math.floor(600 * Math.exp(2 * random.normal())))),
        )
        const times = Tensor.from(BigInt64Array.from(gaps), [TOKENS], { device })
        const table = (cols: number) => placed(values(cols, 5), [1, cols], dtype, device)
        const biases = {
          none: {},
          'position and time': { posW: table(N), timeW: table(129), queryTime: times, keyTime: times },
        }
        return Object.entries(biases).map(([bias, options]) => {
          const run = () =>
            hstuAttention(q, k, v, { seqOffsets, maxSeqLen: N, scale: 1 / N, alpha: D ** -0.5, ...options })
          const forward = timed('forward', () => scope(() => void run()))
          const tables = 'posW' in options ? [options.posW, options.timeW] : []
          const step = () => scope(() => void valueAndGrad([q, k, v, ...tables], () => headOf([run()], [ones])))
          const backward = timed('both', step) - forward
          const flops = (4 * H * D * B * N * N) / 2
          const rate = (seconds: number, times: number) => round((times * flops) / seconds / 1e12)
          const hstu = [rate(forward, 1), rate(backward, 2.5)]
          const ms = [round(forward * 1e3), round(backward * 1e3)]
          return { case: 'full causal', D, N, B, H, bias, dtype, unit: 'TFLOP/s', ms, hstu }
        })
      }),
    ),
  )
})
