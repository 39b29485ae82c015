import { MultiHeadAttention } from '../layers/attention.js'
import { FeedForward } from '../layers/feed_forward.js'
import { ones, truncatedNormal, zeros } from '../layers/init.js'
import type { Noise, SequenceInputs } from '../layers/inputs.js'
import { castAll } from '../ops/cast.js'
import { layerNorm } from '../ops/layer_norm.js'
import { Random } from '../random.js'
import type { Tensor } from '../tensor.js'
import { type ModelOptions, SequenceModel, type SequenceModelConfig } from './sequence_model.js'

export interface TransformerConfig extends SequenceModelConfig {
  /** Width of the feed-forward layer; default 4 d. */
  ffnDim?: number
}

/**
 * Pre-norm Transformer decoder with GELU (Vaswani et al. 2017; Radford et al. 2019), the yardstick of speed comparisons:
 *
 *     x1 = x + MHA(LN(x));  x2 = x1 + FFN(LN(x1));  output LN(x)
 */
export class Transformer extends SequenceModel<TransformerConfig> {
  readonly kind = 'transformer'
  readonly #blocks: { name: string; attention: MultiHeadAttention; feedForward: FeedForward }[]
  readonly #norms: Record<string, Tensor> = {}

  /** @param seed of the initial weights */
  constructor(config: TransformerConfig, seed: number | string = 0, options: ModelOptions = {}) {
    const random = new Random(`transformer:${seed}`)
    super(config, random, options)
    const { dim, heads, ffnDim: hidden = 4 * config.dim, linearDropout: dropout } = config
    this.parameters.positions = truncatedNormal(random, [config.paddedLength, dim], dim ** -0.5, options)
    this.#blocks = Array.from({ length: config.layers }, (_, i) => {
      const attention = new MultiHeadAttention({ dim, heads, dropout }, random, options)
      const feedForward = new FeedForward({ dim, hidden, activation: 'gelu', dropout }, random, options)
      this.addLayer(`blocks.${i}.attention`, attention)
      this.addLayer(`blocks.${i}.feedForward`, feedForward)
      return { name: `blocks.${i}`, attention, feedForward }
    })
    for (const name of [...this.#blocks.flatMap(block => [`${block.name}.norm1`, `${block.name}.norm2`]), 'norm']) {
      this.#norms[`${name}.weight`] = ones([dim], options)
      this.#norms[`${name}.bias`] = zeros([dim], options)
    }
    Object.assign(this.parameters, this.#norms)
  }

  protected blocks(x: Tensor, inputs: SequenceInputs, noise: Noise): Tensor {
    const p = castAll(this.#norms, x.dtype)
    const norm = (y: Tensor, name: string) => layerNorm(y, { weight: p[`${name}.weight`]!, bias: p[`${name}.bias`]! })
    let y = x
    for (const { name, attention, feedForward } of this.#blocks) {
      const normed = norm(y, `${name}.norm1`)
      const x1 = attention.forward(normed, normed, y, inputs, noise)
      y = feedForward.forward(norm(x1, `${name}.norm2`), x1, noise)
    }
    return norm(y, 'norm')
  }
}
