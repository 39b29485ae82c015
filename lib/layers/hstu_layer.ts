import { castAll } from '../ops/cast.js'
import { takeRows } from '../ops/embedding.js'
import { type HstuAttentionOptions, hstuAttention } from '../ops/hstu_attention.js'
import { layerNorm } from '../ops/layer_norm.js'
import { linear } from '../ops/linear.js'
import { normGateLinear } from '../ops/norm_gate_linear.js'
import { normLinearSilu } from '../ops/norm_linear_silu.js'
import type { Random } from '../random.js'
import { type Dtype, dtypeBytes, Tensor, type TensorOptions } from '../tensor.js'
import { normal, ones, uniform, xavierUniform, zeros } from './init.js'
import type { Noise, TokenInputs } from './inputs.js'

export interface HstuLayerConfig {
  /** d, model width. */
  dim: number
  heads: number
  /** D, head dim of q and k. */
  qkDim: number
  /** V, head dim of u and v. */
  vDim: number
  /** N, the model's padded length: scale = 1/N and the rows of the position table. A constant of the model, never of the batch. */
  paddedLength: number
  /** Dropout on the input of the output projection. */
  linearDropout: number
  /** Relative bias from positions, from times. Default both. */
  positionBias?: boolean
  timeBias?: boolean
  /** Rows of the time table less one, NB. Default 128. */
  timeBuckets?: number
  /** 'silu' (HSTU) or 'softmax' (the ablation). */
  activation?: 'silu' | 'softmax'
  /** Default 1 for silu (the paper), 1 / sqrt(D) for softmax. */
  alpha?: number
  /** Industrial form: affine norms, a bias on the first projection. Default false. */
  affine?: boolean
  /** SiLU on u, v, q and k (default) or on u alone. */
  siluAll?: boolean
  /** The output projection reads [u, o, u LN(o)]. Default false. */
  concat?: boolean
  /** Contextual tokens see the whole history. Default false. */
  contextualFull?: boolean
}

/** A layer's keys and values of earlier tokens, and where those of new ones go. Inference alone. */
export interface CachedHistory {
  /** What `hstuAttention` reads; null where there are no earlier tokens. `times` of the inputs are then those of all keys. */
  paged: NonNullable<HstuAttentionOptions['paged']> | null
  /** Called once with those of the tokens at hand, [T, H, D] and [T, H, V]; the layer does not read where they go. */
  append(k: Tensor, v: Tensor): void
}

/** The last rows of each sequence. */
export interface AskedRows {
  /** int64 [R]: row among the tokens at hand */
  rows: Tensor
  /** int64 [B + 1]: where each sequence's begin */
  offsets: Tensor
  /** int64 [R] */
  queryTimes: Tensor | null
}

/** Columns of x [rows, n] or [n], by way of the host. */
function columnsOf(x: Tensor, first: number, width: number): Tensor {
  const [rows, n] = [x.size / x.shape.at(-1)!, x.shape.at(-1)!]
  const all = x.dataSync()
  const data = all.slice(0, rows * width)
  for (let r = 0; r < rows; r++) data.set(all.subarray(r * n + first, r * n + first + width) as never, r * width)
  return Tensor.from(data, [...x.shape.slice(0, -1), width], x)
}

/**
 * One HSTU layer (Zhai et al. 2024, eq. 1-3), on jagged sequences:
 *
 *     u, v, q, k = SiLU(LN(x) W)
 *     o = SiLU(alpha q k^T + rab^{p,t}) v / N          causal
 *     y = x + W_o dropout(u * LN(o)) + b_o
 */
export class HstuLayer {
  readonly parameters: Record<string, Tensor>

  constructor(
    readonly config: HstuLayerConfig,
    random: Random,
    options: TensorOptions,
  ) {
    const { dim, heads, qkDim, vDim, paddedLength, timeBuckets = 128, affine = false, concat = false } = config
    const width = heads * vDim
    const inner = (concat ? 3 : 1) * width
    const columns = 2 * heads * (vDim + qkDim)
    this.parameters = {
      uvqk: normal(random, [dim, columns], 0.02, options),
      output: xavierUniform(random, [inner, dim], options),
      outputBias: uniform(random, [dim], 1 / Math.sqrt(inner), options),
    }
    if (config.positionBias ?? true) this.parameters.positionBias = normal(random, [1, paddedLength], 0.02, options)
    if (config.timeBias ?? true) this.parameters.timeBias = normal(random, [1, timeBuckets + 1], 0.02, options)
    if (affine) {
      this.parameters.uvqkBias = zeros([columns], options)
      this.parameters.inputNormWeight = ones([dim], options)
      this.parameters.inputNormBias = zeros([dim], options)
      this.parameters.outputNormWeight = ones([width], options)
      this.parameters.outputNormBias = zeros([width], options)
    }
  }

  /** The parameters in the dtype of an input; beside 16-bit scores the bias tables stay float32. */
  weights(dtype: Dtype): Record<string, Tensor> {
    const { positionBias: _, timeBias: __, ...dense } = this.parameters
    return dtypeBytes[dtype] < 4 ? { ...this.parameters, ...castAll(dense, dtype) } : castAll(this.parameters, dtype)
  }

  /**
   * @param x [T, d]; the parameters are taken in its dtype
   * @returns [T, d]
   */
  forward(x: Tensor, inputs: TokenInputs, noise: Noise): Tensor {
    const p = this.weights(x.dtype)
    const { u, v, q, k } = this.#project(x, p)
    const o = hstuAttention(q, k, v, this.#attention(p, inputs, inputs.queryTimes))
    return this.#close(x, u, o, p, noise)
  }

  /**
   * Inference over what is cached: keys and values of all rows of x are given to `cached`, the output is made of the rows asked alone.
   * @param x [T, d]
   * @param p of {@link weights}
   * @param asked default all rows
   * @param deterministic see {@link HstuAttentionOptions.deterministic}
   * @returns [T, d], or [R, d] of the R rows asked
   */
  resume(
    x: Tensor,
    inputs: TokenInputs,
    p: Record<string, Tensor>,
    cached: CachedHistory,
    asked: AskedRows | null,
    deterministic = true,
  ) {
    const { of, u, v, q, k } = asked ? this.#projectAsked(x, p, asked) : { of: x, ...this.#project(x, p) }
    cached.append(k, v)
    const o = hstuAttention(q, k, v, {
      ...this.#attention(p, inputs, asked ? asked.queryTimes : inputs.queryTimes),
      ...(asked ? { qOffsets: asked.offsets } : {}),
      ...(cached.paged ? { paged: cached.paged } : {}),
      deterministic,
    })
    return this.#close(of, u, o, p, null)
  }

  /** k and v of all rows; of those asked u, q and x itself. Where these are few, nothing else is computed. */
  #projectAsked(x: Tensor, p: Record<string, Tensor>, { rows }: AskedRows) {
    const { heads, siluAll = true } = this.config
    if (!p.uvqk_u || 2 * rows.size > x.shape[0]!) {
      const all = this.#project(x, p)
      const [u, q, of] = takeRows([all.u, all.q, x], rows)
      return { of, u, v: all.v, q, k: all.k }
    }
    const { inputNormWeight: weight = null, inputNormBias: bias = null } = p
    const norm = layerNorm(x, { weight, bias })
    const [few, asked] = takeRows([norm, x], rows)
    const part = (name: 'u' | 'v' | 'q' | 'k', of: Tensor) => {
      const w = p[`uvqk_${name}`]!
      const activation = siluAll || name === 'u' ? 'silu' : 'none'
      const y = linear(of, w, { bias: p[`uvqkBias_${name}`] ?? null, activation })
      return y.view([of.shape[0]!, heads, w.shape[1]! / heads])
    }
    return { of: asked, u: part('u', few), v: part('v', norm), q: part('q', few), k: part('k', norm) }
  }

  /**
   * The columns of the first projection by what they make, for rows of which not all is wanted; none where they are not whole vectors, and a
   * product of some of them might take another kernel than that of all.
   * @param p of {@link weights}
   */
  splitWeights(p: Record<string, Tensor>): Record<string, Tensor> {
    const { heads, vDim, qkDim } = this.config
    const widths = { u: heads * vDim, v: heads * vDim, q: heads * qkDim, k: heads * qkDim }
    const parts: Record<string, Tensor> = {}
    if (widths.v % 8 !== 0 || widths.k % 8 !== 0) return parts
    let column = 0
    for (const [name, width] of Object.entries(widths)) {
      for (const of of ['uvqk', 'uvqkBias'] as const)
        if (p[of]) parts[`${of}_${name}`] = columnsOf(p[of], column, width)
      column += width
    }
    return parts
  }

  #project(x: Tensor, p: Record<string, Tensor>) {
    const { heads, qkDim, vDim, siluAll = true } = this.config
    return normLinearSilu(x, p.uvqk!, {
      ...{ heads, qkDim, vDim, siluAll, bias: p.uvqkBias ?? null },
      ...{ normWeight: p.inputNormWeight ?? null, normBias: p.inputNormBias ?? null },
    })
  }

  #attention(p: Record<string, Tensor>, inputs: TokenInputs, queryTime: Tensor | null): HstuAttentionOptions {
    const { qkDim, paddedLength, activation = 'silu', contextualFull = false } = this.config
    const { positionBias: posW, timeBias: timeW } = p
    return {
      ...{ seqOffsets: inputs.seqOffsets, maxSeqLen: inputs.maxSeqLen, activation, contextualFull },
      alpha: this.config.alpha ?? (activation === 'silu' ? 1 : 1 / Math.sqrt(qkDim)),
      scale: 1 / paddedLength,
      ...{ numTargets: inputs.numTargets ?? null, contextual: inputs.contextual ?? 0 },
      ...(posW ? { posW } : {}),
      ...(timeW && inputs.times && queryTime ? { timeW, queryTime, keyTime: inputs.times } : {}),
    }
  }

  #close(x: Tensor, u: Tensor, o: Tensor, p: Record<string, Tensor>, noise: Noise): Tensor {
    const { heads, vDim, concat = false } = this.config
    const dropout = noise ? this.config.linearDropout : 0
    return normGateLinear(x, u, o, p.output!, {
      ...{ bias: p.outputBias!, concat, dropout },
      ...{ normWeight: p.outputNormWeight ?? null, normBias: p.outputNormBias ?? null },
      ...(noise && dropout > 0 ? { position: noise.draw(x.shape[0]! * (concat ? 3 : 1) * heads * vDim) } : {}),
    })
  }
}
