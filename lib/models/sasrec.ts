import { MultiHeadAttention } from '../layers/attention.js'
import { FeedForward } from '../layers/feed_forward.js'
import { truncatedNormal } from '../layers/init.js'
import type { Noise, SequenceInputs } from '../layers/inputs.js'
import { layerNorm } from '../ops/layer_norm.js'
import { Random } from '../random.js'
import type { Tensor } from '../tensor.js'
import { type ModelOptions, SequenceModel, type SequenceModelConfig } from './sequence_model.js'

export interface SASRecConfig extends SequenceModelConfig {
  /** Width of the feed-forward layer. */
  ffnDim: number
}

/**
 * Self-Attentive Sequential Recommendation (Kang and McAuley, ICDM 2018), as the HSTU paper's baseline has it. A block is
 *
 *     q = LN(x);  x1 = LN(q + MHA(q, x, x));  x2 = x1 + drop(W2 drop(relu(W1 x1 + b1)) + b2)
 *
 * with norms without affine, eps 1e-8.
 */
export class SASRec extends SequenceModel<SASRecConfig> {
  readonly kind = 'sasrec'
  readonly #blocks: { attention: MultiHeadAttention; feedForward: FeedForward }[]

  /** @param seed of the initial weights */
  constructor(config: SASRecConfig, seed: number | string = 0, options: ModelOptions = {}) {
    const random = new Random(`sasrec:${seed}`)
    super(config, random, options)
    const { dim, heads, ffnDim: hidden, linearDropout: dropout } = config
    this.parameters.positions = truncatedNormal(random, [config.paddedLength, dim], dim ** -0.5, options)
    this.#blocks = Array.from({ length: config.layers }, (_, i) => {
      const attention = new MultiHeadAttention({ dim, heads, dropout }, random, options)
      const feedForward = new FeedForward({ dim, hidden, activation: 'relu', dropout }, random, options)
      this.addLayer(`blocks.${i}.attention`, attention)
      this.addLayer(`blocks.${i}.feedForward`, feedForward)
      return { attention, feedForward }
    })
  }

  protected blocks(x: Tensor, inputs: SequenceInputs, noise: Noise): Tensor {
    let y = x
    for (const { attention, feedForward } of this.#blocks) {
      const q = layerNorm(y, { eps: 1e-8 })
      const x1 = layerNorm(attention.forward(q, y, q, inputs, noise), { eps: 1e-8 })
      y = feedForward.forward(x1, x1, noise)
    }
    return y
  }
}
