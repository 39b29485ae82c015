import { createHash } from 'node:crypto'
import { join } from 'node:path'
import { truncateHistory } from '../data/ranking/batches.js'
import type { RequestReader } from '../data/ranking/reader.js'
import type { RequestBatch } from '../data/ranking/schema.js'
import { parseTasks, type RankingTask, taskTargets } from '../data/ranking/tasks.js'
import { HstuError } from '../errors.js'
import { breathe } from '../eval/evaluate.js'
import { EmbeddingTable, type EmbeddingTableState } from '../layers/embedding_table.js'
import { GenerativeRanker, type GenerativeRankerConfig } from '../models/generative_ranker.js'
import { AdamW } from '../optim/adamw.js'
import { learningRate } from '../optim/schedule.js'
import { Philox } from '../philox.js'
import type { TensorOptions } from '../tensor.js'
import { assignTensors, loadCheckpoint, saveCheckpoint } from './checkpoint.js'
import { RankMetrics, type RankMetricsState, type TaskMetrics } from './rank_metrics.js'
import { type RankOptions, rankOptions } from './rank_options.js'
import { predict, type RankParts, trainStep } from './rank_step.js'
import { fromCheckpoint } from './state.js'

/** A ranker but for what the records say: vocabularies, actions and tasks. */
export type RankerShape = Omit<GenerativeRankerConfig, 'vocabulary' | 'actions' | 'tasks'>

export interface RankTrainerSetting {
  model: RankerShape
  /** See `parseTask`; default those of the records. */
  tasks?: readonly string[]
  /** Of the tasks' losses, by name; default 1. */
  taskWeights?: Record<string, number>
  options?: Partial<RankOptions>
  /** Where `checkpoint/` goes. None: nothing is written. */
  folder?: string
  tensors?: TensorOptions
}

/** Where a run stands; plain JSON, kept in checkpoints. */
export interface RankState {
  /** Passes over the training part that are done; the counted part comes after the last one. */
  pass: number
  /** Number of the next request. */
  cursor: number
  step: number
  /** Requests and impressions trained on, over all passes. */
  requests: number
  impressions: number
  /** Time spent so far, over all sessions. */
  seconds: number
  /** The windowed NE of each binary task now and then; null where it is not defined. */
  curve: { request: number; time: number; ne: Record<string, number | null> }[]
}

/** What a run tells as it goes. */
export type RankEvent =
  | { type: 'start'; step: number; totalSteps: number; parameters: number; requests: number }
  | ({ type: 'step'; step: number; totalSteps: number; pass: number; request: number; loss: number; lr: number } & {
      impressionsPerSecond: number
      etaSeconds: number
    })
  | { type: 'window'; request: number; metrics: ReturnType<RankMetrics['windowed']> }
  | { type: 'checkpoint'; step: number; folder: string }
  | { type: 'interrupted'; step: number; folder: string | null }
  | { type: 'done'; step: number; seconds: number; counted: TaskMetrics; lifetime: ReturnType<RankMetrics['lifetime']> }

/**
 * Trains a ranker on request records in the order of time: each step's requests are predicted, counted in the metrics, and only then
 * learnt from. With several passes that holds for the first one and for the counted part, which comes after the last. The same seed gives
 * the same parameters and metrics, bit for bit, also when the run was killed and resumed from its last checkpoint.
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
  readonly #philox: Philox

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
      vocabulary: sizes,
      actions: schema.actions.length,
      tasks: this.tasks.map(task => ({ name: task.name, kind: task.kind, weight: weights[task.name] ?? 1 })),
    }
    this.model = new GenerativeRanker(config, options.seed, { ...setting.tensors, precision: options.precision })
    this.optimizer = new AdamW(this.model.parameters, options)
    const { tableRows: maxRows, whenFull } = options
    const table = { dim: config.dim, rows: Math.min(1024, maxRows), maxRows, whenFull, seed: BigInt(options.seed) }
    this.table = config.embeddings === 'hash' ? new EmbeddingTable(table, setting.tensors) : null
    this.metrics = new RankMetrics(config.tasks, options.window)
    this.#philox = new Philox(BigInt(options.seed))
  }

  /** Number of the first request of the counted part. */
  get countedFrom(): number {
    return this.reader.at(this.options.trainShare)
  }

  get totalSteps(): number {
    const { batchSize, passes } = this.options
    const steps = (requests: number) => Math.ceil(requests / batchSize)
    return passes * steps(this.countedFrom) + steps(this.reader.manifest.requests - this.countedFrom)
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
    const session = { start: performance.now(), ...{ step: state.step, impressions: state.impressions } }
    const before = state.seconds
    if (state.step === 0 && setting.folder) yield await this.save()
    while (state.pass <= options.passes) {
      const end = state.pass < options.passes ? countedFrom : requests
      for await (const read of this.reader.batches({ batchSize: options.batchSize, first: state.cursor, end })) {
        if (signal?.aborted) {
          if (setting.folder) await this.save()
          return void (yield { type: 'interrupted', step: state.step, folder: setting.folder ?? null })
        }
        const lr = learningRate(state.step + 1, totalSteps, options)
        const loss = await this.#step(truncateHistory(read, options.maxHistory), lr)
        const seconds = (performance.now() - session.start) / 1e3
        state.seconds = before + seconds
        yield {
          ...{ type: 'step', step: state.step, totalSteps, pass: state.pass + 1, request: state.cursor, loss, lr },
          impressionsPerSecond: (state.impressions - session.impressions) / seconds,
          etaSeconds: ((totalSteps - state.step) * seconds) / (state.step - session.step),
        }
        if (options.windowEvery > 0 && state.step % options.windowEvery === 0 && this.#predicts())
          yield this.#window(read)
        if (options.checkpointEvery > 0 && state.step % options.checkpointEvery === 0 && setting.folder)
          yield await this.save()
        await breathe()
      }
      state.pass += 1
      if (state.pass < options.passes) state.cursor = 0
    }
    if (setting.folder) yield await this.save()
    const [counted, lifetime] = [this.metrics.counted(options.gaucBy), this.metrics.lifetime()]
    yield { type: 'done', step: state.step, seconds: state.seconds, counted, lifetime }
  }

  /** Whether requests are predicted before they are learnt from: not where an earlier pass has learnt from them. */
  #predicts(): boolean {
    return this.state.pass === 0 || this.state.pass === this.options.passes
  }

  async #step(batch: RequestBatch, lr: number): Promise<number> {
    const { state, options, tasks, model, optimizer, table } = this
    const parts: RankParts = { model, optimizer, table, philox: this.#philox }
    const candidates = taskTargets(batch, tasks)
    const predicted = this.#predicts() ? predict(parts, batch, candidates) : null
    predicted?.catch(() => {}) // told where it is awaited
    const targets = options.supervise === 'candidates' ? candidates : taskTargets(batch, tasks, options)
    const { tableLr } = options
    const loss = Number((await trainStep(parts, batch, targets, { lr, tableLr }))[0])
    if (predicted) this.metrics.update(batch, candidates, await predicted, state.cursor >= this.countedFrom)
    state.step += 1
    if (!Number.isFinite(loss))
      throw new HstuError(
        'ERR_HSTU_INVALID_ARGUMENT',
        `loss became ${loss} at step ${state.step}: lower lr or set clipNorm`,
      )
    state.cursor += batch.requests.length
    state.requests += batch.requests.length
    state.impressions += batch.candidates.items.length
    return loss
  }

  #window(batch: RequestBatch): RankEvent {
    const metrics = this.metrics.windowed()
    const ne = Object.entries(metrics).map(([name, of]) => [name, Number.isFinite(of.ne) ? of.ne : null])
    const { cursor: request, curve } = this.state
    curve.push({ request, time: Number(batch.times.at(-1)!), ne: Object.fromEntries(ne) })
    return { type: 'window', request, metrics }
  }

  /**
   * Predicts requests without learning from them; the run's own metrics stay as they are.
   * @param first number of the first request; those before `state.cursor` have been learnt from, unless a pass has begun anew
   */
  async evaluate({ first = this.countedFrom, signal }: { first?: number; signal?: AbortSignal } = {}) {
    const { options, tasks, model, optimizer, table } = this
    const metrics = new RankMetrics(model.config.tasks, options.window)
    const parts: RankParts = { model, optimizer, table, philox: this.#philox }
    const range = { batchSize: options.batchSize, first, ...(signal ? { signal } : {}) }
    for await (const read of this.reader.batches(range)) {
      const batch = truncateHistory(read, options.maxHistory)
      const candidates = taskTargets(batch, tasks)
      metrics.update(batch, candidates, await predict(parts, batch, candidates), true)
      await breathe()
    }
    return metrics.counted(options.gaucBy)
  }

  /** Writes everything that `resume` needs into `<folder>/checkpoint`. */
  async save(): Promise<RankEvent & { type: 'checkpoint' }> {
    const { folder, ...setting } = this.setting
    if (!folder) throw new HstuError('ERR_HSTU_INVALID_ARGUMENT', 'RankTrainer.save: the trainer was given no folder')
    const { model, optimizer, state, options } = this
    const [metrics, table] = [this.metrics.state(), this.table?.state()]
    await saveCheckpoint(join(folder, 'checkpoint'), state.step, {
      kind: 'ranking',
      tensors: {
        ...{ model: model.parameters, m: optimizer.m, v: optimizer.v, counted: metrics.tensors },
        ...(table ? { table: table.tensors } : {}),
      },
      json: {
        ...{ setting: { ...setting, options }, state, metrics: metrics.json, table: table?.json ?? null },
        ...{ philoxOffset: String(this.#philox.offset), records: fingerprint(this.reader) },
      },
    })
    return { type: 'checkpoint', step: state.step, folder }
  }

  /**
   * Continues the run whose checkpoint is in `folder`, exactly where it was.
   * @throws HstuError ERR_HSTU_CHECKPOINT when there is none, it is damaged, or it belongs to other records.
   */
  static async resume(folder: string, reader: RequestReader): Promise<RankTrainer> {
    return fromCheckpoint(folder, async () => {
      const { kind, json, tensors } = await loadCheckpoint(join(folder, 'checkpoint'))
      const fail = (message: string) => new HstuError('ERR_HSTU_CHECKPOINT', `${folder}: ${message}`)
      if (kind !== 'ranking') throw fail(`holds a '${kind}' checkpoint, not a ranking run's`)
      const saved = json as unknown as SavedRanking
      if (saved.records !== fingerprint(reader))
        throw fail(`the run was trained on other records than those in ${reader.folder}`)
      const trainer = new RankTrainer(reader, { ...saved.setting, folder })
      try {
        assignTensors(trainer.model.parameters, tensors.model!, `${folder}: model`)
        assignTensors(trainer.optimizer.m, tensors.m!, `${folder}: first moments`)
        assignTensors(trainer.optimizer.v, tensors.v!, `${folder}: second moments`)
        trainer.table?.restore(tensors.table!, saved.table!)
        trainer.metrics.restore(saved.metrics, tensors.counted!)
        Object.assign(trainer.state, saved.state)
        trainer.optimizer.steps = saved.state.step
        trainer.#philox.offset = BigInt(saved.philoxOffset)
        return trainer
      } catch (error) {
        trainer.dispose()
        throw error
      }
    })
  }

  /** Frees model, optimiser and table. */
  dispose(): void {
    this.model.dispose()
    this.optimizer.dispose()
    this.table?.dispose()
  }
}

/** The JSON of a checkpoint. */
interface SavedRanking {
  setting: RankTrainerSetting
  state: RankState
  metrics: RankMetricsState
  table: EmbeddingTableState | null
  philoxOffset: string
  records: string
}

/** Hash of the manifest, which knows sizes and counts of all shards. */
function fingerprint({ manifest }: RequestReader): string {
  return createHash('sha256').update(JSON.stringify(manifest)).digest('hex')
}
