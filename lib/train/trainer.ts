import { join } from 'node:path'
import { valueAndGrad } from '../autograd.js'
import { trainBatch } from '../data/batch.js'
import type { SequenceDataset } from '../data/dataset.js'
import { toInputs, toTargets } from '../data/inputs.js'
import { epochBatches, trainableUsers } from '../data/split.js'
import { HstuError } from '../errors.js'
import { breathe, evaluate } from '../eval/evaluate.js'
import type { Metrics } from '../eval/metrics.js'
import { nextItemLoss } from '../losses/next_item.js'
import { type AnySequenceModel, createModel, type ModelSpec } from '../models/create.js'
import { AdamW } from '../optim/adamw.js'
import { learningRate } from '../optim/schedule.js'
import { Philox } from '../philox.js'
import { Random } from '../random.js'
import { scope, type TensorOptions } from '../tensor.js'
import { assignTensors, loadCheckpoint, saveCheckpoint } from './checkpoint.js'
import { modelContent } from './model_checkpoint.js'
import { type TrainOptions, trainOptions } from './options.js'
import { fingerprint, fromCheckpoint, type HostTensors, hostCopies, type SavedRun, type TrainState } from './state.js'

/** What a run tells as it goes. */
export type TrainEvent =
  | { type: 'start'; step: number; totalSteps: number; stepsPerEpoch: number; parameters: number; users: number }
  | ({ type: 'step'; epoch: number; step: number; totalSteps: number } & StepResult & {
        tokensPerSecond: number
        etaSeconds: number
      })
  | { type: 'evaluation'; epoch: number; step: number; loss: number; metrics: Metrics; best: boolean }
  | { type: 'checkpoint'; step: number; folder: string }
  | { type: 'interrupted'; step: number; folder: string | null }
  | { type: 'done'; step: number; epoch: number; seconds: number; best: TrainState['best']; stoppedEarly: boolean }

export interface StepResult {
  loss: number
  /** Tokens that went through the model. */
  tokens: number
  lr: number
}

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
 * also when the run was interrupted and resumed.
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
  readonly #philox: Philox
  readonly #users: ArrayLike<number>
  /** Parameters at the best evaluation so far. */
  #best: HostTensors | null = null
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
    this.optimizer = new AdamW(this.model.parameters, this.options)
    this.#philox = new Philox(BigInt(seed))
    this.state = {
      epoch: 0,
      batch: 0,
      step: 0,
      lossSum: 0,
      badEvaluations: 0,
      best: null,
      history: [],
      seconds: 0,
      done: false,
    }
  }

  /**
   * Continues the run whose checkpoint is in `folder`, exactly where it was.
   * @param options replaces options that may change on the way: `epochs`, `patience`, `checkpointEvery`
   * @throws HstuError ERR_HSTU_CHECKPOINT when there is none, it is damaged, or it belongs to other data.
   */
  static async resume(
    folder: string,
    dataset: SequenceDataset,
    options: Partial<Pick<TrainOptions, 'epochs' | 'patience' | 'checkpointEvery'>> & {
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
    const { users, ...changed } = options
    const trainer = new Trainer(dataset, {
      ...{ model: saved.model, options: { ...saved.options, ...changed }, folder, tensors: saved.tensors },
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

  /** One optimiser step on these users' training parts; everything it makes is freed. */
  step(users: ArrayLike<number>): StepResult {
    const { model, options } = this
    const batch = trainBatch(this.dataset, users, { maxLength: model.config.maxLength, protocol: options.part })
    const lr = learningRate(this.state.step + 1, this.totalSteps, options)
    const loss = scope(() => {
      const inputs = toInputs(batch, model.options)
      const { targets, weights } = toTargets(batch, model.options)
      const { value, grads } = valueAndGrad(model.parameters, () => {
        const output = model.forward(inputs, this.#philox)
        return nextItemLoss(output, model.parameters.items!, targets, weights, this.#philox, options)
      })
      this.optimizer.step(grads, lr)
      return value.item()
    })
    this.state.step += 1
    const advice = `loss became ${loss} at step ${this.state.step}: lower lr or set clipNorm`
    if (!Number.isFinite(loss)) throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', advice)
    return { loss, tokens: batch.ids.length, lr }
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
    const start = performance.now()
    const before = state.seconds
    const first = state.step
    let tokens = 0
    // Before the work: a folder that cannot be written fails now, and from here on there is always a checkpoint to resume from.
    if (state.step === 0 && this.setting.folder) yield await this.save()
    while (!state.done && state.epoch < options.epochs) {
      const epoch = state.epoch + 1
      for (const users of this.#remainingBatches()) {
        if (signal?.aborted) {
          if (this.setting.folder) await this.save()
          return void (yield { type: 'interrupted', step: state.step, folder: this.setting.folder ?? null })
        }
        const result = this.step(users)
        state.batch += 1
        state.lossSum += result.loss
        tokens += result.tokens
        const elapsed = (performance.now() - start) / 1e3
        state.seconds = before + elapsed
        const etaSeconds = ((totalSteps - state.step) * elapsed) / (state.step - first)
        yield {
          type: 'step',
          epoch,
          step: state.step,
          totalSteps,
          ...result,
          tokensPerSecond: tokens / elapsed,
          etaSeconds,
        }
        const due = options.checkpointEvery > 0 && state.step % options.checkpointEvery === 0
        if (due && this.setting.folder) yield await this.save()
        await breathe()
      }
      yield* this.#endEpoch()
    }
    if (this.#best) {
      assignTensors(this.model.parameters, this.#best, 'best parameters')
      this.#over = true
    }
    const stoppedEarly = state.epoch < options.epochs
    yield { type: 'done', step: state.step, epoch: state.epoch, seconds: state.seconds, best: state.best, stoppedEarly }
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
    return modelContent(this.model, this.setting.model, this.dataset, {
      options: this.options,
      epoch: this.state.epoch,
      metrics,
    })
  }

  /** Writes everything that `resume` needs into `<folder>/checkpoint`. */
  async save(): Promise<TrainEvent & { type: 'checkpoint' }> {
    const { folder } = this.setting
    if (!folder) throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', 'Trainer.save: the trainer was given no folder')
    if (this.#over)
      throw new HstuError(
        'ERR_HSTU_INVALID_ARGUMENT',
        'Trainer.save: the run is over and holds its best model, not its last step',
      )
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

  /** Frees model and optimiser. */
  dispose(): void {
    this.model.dispose()
    this.optimizer.dispose()
  }
}
