import type { RequestBatch, TaskTargets } from '../data/ranking/schema.js'
import { HstuError } from '../errors.js'
import { CountedMetrics, type CountedState, type KeptRows, type RegressionMetrics } from '../eval/counted_metrics.js'
import { type BinaryMetrics, StreamingMetrics, type StreamingMetricsState } from '../eval/ranking_metrics.js'
import type { RankerTask } from '../models/generative_ranker.js'
import type { HostTensor } from './safetensors.js'

export type { RegressionMetrics } from '../eval/counted_metrics.js'

/** By the names of the tasks. */
export type TaskMetrics = Record<string, BinaryMetrics | RegressionMetrics>

/** Plain JSON beside the tensors of a checkpoint: `streams` has one entry a binary task. */
export interface RankMetricsState {
  streams: StreamingMetricsState[]
  counted: CountedState
}

/** Metrics of a ranker's predictions task by task, in bounded memory: over the last impressions, for life, and over the counted part. */
export class RankMetrics {
  readonly #streams: (StreamingMetrics | null)[]
  readonly #counted: CountedMetrics

  /**
   * @param window impressions of `windowed`
   * @param gaucBy what GAUC of the counted part groups by
   * @param keep see `CountedMetrics`
   */
  constructor(
    readonly tasks: readonly RankerTask[],
    readonly window: number,
    readonly gaucBy: 'request' | 'user' = 'request',
    keep?: number,
  ) {
    this.#streams = tasks.map(task => (task.kind === 'binary' ? new StreamingMetrics(window) : null))
    const kinds = tasks.map(task => task.kind)
    this.#counted = new CountedMetrics(kinds, gaucBy, keep)
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
    const groupOf = (b: number) => (this.gaucBy === 'user' ? batch.users[b]! : BigInt(batch.requests[b]!))
    const groups = BigInt64Array.from(requestIndex, b => groupOf(Number(b)))
    this.#counted.update(logits, labels, weights, groups)
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

  /** Of all tasks over the counted part. */
  counted(): TaskMetrics {
    return Object.fromEntries(this.#counted.metrics().map((metrics, k) => [this.tasks[k]!.name, metrics]))
  }

  /** Everything needed to go on exactly. */
  state(): { json: RankMetricsState; tensors: Record<string, HostTensor> } {
    const { json, rows } = this.#counted.state()
    const tensor = (dtype: HostTensor['dtype'], data: HostTensor['data']) => ({ dtype, shape: [data.length], data })
    return {
      json: { streams: this.#streams.flatMap(stream => (stream ? [stream.state()] : [])), counted: json },
      tensors: {
        ...{ logits: tensor('float64', rows.logits), labels: tensor('float32', rows.labels) },
        ...{ weights: tensor('float32', rows.weights), groups: tensor('int64', rows.groups) },
      },
    }
  }

  /** Goes on from a state taken earlier. @throws HstuError ERR_HSTU_CHECKPOINT where it is of other tasks. */
  restore({ streams: saved, counted }: RankMetricsState, tensors: ReadonlyMap<string, HostTensor>): void {
    const streams = this.#streams.filter(stream => stream !== null)
    if (saved?.length !== streams.length)
      throw new HstuError('ERR_HSTU_CHECKPOINT', `the metrics are not those of ${this.tasks.length} tasks`)
    streams.forEach((stream, k) => {
      stream.setState(saved[k]!)
    })
    const names = ['logits', 'labels', 'weights', 'groups'] as const
    const rows = Object.fromEntries(names.map(name => [name, tensors.get(name)?.data]))
    this.#counted.setState(counted, rows as unknown as KeptRows)
  }
}
