import { add } from '../ops/add.js'
import { cast } from '../ops/cast.js'
import { embedding } from '../ops/embedding.js'
import { expand, segmentSum } from '../ops/expand.js'
import { linear } from '../ops/linear.js'
import { mul } from '../ops/mul.js'
import { swishLayerNorm } from '../ops/swish_layer_norm.js'
import type { Random } from '../random.js'
import { Tensor, type TensorOptions } from '../tensor.js'
import { ones, xavierNormal, zeros } from './init.js'

/** Every pair of a candidate and an event of its request's history, candidate by candidate: P of them. */
export interface CandidatePairs {
  /** int64 [P]: the pair's row among the T history rows. */
  historyIds: Tensor
  /** int64 [M + 1]: where each candidate's pairs begin. */
  offsets: Tensor
  /** P */
  count: number
}

/**
 * The pairs of B requests.
 * @param historyOffsets B + 1 values: where each request's history begins
 * @param candidateOffsets B + 1 values: where its candidates begin
 */
export function candidatePairs(
  historyOffsets: BigInt64Array,
  candidateOffsets: BigInt64Array,
  { device = 'cpu' }: TensorOptions = {},
): CandidatePairs {
  const [history, candidates] = [historyOffsets, candidateOffsets].map(x => Array.from(x, Number))
  const offsets = [0]
  for (let b = 0; b + 1 < candidates!.length; b++) {
    const length = history![b + 1]! - history![b]!
    for (let m = candidates![b]!; m < candidates![b + 1]!; m++) offsets.push(offsets[m]! + length)
  }
  const count = offsets.at(-1)!
  const ids = new BigInt64Array(count)
  let p = 0
  for (let b = 0; b + 1 < candidates!.length; b++)
    for (let m = candidates![b]!; m < candidates![b + 1]!; m++)
      for (let t = historyOffsets[b]!; t < historyOffsets[b + 1]!; t++) ids[p++] = t
  return {
    historyIds: Tensor.from(ids, [count], { device }),
    offsets: Tensor.from(BigInt64Array.from(offsets, BigInt), undefined, { device }),
    count,
  }
}

export interface TargetAttentionConfig {
  /** d, width of a candidate and of an event. */
  dim: number
  /** Widths of the unit's two hidden layers. Default [32, 16]. */
  hidden?: readonly [number, number]
  /** Factor of the sum; 1 over the usual history length keeps it near the size of one event. Default 1 (the paper's). */
  scale?: number
}

/**
 * DIN's target attention (Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018): each candidate q sums the
 * events k of its request's history by weights a(q, k) of a small network,
 *
 *     z = W_q q + W_k k + W_p (q * k) + b        as W [q, k, q - k, q * k], for q - k is a sum of the first two
 *     a = w_o silu(W_h (z sigmoid(LN(z))) + b_h) + b_o
 *     out = scale sum_k a(q, k) k                weights are not normalised: how much there is counts
 *
 * z sigmoid(LN(z)) stands for the paper's Dice, a gate at the data's own scale. W_q and W_k are applied before the pairs are made.
 */
export class TargetAttention {
  readonly parameters: Record<string, Tensor>

  constructor(
    readonly config: TargetAttentionConfig,
    random: Random,
    options: TensorOptions,
  ) {
    const { dim, hidden: [first, second] = [32, 16] } = config
    this.parameters = {
      query: xavierNormal(random, [dim, first], options),
      key: xavierNormal(random, [dim, first], options),
      product: xavierNormal(random, [dim, first], options),
      bias: zeros([first], options),
      normWeight: ones([first], options),
      normBias: zeros([first], options),
      hidden: xavierNormal(random, [first, second], options),
      hiddenBias: zeros([second], options),
      output: xavierNormal(random, [second, 1], options),
      outputBias: zeros([1], options),
    }
  }

  /**
   * @param candidates [M, d]
   * @param history [T, d]
   * @returns [M, d]; 0 where there is no history
   */
  forward(candidates: Tensor, history: Tensor, pairs: CandidatePairs): Tensor {
    const p = this.parameters
    const { offsets, historyIds, count: rows } = pairs
    const k = embedding(history, historyIds) // [P, d]
    const product = mul(expand(candidates, { offsets, rows }), k)
    const ofQuery = expand(linear(candidates, p.query!, { bias: p.bias! }), { offsets, rows })
    const ofKey = embedding(linear(history, p.key!), historyIds)
    const z = add(linear(product, p.product!, { residual: ofKey }), ofQuery)
    const gated = swishLayerNorm(z, { weight: p.normWeight!, bias: p.normBias! })
    const hidden = linear(gated, p.hidden!, { bias: p.hiddenBias!, activation: 'silu' })
    const weight = linear(hidden, p.output!, { bias: p.outputBias! }) // [P, 1]
    const { dim, scale = 1 } = this.config
    const factors = Tensor.from(new Float32Array(dim).fill(scale), [1, dim], { device: k.device })
    return segmentSum(mul(linear(weight, cast(factors, k.dtype)), k), offsets)
  }
}
