import { valueAndGrad } from '../autograd.js'
import { type Batch, trainBatch } from '../data/batch.js'
import type { SequenceDataset } from '../data/dataset.js'
import { toDevice, toInputs, toTargets } from '../data/inputs.js'
import { HstuError } from '../errors.js'
import { inBatchNegatives, nextItemLoss } from '../losses/next_item.js'
import type { AnySequenceModel } from '../models/create.js'
import type { AdamW } from '../optim/adamw.js'
import type { Philox } from '../philox.js'
import { scope } from '../tensor.js'
import type { TrainOptions } from './options.js'
import type { LossAndGrads, StepGraphs } from './step_graphs.js'

/** What a step reads and changes. */
export interface StepParts {
  dataset: SequenceDataset
  model: AnySequenceModel
  optimizer: AdamW
  philox: Philox
  options: TrainOptions
  /** Null: forward and backward are run op by op. */
  graphs: StepGraphs | null
}

/** An optimiser step that was put on the device's queue. */
export interface StepHandle {
  /** Its number, from 1. */
  step: number
  /** Tokens that went through the model. */
  tokens: number
  lr: number
  /** Once the device has come to it. Rejects with ERR_HSTU_INVALID_ARGUMENT where it is not finite. */
  loss: Promise<number>
}

/**
 * Puts step number `step` on the queue: batch, forward, backward, update. Nothing waits for the device, which runs the step before
 * while the host prepares this one; the loss alone is read back. What fails on the way has changed nothing: neither parameters nor
 * moments nor the position of the draws.
 * @throws HstuError ERR_HSTU_OUT_OF_MEMORY naming the step and its size, and whatever an op throws.
 */
export function enqueueStep(parts: StepParts, users: ArrayLike<number>, step: number, lr: number): StepHandle {
  const { dataset, model, optimizer, philox, options, graphs } = parts
  const batch = trainBatch(dataset, users, { maxLength: model.config.maxLength, protocol: options.part })
  const tokens = batch.ids.length
  const { offset } = philox
  try {
    return scope(() => {
      const { value, grads } = graphs?.run(batch, philox) ?? lossAndGrads(parts, batch)
      optimizer.step(grads, lr)
      const loss = value.data().then(data => finite(Number(data[0]), step))
      loss.catch(() => {}) // told to who awaits it
      return { step, tokens, lr, loss }
    })
  } catch (error) {
    philox.offset = offset
    if (!(error instanceof HstuError && error.code === 'ERR_HSTU_OUT_OF_MEMORY')) throw error
    const size = `${users.length} users, ${tokens} tokens`
    const message = `step ${step} (${size}) was abandoned, nothing has changed; lower batchSize: ${error.message}`
    throw new HstuError('ERR_HSTU_OUT_OF_MEMORY', message, { cause: error })
  }
}

function lossAndGrads({ model, philox, options }: StepParts, batch: Batch): LossAndGrads {
  const inputs = toInputs(batch, model.options, model.config.numItems)
  const { targets, weights } = toTargets(batch, model.options, model.config.numItems)
  const inBatch = options.negatives === 'in-batch'
  const negativeIds = inBatch ? toDevice(inBatchNegatives(batch.targets), model.options) : null
  return valueAndGrad(model.parameters, () => {
    const output = model.forward(inputs, philox)
    return nextItemLoss(output, model.parameters.items!, targets, weights, philox, options, negativeIds)
  })
}

function finite(loss: number, step: number): number {
  const advice = `loss became ${loss} at step ${step}: lower lr or set clipNorm`
  if (!Number.isFinite(loss)) throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', advice)
  return loss
}
