import { castAll } from '../ops/cast.js'
import { layerNorm } from '../ops/layer_norm.js'
import { linear } from '../ops/linear.js'
import { swishLayerNorm } from '../ops/swish_layer_norm.js'
import type { Random } from '../random.js'
import type { Dtype, Tensor, TensorOptions } from '../tensor.js'
import { ones, xavierUniform, zeros } from './init.js'

export interface SwishMlpConfig {
  input: number
  hidden: number
  output: number
  /** A layer norm at the end: an encoder of tokens. Default false: logits. */
  norm?: boolean
}

/**
 * The perceptron of industrial HSTU models, row by row: z = x W_1 + b_1;  y = (z sigmoid(LN(z))) W_2 + b_2;  with `norm` LN(y).
 * (Public code of Zhai et al. 2024.)
 */
export class SwishMlp {
  readonly parameters: Record<string, Tensor>

  constructor(
    readonly config: SwishMlpConfig,
    random: Random,
    options: TensorOptions,
  ) {
    const { input, hidden, output, norm = false } = config
    this.parameters = {
      hidden: xavierUniform(random, [input, hidden], options),
      hiddenBias: zeros([hidden], options),
      swishWeight: ones([hidden], options),
      swishBias: zeros([hidden], options),
      output: xavierUniform(random, [hidden, output], options),
      outputBias: zeros([output], options),
    }
    if (norm) {
      this.parameters.normWeight = ones([output], options)
      this.parameters.normBias = zeros([output], options)
    }
  }

  /** The parameters in the dtype of an input. */
  weights(dtype: Dtype): Record<string, Tensor> {
    return castAll(this.parameters, dtype)
  }

  /**
   * @param x [R, input]; the parameters are taken in its dtype
   * @param state [R, hidden], added to z
   * @param p of {@link weights}
   * @returns [R, output]
   */
  forward(x: Tensor, state: Tensor | null = null, p = this.weights(x.dtype)): Tensor {
    const z = linear(x, p.hidden!, { bias: p.hiddenBias!, residual: state })
    const gated = swishLayerNorm(z, { weight: p.swishWeight!, bias: p.swishBias! })
    const y = linear(gated, p.output!, { bias: p.outputBias! })
    return this.config.norm ? layerNorm(y, { weight: p.normWeight!, bias: p.normBias! }) : y
  }
}
