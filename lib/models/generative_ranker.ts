import { reshape } from '../autograd.js'
import { check } from '../errors.js'
import { HstuLayer, type HstuLayerConfig } from '../layers/hstu_layer.js'
import { normal, xavierUniform } from '../layers/init.js'
import type { Noise, TokenInputs } from '../layers/inputs.js'
import { computeDtype } from '../layers/precision.js'
import { SwishMlp } from '../layers/swish_mlp.js'
import { add } from '../ops/add.js'
import { bceWithLogitsLoss } from '../ops/bce_with_logits_loss.js'
import { cast } from '../ops/cast.js'
import { concat } from '../ops/concat.js'
import { dropout } from '../ops/dropout.js'
import { embedding } from '../ops/embedding.js'
import { expand } from '../ops/expand.js'
import { linear } from '../ops/linear.js'
import { mseLoss } from '../ops/mse_loss.js'
import { multiHotEmbedding } from '../ops/multi_hot_embedding.js'
import { Random } from '../random.js'
import { type Dtype, Tensor } from '../tensor.js'
import type { ModelOptions } from './sequence_model.js'

/** A head: what it predicts, and how much its loss counts. */
export interface RankerTask {
  name: string
  /** 'binary': a logit, cross entropy; 'regression': a value, squared error. */
  kind: 'binary' | 'regression'
  /** Default 1. */
  weight?: number
}

/** What a ranker is made from; plain JSON, kept in checkpoints. */
export interface GenerativeRankerConfig
  extends Pick<
    HstuLayerConfig,
    'positionBias' | 'timeBias' | 'timeBuckets' | 'activation' | 'siluAll' | 'concat' | 'contextualFull'
  > {
  /** The highest number of each vocabulary, 0 standing for unknown. `users: 0` makes one token of all users. */
  vocabulary: { users: number; items: number; contextual: readonly number[]; series: readonly number[] }
  /** 'dense' (default): a parameter with a row a number. 'hash': rows come from outside, for ids that are 64-bit keys. */
  embeddings?: 'dense' | 'hash'
  /** K: bits of an action. */
  actions: number
  tasks: readonly RankerTask[]
  /** 'interleave' (default): two tokens an event, its item and its actions. 'add': one, the sum; then only candidates have a loss. */
  fusion?: 'interleave' | 'add'
  /** d, width of tokens and embeddings. */
  dim: number
  layers: number
  heads: number
  /** D and V, head dims of q, k and of u, v. */
  qkDim: number
  vDim: number
  /** N: the attention's 1/N, and rows of its position table. A constant: no score depends on who shares the batch. */
  scalingSeqLen: number
  /** Width of the hidden layers of encoders and head; default d. */
  hidden?: number
  /** Width of an action bit; default 8. */
  actionDim?: number
  /** Rows of an input position table; 0 (default) is none: positions enter through the bias. */
  positions?: number
  inputDropout: number
  linearDropout: number
}

/**
 * B requests on the device, once each: T history rows and M candidates, as N tokens. R of the tokens are predicted: first supervised
 * history rows, each a group of its own, then all candidates, those of a request a group.
 */
export interface RankerInputs extends TokenInputs {
  /** int64 [C B + T + M]: contextual, history and candidate rows by their row of the table, or key. */
  ids: Tensor
  /** int64 bits, -1 where not known: [T] of history rows ('interleave'), [C B + T + M] ('add'). */
  actions: Tensor
  /** int64 [N]: the row of each token among `ids` and, below them, `actions`. */
  source: Tensor
  /** int64 [N]: index in the request, min(index, h); null without a position table. */
  positions: Tensor | null
  /** int64 [R]: tokens that are predicted. */
  predicted: Tensor
  /** int64 [G]: the token right before each group. */
  states: Tensor
  /** int64 [G + 1]: where each group begins. */
  groups: Tensor
  /** How many of the predicted tokens are history rows. */
  supervisedHistory: number
}

/** @see GenerativeRanker.loss */
export interface RankerLoss {
  /** [1, 1]: the sum of the tasks' losses by their weights. */
  total: Tensor
  /** [K]: of each task. */
  tasks: Tensor
}

/**
 * Ranking as sequential transduction (Zhai et al. 2024, section 2.2): a user's items and actions are one sequence, an item's token says
 * what the user will do with it, and candidates are tokens behind the history that do not see one another:
 *
 *     c = MLP_c(E[id])                                     content: contextual features, items, values of auxiliary series
 *     a = MLP_a([bit_1 A_1, .., bit_K A_K])                actions
 *     x = u, c_0, a_0, c_1, a_1, .., candidates            'interleave';  c + a for 'add', where a candidate's actions are one learned vector
 *     y = HSTU(x + P)                                      affine norms, alpha = 1 / sqrt(D), times t_i on both sides
 *     logits_i = MLP_h(y_i, y_s W_s)                       s: the token right before; the same for all candidates of a request
 *
 * History and y_s W_s are computed once a request and expanded to its candidates, whose gradients are summed (ROO, arXiv 2508.05640).
 * Contextual tokens are the user and the request's features; they have no time.
 */
export class GenerativeRanker {
  /** Every trainable tensor by its name in checkpoints; but for the rows of 'hash' embeddings. */
  readonly parameters: Record<string, Tensor> = {}
  readonly #content: SwishMlp
  readonly #action: SwishMlp
  readonly #layers: HstuLayer[]
  readonly #head: SwishMlp
  /** Inside the layers; table, loss and head are float32. */
  readonly #dtype: Dtype

  /**
   * @param seed of the initial weights
   * @throws HstuError ERR_HSTU_INVALID_ARGUMENT for a config that makes no sense.
   */
  constructor(
    readonly config: GenerativeRankerConfig,
    seed: number | string = 0,
    readonly options: ModelOptions = {},
  ) {
    checkConfig(config)
    this.#dtype = computeDtype(options.precision ?? 'float32', options)
    const { dim, layers, actions, tasks, hidden = dim, actionDim = 8, positions = 0, fusion = 'interleave' } = config
    const random = new Random(`ranker:${seed}`)
    const p = this.parameters
    if (config.embeddings !== 'hash') p.table = normal(random, [tableRows(config), dim], 0.02, options)
    if (positions > 0) p.positions = normal(random, [positions, dim], 0.02, options)
    p.actions = normal(random, [actions, actionDim], 0.1, options)
    if (fusion === 'add') p.pending = normal(random, [actions, actionDim], 0.1, options)
    const width = actions * actionDim
    this.#content = this.#add('content', new SwishMlp({ input: dim, hidden, output: dim, norm: true }, random, options))
    this.#action = this.#add('action', new SwishMlp({ input: width, hidden, output: dim, norm: true }, random, options))
    const layer = { ...config, paddedLength: config.scalingSeqLen, affine: true, alpha: 1 / Math.sqrt(config.qkDim) }
    this.#layers = Array.from({ length: layers }, (_, i) =>
      this.#add(`layers.${i}`, new HstuLayer(layer, random, options)),
    )
    p.state = xavierUniform(random, [dim, hidden], options)
    this.#head = this.#add('head', new SwishMlp({ input: dim, hidden, output: tasks.length }, random, options))
  }

  #add<L extends { parameters: Record<string, Tensor> }>(name: string, layer: L): L {
    for (const [key, tensor] of Object.entries(layer.parameters)) this.parameters[`${name}.${key}`] = tensor
    return layer
  }

  /** What it is made of, for inference. */
  get modules(): { content: SwishMlp; action: SwishMlp; layers: readonly HstuLayer[]; head: SwishMlp } {
    return { content: this.#content, action: this.#action, layers: this.#layers, head: this.#head }
  }

  /**
   * Logits of binary tasks and values of regression tasks for the R predicted tokens, [R, K]; candidates are the last M rows.
   * @param noise where dropouts draw from; null in inference
   * @param embedded E[ids], [C B + T + M, d]: required with 'hash' embeddings
   * @throws HstuError ERR_HSTU_INVALID_ARGUMENT for a loss on history rows that the config's tokens would tell the answer to.
   */
  forward(inputs: RankerInputs, noise: Noise = null, embedded = this.#embed(inputs)): Tensor {
    const { fusion = 'interleave', contextualFull = false, inputDropout } = this.config
    check(
      inputs.supervisedHistory === 0 || (fusion === 'interleave' && !contextualFull),
      'ERR_HSTU_INVALID_ARGUMENT',
      () =>
        `a loss on history rows with ${contextualFull ? 'contextualFull' : "fusion 'add'"} would see its own labels: supervise 'candidates'`,
    )
    let x = this.#tokens(inputs, embedded)
    if (noise && inputDropout > 0) x = dropout(x, inputDropout, noise.draw(x.size))
    const y = this.#layers.reduce((tokens, layer) => layer.forward(tokens, inputs, noise), x)
    return this.#logits(y, inputs, this.#states(y, inputs.states, embedded), embedded)
  }

  /** x, [N, d]. */
  #tokens(inputs: RankerInputs, embedded: Tensor): Tensor {
    const p = this.parameters
    const content = this.#content.forward(cast(embedded, this.#dtype)) // [C B + T + M, d]
    const bits = multiHotEmbedding(p.actions!, inputs.actions, { pending: p.pending ?? null })
    const actions = this.#action.forward(cast(bits, this.#dtype))
    const rows = this.config.fusion === 'add' ? add(content, actions) : below(content, actions)
    const x = embedding(rows, inputs.source)
    return inputs.positions ? add(x, cast(embedding(p.positions!, inputs.positions), this.#dtype)) : x
  }

  /** y_s W_s, [G, hidden], once a request. */
  #states(y: Tensor, rows: Tensor, { dtype }: Tensor): Tensor {
    return linear(cast(embedding(y, rows), dtype), this.parameters.state!)
  }

  #logits(y: Tensor, { predicted, groups }: RankerInputs, states: Tensor, { dtype }: Tensor): Tensor {
    const items = cast(embedding(y, predicted), dtype) // [R, d]
    return this.#head.forward(items, expand(states, { offsets: groups, rows: predicted.size }))
  }

  #embed(inputs: RankerInputs): Tensor {
    const { table } = this.parameters
    check(table !== undefined, 'ERR_HSTU_INVALID_ARGUMENT', () => "embeddings 'hash': give forward the looked-up rows")
    return embedding(table!, inputs.ids)
  }

  /**
   * Each task's mean loss by weight, and their sum by the tasks' weights.
   * @param logits [R, K] of `forward`
   * @param labels [R, K]
   * @param weights [R, K]
   */
  loss(logits: Tensor, labels: Tensor, weights: Tensor): RankerLoss {
    const { tasks } = this.config
    const K = tasks.length
    const of = (kind: RankerTask['kind']) => tasks.map(task => Number(task.kind === kind))
    // A task is of one kind; with weights of 0 the other kind's loss of it is 0.
    const only = (kind: RankerTask['kind']) => mask(weights, of(kind))
    const losses: Tensor[] = []
    if (of('binary').includes(1)) losses.push(bceWithLogitsLoss(logits, labels, { weights: only('binary') }))
    if (of('regression').includes(1)) losses.push(mseLoss(logits, labels, { weights: only('regression') }))
    const each = losses.length === 2 ? add(losses[0]!, losses[1]!) : losses[0]!
    const factors = tasks.map(task => task.weight ?? 1)
    return { total: linear(reshape(each, [1, K]), constant([K, 1], factors, each)), tasks: each }
  }

  /** Frees the parameters. */
  dispose(): void {
    for (const tensor of Object.values(this.parameters)) tensor.dispose()
  }
}

function constant(shape: readonly number[], values: readonly number[], { dtype, device }: Tensor): Tensor {
  return Tensor.from(dtype === 'float64' ? Float64Array.from(values) : Float32Array.from(values), shape, { device })
}

/** weights [R, K] with the columns where `kept` is 0 set to 0. */
function mask(weights: Tensor, kept: readonly number[]): Tensor {
  if (kept.every(one => one === 1)) return weights
  const K = kept.length
  const diagonal = Array.from({ length: K * K }, (_, i) => (i % (K + 1) === 0 ? kept[i % K]! : 0))
  return linear(weights, constant([K, K], diagonal, weights))
}

/** The rows of a, then those of b. */
function below(a: Tensor, b: Tensor): Tensor {
  const offsets = ({ shape, device }: Tensor) => Tensor.from(BigInt64Array.of(0n, BigInt(shape[0]!)), [2], { device })
  return concat(a, b, { aOffsets: offsets(a), bOffsets: offsets(b) }).values
}

/** Sizes of the vocabularies in the order of the table's rows: user, contextual features, items, auxiliary series; each has a row 0. */
export function vocabularySizes({ vocabulary }: GenerativeRankerConfig): number[] {
  return [vocabulary.users, ...vocabulary.contextual, vocabulary.items, ...vocabulary.series]
}

function tableRows(config: GenerativeRankerConfig): number {
  return vocabularySizes(config).reduce((sum, size) => sum + size + 1, 0)
}

function checkConfig(config: GenerativeRankerConfig): void {
  const { tasks, positions = 0, hidden = config.dim, actionDim = 8 } = config
  const whole = (name: string, value: number, least: number, most = Infinity) =>
    check(Number.isInteger(value) && value >= least && value <= most, 'ERR_HSTU_INVALID_ARGUMENT', () => {
      return `${name} must be an integer of at least ${least}${most < Infinity ? ` and at most ${most}` : ''}, got ${value}`
    })
  for (const name of ['dim', 'layers', 'heads', 'qkDim', 'vDim', 'scalingSeqLen'] as const) whole(name, config[name], 1)
  for (const [name, value] of Object.entries({ hidden, actionDim })) whole(name, value, 1)
  whole('positions', positions, 0)
  whole('actions', config.actions, 1, 31)
  for (const [f, size] of vocabularySizes(config).entries()) whole(`vocabulary size ${f}`, size, 0)
  const oneOf = (name: 'fusion' | 'activation' | 'embeddings', values: readonly string[]) =>
    check(values.includes(config[name] ?? values[0]!), 'ERR_HSTU_INVALID_ARGUMENT', () => {
      return `${name} must be one of ${values.join(', ')}, got ${JSON.stringify(config[name])}`
    })
  oneOf('fusion', ['interleave', 'add'])
  oneOf('activation', ['silu', 'softmax'])
  oneOf('embeddings', ['dense', 'hash'])
  for (const name of ['inputDropout', 'linearDropout'] as const)
    check(config[name] >= 0 && config[name] < 1, 'ERR_HSTU_INVALID_ARGUMENT', () => {
      return `${name} must be in [0, 1), got ${config[name]}`
    })
  const named = new Set(tasks.map(task => task.name)).size === tasks.length && tasks.length > 0
  check(named, 'ERR_HSTU_INVALID_ARGUMENT', () => 'tasks must be at least one, with different names')
  for (const { name, weight = 1 } of tasks)
    check(weight >= 0 && weight < Infinity, 'ERR_HSTU_INVALID_ARGUMENT', () => {
      return `task ${name}: weight must be a non-negative number, got ${weight}`
    })
}
