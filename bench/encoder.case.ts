import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { StochasticLength } from '#lib/data/stochastic_length.js'
import { HstuLayer } from '#lib/layers/hstu_layer.js'
import { packageRoot } from '#lib/native.js'
import { Random } from '#lib/random.js'
import { scope, Tensor } from '#lib/tensor.js'
import { noise } from './ceilings.js'
import { benchCase, lognormalTimes, type Row, type Run, round, shareOf, timePair } from './harness.js'
import { peersIn, publishedPeers } from './peers.js'
import type { Value } from './report.js'

const shape = { layers: 4, d: 512, H: 8, D: 64 }
const kTokens = 65536
const [kDraws, kBiasDraws] = [50, 10]
const ALPHA = 1.6

/** By N: normal(3600, 1400) clipped to 64 .. N, the draws that the published peer was measured on. */
const rawLengths = JSON.parse(readFileSync(join(packageRoot, 'bench/peers/encoder_lengths.json'), 'utf8')) as Record<
  string,
  number[]
>
/** What the peers' script measures: compiling takes it most of a minute, so one N. */
const peerCase = (N: number) => ({ case: 'encoder', N, layers: shape.layers, d: shape.d, H: shape.H })
const PEER_N = 8192

/** Seconds of the forward, and of the forward and the backward (gradients of all parameters and of the input) of four layers. */
function secondsOf(lengths: readonly number[], N: number, bias: boolean, { device, dtype }: Run): [number, number] {
  return scope(() => {
    const { layers, d, H, D } = shape
    const config = {
      ...{ dim: d, heads: H, qkDim: D, vDim: D, paddedLength: N, linearDropout: 0, alpha: D ** -0.5 },
      ...{ positionBias: bias, timeBias: bias },
    }
    const random = new Random(0)
    const stack = Array.from({ length: layers }, () => new HstuLayer(config, random, { device }))
    const offsets = [0n]
    for (const length of lengths) offsets.push(offsets.at(-1)! + BigInt(length))
    const tokens = Number(offsets.at(-1)!)
    const times = bias ? lognormalTimes(tokens, device) : null
    const inputs = {
      ...{ seqOffsets: Tensor.from(BigInt64Array.from(offsets), [lengths.length + 1], { device }) },
      ...{ times, queryTimes: times, maxSeqLen: Math.max(...lengths) },
    }
    const x = noise(device, dtype, 1, tokens, d)
    const encode = () => [stack.reduce((y, layer) => layer.forward(y, inputs, null), x)]
    const params = [x, ...stack.flatMap(layer => Object.values(layer.parameters))]
    const [forward, backward] = timePair('encoder', encode, params, device) as [number, number]
    return [forward, forward + backward]
  })
}

interface Form {
  lengths: string
  batches: number[][]
  peers: readonly string[]
}

function formsOf(N: number, B: number): Form[] {
  const raw = rawLengths[N]!
  const random = new Random(4)
  const stochastic = new StochasticLength(ALPHA, N)
  const draw = () => raw.map(n => (random.float() < stochastic.wholeProbability(n) ? n : Math.min(n, stochastic.bound)))
  return [
    { lengths: 'full', batches: [Array<number>(B).fill(N)], peers: ['transformer_fa2', 'hstu_pytorch_full'] },
    { lengths: 'raw', batches: [raw], peers: ['transformer_fa2', 'transformer_fa2_unpadded', 'hstu_pytorch_raw'] },
    {
      lengths: `stochastic ${ALPHA}`,
      batches: Array.from({ length: N === 8192 ? kDraws : 4 }, draw),
      peers: ['transformer_fa2', 'transformer_fa2_unpadded', 'hstu_pytorch_sl16'],
    },
  ]
}

const mean = (values: readonly number[]) => values.reduce((a, b) => a + b, 0) / values.length

function rowsOf(N: number, run: Run): Row[] {
  const B = kTokens / N
  const own = N === PEER_N ? peersIn(run.peers, peerCase(N)) : {}
  const published = publishedPeers({ case: 'encoder', N })
  return formsOf(N, B).flatMap(({ lengths, batches, peers }) =>
    [false, true]
      .filter(bias => run.options.only.test(`N ${N} ${lengths}${bias ? ' bias' : ''}`))
      .map(bias => {
        const seconds = batches.slice(0, bias ? kBiasDraws : kDraws).map(batch => secondsOf(batch, N, bias, run))
        const ms = [0, 1].map(i => round(1e3 * mean(seconds.map(pair => pair[i]!))))
        const pairsOf = (rows: Record<string, Value>) =>
          Object.fromEntries(
            Object.entries(rows)
              .filter(([name]) => peers.includes(name))
              .map(([name, value]) => [name, (value as number[]).slice(0, 2)]),
          )
        const [measured, theirs] = [pairsOf(own), pairsOf(published)]
        const all = Object.entries({ ...theirs, ...measured })
        const share = Object.fromEntries(all.map(([name, value]) => [name, shareOf(ms, value, 'ms')]))
        return {
          ...{ case: 'encoder', lengths, draws: seconds.length, ...shape, N, B, dtype: 'bf16', unit: 'ms' },
          ...{ tokens: Math.round(mean(batches.map(batch => batch.reduce((a, b) => a + b, 0)))) },
          ...{ bias: bias ? 'position and time' : 'none', ms, hstu: ms },
          ...(lengths === 'raw' ? { sequences: batches[0] as Value } : {}),
          ...measured,
          ...{ published: theirs, share: share as Record<string, Value> },
        } as Row
      }),
  )
}

/**
 * Four HSTU layers at the shapes of the published encoders, bfloat16 with float32 masters: ms of a forward | of a forward and backward.
 * full: B sequences of N. raw: lengths normal(3600, 1400). stochastic: those after Stochastic Length 1.6, the mean of draws. The peers
 * are a Transformer on FlashAttention-2, padded to N and (N 8192, measured in the same run) on the raw lengths as they are, and HSTU in
 * PyTorch around FBGEMM's kernel, which has no bias.
 */
benchCase('encoder', {
  dtypes: ['bfloat16'],
  peerCases: [{ ...peerCase(PEER_N), lengths: rawLengths[PEER_N]! }],
  run: run => (run.device === 'cpu' ? [] : [1024, 2048, 4096, 8192].flatMap(N => rowsOf(N, run))),
})
