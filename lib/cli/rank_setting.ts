import { existsSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { prepareRequests } from '../data/ranking/prepare.js'
import { rankingPreset } from '../data/ranking/presets.js'
import { RequestReader } from '../data/ranking/reader.js'
import { syntheticMapping, writeSyntheticLog } from '../data/ranking/synthetic.js'
import { HstuError } from '../errors.js'
import type { RankerShape } from '../train/rank_events.js'
import { type RankOptions, rankOptions } from '../train/rank_options.js'
import { type RankPreset, rankPreset } from '../train/rank_presets.js'
import { type Args, suggestion, UsageError } from './args.js'
import { SYNTHETIC } from './data_prepare.js'
import { Progress } from './progress.js'
import { parseValue } from './settings.js'

/** What the options of a ranking command ask for: the preset's setting with their changes. */
export interface RankSetting {
  preset: RankPreset
  model: RankerShape
  options: Partial<RankOptions>
}

/** @throws HstuError ERR_HSTU_INVALID_ARGUMENT naming a preset, a key or a value that is not known. */
export function rankSetting(args: Args): RankSetting {
  const preset = rankPreset(args.required('preset'))
  const options = { ...preset.options, ...explicitOptions(args) }
  rankOptions(options) // names what is wrong
  return { preset, model: shapeOf(args, preset.model), options }
}

/** The tasks that are reported, and all that are learnt: the preset's auxiliary ones behind them. */
export function rankTasks(args: Args, { auxiliary = [] }: RankPreset, reader: RequestReader) {
  const main = args.list('task').length > 0 ? args.list('task') : reader.manifest.tasks
  const nameOf = (task: string) => task.split('=')[0]!.trim()
  const others = auxiliary.filter(task => !main.some(own => nameOf(own) === nameOf(task)))
  return { tasks: [...main, ...others], auxiliary: others.map(nameOf) }
}

/** KEY=VALUE pairs of an option, as what they are. */
function values(args: Args, name: string): Record<string, unknown> {
  return Object.fromEntries(args.pairs(name).map(([key, text]) => [key, parseValue(text)]))
}

const SHAPE = [
  ...(['dim', 'layers', 'heads', 'qkDim', 'vDim', 'scalingSeqLen', 'hidden', 'actionDim', 'positions'] as const),
  ...(['inputDropout', 'linearDropout', 'timeBuckets', 'positionBias', 'timeBias', 'siluAll', 'concat'] as const),
  ...(['contextualFull', 'fusion', 'activation', 'embeddings'] as const),
] satisfies (keyof RankerShape)[]

/** A preset's model with the changes of `--model-set`. @throws HstuError ERR_HSTU_INVALID_ARGUMENT for an unknown key. */
function shapeOf(args: Args, shape: RankerShape): RankerShape {
  const changes = values(args, 'model-set')
  const unknown = Object.keys(changes).find(key => !(SHAPE as readonly string[]).includes(key))
  if (unknown !== undefined)
    throw new HstuError(
      'ERR_HSTU_INVALID_ARGUMENT',
      `unknown option '${unknown}' of the model.${suggestion(unknown, SHAPE)} Options: ${SHAPE.join(', ')}`,
    )
  return { ...shape, ...changes }
}

function explicitOptions(args: Args): Partial<RankOptions> {
  const options: Record<string, unknown> = {
    ...{ seed: args.integer('seed'), passes: args.integer('passes', 1), batchSize: args.integer('batch-size', 1) },
    ...{ lr: args.number('lr'), precision: args.text('precision') },
    stochasticLength: args.number('stochastic-length'),
  }
  for (const key of Object.keys(options)) if (options[key] === undefined) delete options[key]
  Object.assign(options, values(args, 'set'))
  return options as Partial<RankOptions>
}

/** The prepared records: those of --requests, or the preset's, which are made in the run's folder once. */
export async function records(args: Args, signal: AbortSignal): Promise<RequestReader> {
  const { records: preset } = rankPreset(args.required('preset'))
  const [given, data] = [args.text('requests'), args.text('data')]
  if (given !== undefined) return RequestReader.open(given)
  const folder = join(args.required('out'), 'requests')
  if (existsSync(folder)) return RequestReader.open(folder)
  if ((preset === SYNTHETIC) === (data !== undefined))
    throw new UsageError('--data names the folder of a preset with files; or give --requests', args.command)
  const progress = new Progress('preparing requests')
  const scratch = await mkdtemp(join(tmpdir(), 'hstu-rank-'))
  try {
    const log = join(scratch, 'log.csv')
    if (preset === SYNTHETIC) await writeSyntheticLog(log, { signal })
    const mapping = preset === SYNTHETIC ? syntheticMapping(log) : rankingPreset(preset, data!)
    const onProgress = ({ done, total }: { done: number; total: number | null }) => progress.update(done, total)
    await prepareRequests(mapping, { out: folder, signal, onProgress })
  } finally {
    progress.clear()
    await rm(scratch, { recursive: true, force: true })
  }
  return RequestReader.open(folder)
}
