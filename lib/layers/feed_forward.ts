import { add } from '../ops/add.js'
import { castAll } from '../ops/cast.js'
import { dropout } from '../ops/dropout.js'
import { linear } from '../ops/linear.js'
import type { Random } from '../random.js'
import type { Tensor, TensorOptions } from '../tensor.js'
import { uniform, xavierNormal } from './init.js'
import type { Noise } from './inputs.js'

/** residual + drop(W2 drop(activation(W1 x + b1)) + b2), position by position. */
export class FeedForward {
  readonly parameters: Record<string, Tensor>

  constructor(
    readonly config: { dim: number; hidden: number; activation: 'relu' | 'gelu'; dropout: number },
    random: Random,
    options: TensorOptions,
  ) {
    const { dim, hidden } = config
    this.parameters = {
      hidden: xavierNormal(random, [dim, hidden], options),
      hiddenBias: uniform(random, [hidden], 1 / Math.sqrt(dim), options),
      output: xavierNormal(random, [hidden, dim], options),
      outputBias: uniform(random, [dim], 1 / Math.sqrt(hidden), options),
    }
  }

  /** @param x [T, d]; the parameters are taken in its dtype */
  forward(x: Tensor, residual: Tensor, noise: Noise): Tensor {
    const p = castAll(this.parameters, x.dtype)
    const rate = noise ? this.config.dropout : 0
    const drop = (y: Tensor) => (noise && rate > 0 ? dropout(y, rate, noise.draw(y.size)) : y)
    const hidden = drop(linear(x, p.hidden!, { bias: p.hiddenBias!, activation: this.config.activation }))
    if (rate === 0) return linear(hidden, p.output!, { bias: p.outputBias!, residual })
    return add(drop(linear(hidden, p.output!, { bias: p.outputBias! })), residual)
  }
}
