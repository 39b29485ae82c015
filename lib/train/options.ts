import type { FilterSeen } from '../data/batch.js'
import type { TrainPart } from '../data/split.js'
import { HstuError } from '../errors.js'
import { type Precision, precisions } from '../layers/precision.js'
import type { NextItemLossOptions } from '../losses/next_item.js'
import type { AdamWOptions } from '../optim/adamw.js'
import type { ScheduleOptions } from '../optim/schedule.js'

/** How a model is trained; plain JSON, kept in checkpoints. */
export interface TrainOptions extends Required<NextItemLossOptions>, Required<AdamWOptions>, Required<ScheduleOptions> {
  /**
   * What the model computes in, training and evaluation alike: 'float32' (default) or 'bf16' (CUDA). Parameters, gradients, optimiser
   * state and checkpoints are float32 either way.
   */
  precision: Precision
  /**
   * On CUDA, run forward and backward of a step as one CUDA graph: default true. Of HSTU models, with negatives 'uniform' or 'full';
   * others, and the CPU, run op by op either way. Batches are then padded, to a few shapes; draws are the same ones.
   */
  cudaGraphs: boolean
  epochs: number
  /** Users a step. */
  batchSize: number
  /** Of the initial weights, the shuffles, the dropouts and the negatives. */
  seed: number
  /** Which actions are trained on; 'valid' (default) holds out two a user, 'paper' one, 'all' none. */
  part: TrainPart
  /** Draw a new order of users each epoch. Default true; false for a stream that is to be read in order. */
  shuffle: boolean
  /** Epochs between evaluations; 0: none. Under 'valid' on the validation action, under 'paper' on the test action. */
  evaluateEvery: number
  /** Stop after this many evaluations without a better NDCG@10; 0: never. */
  patience: number
  filterSeen: FilterSeen
  /** Steps between checkpoints, beside those at the end of evaluations; 0: none. */
  checkpointEvery: number
}

const defaults: TrainOptions = {
  ...{ epochs: 101, batchSize: 128, seed: 0, part: 'valid', shuffle: true },
  ...{ evaluateEvery: 1, patience: 0, filterSeen: 'history', checkpointEvery: 500 },
  ...{ negatives: 'uniform', numNegatives: 128, temperature: 0.05, precision: 'float32', cudaGraphs: true },
  ...{
    lr: 1e-3,
    betas: [0.9, 0.98],
    eps: 1e-8,
    weightDecay: 0,
    clipNorm: 0,
    warmupSteps: 0,
    schedule: 'constant',
    finalShare: 0,
  },
}

/**
 * Fills in the defaults and checks every value.
 * @throws HstuError ERR_HSTU_INVALID_ARGUMENT naming the option, its value and what is allowed.
 */
export function trainOptions(options: Partial<TrainOptions>): TrainOptions {
  const all = { ...defaults, ...options }
  const fail = (name: keyof TrainOptions, wanted: string): never => {
    throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', `${name} must be ${wanted}, got ${JSON.stringify(all[name])}`)
  }
  for (const name of Object.keys(options) as (keyof TrainOptions)[])
    if (!(name in defaults)) {
      throw new HstuError(
        'ERR_HSTU_INVALID_ARGUMENT',
        `unknown training option '${name}'. Options: ${Object.keys(defaults).join(', ')}`,
      )
    }
  for (const name of ['epochs', 'batchSize', 'numNegatives'] as const)
    if (!Number.isInteger(all[name]) || all[name] < 1) fail(name, 'a positive integer')
  for (const name of ['evaluateEvery', 'patience', 'checkpointEvery', 'warmupSteps', 'seed'] as const)
    if (!Number.isSafeInteger(all[name]) || all[name] < 0) fail(name, 'a non-negative integer')
  for (const name of ['lr', 'temperature', 'eps'] as const)
    if (!(all[name] > 0 && all[name] < Infinity)) fail(name, 'a positive number')
  for (const name of ['weightDecay', 'clipNorm'] as const)
    if (!(all[name] >= 0 && all[name] < Infinity)) fail(name, 'a non-negative number')
  if (all.betas.length !== 2 || !all.betas.every(beta => beta >= 0 && beta < 1)) fail('betas', 'two numbers in [0, 1)')
  if (!(all.finalShare >= 0 && all.finalShare <= 1)) fail('finalShare', 'in 0 .. 1')
  const oneOf = (name: keyof TrainOptions, values: readonly string[]) => {
    if (!values.includes(all[name] as string)) fail(name, `one of ${values.join(', ')}`)
  }
  oneOf('part', ['valid', 'paper', 'all'])
  oneOf('schedule', ['constant', 'cosine'])
  oneOf('negatives', ['uniform', 'in-batch', 'full'])
  oneOf('filterSeen', ['history', 'all', 'none'])
  oneOf('precision', precisions)
  if (typeof all.cudaGraphs !== 'boolean') fail('cudaGraphs', 'true or false')
  return all
}
