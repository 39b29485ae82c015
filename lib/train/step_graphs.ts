import { valueAndGrad } from '../autograd.js'
import type { Batch } from '../data/batch.js'
import { checkIds } from '../data/inputs.js'
import { check, HstuError } from '../errors.js'
import { captureGraph, type Graph } from '../graph.js'
import { nextItemLoss } from '../losses/next_item.js'
import type { AnySequenceModel } from '../models/create.js'
import { native } from '../native.js'
import type { Draws, Philox, PhiloxPosition } from '../philox.js'
import { Tensor, unscoped } from '../tensor.js'
import type { TrainOptions } from './options.js'

/** Rows and sequences of a padded batch. */
export interface PaddedShape {
  rows: number
  sequences: number
}

/**
 * What a batch is padded to: rows in steps of an eighth of their power of two (at least 64), so that batches of nearly the same size
 * have one shape; and as many sequences more as the added rows may need.
 */
export function paddedShape(tokens: number, sequences: number, maxLength: number): PaddedShape {
  const step = Math.max(64, 2 ** (Math.floor(Math.log2(tokens)) - 3))
  const rows = Math.ceil(tokens / step) * step
  return { rows, sequences: sequences + Math.ceil(Math.max(64, rows / 8) / maxLength) }
}

/** The int64 arrays of a padded batch, and where its draws begin. */
interface Fields<A> {
  ids: A
  targets: A
  times: A
  queryTimes: A
  offsets: A
  positions: A
}

/** Cuts one array into the fields. */
function cut<A>(lengths: Fields<number>, part: (begin: number, length: number) => A): Fields<A> {
  let end = 0
  const take = (length: number) => part((end += length) - length, length)
  return {
    ...{ ids: take(lengths.ids), targets: take(lengths.targets) },
    ...{ times: take(lengths.times), queryTimes: take(lengths.queryTimes) },
    ...{ offsets: take(lengths.offsets), positions: take(lengths.positions) },
  }
}

/** A batch with sequences of padding behind its own, in arrays that are filled again for each batch of a shape. */
export class PaddedBatch {
  readonly lengths: Fields<number>
  /** All fields, one after the other: one copy to the device. */
  readonly words: BigInt64Array
  readonly fields: Fields<BigInt64Array>
  /** [rows], 0 on padding */
  readonly weights: Float32Array

  /**
   * @param maxLength the most rows of a sequence
   * @param draws room for the positions of so many
   */
  constructor(
    readonly shape: PaddedShape,
    readonly maxLength: number,
    readonly timed: boolean,
    draws: number,
  ) {
    const { rows, sequences } = shape
    const times = timed ? rows : 0
    this.lengths = { ids: rows, targets: rows, times, queryTimes: times, offsets: sequences + 1, positions: draws }
    this.words = new BigInt64Array(2 * rows + 2 * times + sequences + 1 + draws)
    this.fields = cut(this.lengths, (begin, length) => this.words.subarray(begin, begin + length))
    this.weights = new Float32Array(rows)
  }

  /**
   * Takes a batch over. A row of padding has item 0, time 0 and weight 0; no other sequence sees it, and without weight its gradients
   * are 0. So the step is that of the batch, but for how sums over rows are split.
   */
  fill(batch: Batch): void {
    const tokens = batch.ids.length
    for (const name of ['ids', 'targets', ...(this.timed ? (['times', 'queryTimes'] as const) : [])] as const) {
      this.fields[name].set(batch[name]!)
      this.fields[name].fill(0n, tokens)
    }
    this.weights.set(batch.weights)
    this.weights.fill(0, tokens)
    const { offsets } = this.fields
    const users = batch.offsets.length - 1
    offsets.set(batch.offsets)
    for (let s = users + 1; s < offsets.length; s++)
      offsets[s] = BigInt(Math.min(tokens + (s - users) * this.maxLength, this.shape.rows))
  }
}

/** Draws whose positions stand in the device's memory. */
class DeviceDraws implements Draws {
  /** 32-bit words a row, of each draw so far. */
  readonly wordsARow: number[] = []

  /** @param positions int64 [n], of at most n draws */
  constructor(
    readonly seed: bigint,
    readonly positions: Tensor,
    readonly rows: number,
  ) {}

  draw(count: number): PhiloxPosition {
    const n = this.wordsARow.length
    const words = count / this.rows
    check(Number.isInteger(words) && n < this.positions.size, 'ERR_HSTU_INVALID_ARGUMENT', () => {
      return `cudaGraphs: draw ${n + 1} is of ${count} words, expected ${this.positions.size} draws by rows: train without cudaGraphs`
    })
    this.wordsARow.push(words)
    return { seed: this.seed, offset: 0n, base: this.positions.rows(n, n + 1) }
  }
}

/** Loss of a batch, and the gradients of the parameters by name. */
export interface LossAndGrads {
  value: Tensor
  grads: Record<string, Tensor>
}

/** The step of one shape: its buffers, and its graph once it is captured. */
class PaddedStep {
  readonly #batch: PaddedBatch
  readonly #words: Tensor
  readonly #weights: Tensor
  graph: Graph<LossAndGrads> | null = null
  /** Of the draws of the last run. */
  wordsARow: readonly number[] = []

  constructor(
    readonly model: AnySequenceModel,
    readonly options: TrainOptions,
    readonly shape: PaddedShape,
    timed: boolean,
  ) {
    const { layers, maxLength } = model.config
    const { device = 'cpu', dtype = 'float32' } = model.options
    const batch = new PaddedBatch(shape, maxLength, timed, layers + 2)
    this.#batch = batch
    this.#words = unscoped(() => Tensor.zeros([batch.words.length], { dtype: 'int64', device }))
    try {
      this.#weights = unscoped(() => Tensor.zeros([shape.rows], { dtype, device }))
    } catch (error) {
      this.#words.dispose()
      throw error
    }
  }

  /** @param positions where each draw begins */
  upload(batch: Batch, positions: readonly bigint[]): void {
    this.#batch.fill(batch)
    this.#batch.fields.positions.set(positions)
    this.#words.write(this.#batch.words)
    const { weights } = this.#batch
    this.#weights.write(this.#weights.dtype === 'float64' ? Float64Array.from(weights) : weights)
  }

  /** Op by op, on what was uploaded. */
  run(seed: bigint): LossAndGrads {
    const { model, options } = this
    const { lengths, timed, maxLength } = this.#batch
    const { ids, targets, times, queryTimes, offsets, positions } = cut(lengths, (begin, length) => {
      return this.#words.view([length], begin)
    })
    const draws = new DeviceDraws(seed, positions, this.shape.rows)
    this.wordsARow = draws.wordsARow
    const inputs = { ids, seqOffsets: offsets, ...(timed ? { times, queryTimes } : { times: null, queryTimes: null }) }
    return valueAndGrad(model.parameters, () => {
      const output = model.forward({ ...inputs, maxSeqLen: maxLength }, draws)
      return nextItemLoss(output, model.parameters.items!, targets, this.#weights, draws, options)
    })
  }

  capture(seed: bigint, pool: Graph<LossAndGrads> | undefined): void {
    const { device = 'cpu' } = this.model.options
    this.graph = captureGraph(() => this.run(seed), { device, pool })
  }

  dispose(): void {
    this.graph?.dispose()
    this.#words.dispose()
    this.#weights.dispose()
  }
}

/**
 * Forward and backward of training steps as CUDA graphs, one for each shape that batches are padded to: the first batch of a shape
 * captures it; from then on a step costs the host two copies and one launch. What changes from step to step the device reads from its
 * memory: the batch, and where each draw begins, so that dropouts and negatives are those of the step without graphs. Graphs share
 * blocks of the same size of the memory that they work in. Shapes beyond `most`, the CPU, and all under HSTU_DEBUG=1 run the same step op by
 * op; where a capture finds no memory, all graphs are freed and there are none from then on.
 */
export class StepGraphs {
  readonly #steps = new Map<string, PaddedStep>()
  #off = false
  /** Of each draw of a step: the same for all shapes. */
  #wordsARow: readonly number[] = []

  /**
   * Whether steps are to be graphs, and can be, all but the batch staying the same: dropout of softmax attention draws by the longest
   * sequence, and in-batch negatives are as many as they are.
   */
  static supports(model: AnySequenceModel, { cudaGraphs, negatives }: TrainOptions): boolean {
    const onCuda = model.parameters.items!.device !== 'cpu'
    return cudaGraphs && onCuda && model.kind === 'hstu' && negatives !== 'in-batch'
  }

  /** @param most graphs, each with a loss and gradients of its own */
  constructor(
    readonly model: AnySequenceModel,
    readonly options: TrainOptions,
    readonly most = 32,
  ) {}

  /**
   * @param philox where the draws come from; it moves on as without graphs
   * @returns tensors that the next batch of the same shape overwrites; null where there is no memory for graphs, the step being the caller's
   * @throws HstuError ERR_HSTU_INVALID_ARGUMENT naming an id outside the items; ERR_HSTU_OUT_OF_MEMORY
   */
  run(batch: Batch, philox: Philox): LossAndGrads | null {
    if (this.#off) return null
    const { model, options } = this
    const { maxLength, numItems } = model.config
    checkIds('batch.ids', batch.ids, numItems)
    checkIds('batch.targets', batch.targets, numItems)
    const shape = paddedShape(batch.ids.length, Math.max(options.batchSize, batch.users.length), maxLength)
    const key = `${shape.rows} rows, ${shape.sequences} sequences`
    const known = this.#steps.get(key)
    const step = known ?? new PaddedStep(model, options, shape, batch.times !== null)
    let kept = known !== undefined
    try {
      if (!kept && this.#steps.size < this.most) {
        step.upload(batch, [])
        const [other] = this.#steps.values()
        try {
          step.capture(philox.seed, other?.graph ?? undefined)
        } catch (error) {
          if (!(error instanceof HstuError && error.code === 'ERR_HSTU_OUT_OF_MEMORY')) throw error
          this.#off = true
          this.dispose()
          native.trim(model.parameters.items!.device)
          return null
        }
        this.#wordsARow = step.wordsARow
        this.#steps.set(key, step)
        kept = true
      }
      step.upload(
        batch,
        this.#wordsARow.map(words => philox.draw(words * batch.ids.length).offset),
      )
      return step.graph ? step.graph.replay() : step.run(philox.seed)
    } finally {
      if (!kept) step.dispose()
    }
  }

  dispose(): void {
    for (const step of this.#steps.values()) step.dispose()
    this.#steps.clear()
  }
}
