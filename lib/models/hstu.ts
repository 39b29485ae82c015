import { HstuLayer, type HstuLayerConfig } from '../layers/hstu_layer.js'
import { xavierNormal } from '../layers/init.js'
import type { Noise, SequenceInputs } from '../layers/inputs.js'
import { Random } from '../random.js'
import type { Tensor } from '../tensor.js'
import { type ModelOptions, SequenceModel, type SequenceModelConfig } from './sequence_model.js'

export interface HstuConfig
  extends SequenceModelConfig,
    Pick<
      HstuLayerConfig,
      'positionBias' | 'timeBias' | 'timeBuckets' | 'activation' | 'alpha' | 'affine' | 'siluAll' | 'concat'
    > {
  /** D, head dim of q and k. */
  qkDim: number
  /** V, head dim of u and v. */
  vDim: number
}

/**
 * Hierarchical Sequential Transduction Unit (Zhai et al., "Actions Speak Louder than Words", ICML 2024): a stack of
 * pointwise-attention layers with relative position and time bias, no softmax, no feed-forward layer, no final norm.
 *
 * The defaults are the paper's research form; `affine`, `siluAll`, `alpha` and `concat` give the industrial one.
 */
export class HSTU extends SequenceModel<HstuConfig> {
  readonly kind = 'hstu'
  readonly #layers: HstuLayer[]

  /** @param seed of the initial weights */
  constructor(config: HstuConfig, seed: number | string = 0, options: ModelOptions = {}) {
    const random = new Random(`hstu:${seed}`)
    super(config, random, options)
    this.parameters.positions = xavierNormal(random, [config.paddedLength, config.dim], options)
    this.#layers = Array.from({ length: config.layers }, () => new HstuLayer(config, random, options))
    this.#layers.forEach((layer, i) => {
      this.addLayer(`layers.${i}`, layer)
    })
  }

  protected blocks(x: Tensor, inputs: SequenceInputs, noise: Noise): Tensor {
    return this.#layers.reduce((y, layer) => layer.forward(y, inputs, noise), x)
  }
}
