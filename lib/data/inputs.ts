import { HstuError } from '../errors.js'
import type { SequenceInputs } from '../layers/inputs.js'
import { Tensor, type TensorOptions, type TypedArray } from '../tensor.js'
import type { Batch } from './batch.js'

/** A host array as a tensor on the model's device, [length]. */
export function toDevice(data: TypedArray, { device }: TensorOptions = {}): Tensor {
  return Tensor.from(data, [data.length], device ? { device } : {})
}

/** Before ids are copied: on a GPU one outside the item table is found under HSTU_DEBUG=1 alone. */
export function checkIds(what: string, ids: BigInt64Array, numItems: number): void {
  const words = new Int32Array(ids.buffer, ids.byteOffset, 2 * ids.length) // low word, high word: no bigint an id
  for (let t = 0; t < ids.length; t++)
    if (words[2 * t + 1] !== 0 || words[2 * t]! >>> 0 > numItems)
      throw new HstuError(
        'ERR_HSTU_INVALID_ARGUMENT',
        `${what}[${t}] is ${ids[t]}, the model has items 1 to ${numItems}`,
      )
}

/** What a model reads of a batch. */
export type BatchRows = Pick<Batch, 'ids' | 'offsets' | 'times' | 'queryTimes' | 'maxLength'>

/**
 * Copies a batch to the model's device. The tensors belong to the current scope.
 * @param numItems of the model; without it ids are not checked
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT that names the first id outside 0 .. numItems.
 */
export function toInputs(batch: BatchRows, options: TensorOptions = {}, numItems?: number): SequenceInputs {
  if (numItems !== undefined) checkIds('batch.ids', batch.ids, numItems)
  return {
    ids: toDevice(batch.ids, options),
    seqOffsets: toDevice(batch.offsets, options),
    times: batch.times && toDevice(batch.times, options),
    queryTimes: batch.queryTimes && toDevice(batch.queryTimes, options),
    maxSeqLen: batch.maxLength,
  }
}

/**
 * Targets and weights of a batch as tensors; weights in float64 where the model is.
 * @param numItems as for {@link toInputs}
 * @throws HstuError as {@link toInputs}.
 */
export function toTargets(
  batch: Batch,
  options: TensorOptions = {},
  numItems?: number,
): { targets: Tensor; weights: Tensor } {
  if (numItems !== undefined) checkIds('batch.targets', batch.targets, numItems)
  const weights = options.dtype === 'float64' ? Float64Array.from(batch.weights) : batch.weights
  return { targets: toDevice(batch.targets, options), weights: toDevice(weights, options) }
}
