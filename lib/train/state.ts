import { createHash } from 'node:crypto'
import type { SequenceDataset } from '../data/dataset.js'
import { HstuError } from '../errors.js'
import type { Metrics } from '../eval/metrics.js'
import type { ModelSpec } from '../models/create.js'
import type { Tensor, TensorOptions } from '../tensor.js'
import type { TrainOptions } from './options.js'
import type { HostTensor } from './safetensors.js'

/** Where a run stands; plain JSON, kept in checkpoints. */
export interface TrainState {
  /** Epochs completed. */
  epoch: number
  /** Batches done of the epoch that is under way. */
  batch: number
  step: number
  /** Of the epoch that is under way. */
  lossSum: number
  /** Evaluations since the best one. */
  badEvaluations: number
  best: { epoch: number; metrics: Metrics } | null
  /** One entry an epoch: mean loss, and the metrics where it ended with an evaluation. */
  history: { epoch: number; step: number; loss: number; metrics: Metrics | null }[]
  /** Time spent so far, over all sessions. */
  seconds: number
  /** Stopped early. */
  done: boolean
}

/** Where a run begins. */
export function newState(): TrainState {
  return {
    ...{ epoch: 0, batch: 0, step: 0, lossSum: 0, badEvaluations: 0 },
    ...{ best: null, history: [], seconds: 0, done: false },
  }
}

/** The JSON of a training checkpoint. */
export interface SavedRun {
  model: ModelSpec
  options: TrainOptions
  state: TrainState
  philoxOffset: string
  dataset: { fingerprint: string; name: string }
  tensors: TensorOptions
}

/** Parameters by name, on the host. */
export type HostTensors = Map<string, HostTensor>

export function hostCopies(tensors: Record<string, Tensor>): HostTensors {
  const copy = (tensor: Tensor) => ({ dtype: tensor.dtype, shape: tensor.shape, data: tensor.dataSync() })
  return new Map(Object.entries(tensors).map(([name, tensor]) => [name, copy(tensor)]))
}

/** Hash of what a run depends on: who did what in which order, when, and what the items are called. */
export function fingerprint(dataset: SequenceDataset): string {
  const hash = createHash('sha256').update(dataset.offsets).update(dataset.items)
  if (dataset.times) hash.update(dataset.times)
  return hash.update(dataset.itemIds.join('\n')).digest('hex')
}

/** Runs `read`; what it throws beside an HstuError is about content that a checkpoint's hashes cannot vouch for. */
export async function fromCheckpoint<T>(folder: string, read: () => Promise<T>): Promise<T> {
  try {
    return await read()
  } catch (cause) {
    if (cause instanceof HstuError) throw cause
    const reason = cause instanceof Error ? cause.message : String(cause)
    throw new HstuError('ERR_HSTU_CHECKPOINT', `${folder}: the manifest does not hold what it should: ${reason}`, {
      cause,
    })
  }
}
