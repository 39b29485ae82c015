import { check } from '../errors.js'
import { normal, xavierUniform } from '../layers/init.js'
import type { Noise } from '../layers/inputs.js'
import { SwishMlp } from '../layers/swish_mlp.js'
import { type CandidatePairs, TargetAttention } from '../layers/target_attention.js'
import { dropout } from '../ops/dropout.js'
import { embedding } from '../ops/embedding.js'
import { linear } from '../ops/linear.js'
import { mul } from '../ops/mul.js'
import { multiHotEmbedding } from '../ops/multi_hot_embedding.js'
import { Random } from '../random.js'
import type { Tensor, TensorOptions } from '../tensor.js'

export interface DinConfig {
  /** The highest number of each vocabulary, 0 standing for unknown. */
  users: number
  items: number
  /** K: bits of an action. */
  actions: number
  /** Binary tasks. */
  tasks: number
  /** d, width of embeddings. */
  dim: number
  /** Width of the head's hidden layer; default d. */
  hidden?: number
  /** Factor of the attention's sum: 1 over the usual history length. */
  scale: number
  /** Of embeddings. */
  dropout: number
}

/** M candidates and T history rows on the device. */
export interface DinInputs {
  /** int64 [M] numbers of items */
  candidates: Tensor
  /** int64 [M] numbers of users */
  users: Tensor
  /** int64 [T] numbers of items */
  history: Tensor
  /** int64 [T] action bits */
  actions: Tensor
  pairs: CandidatePairs
}

/**
 * Deep Interest Network (Zhou et al., KDD 2018), the DLRM-style sequence model that the ranker is compared with:
 *
 *     q = E[candidate];  k = E[item] + [bit_1 A_1, .., bit_K A_K] W_a        an event is its item and its actions
 *     s = sum_k a(q, k) k                                                    target attention
 *     logits = MLP(s W_s + q W_q + (q * s) W_p + U[user] W_u)
 */
export class Din {
  readonly parameters: Record<string, Tensor> = {}
  readonly #attention: TargetAttention
  readonly #head: SwishMlp

  /** @throws HstuError ERR_HSTU_INVALID_ARGUMENT for a config that makes no sense. */
  constructor(
    readonly config: DinConfig,
    seed: number | string = 0,
    readonly options: TensorOptions = {},
  ) {
    const { users, items, actions, tasks, dim, hidden = dim, scale } = config
    for (const [name, value] of Object.entries({ actions, tasks, dim, hidden }))
      check(Number.isInteger(value) && value > 0, 'ERR_HSTU_INVALID_ARGUMENT', () => {
        return `Din: ${name} must be a positive integer, got ${value}`
      })
    const random = new Random(`din:${seed}`)
    const p = this.parameters
    p.items = normal(random, [items + 1, dim], 0.02, options)
    p.users = normal(random, [users + 1, dim], 0.02, options)
    p.actions = normal(random, [actions, 8], 0.1, options)
    p.action = xavierUniform(random, [8 * actions, dim], options)
    this.#attention = this.#add('attention', new TargetAttention({ dim, scale }, random, options))
    for (const name of ['query', 'product', 'user']) p[name] = xavierUniform(random, [dim, hidden], options)
    this.#head = this.#add('head', new SwishMlp({ input: dim, hidden, output: tasks }, random, options))
  }

  #add<L extends { parameters: Record<string, Tensor> }>(name: string, layer: L): L {
    for (const [key, tensor] of Object.entries(layer.parameters)) this.parameters[`${name}.${key}`] = tensor
    return layer
  }

  /**
   * @param noise where dropouts draw from; null in inference
   * @returns logits [M, K]
   */
  forward(inputs: DinInputs, noise: Noise = null): Tensor {
    const p = this.parameters
    const rate = this.config.dropout
    const dropped = (x: Tensor) => (noise && rate > 0 ? dropout(x, rate, noise.draw(x.size)) : x)
    const q = dropped(embedding(p.items!, inputs.candidates)) // [M, d]
    const events = dropped(embedding(p.items!, inputs.history)) // [T, d]
    const k = linear(multiHotEmbedding(p.actions!, inputs.actions), p.action!, { residual: events })
    const s = this.#attention.forward(q, k, inputs.pairs) // [M, d]
    const user = linear(dropped(embedding(p.users!, inputs.users)), p.user!)
    return this.#head.forward(s, linear(q, p.query!, { residual: linear(mul(q, s), p.product!, { residual: user }) }))
  }

  /** Frees the parameters. */
  dispose(): void {
    for (const tensor of Object.values(this.parameters)) tensor.dispose()
  }
}
