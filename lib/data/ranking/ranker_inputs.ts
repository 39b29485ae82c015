import { check } from '../../errors.js'
import { type GenerativeRankerConfig, type RankerInputs, vocabularySizes } from '../../models/generative_ranker.js'
import { Tensor, type TensorOptions } from '../../tensor.js'
import { toDevice } from '../inputs.js'
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
  const rows = new Int32Array(source.buffer) // low word, high word
  const [actionRows, candidateRows] = [B * C + T, B * C + 2 * T]
  if (fusion === 'interleave')
    for (let n = 0; n < rows.length; n += 2)
      if (rows[n]! >= candidateRows) rows[n]! -= T
      else if (rows[n]! >= actionRows) rows[n]! += M
  const actions = new BigInt64Array(fusion === 'interleave' ? T : B * C + T + M).fill(0n)
  const before = actions.length === T ? 0 : B * C
  for (let t = 0; t < T; t++) {
    const bits = history.actions[t]!
    const known = bits >= 0 && bits < 2 ** config.actions
    check(known, 'ERR_HSTU_DATA', () => `history row ${t} has action bits ${bits}, the model ${config.actions} actions`)
    actions[before + t] = BigInt(bits)
  }
  if (fusion === 'add') actions.fill(-1n, B * C + T)

  const supervised: number[] = []
  for (let t = 0; t < T; t++)
    for (let k = 0; k < K; k++)
      if (targets.historyWeights[t * K + k]! > 0) {
        supervised.push(t)
        break
      }
  const H = supervised.length
  const [predicted, states, groups] = [new BigInt64Array(H + M), new BigInt64Array(H + B), new BigInt64Array(H + B + 1)]
  const [labels, weights] = [new Float64Array((H + M) * K), new Float64Array((H + M) * K)]
  let b = 0
  supervised.forEach((t, row) => {
    while (t >= Number(history.offsets[b + 1]!)) b++
    predicted[row] = layout.historyTokens[t]!
    states[row] = layout.historyTokens[t]! - 1n
    groups[row + 1] = BigInt(row + 1)
    for (let k = 0; k < K; k++) {
      labels[row * K + k] = targets.historyLabels[t * K + k]!
      weights[row * K + k] = targets.historyWeights[t * K + k]! * (historyWeight?.[b] ?? 1)
    }
  })
  predicted.set(layout.candidateTokens, H)
  for (let r = 0; r < B; r++) {
    states[H + r] = layout.seqOffsets[r + 1]! - BigInt(layout.numTargets[r]! + 1)
    groups[H + r + 1] = BigInt(H) + candidates.offsets[r + 1]!
  }
  labels.set(targets.labels, H * K)
  weights.set(targets.weights, H * K)

  const times = toDevice(layout.times, options)
  const floats = (data: Float64Array) =>
    Tensor.from(options.dtype === 'float64' ? data : Float32Array.from(data), [H + M, K], {
      device: options.device ?? 'cpu',
    })
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

  /** Row of the table, or key, of every contextual, history and candidate row. */
  function contentIds({ users, contextual }: RequestBatch, of: GenerativeRankerConfig): BigInt64Array {
    const all = new BigInt64Array(B * C + T + M)
    const hash = of.embeddings === 'hash'
    const sizes = vocabularySizes(of)
    const names = ['user', ...schema.contextual, 'item', ...schema.series]
    const bases: bigint[] = []
    sizes.reduce((sum, size, f) => {
      bases.push(hash ? BigInt(f) << KEY_BITS : BigInt(sum))
      return sum + size + 1
    }, 0)
    const most = sizes.map(BigInt)
    let row = 0
    const put = (f: number, number: bigint) => {
      check(
        f < sizes.length,
        'ERR_HSTU_DATA',
        () => `a history row is of series ${f - item}, the records have ${sizes.length - 1 - item}`,
      )
      const last = hash ? LARGEST_KEY : most[f]!
      check(number >= 0n && number <= last, 'ERR_HSTU_DATA', () => {
        return `${names[f]} number ${number} is not in the model's 0 .. ${last}`
      })
      all[row++] = bases[f]! + number
    }
    const item = C
    for (let r = 0; r < B; r++) {
      put(0, vocabulary.users === 0 ? 0n : users[r]!)
      for (let c = 1; c < C; c++) put(c, contextual[r * (C - 1) + c - 1]!)
    }
    for (let t = 0; t < T; t++) put(item + history.series[t]!, history.items[t]!)
    for (let m = 0; m < M; m++) put(item, candidates.items[m]!)
    return all
  }
}

/** min(index in the request, h): all candidates share the position behind the history. */
function positionsOf({ seqOffsets, numTargets }: ReturnType<typeof tokenLayout>, rows: number): BigInt64Array {
  const positions = new BigInt64Array(Number(seqOffsets.at(-1)!))
  for (let b = 0; b < numTargets.length; b++) {
    const [first, end] = [Number(seqOffsets[b]!), Number(seqOffsets[b + 1]!)]
    const h = end - first - numTargets[b]!
    check(h < rows, 'ERR_HSTU_SHAPE', () => {
      return `a request has ${h} tokens before its candidates, the position table ${rows} rows: lower maxHistory`
    })
    for (let n = first; n < end; n++) positions[n] = BigInt(Math.min(n - first, h))
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
