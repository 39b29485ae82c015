import { join } from 'node:path'
import { truncateHistory } from '../data/ranking/batches.js'
import type { RequestReader } from '../data/ranking/reader.js'
import type { RequestBatch } from '../data/ranking/schema.js'
import { parseTasks, type RankingTask, taskTargets } from '../data/ranking/tasks.js'
import type { SparsityReport } from '../data/stochastic_length.js'
import { HstuError } from '../errors.js'
import { breathe } from '../eval/evaluate.js'
import { EmbeddingTable } from '../layers/embedding_table.js'
import { GenerativeRanker, type GenerativeRankerConfig } from '../models/generative_ranker.js'
import { AdamW } from '../optim/adamw.js'
import { learningRate } from '../optim/schedule.js'
import { Philox } from '../philox.js'
import { loadCheckpoint, saveCheckpoint } from './checkpoint.js'
import { type RankRun, rankContent, restoreRank, savedSetting } from './rank_checkpoint.js'
import type { RankEvent, RankSession, RankState, RankTrainerSetting } from './rank_events.js'
import { type Predicted, RankFeed, type RankWork } from './rank_feed.js'
import { RankMetrics } from './rank_metrics.js'
import { type RankOptions, rankOptions } from './rank_options.js'
import { enqueueRankStep, type Logits, predict, type RankStepHandle } from './rank_step.js'
import { fromCheckpoint } from './state.js'

export type { RankEvent, RankerShape, RankState, RankTrainerSetting } from './rank_events.js'

/**
 * Trains a ranker on request records in the order of time: each step's requests are predicted, counted in the metrics, and only then
 * learnt from. With several passes that holds for the first one and for the counted part, which comes after the last. The same seed gives
 * the same parameters and metrics, bit for bit, also when the run was killed and resumed from its last checkpoint. On CUDA the host
 * prepares a batch while the device runs the steps before it; losses and predictions are read up to two steps late, and are all in
 * before a checkpoint and an interruption.
 *
 *     const reader = await RequestReader.open('runs/requests')
 *     const trainer = new RankTrainer(reader, { model: { dim: 64, layers: 2, ... } })
 *     for await (const event of trainer.run()) console.log(event)
 */
export class RankTrainer {
  readonly model: GenerativeRanker
  readonly options: RankOptions
  readonly tasks: readonly RankingTask[]
  readonly optimizer: AdamW
  /** Of 'hash' embeddings. */
  readonly table: EmbeddingTable | null
  readonly metrics: RankMetrics
  readonly state: RankState = { pass: 0, cursor: 0, step: 0, requests: 0, impressions: 0, seconds: 0, curve: [] }
  /** How many later steps may be under way when the event of one is told: 2 on CUDA, 0 on the CPU. */
  readonly lag: number
  readonly #philox: Philox
  readonly #feed: RankFeed
  /** The last step of a run, once its loss and predictions and all before them are in the state. */
  #counted: Promise<unknown> = Promise.resolve()

  /** @throws HstuError ERR_HSTU_INVALID_ARGUMENT for bad options, ERR_HSTU_DATA for tasks that the records do not have. */
  constructor(
    readonly reader: RequestReader,
    readonly setting: RankTrainerSetting,
  ) {
    const { schema, sizes, tasks, name, requests } = reader.manifest
    const options = (this.options = rankOptions(setting.options ?? {}))
    this.tasks = parseTasks(setting.tasks ?? tasks, schema)
    if (requests === 0) throw new HstuError('ERR_HSTU_DATA', `${name}: there are no requests`)
    const weights = setting.taskWeights ?? {}
    const unknown = Object.keys(weights).find(key => !this.tasks.some(task => task.name === key))
    if (unknown !== undefined) throw new HstuError('ERR_HSTU_DATA', `taskWeights: there is no task ${unknown}`)
    const config: GenerativeRankerConfig = {
      ...setting.model,
      vocabulary: { ...sizes, users: options.userIds ? sizes.users : 0 },
      actions: schema.actions.length,
      tasks: this.tasks.map(task => ({ name: task.name, kind: task.kind, weight: weights[task.name] ?? 1 })),
    }
    this.model = new GenerativeRanker(config, options.seed, { ...setting.tensors, precision: options.precision })
    this.optimizer = new AdamW(this.model.parameters, options)
    const { tableRows: maxRows, whenFull } = options
    const table = { dim: config.dim, rows: Math.min(1024, maxRows), maxRows, whenFull, seed: BigInt(options.seed) }
    this.table = config.embeddings === 'hash' ? new EmbeddingTable(table, setting.tensors) : null
    this.metrics = new RankMetrics(config.tasks, options.window, options.gaucBy)
    this.lag = this.model.parameters.actions!.device === 'cpu' ? 0 : 2
    this.#philox = new Philox(BigInt(options.seed))
    this.#feed = new RankFeed(options, this.tasks, config.fusion ?? 'interleave', sizes)
  }

  /** How much shorter Stochastic Length made the histories so far; null without it. */
  get sparsity(): SparsityReport | null {
    return this.#feed.sparsity
  }

  /** With `userRate`: requests so far, and those that were learnt from. */
  get sampled(): { requests: number; trained: number } | null {
    return this.#feed.sampled
  }

  /** Number of the first request of the counted part. */
  get countedFrom(): number {
    return this.reader.at(this.options.trainShare)
  }

  /** One past the last request of the run. */
  get end(): number {
    return this.reader.at(this.options.until)
  }

  get totalSteps(): number {
    const { batchSize, passes } = this.options
    const steps = (requests: number) => Math.ceil(requests / batchSize)
    return passes * steps(this.countedFrom) + steps(this.end - this.countedFrom)
  }

  /**
   * Runs to the end of the records. With `signal` aborted it saves a checkpoint (where there is a folder), yields 'interrupted' and
   * returns.
   * @throws HstuError ERR_HSTU_INVALID_ARGUMENT where a loss is not finite, ERR_HSTU_DATA for records that are damaged.
   */
  async *run({ signal }: { signal?: AbortSignal } = {}): AsyncGenerator<RankEvent, void, undefined> {
    const { state, options, setting, totalSteps, countedFrom } = this
    const { requests } = this.reader.manifest
    const parameters = Object.values(this.model.parameters).reduce((sum, tensor) => sum + tensor.size, 0)
    yield { type: 'start', step: state.step, totalSteps, parameters, requests }
    const session = {
      ...{ start: performance.now(), step: state.step },
      ...{ seconds: state.seconds, impressions: state.impressions },
    }
    const inFlight: Promise<RankEvent[]>[] = []
    const landed = async function* (left: number) {
      while (inFlight.length > left) {
        const events = await inFlight.shift()!.catch(error => {
          inFlight.length = 0
          throw error
        })
        yield* events
      }
    }
    if (state.step === 0 && setting.folder) yield await this.save()
    while (state.pass <= options.passes) {
      const end = state.pass < options.passes ? countedFrom : this.end
      try {
        for await (const read of this.reader.batches({ batchSize: options.batchSize, first: state.cursor, end })) {
          if (signal?.aborted) {
            yield* landed(0)
            if (setting.folder) await this.save()
            return void (yield { type: 'interrupted', step: state.step, folder: setting.folder ?? null })
          }
          inFlight.push(this.#enqueue(read, session))
          yield* landed(this.lag)
          if (options.checkpointEvery > 0 && state.step % options.checkpointEvery === 0 && setting.folder) {
            yield* landed(0)
            yield await this.save()
          }
          await breathe()
        }
      } catch (error) {
        yield* landed(0) // the steps before it were made
        throw error
      }
      state.pass += 1
      if (state.pass < options.passes) {
        state.cursor = 0
        this.#feed.begin()
      }
    }
    yield* landed(0)
    if (setting.folder) yield await this.save()
    const [counted, lifetime] = [this.metrics.counted(), this.metrics.lifetime()]
    yield { type: 'done', step: state.step, seconds: state.seconds, counted, lifetime }
  }

  /** Whether requests are predicted before they are learnt from: not where an earlier pass has learnt from them. */
  #predicts(): boolean {
    return this.state.pass === 0 || this.state.pass === this.options.passes
  }

  /** Puts the step of a batch on the queue. @returns its events */
  #enqueue(read: RequestBatch, session: RankSession): Promise<RankEvent[]> {
    const { state, options } = this
    const step = state.step + 1
    const lr = learningRate(step, this.totalSteps, options)
    const work = this.#feed.work(read, state.pass)
    const table = { ...options, lr: options.tableLr, finalShare: options.tableFinalShare }
    const rates = { lr, tableLr: learningRate(step, this.totalSteps, table) }
    const handle = enqueueRankStep(this.#run(), work, this.#predicts(), step, rates)
    work.commit()
    const counts = state.cursor >= this.countedFrom
    state.step = step
    state.cursor += read.requests.length
    state.requests += work.learn?.batch.requests.length ?? 0
    state.impressions += work.learn?.batch.candidates.items.length ?? 0
    const events = this.#count(handle, work, counts, { ...state, lr }, session)
    events.catch(() => {}) // told to who awaits it
    this.#counted = events
    return events
  }

  /** The events of a step, once its values and those of all before it are in the metrics. @param at the state after the step */
  async #count(
    handle: RankStepHandle,
    { batch, candidates }: RankWork,
    counts: boolean,
    { step, pass, cursor, impressions, lr }: RankState & { lr: number },
    session: RankSession,
  ): Promise<RankEvent[]> {
    const { state, options, totalSteps } = this
    await this.#counted // of the step before: metrics are added in the order of the steps
    const loss = await handle.loss
    const logits = await handle.logits
    if (logits) this.metrics.update(batch, candidates, logits, counts)
    const elapsed = (performance.now() - session.start) / 1e3
    state.seconds = session.seconds + elapsed
    const told: RankEvent = {
      ...{ type: 'step', step, totalSteps, pass: pass + 1, request: cursor, loss, lr },
      impressionsPerSecond: (impressions - session.impressions) / elapsed,
      etaSeconds: ((totalSteps - step) * elapsed) / (step - session.step),
    }
    const window = logits !== null && options.windowEvery > 0 && step % options.windowEvery === 0
    return window ? [told, this.#window(cursor, batch.times.at(-1)!)] : [told]
  }

  #window(request: number, time: bigint): RankEvent {
    const metrics = this.metrics.windowed()
    const ne = Object.entries(metrics).map(([name, of]) => [name, Number.isFinite(of.ne) ? of.ne : null])
    this.state.curve.push({ request, time: Number(time), ne: Object.fromEntries(ne) })
    return { type: 'window', request, metrics }
  }

  /**
   * Predicts requests without learning from them; the run's own metrics stay as they are.
   * @param first number of the first request; those before `state.cursor` have been learnt from, unless a pass has begun anew
   */
  async evaluate({ first = this.countedFrom, signal }: { first?: number; signal?: AbortSignal } = {}) {
    const { options, tasks } = this
    const metrics = new RankMetrics(this.model.config.tasks, options.window, options.gaucBy)
    const inFlight: { work: Predicted; logits: Promise<Logits> }[] = []
    const landed = async (left: number) => {
      while (inFlight.length > left) {
        const { work, logits } = inFlight.shift()!
        metrics.update(work.batch, work.candidates, await logits, true)
      }
    }
    const range = { batchSize: options.batchSize, first, end: this.end, ...(signal ? { signal } : {}) }
    for await (const read of this.reader.batches(range)) {
      const batch = truncateHistory(read, options.maxHistory)
      const work = { batch, candidates: taskTargets(batch, tasks), base: this.#feed.baseOf(batch) }
      inFlight.push({ work, logits: predict(this.#run(), work) })
      await landed(this.lag)
      await breathe()
    }
    await landed(0)
    return metrics.counted()
  }

  /** Writes everything that `resume` needs into `<folder>/checkpoint`, once the values of all steps are in. */
  async save(): Promise<RankEvent & { type: 'checkpoint' }> {
    const { folder, ...setting } = this.setting
    if (!folder) throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', 'RankTrainer.save: the trainer was given no folder')
    await this.#counted
    const { state, options } = this
    const content = rankContent(this.#run(), { ...setting, options })
    await saveCheckpoint(join(folder, 'checkpoint'), state.step, content)
    return { type: 'checkpoint', step: state.step, folder }
  }

  /**
   * Continues the run whose checkpoint is in `folder`, exactly where it was.
   * @throws HstuError ERR_HSTU_CHECKPOINT when there is none, it is damaged, or it belongs to other records.
   */
  static async resume(folder: string, reader: RequestReader): Promise<RankTrainer> {
    return fromCheckpoint(folder, async () => {
      const checkpoint = await loadCheckpoint(join(folder, 'checkpoint'))
      const trainer = new RankTrainer(reader, { ...savedSetting(checkpoint, reader, folder), folder })
      try {
        restoreRank(trainer.#run(), checkpoint, folder)
        return trainer
      } catch (error) {
        trainer.dispose()
        throw error
      }
    })
  }

  #run(): RankRun {
    const { model, optimizer, table, metrics, state, reader } = this
    return { model, optimizer, table, metrics, state, reader, philox: this.#philox, feed: this.#feed }
  }

  /** Frees model, optimiser and table. */
  dispose(): void {
    this.model.dispose()
    this.optimizer.dispose()
    this.table?.dispose()
  }
}
