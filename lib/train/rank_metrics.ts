import type { RequestBatch, TaskTargets } from '../data/ranking/schema.js'
import { HstuError } from '../errors.js'
import {
  type BinaryMetrics,
  binaryMetrics,
  StreamingMetrics,
  type StreamingMetricsState,
} from '../eval/ranking_metrics.js'
import type { RankerTask } from '../models/generative_ranker.js'
import type { HostTensor } from './safetensors.js'

/** Of a regression task over impressions; NaN where there are none. */
export interface RegressionMetrics {
  weight: number
  mse: number
  mae: number
}

/** By the names of the tasks. */
export type TaskMetrics = Record<string, BinaryMetrics | RegressionMetrics>

/** Plain JSON beside the tensors of a checkpoint: one entry a binary task. */
export type RankMetricsState = StreamingMetricsState[]

/**
 * Metrics of a ranker's predictions over a stream, task by task: over the last impressions and for life in fixed memory, and exactly over
 * the counted part, whose predictions are kept.
 */
export class RankMetrics {
  readonly #streams: (StreamingMetrics | null)[]
  #counted = { logits: [] as number[], labels: [] as number[], weights: [] as number[] } // [M, K] each
  #users: bigint[] = []
  #requests: bigint[] = []

  /** @param window impressions of `windowed` */
  constructor(
    readonly tasks: readonly RankerTask[],
    readonly window: number,
  ) {
    this.#streams = tasks.map(task => (task.kind === 'binary' ? new StreamingMetrics(window) : null))
  }

  /**
   * Adds a batch that was predicted before it was learnt from.
   * @param logits [M, K]
   * @param counted whether it belongs to the counted part
   */
  update(batch: RequestBatch, { labels, weights }: TaskTargets, logits: ArrayLike<number>, counted: boolean): void {
    const { requestIndex } = batch.candidates
    const K = this.tasks.length
    const requests = Array.from(requestIndex, b => batch.requests[Number(b)]!)
    this.#streams.forEach((stream, k) => {
      const column = (of: ArrayLike<number>) => requests.map((_, m) => of[m * K + k]!)
      stream?.update(column(logits), column(labels), column(weights), requests)
    })
    if (!counted) return
    for (let i = 0; i < requests.length * K; i++) {
      this.#counted.logits.push(logits[i]!)
      this.#counted.labels.push(labels[i]!)
      this.#counted.weights.push(weights[i]!)
    }
    for (const b of requestIndex) {
      this.#users.push(batch.users[Number(b)]!)
      this.#requests.push(BigInt(batch.requests[Number(b)]!))
    }
  }

  /** Of the binary tasks, over the last `window` impressions. */
  windowed(): Record<string, BinaryMetrics> {
    return this.#binary(stream => stream.windowed())
  }

  /** Of the binary tasks, over all impressions so far. */
  lifetime(): Record<string, BinaryMetrics> {
    return this.#binary(stream => stream.lifetime())
  }

  #binary(of: (stream: StreamingMetrics) => BinaryMetrics): Record<string, BinaryMetrics> {
    const streams = this.#streams.map((stream, k) => [this.tasks[k]!.name, stream] as const)
    return Object.fromEntries(streams.flatMap(([name, stream]) => (stream ? [[name, of(stream)]] : [])))
  }

  /** Of all tasks over the counted part, exactly. */
  counted(gaucBy: 'request' | 'user'): TaskMetrics {
    const K = this.tasks.length
    const groups = gaucBy === 'user' ? this.#users : this.#requests
    const metrics = this.tasks.map((task, k) => {
      const column = (of: readonly number[]) => groups.map((_, m) => of[m * K + k]!)
      const [logits, labels, weights] = [this.#counted.logits, this.#counted.labels, this.#counted.weights].map(column)
      const own =
        task.kind === 'binary'
          ? binaryMetrics(logits!, labels!, weights!, groups)
          : regressionMetrics(logits!, labels!, weights!)
      return [task.name, own] as const
    })
    return Object.fromEntries(metrics)
  }

  /** Everything needed to go on exactly. */
  state(): { json: RankMetricsState; tensors: Record<string, HostTensor> } {
    const K = this.tasks.length
    const floats = (values: readonly number[]): HostTensor => {
      return { dtype: 'float64', shape: [values.length / K, K], data: Float64Array.from(values) }
    }
    const ids = (values: readonly bigint[]): HostTensor => {
      return { dtype: 'int64', shape: [values.length], data: BigInt64Array.from(values) }
    }
    const { logits, labels, weights } = this.#counted
    return {
      json: this.#streams.flatMap(stream => (stream ? [stream.state()] : [])),
      tensors: {
        ...{ logits: floats(logits), labels: floats(labels), weights: floats(weights) },
        ...{ users: ids(this.#users), requests: ids(this.#requests) },
      },
    }
  }

  /** Goes on from a state taken earlier. @throws HstuError ERR_HSTU_CHECKPOINT where it is of other tasks. */
  restore(json: RankMetricsState, tensors: ReadonlyMap<string, HostTensor>): void {
    const streams = this.#streams.filter(stream => stream !== null)
    const data = (name: string) => tensors.get(name)?.data
    const M = data('requests')?.length ?? -1
    const whole = (['logits', 'labels', 'weights'] as const).every(name => data(name)?.length === M * this.tasks.length)
    if (json.length !== streams.length || data('users')?.length !== M || !whole)
      throw new HstuError('ERR_HSTU_CHECKPOINT', `the metrics are not those of ${this.tasks.length} tasks`)
    streams.forEach((stream, k) => {
      stream.setState(json[k]!)
    })
    const numbers = (name: string) => Array.from(data(name) as Float64Array)
    this.#counted = { logits: numbers('logits'), labels: numbers('labels'), weights: numbers('weights') }
    this.#users = Array.from(data('users') as BigInt64Array)
    this.#requests = Array.from(data('requests') as BigInt64Array)
  }
}

function regressionMetrics(values: number[], labels: number[], weights: number[]): RegressionMetrics {
  let [weight, squares, distances] = [0, 0, 0]
  values.forEach((value, m) => {
    if (weights[m] === 0) return
    weight += weights[m]!
    squares += weights[m]! * (value - labels[m]!) ** 2
    distances += weights[m]! * Math.abs(value - labels[m]!)
  })
  return { weight, mse: squares / weight, mae: distances / weight }
}
