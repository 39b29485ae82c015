import { check, HstuError } from '../../errors.js'
import { type GenerativeRankerConfig, type RankerInputs, vocabularySizes } from '../../models/generative_ranker.js'
import { Tensor, type TensorOptions } from '../../tensor.js'
import { toDevice } from '../inputs.js'
import { wordsOf } from '../words.js'
import type { RequestBatch, TaskTargets } from './schema.js'
import { tokenLayout } from './sequence.js'

/** A batch as a ranker reads it; tensors belong to the current scope. */
export interface RankerBatch {
  inputs: RankerInputs
  /** [R, K], R the supervised history rows, then all M candidates. */
  labels: Tensor
  /** [R, K] */
  weights: Tensor
}

/** In 'hash' embeddings the upper byte of a key is its vocabulary. */
const KEY_BITS = 56n
const LARGEST_KEY = (1n << KEY_BITS) - 1n

/** Row of the table, or key, of number 0 of each vocabulary, in the order of `vocabularySizes`. */
export function vocabularyBases(config: GenerativeRankerConfig): bigint[] {
  const bases: bigint[] = []
  vocabularySizes(config).reduce((sum, size, f) => {
    bases.push(config.embeddings === 'hash' ? BigInt(f) << KEY_BITS : BigInt(sum))
    return sum + size + 1
  }, 0)
  return bases
}

/**
 * Copies a batch to the model's device.
 * @param targets of `taskTargets`; history rows without any weight are not predicted
 * @param historyWeight [B] factor of the weights of each request's history (see `expandBatch`); default 1
 * @throws HstuError ERR_HSTU_DATA for a schema that is not the config's, or a number beyond its vocabulary.
 */
export function rankerBatch(
  batch: RequestBatch,
  targets: TaskTargets,
  config: GenerativeRankerConfig,
  options: TensorOptions = {},
  historyWeight?: ArrayLike<number>,
): RankerBatch {
  const { schema, history, candidates } = batch
  const { vocabulary, fusion = 'interleave' } = config
  checkSchema(batch, config)
  const [B, T, M, K] = [batch.requests.length, history.items.length, candidates.items.length, config.tasks.length]
  const C = 1 + schema.contextual.length
  const layout = tokenLayout(batch, fusion, C)
  const ids = contentIds(batch, config)

  // The layout has actions between history and candidates; here they come last.
  const source = layout.source
  const rows = wordsOf(source)
  const [actionRows, candidateRows] = [B * C + T, B * C + 2 * T]
  if (fusion === 'interleave')
    for (let n = 0; n < rows.length; n += 2)
      if (rows[n]! >= candidateRows) rows[n]! -= T
      else if (rows[n]! >= actionRows) rows[n]! += M
  const actions = new BigInt64Array(fusion === 'interleave' ? T : B * C + T + M)
  const actionBits = wordsOf(fusion === 'interleave' ? actions : actions.subarray(B * C))
  const noBits = 2 ** config.actions
  for (let t = 0; t < T; t++) {
    const bits = history.actions[t]!
    if (bits < 0 || bits >= noBits) refuseBits(t)
    actionBits[2 * t] = bits
  }
  if (fusion === 'add') actions.fill(-1n, B * C + T)

  const supervised = rowsWithWeight(targets.historyWeights, T, K)
  const H = supervised.length
  const [predicted, states, groups] = [new BigInt64Array(H + M), new BigInt64Array(H + B), new BigInt64Array(H + B + 1)]
  const Floats = options.dtype === 'float64' ? Float64Array : Float32Array
  const [labels, weights] = [new Floats((H + M) * K), new Floats((H + M) * K)]
  const [tokens, predictedWords] = [wordsOf(layout.historyTokens), wordsOf(predicted)]
  const [stateWords, groupWords] = [wordsOf(states), wordsOf(groups)]
  for (let row = 0, b = 0, end = 0, factor = 1; row < H; row++) {
    const t = supervised[row]!
    for (; t >= end; b++) [end, factor] = [Number(history.offsets[b + 1]!), historyWeight?.[b] ?? 1]
    predictedWords[2 * row] = tokens[2 * t]!
    stateWords[2 * row] = tokens[2 * t]! - 1 // there is a token in front: the user's
    groupWords[2 * row + 2] = row + 1
    for (let k = 0; k < K; k++) {
      labels[row * K + k] = targets.historyLabels[t * K + k]!
      weights[row * K + k] = targets.historyWeights[t * K + k]! * factor
    }
  }
  predicted.set(layout.candidateTokens, H)
  for (let r = 0; r < B; r++) {
    states[H + r] = layout.seqOffsets[r + 1]! - BigInt(layout.numTargets[r]! + 1)
    groups[H + r + 1] = BigInt(H) + candidates.offsets[r + 1]!
  }
  labels.set(targets.labels, H * K)
  weights.set(targets.weights, H * K)

  const times = toDevice(layout.times, options)
  const floats = (data: Float32Array | Float64Array) =>
    Tensor.from(data, [H + M, K], { device: options.device ?? 'cpu' })
  return {
    inputs: {
      ...{ seqOffsets: toDevice(layout.seqOffsets, options), times, queryTimes: times, maxSeqLen: layout.maxSeqLen },
      ...{ numTargets: toDevice(layout.numTargets, options), contextual: C, supervisedHistory: H },
      ids: toDevice(ids, options),
      actions: toDevice(actions, options),
      source: toDevice(source, options),
      positions: config.positions ? toDevice(positionsOf(layout, config.positions), options) : null,
      predicted: toDevice(predicted, options),
      states: toDevice(states, options),
      groups: toDevice(groups, options),
    },
    labels: floats(labels),
    weights: floats(weights),
  }

  function refuseBits(t: number): never {
    const bits = history.actions[t]
    throw new HstuError(
      'ERR_HSTU_DATA',
      `history row ${t} has action bits ${bits}, the model ${config.actions} actions`,
    )
  }

  /** Row of the table, or key, of every contextual, history and candidate row. */
  function contentIds({ users, contextual }: RequestBatch, of: GenerativeRankerConfig): BigInt64Array {
    const all = new BigInt64Array(B * C + T + M)
    const sizes = vocabularySizes(of)
    const names = ['user', ...schema.contextual, 'item', ...schema.series]
    const last = sizes.map(size => (of.embeddings === 'hash' ? LARGEST_KEY : BigInt(size)))
    const [bases, most] = [vocabularyBases(of), last].map(numbers => wordsOf(BigInt64Array.from(numbers)))
    const words = wordsOf(all)
    let row = 0
    /** Entry `at` of the numbers `from`, of vocabulary f. */
    const put = (f: number, from: Int32Array, at: number) => {
      const [low, high] = [from[2 * at]!, from[2 * at + 1]!]
      const [lowMost, highMost] = [most![2 * f]!, most![2 * f + 1]!]
      const fits = high < highMost || (high === highMost && low >>> 0 <= lowMost >>> 0)
      if (f >= sizes.length || high < 0 || !fits) refuse(f, from, at)
      const sum = (low >>> 0) + (bases![2 * f]! >>> 0)
      words[2 * row] = sum
      words[2 * row++ + 1] = high + bases![2 * f + 1]! + (sum >= 2 ** 32 ? 1 : 0)
    }
    const item = C
    const [user, feature] = [wordsOf(vocabulary.users === 0 ? new BigInt64Array(B) : users), wordsOf(contextual)]
    for (let r = 0; r < B; r++) {
      put(0, user, r)
      for (let c = 1; c < C; c++) put(c, feature, r * (C - 1) + c - 1)
    }
    const [past, shown] = [wordsOf(history.items), wordsOf(candidates.items)]
    for (let t = 0; t < T; t++) put(item + history.series[t]!, past, t)
    for (let m = 0; m < M; m++) put(item, shown, m)
    return all

    function refuse(f: number, from: Int32Array, at: number): never {
      const number = new BigInt64Array(from.buffer, from.byteOffset)[at]
      throw new HstuError(
        'ERR_HSTU_DATA',
        f >= sizes.length
          ? `a history row is of series ${f - item}, the records have ${sizes.length - 1 - item}`
          : `${names[f]} number ${number} is not in the model's 0 .. ${last[f]}`,
      )
    }
  }
}

/** Rows with any weight above 0. */
function rowsWithWeight(weights: Float32Array, T: number, K: number): Int32Array {
  const rows = new Int32Array(T)
  let count = 0
  for (let t = 0; t < T; t++) {
    let any = false
    for (let k = 0; k < K; k++) any ||= weights[t * K + k]! > 0
    rows[count] = t
    count += any ? 1 : 0
  }
  return rows.subarray(0, count)
}

/** min(index in the request, h): all candidates share the position behind the history. */
function positionsOf({ seqOffsets, numTargets }: ReturnType<typeof tokenLayout>, rows: number): BigInt64Array {
  const positions = new BigInt64Array(Number(seqOffsets.at(-1)!))
  const words = wordsOf(positions)
  for (let b = 0; b < numTargets.length; b++) {
    const [first, end] = [Number(seqOffsets[b]!), Number(seqOffsets[b + 1]!)]
    const h = end - first - numTargets[b]!
    check(h < rows, 'ERR_HSTU_SHAPE', () => {
      return `a request has ${h} tokens before its candidates, the position table ${rows} rows: lower maxHistory`
    })
    for (let n = first; n < end; n++) words[2 * n] = Math.min(n - first, h)
  }
  return positions
}

function checkSchema({ schema }: RequestBatch, { vocabulary, actions }: GenerativeRankerConfig): void {
  const same = (name: string, found: number, wanted: number) =>
    check(found === wanted, 'ERR_HSTU_DATA', () => `the records have ${found} ${name}, the model ${wanted}`)
  same('actions', schema.actions.length, actions)
  same('contextual features', schema.contextual.length, vocabulary.contextual.length)
  same('auxiliary series', schema.series.length, vocabulary.series.length)
}
