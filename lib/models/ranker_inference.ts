import type { EmbeddingTable } from '../layers/embedding_table.js'
import type { AskedRows, CachedHistory } from '../layers/hstu_layer.js'
import type { TokenInputs } from '../layers/inputs.js'
import { computeDtype } from '../layers/precision.js'
import type { SwishMlp } from '../layers/swish_mlp.js'
import { cast } from '../ops/cast.js'
import { embedding } from '../ops/embedding.js'
import { embeddingSum } from '../ops/embedding_sum.js'
import { multiHotEmbedding } from '../ops/multi_hot_embedding.js'
import { type RankerHeadOptions, rankerHead } from '../ops/ranker_head.js'
import { type Dtype, scope, Tensor, unscoped } from '../tensor.js'
import type { GenerativeRanker } from './generative_ranker.js'

/** Rows of what tokens are the sum of. */
export interface RowIds {
  /** int64 [N]: each token's row, -1 where it has none */
  ids: Tensor
  /** int64 [n]: what the n rows are made from; null where the rows are a table made beforehand */
  from: Tensor | null
}

/** What of B requests is not cached: the last rows of their histories (or none) and candidates, N tokens; `times` are of all keys. */
export interface PassInputs extends TokenInputs {
  /** Rows of the embedding table, or keys. */
  content: RowIds
  /** Action bits; -1 is known of no candidate. */
  actions: RowIds
  /** int64 [N]: index in the request, min(index, h); null without a position table. */
  positions: Tensor | null
  /** The R rows of the last layer; `predicted` and `states` number these. */
  asked: AskedRows
  /** int64 [M] */
  predicted: Tensor
  /** int64 [G]: the last row of each history; null where the states are given. */
  states: Tensor | null
  /** int64 [G + 1]: where each request's candidates begin. */
  groups: Tensor
}

/** Rows of an embedding table whose content is made beforehand: on the CPU that takes a second or two, on CUDA a gigabyte or two. */
const MOST_ROWS = { cpu: 1 << 14, cuda: 1 << 21 } as const
/** Of 2^K sets of actions. */
const MOST_ACTIONS = 10
const CHUNK = 1 << 16

/**
 * A trained ranker as inference computes it: the parameters in the dtype of its layers, once, and in place of its encoders the rows that they
 * make: of the whole embedding table and of all sets of actions, where these are not too many. The same bits as `GenerativeRanker.forward`,
 * whose parameters must not change meanwhile.
 */
export class RankerInference {
  readonly dtype: Dtype
  /** MLP_c(E) [I, d]; null where it is made pass by pass. */
  readonly content: Tensor | null = null
  /** MLP_a of each set of actions, then of those of a candidate [2^K + 1, d]; null as above. */
  readonly actions: Tensor | null = null
  readonly #positions: Tensor | null = null
  readonly #layers: readonly Record<string, Tensor>[]
  readonly #encoders: { content: Record<string, Tensor>; action: Record<string, Tensor> }
  /** Those that are not the model's own. */
  readonly #made: readonly Tensor[]

  /**
   * @param table rows of 'hash' embeddings
   * @param deterministic whether the bits of a candidate's logits do not depend on the pass; else the same within the rounding of the dtype
   * @throws HstuError ERR_HSTU_OUT_OF_MEMORY
   */
  constructor(
    readonly model: GenerativeRanker,
    readonly table: EmbeddingTable | null,
    readonly deterministic = true,
  ) {
    const { modules, parameters: p, options, config } = model
    this.dtype = computeDtype(options.precision ?? 'float32', options)
    const rows = p.table?.shape[0] ?? Infinity
    const made = unscoped(() =>
      scope(() => {
        const layers = modules.layers.map(layer => layer.weights(this.dtype))
        const last = layers.length - 1
        layers[last] = { ...layers[last], ...modules.layers[last]!.splitWeights(layers[last]!) }
        const encoders = { content: modules.content.weights(this.dtype), action: modules.action.weights(this.dtype) }
        const content =
          rows <= MOST_ROWS[(options.device ?? 'cpu') === 'cpu' ? 'cpu' : 'cuda']
            ? this.#contentOfAll(p.table!, modules.content, encoders.content)
            : null
        const actions = config.actions <= MOST_ACTIONS ? this.#actionsOf(this.#allActions(), encoders) : null
        return { layers, encoders, content, actions, positions: p.positions ? cast(p.positions, this.dtype) : null }
      }),
    )
    this.content = made.content
    this.actions = made.actions
    this.#positions = made.positions
    this.#layers = made.layers
    this.#encoders = made.encoders
    const own = new Set(Object.values(p))
    const all = [...made.layers, made.encoders.content, made.encoders.action].flatMap(of => Object.values(of))
    this.#made = [...all, made.content, made.actions, made.positions].filter(
      tensor => tensor && !own.has(tensor),
    ) as Tensor[]
  }

  /**
   * @param layers a cache a layer
   * @param states [G, hidden] of an earlier pass with the same histories; else made from `inputs.states`
   * @param into where they then go, [G, hidden]
   * @returns logits [M, K] of the candidates, and the states
   */
  run(
    inputs: PassInputs,
    layers: readonly CachedHistory[],
    states: Tensor | null,
    into: Tensor | null = null,
  ): { logits: Tensor; states: Tensor } {
    const { modules, parameters } = this.model
    const last = this.#layers.length - 1
    const y = modules.layers.reduce(
      (x, layer, i) =>
        layer.resume(x, inputs, this.#layers[i]!, layers[i]!, i === last ? inputs.asked : null, this.deterministic),
      this.#tokens(inputs),
    )
    const { predicted: rows, groups } = inputs
    const mlp = modules.head.parameters as RankerHeadOptions['mlp']
    const of = states ? { known: states } : { last: inputs.states!, into }
    return rankerHead(y, { rows, groups, states: of, stateWeight: parameters.state!, mlp })
  }

  /** x, [N, d]. */
  #tokens({ content, actions, positions }: PassInputs): Tensor {
    const { parameters: p, modules } = this.model
    const embedded = (from: Tensor) =>
      this.table ? this.table.embed(this.table.lookup(from)) : embedding(p.table!, from)
    const contentRows = () =>
      modules.content.forward(cast(embedded(content.from!), this.dtype), null, this.#encoders.content)
    return embeddingSum([
      { table: this.content ?? contentRows(), ids: content.ids },
      { table: this.actions ?? this.#actionsOf(actions.from!, this.#encoders), ids: actions.ids },
      ...(positions ? [{ table: this.#positions!, ids: positions }] : []),
    ])
  }

  #contentOfAll(table: Tensor, mlp: SwishMlp, weights: Record<string, Tensor>): Tensor {
    const [rows, d] = table.shape as [number, number]
    const all = Tensor.empty([rows, d], { dtype: this.dtype, device: table.device })
    const ids = BigInt64Array.from({ length: Math.min(rows, CHUNK) }, (_, i) => BigInt(i))
    for (let begin = 0; begin < rows; begin += CHUNK)
      scope(() => {
        const end = Math.min(rows, begin + CHUNK)
        const chunk = mlp.forward(cast(table.rows(begin, end), this.dtype), null, weights)
        const from = Tensor.from(ids.subarray(0, end - begin), undefined, { device: table.device })
        embeddingSum([{ table: chunk, ids: from }], all.rows(begin, end))
      })
    return all
  }

  /** 0 .. 2^K - 1, and what a candidate has where it has any. */
  #allActions(): Tensor {
    const { config, options, parameters } = this.model
    const sets = Array.from({ length: 2 ** config.actions }, (_, bits) => BigInt(bits))
    return Tensor.from(BigInt64Array.from(parameters.pending ? [...sets, -1n] : sets), undefined, {
      device: options.device ?? 'cpu',
    })
  }

  #actionsOf(bits: Tensor, { action }: { action: Record<string, Tensor> }): Tensor {
    const { parameters: p, modules } = this.model
    const features = multiHotEmbedding(p.actions!, bits, { pending: p.pending ?? null })
    return modules.action.forward(cast(features, this.dtype), null, action)
  }

  /** Frees what was made of the parameters. */
  dispose(): void {
    for (const tensor of this.#made) tensor.dispose()
  }
}
