import { HstuError } from '../errors.js'
import { adamw } from '../ops/adamw.js'
import { globalNormClip } from '../ops/global_norm_clip.js'
import { Tensor, unscoped } from '../tensor.js'

export interface AdamWOptions {
  /** Learning rate where `step` is given none. Default 1e-3. */
  lr?: number
  /** Default [0.9, 0.98]. */
  betas?: readonly [number, number]
  /** Default 1e-8. */
  eps?: number
  /** Decoupled weight decay. Default 0. */
  weightDecay?: number
  /** Gradients are scaled down to this global L2 norm; 0 (default) leaves them. */
  clipNorm?: number
}

/**
 * AdamW (Loshchilov and Hutter, ICLR 2019) over named parameters, dense: a parameter whose gradient is zero still moves by
 * momentum and decay.
 */
export class AdamW {
  /** First and second moments, named like the parameters. */
  readonly m: Record<string, Tensor>
  readonly v: Record<string, Tensor>
  /** Steps taken. */
  steps = 0
  readonly #names: readonly string[]
  readonly #lists: readonly (readonly Tensor[])[]

  constructor(
    readonly parameters: Record<string, Tensor>,
    readonly options: AdamWOptions = {},
  ) {
    const zeros = () =>
      unscoped(() => {
        const like = ([name, tensor]: [string, Tensor]) => [name, Tensor.zeros(tensor.shape, tensor)] as const
        return Object.fromEntries(Object.entries(parameters).map(like))
      })
    this.m = zeros()
    this.v = zeros()
    this.#names = Object.keys(parameters)
    this.#lists = [parameters, this.m, this.v].map(group => Object.values(group))
  }

  /**
   * One update in place.
   * @param gradients named like the parameters
   * @returns the global gradient norm before clipping, [1], where `clipNorm` is set
   * @throws HstuError ERR_HSTU_INVALID_ARGUMENT when a gradient is missing.
   */
  step(gradients: Record<string, Tensor>, lr = this.options.lr ?? 1e-3): Tensor | null {
    const { betas = [0.9, 0.98], eps = 1e-8, weightDecay = 0, clipNorm = 0 } = this.options
    const list = this.#names.map(name => {
      const tensor = gradients[name]
      if (!tensor) throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', `AdamW: no gradient for ${name}`)
      return tensor
    })
    const norm = clipNorm > 0 ? globalNormClip(list, clipNorm) : null
    const [parameters, m, v] = this.#lists
    adamw(parameters!, list, m!, v!, {
      ...{ lr, beta1: betas[0], beta2: betas[1], eps, weightDecay, step: this.steps + 1 },
    })
    this.steps += 1
    return norm
  }

  /** Frees the moments. */
  dispose(): void {
    for (const tensor of [...Object.values(this.m), ...Object.values(this.v)]) tensor.dispose()
  }
}
