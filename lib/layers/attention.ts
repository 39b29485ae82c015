import { reshape } from '../autograd.js'
import { castAll } from '../ops/cast.js'
import { hstuAttention } from '../ops/hstu_attention.js'
import { linear } from '../ops/linear.js'
import type { Random } from '../random.js'
import type { Tensor, TensorOptions } from '../tensor.js'
import { xavierNormal, zeros } from './init.js'
import type { Noise, SequenceInputs } from './inputs.js'

/** Causal multi-head softmax attention on jagged sequences (Vaswani et al. 2017), with biases and dropout on the probabilities. */
export class MultiHeadAttention {
  readonly parameters: Record<string, Tensor>

  constructor(
    readonly config: { dim: number; heads: number; dropout: number },
    random: Random,
    options: TensorOptions,
  ) {
    const { dim } = config
    this.parameters = {}
    for (const name of ['query', 'key', 'value', 'output']) {
      this.parameters[name] = xavierNormal(random, [dim, dim], options)
      this.parameters[`${name}Bias`] = zeros([dim], options)
    }
  }

  /**
   * @param query [T, d] what the queries are made from; the parameters are taken in the dtype of all three
   * @param x [T, d] what keys and values are made from
   * @param residual [T, d] added to the result
   */
  forward(query: Tensor, x: Tensor, residual: Tensor, inputs: SequenceInputs, noise: Noise): Tensor {
    const { dim, heads } = this.config
    const p = castAll(this.parameters, x.dtype)
    const headDim = dim / heads
    const T = x.shape[0]!
    const project = (from: Tensor, name: string) =>
      reshape(linear(from, p[name]!, { bias: p[`${name}Bias`]! }), [T, heads, headDim])
    const dropout = noise ? this.config.dropout : 0
    const B = inputs.seqOffsets.size - 1
    const o = hstuAttention(project(query, 'query'), project(x, 'key'), project(x, 'value'), {
      ...{ seqOffsets: inputs.seqOffsets, maxSeqLen: inputs.maxSeqLen, activation: 'softmax' as const, dropout },
      alpha: 1 / Math.sqrt(headDim),
      ...(noise && dropout > 0 ? noise.draw(B * heads * inputs.maxSeqLen ** 2) : {}),
    })
    return linear(reshape(o, [T, dim]), p.output!, { bias: p.outputBias!, residual })
  }
}
