import type { SequenceInputs } from '../layers/inputs.js'
import { Tensor, type TensorOptions } from '../tensor.js'
import type { Batch } from './batch.js'

/** Copies a batch to the model's device. The tensors belong to the current scope. */
export function toInputs(batch: Batch, options: TensorOptions = {}): SequenceInputs {
  const device = options.device ? { device: options.device } : {}
  return {
    ids: Tensor.from(batch.ids, [batch.ids.length], device),
    seqOffsets: Tensor.from(batch.offsets, [batch.offsets.length], device),
    times: batch.times && Tensor.from(batch.times, [batch.times.length], device),
    queryTimes: batch.queryTimes && Tensor.from(batch.queryTimes, [batch.queryTimes.length], device),
    maxSeqLen: batch.maxLength,
  }
}

/** Targets and weights of a batch as tensors; weights in the model's dtype. */
export function toTargets(batch: Batch, options: TensorOptions = {}): { targets: Tensor; weights: Tensor } {
  const device = options.device ? { device: options.device } : {}
  const weights = options.dtype === 'float64' ? Float64Array.from(batch.weights) : batch.weights
  return { targets: Tensor.from(batch.targets, [batch.targets.length], device), weights: Tensor.from(weights, [weights.length], device) }
}
