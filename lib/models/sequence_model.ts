import { check } from '../errors.js'
import { truncatedNormal } from '../layers/init.js'
import type { Noise, SequenceInputs } from '../layers/inputs.js'
import { computeDtype, type Precision } from '../layers/precision.js'
import { cast } from '../ops/cast.js'
import { dropout } from '../ops/dropout.js'
import { embedding } from '../ops/embedding.js'
import { l2Normalize } from '../ops/l2_normalize.js'
import { positionEmbedding } from '../ops/position_embedding.js'
import type { Random } from '../random.js'
import type { Dtype, Tensor, TensorOptions } from '../tensor.js'

/** What every sequence model is made from; plain JSON, kept in checkpoints. */
export interface SequenceModelConfig {
  /** Items have ids 1 .. numItems; 0 is padding. */
  numItems: number
  /** d, model width. */
  dim: number
  layers: number
  heads: number
  /** Most actions of a history. */
  maxLength: number
  /** N >= maxLength: rows of the position table, and HSTU's 1/N. */
  paddedLength: number
  inputDropout: number
  linearDropout: number
}

/** Where a model lives and what it computes in. */
export interface ModelOptions extends TensorOptions {
  /** Default 'float32'; 'bf16' needs a CUDA device. Parameters and outputs are float32 either way. */
  precision?: Precision
}

/** An object with parameters of its own: a layer. */
interface HasParameters {
  readonly parameters: Record<string, Tensor>
}

/**
 * Next-item model on jagged sequences of item ids:
 *
 *     x_t = dropout(E[id_t] sqrt(d) + P[t])
 *     y = blocks(x)
 *     output_t = y_t / |y_t|                    score of item i: <output_t, E[i] / |E[i]|>
 *
 * A subclass gives `blocks`, which computes in the model's precision; both ends, and so the whole item table, are float32. (Kang and McAuley 2018; Zhai et al. 2024, section 4.1.1 and its public recipe.)
 */
export abstract class SequenceModel<C extends SequenceModelConfig = SequenceModelConfig> {
  abstract readonly kind: string
  /** Every trainable tensor by its name in checkpoints. */
  readonly parameters: Record<string, Tensor> = {}
  /** Of everything between the embedding and the output's normalisation. */
  readonly #dtype: Dtype

  constructor(
    readonly config: C,
    random: Random,
    readonly options: ModelOptions,
  ) {
    this.#dtype = computeDtype(options.precision ?? 'float32', options)
    const { numItems, dim, maxLength, paddedLength } = config
    const positive = (name: string, value: number) =>
      check(
        Number.isInteger(value) && value > 0,
        'ERR_HSTU_INVALID_ARGUMENT',
        () => `${name} must be a positive integer, got ${value}`,
      )
    for (const name of ['numItems', 'dim', 'layers', 'heads', 'maxLength', 'paddedLength'] as const)
      positive(name, config[name])
    check(paddedLength >= maxLength, 'ERR_HSTU_INVALID_ARGUMENT', () => {
      return `paddedLength ${paddedLength} is below maxLength ${maxLength}`
    })
    this.parameters.items = truncatedNormal(random, [numItems + 1, dim], 0.02, options)
  }

  protected addLayer(name: string, layer: HasParameters): void {
    for (const [key, tensor] of Object.entries(layer.parameters)) this.parameters[`${name}.${key}`] = tensor
  }

  /** The stack between input and output, in the dtype of its input. @param x [T, d] */
  protected abstract blocks(x: Tensor, inputs: SequenceInputs, noise: Noise): Tensor

  /**
   * The L2-normalised output of every token, [T, d].
   * @param noise where dropouts draw from; null in inference
   * @throws HstuError ERR_HSTU_SHAPE when a sequence is longer than `paddedLength`.
   */
  forward(inputs: SequenceInputs, noise: Noise = null): Tensor {
    const { dim, inputDropout, paddedLength } = this.config
    check(inputs.maxSeqLen <= paddedLength, 'ERR_HSTU_SHAPE', () => {
      return `a sequence of ${inputs.maxSeqLen} tokens is longer than the model's paddedLength ${paddedLength}`
    })
    const { ids, seqOffsets } = inputs
    const embedded = positionEmbedding(embedding(this.parameters.items!, ids), this.parameters.positions!, {
      ...{ seqOffsets, ids, scale: Math.sqrt(dim) },
    })
    let x = cast(embedded, this.#dtype)
    if (noise && inputDropout > 0) x = dropout(x, inputDropout, noise.draw(x.size))
    return l2Normalize(cast(this.blocks(x, inputs, noise), embedded.dtype), 1e-6)
  }

  /** The item table with rows of length one, [numItems + 1, d], to score against. The caller disposes it. */
  itemEmbeddings(): Tensor {
    return l2Normalize(this.parameters.items!, 1e-6)
  }

  /** Frees the parameters. */
  dispose(): void {
    for (const tensor of Object.values(this.parameters)) tensor.dispose()
  }
}
