import type { SequenceInputs } from '../layers/inputs.js'
import { Tensor, type TensorOptions, type TypedArray } from '../tensor.js'
import type { Batch } from './batch.js'

/** A host array as a tensor on the model's device, [length]. */
export function toDevice(data: TypedArray, { device }: TensorOptions = {}): Tensor {
  return Tensor.from(data, [data.length], device ? { device } : {})
}

/** Copies a batch to the model's device. The tensors belong to the current scope. */
export function toInputs(batch: Batch, options: TensorOptions = {}): SequenceInputs {
  return {
    ids: toDevice(batch.ids, options),
    seqOffsets: toDevice(batch.offsets, options),
    times: batch.times && toDevice(batch.times, options),
    queryTimes: batch.queryTimes && toDevice(batch.queryTimes, options),
    maxSeqLen: batch.maxLength,
  }
}

/** Targets and weights of a batch as tensors; weights in float64 where the model is. */
export function toTargets(batch: Batch, options: TensorOptions = {}): { targets: Tensor; weights: Tensor } {
  const weights = options.dtype === 'float64' ? Float64Array.from(batch.weights) : batch.weights
  return { targets: toDevice(batch.targets, options), weights: toDevice(weights, options) }
}
