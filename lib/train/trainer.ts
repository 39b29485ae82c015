import { join } from 'node:path'
import type { SequenceDataset } from '../data/dataset.js'
import { epochBatches, trainableUsers } from '../data/split.js'
import { HstuError } from '../errors.js'
import { breathe, evaluate } from '../eval/evaluate.js'
import type { Metrics } from '../eval/metrics.js'
import { type AnySequenceModel, createModel, type ModelSpec } from '../models/create.js'
import { AdamW } from '../optim/adamw.js'
import { learningRate } from '../optim/schedule.js'
import { Philox } from '../philox.js'
import { Random } from '../random.js'
import type { TensorOptions } from '../tensor.js'
import { assignTensors, loadCheckpoint, saveCheckpoint } from './checkpoint.js'
import type { Session, TrainEvent } from './events.js'
import { modelContent } from './model_checkpoint.js'
import { type TrainOptions, trainOptions } from './options.js'
import {
  fingerprint,
  fromCheckpoint,
  type HostTensors,
  hostCopies,
  newState,
  type SavedRun,
  type TrainState,
} from './state.js'
import { enqueueStep, type StepHandle } from './step.js'
import { StepGraphs } from './step_graphs.js'

export type { TrainEvent } from './events.js'
export type { StepHandle } from './step.js'

export interface TrainerSetting {
  model: ModelSpec
  options?: Partial<TrainOptions>
  /** Users to train on; default all whose training part has two actions. */
  users?: ArrayLike<number>
  /** Where checkpoints go: `checkpoint/` (to resume), `best/` (the best model). None: nothing is written. */
  folder?: string
  tensors?: TensorOptions
}

/**
 * Trains a sequence model on a dataset. `run()` is an async iterator of events; the same seed gives the same parameters, bit for bit,
 * also when the run was interrupted and resumed. On CUDA the host prepares a batch while the device runs the steps before it; the
 * losses arrive up to two steps late, and are all in before an evaluation, a checkpoint and an interruption.
 *
 *     const trainer = new Trainer(dataset, { model: preset('ml-100k/hstu').model(dataset.numItems) })
 *     for await (const event of trainer.run()) console.log(event)
 *     const metrics = await evaluate(trainer.model, dataset)
 */
export class Trainer {
  readonly model: AnySequenceModel
  readonly options: TrainOptions
  readonly optimizer: AdamW
  readonly state: TrainState
  /** How many later steps may be under way when the event of one is told: 2 on CUDA, 0 on the CPU. */
  readonly lag: number
  readonly #philox: Philox
  readonly #graphs: StepGraphs | null
  readonly #users: ArrayLike<number>
  /** Parameters at the best evaluation so far. */
  #best: HostTensors | null = null
  /** The last step of a run, once its loss and all before it are in the state. */
  #counted: Promise<unknown> = Promise.resolve()
  /** The model holds the best parameters, no longer the last. */
  #over = false

  /** @throws HstuError ERR_HSTU_INVALID_ARGUMENT for bad options, ERR_HSTU_DATA when there is nothing to train on. */
  constructor(
    readonly dataset: SequenceDataset,
    readonly setting: TrainerSetting,
  ) {
    this.options = trainOptions(setting.options ?? {})
    const { seed, part, precision } = this.options
    this.#users = setting.users ?? trainableUsers(dataset, part)
    const nobody = `${dataset.name}: no user has two actions to train on (part '${part}')`
    if (this.#users.length === 0) throw new HstuError('ERR_HSTU_DATA', nobody)
    this.model = createModel(setting.model, seed, { ...setting.tensors, precision })
    this.lag = this.model.parameters.items!.device === 'cpu' ? 0 : 2
    this.optimizer = new AdamW(this.model.parameters, this.options)
    this.#philox = new Philox(BigInt(seed))
    this.#graphs = StepGraphs.supports(this.model, this.options) ? new StepGraphs(this.model, this.options) : null
    this.state = newState()
  }

  /**
   * Continues the run whose checkpoint is in `folder`, exactly where it was.
   * @param options replaces `epochs`, `patience`, `checkpointEvery` or `cudaGraphs` (whose sums differ in their last bits)
   * @throws HstuError ERR_HSTU_CHECKPOINT when there is none, it is damaged, or it belongs to other data.
   */
  static async resume(
    folder: string,
    dataset: SequenceDataset,
    options: Partial<Pick<TrainOptions, 'epochs' | 'patience' | 'checkpointEvery' | 'cudaGraphs'>> & {
      users?: ArrayLike<number>
    } = {},
  ): Promise<Trainer> {
    return fromCheckpoint(folder, () => Trainer.#restore(folder, dataset, options))
  }

  static async #restore(
    folder: string,
    dataset: SequenceDataset,
    options: Partial<TrainOptions> & { users?: ArrayLike<number> },
  ): Promise<Trainer> {
    const checkpoint = await loadCheckpoint(join(folder, 'checkpoint'))
    const saved = checkpoint.json as unknown as SavedRun
    if (saved.dataset?.fingerprint !== fingerprint(dataset))
      throw new HstuError(
        'ERR_HSTU_CHECKPOINT',
        `${folder}: the run was trained on other data (${saved.dataset?.name}) than ${dataset.name}`,
      )
    const [{ users, ...changed }, before] = [options, { cudaGraphs: false }] // saved options of a version without graphs have none
    const trainer = new Trainer(dataset, {
      ...{ model: saved.model, options: Object.assign(before, saved.options, changed), folder, tensors: saved.tensors },
      ...(users ? { users } : {}),
    })
    try {
      assignTensors(trainer.model.parameters, checkpoint.tensors.model!, `${folder}: model`)
      assignTensors(trainer.optimizer.m, checkpoint.tensors.m!, `${folder}: first moments`)
      assignTensors(trainer.optimizer.v, checkpoint.tensors.v!, `${folder}: second moments`)
      Object.assign(trainer.state, saved.state)
      const { patience } = trainer.options
      trainer.state.done = patience > 0 && trainer.state.badEvaluations >= patience
      trainer.optimizer.steps = saved.state.step
      trainer.#philox.offset = BigInt(saved.philoxOffset)
      if (saved.state.best) trainer.#best = (await loadCheckpoint(join(folder, 'best'))).tensors.model ?? null
      return trainer
    } catch (error) {
      trainer.dispose()
      throw error
    }
  }

  get stepsPerEpoch(): number {
    return Math.ceil(this.#users.length / this.options.batchSize)
  }

  get totalSteps(): number {
    return this.options.epochs * this.stepsPerEpoch
  }

  /**
   * Puts one optimiser step on these users' training parts on the device's queue, and returns; its loss is read back later (on the CPU
   * it is there). A step that throws was not made: the next one, smaller perhaps, goes on from where the last one ended.
   * @throws HstuError ERR_HSTU_OUT_OF_MEMORY
   */
  step(users: ArrayLike<number>): StepHandle {
    const { state, options } = this
    const lr = learningRate(state.step + 1, this.totalSteps, options)
    const handle = enqueueStep({ ...this, philox: this.#philox, graphs: this.#graphs }, users, state.step + 1, lr)
    state.step += 1
    return handle
  }

  /**
   * Runs to the end of the last epoch, or to early stopping. With `signal` aborted it saves a checkpoint (where there is a folder),
   * yields 'interrupted' and returns. At the end the model holds the parameters of the best evaluation, if there was one.
   */
  async *run({ signal }: { signal?: AbortSignal } = {}): AsyncGenerator<TrainEvent, void, undefined> {
    const { state, options } = this
    const parameters = Object.values(this.model.parameters).reduce((sum, tensor) => sum + tensor.size, 0)
    const { stepsPerEpoch, totalSteps } = this
    yield { type: 'start', step: state.step, totalSteps, stepsPerEpoch, parameters, users: this.#users.length }
    const session = { start: performance.now(), step: state.step, seconds: state.seconds, tokens: 0 }
    const inFlight: Promise<TrainEvent>[] = []
    const landed = async function* (left: number) {
      while (inFlight.length > left) yield await inFlight.shift()!
    }
    // Before the work: a folder that cannot be written fails now, and from here on there is always a checkpoint to resume from.
    if (state.step === 0 && this.setting.folder) yield await this.save()
    while (!state.done && state.epoch < options.epochs) {
      for (const users of this.#remainingBatches()) {
        if (signal?.aborted) {
          yield* landed(0)
          if (this.setting.folder) await this.save()
          return void (yield { type: 'interrupted', step: state.step, folder: this.setting.folder ?? null })
        }
        try {
          inFlight.push(this.#enqueue(users, session))
        } catch (error) {
          yield* landed(0) // the steps before it were made
          throw error
        }
        yield* landed(this.lag)
        const due = options.checkpointEvery > 0 && state.step % options.checkpointEvery === 0
        if (due && this.setting.folder) {
          yield* landed(0)
          yield await this.save()
        }
        await breathe()
      }
      yield* landed(0)
      yield* this.#endEpoch()
    }
    if (this.#best) {
      assignTensors(this.model.parameters, this.#best, 'best parameters')
      this.#over = true
    }
    const stoppedEarly = state.epoch < options.epochs
    yield { type: 'done', step: state.step, epoch: state.epoch, seconds: state.seconds, best: state.best, stoppedEarly }
  }

  /** The next batch's step. @returns its event */
  #enqueue(users: Int32Array, session: Session): Promise<TrainEvent> {
    const event = this.#count(this.step(users), session)
    event.catch(() => {}) // told to who awaits it
    this.#counted = event
    this.state.batch += 1
    return event
  }

  /** The event of a step, once its loss and all before it are in the state. */
  async #count(handle: StepHandle, session: Session): Promise<TrainEvent> {
    const { state, totalSteps } = this
    await this.#counted // of the step before: losses are added in the order of the steps
    const loss = await handle.loss
    state.lossSum += loss
    session.tokens += handle.tokens
    const elapsed = (performance.now() - session.start) / 1e3
    state.seconds = session.seconds + elapsed
    return {
      ...{ type: 'step', epoch: state.epoch + 1, totalSteps, ...handle, loss },
      tokensPerSecond: session.tokens / elapsed,
      etaSeconds: ((totalSteps - handle.step) * elapsed) / (handle.step - session.step),
    }
  }

  /** Batches of the current epoch that are still to do: its order is a function of seed and epoch alone. */
  *#remainingBatches(): Generator<Int32Array> {
    const { seed, shuffle, batchSize } = this.options
    const random = new Random(seed).fork(`epoch ${this.state.epoch}`)
    let index = 0
    const skip = this.state.batch
    for (const users of epochBatches(this.#users, batchSize, shuffle ? () => random.float() : null))
      if (index++ >= skip) yield users
  }

  async *#endEpoch(): AsyncGenerator<TrainEvent> {
    const { state, options, setting } = this
    const loss = state.lossSum / state.batch
    state.epoch += 1
    state.batch = 0
    state.lossSum = 0
    const due =
      options.evaluateEvery > 0 && (state.epoch % options.evaluateEvery === 0 || state.epoch === options.epochs)
    if (due && options.part !== 'all') {
      const stage = options.part === 'valid' ? 'valid' : 'test'
      const how = { stage, protocol: options.part, filterSeen: options.filterSeen } as const
      const metrics = await evaluate(this.model, this.dataset, how)
      const best = !state.best || metrics['ndcg@10'] > state.best.metrics['ndcg@10']
      state.badEvaluations = best ? 0 : state.badEvaluations + 1
      if (best) {
        state.best = { epoch: state.epoch, metrics }
        this.#best = hostCopies(this.model.parameters)
      }
      state.done = options.patience > 0 && state.badEvaluations >= options.patience
      state.history.push({ epoch: state.epoch, step: state.step, loss, metrics })
      if (best && setting.folder)
        await saveCheckpoint(join(setting.folder, 'best'), state.step, this.#modelContent(metrics))
      yield { type: 'evaluation', epoch: state.epoch, step: state.step, loss, metrics, best }
      if (setting.folder) yield await this.save()
    } else state.history.push({ epoch: state.epoch, step: state.step, loss, metrics: null })
  }

  #modelContent(metrics: Metrics | null) {
    const origin = { options: this.options, epoch: this.state.epoch, metrics }
    return modelContent(this.model, this.setting.model, this.dataset, origin)
  }

  /** Writes everything that `resume` needs into `<folder>/checkpoint`, once the losses of all steps are in. */
  async save(): Promise<TrainEvent & { type: 'checkpoint' }> {
    const { folder } = this.setting
    if (!folder) throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', 'Trainer.save: the trainer was given no folder')
    if (this.#over)
      throw new HstuError(
        'ERR_HSTU_INVALID_ARGUMENT',
        'Trainer.save: the run is over and holds its best model, not its last step',
      )
    await this.#counted
    const { state } = this
    await saveCheckpoint(join(folder, 'checkpoint'), state.step, {
      kind: 'training',
      tensors: { model: this.model.parameters, m: this.optimizer.m, v: this.optimizer.v },
      json: {
        ...{ model: this.setting.model, options: this.options, state, tensors: this.setting.tensors ?? {} },
        philoxOffset: String(this.#philox.offset),
        dataset: { name: this.dataset.name, fingerprint: fingerprint(this.dataset) },
      },
    })
    return { type: 'checkpoint', step: state.step, folder }
  }

  /** Frees model, optimiser and graphs. */
  dispose(): void {
    this.#graphs?.dispose()
    this.model.dispose()
    this.optimizer.dispose()
  }
}
