import { existsSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { prepareRequests } from '../data/ranking/prepare.js'
import { rankingPreset } from '../data/ranking/presets.js'
import { RequestReader } from '../data/ranking/reader.js'
import { syntheticMapping, writeSyntheticLog } from '../data/ranking/synthetic.js'
import { HstuError } from '../errors.js'
import { evaluateBaselines } from '../eval/ranking_baselines.js'
import { type RankOptions, rankOptions } from '../train/rank_options.js'
import { rankPreset } from '../train/rank_presets.js'
import { type RankEvent, type RankerShape, RankTrainer } from '../train/rank_trainer.js'
import { type Args, suggestion, UsageError } from './args.js'
import { curveHint, writeCurve } from './curve.js'
import { SYNTHETIC } from './data_prepare.js'
import { tensorOptions } from './device.js'
import { EXIT_INTERRUPTED, interruptible } from './interrupt.js'
import { clock, compact, count, counted, print, printJson } from './output.js'
import { commandLine } from './package.js'
import { Progress } from './progress.js'
import { notes, tableReport } from './rank_notes.js'
import { resultTable } from './rank_report.js'
import { makeFolder, provenance, writeReport } from './report.js'
import { parseValue } from './settings.js'

export function run(args: Args): Promise<number | undefined> {
  const [out, resuming] = [args.required('out'), args.flag('resume')]
  const device = tensorOptions(args.text('device'))
  const recipe = rankPreset(args.required('preset'))
  const options = { ...recipe.options, ...explicitOptions(args) }
  const model = shapeOf(args, recipe.model)
  const begun = existsSync(join(out, 'checkpoint/manifest.json'))
  if (begun && !resuming)
    throw new HstuError(
      'ERR_HSTU_INVALID_ARGUMENT',
      `${out} already holds a run: add --resume to go on with it, or name another folder with --out`,
    )
  const again = [...args.argv.filter(word => word !== '--resume'), '--resume']
  return interruptible(
    async signal => {
      await makeFolder(out)
      const reader = await records(args, signal)
      const tasks = args.list('task')
      const trainer = resuming
        ? await RankTrainer.resume(out, reader)
        : new RankTrainer(reader, {
            ...{ model, options, folder: out, tensors: device },
            ...(tasks.length > 0 ? { tasks } : {}),
          })
      try {
        const done = await train(trainer, signal)
        if (!done) {
          process.stderr.write(`stopped at step ${trainer.state.step}; to go on:  ${commandLine(again)}\n`)
          return EXIT_INTERRUPTED
        }
        await report(trainer, done, args, signal)
      } finally {
        trainer.dispose()
      }
      return undefined
    },
    () => process.stderr.write(`interrupted; to go on:  ${commandLine(again)}\n`),
  )
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
  rankOptions(options as Partial<RankOptions>) // names what is wrong
  return options as Partial<RankOptions>
}

/** The prepared records: those of --requests, or the preset's, which are made in the run's folder once. */
async function records(args: Args, signal: AbortSignal): Promise<RequestReader> {
  const [given, preset, data] = [args.text('requests'), args.required('preset'), args.text('data')]
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

type Done = RankEvent & { type: 'done' }

/** Runs the trainer and tells about it. @returns null where it was interrupted */
async function train(trainer: RankTrainer, signal: AbortSignal): Promise<Done | null> {
  const progress = new Progress('training')
  const { passes, seed, precision } = trainer.options
  const { requests, candidates, name } = trainer.reader.manifest
  let [losses, steps] = [0, 0]
  try {
    for await (const event of trainer.run({ signal })) {
      if (event.type === 'start') {
        progress.log(`${name}: ${counted(requests, 'request')}, ${counted(candidates, 'impression')}`)
        progress.log(
          `${event.step > 0 ? `going on at step ${count(event.step)}: ` : ''}${counted(event.parameters, 'parameter')}, ` +
            `${counted(event.totalSteps, 'step')}, seed ${seed}, ${precision}`,
        )
      } else if (event.type === 'step') {
        if (event.loss !== null) {
          losses = 0.98 * losses + event.loss
          steps = 0.98 * steps + 1
        }
        progress.start(event.pass > passes ? 'counted part' : `pass ${event.pass}/${passes}`)
        const rate = `${compact(event.impressionsPerSecond)} impressions/s`
        progress.update(
          ...([event.step, event.totalSteps] as const),
          `loss ${(losses / steps).toFixed(4)}  ${rate}  ETA ${clock(event.etaSeconds)}`,
        )
      } else if (event.type === 'done') return event
    }
  } finally {
    progress.clear()
  }
  return null
}

async function report(trainer: RankTrainer, done: Done, args: Args, signal: AbortSignal): Promise<void> {
  const { reader, options, state, countedFrom, tasks, model } = trainer
  const out = args.required('out')
  const stream = reader.batches({ batchSize: 2048, signal })
  const baselines = await evaluateBaselines(stream, tasks, { from: countedFrom, gaucBy: options.gaucBy })
  const { requests, candidates, name } = reader.manifest
  const document = {
    ...provenance('rank train'),
    ...{ preset: args.required('preset'), seed: options.seed, options, model: model.config },
    records: { name, requests, candidates, countedFrom },
    ...{ steps: state.step, seconds: state.seconds, impressions: state.impressions },
    ...{ sparsity: trainer.sparsity, sampled: trainer.sampled, table: tableReport(trainer) },
    ...{ counted: done.counted, lifetime: done.lifetime, baselines, curve: state.curve },
  }
  await writeReport(out, document)
  const names = tasks.flatMap(task => (task.kind === 'binary' ? [task.name] : []))
  const hasCurve = await writeCurve(join(out, 'curve.svg'), {
    title: `Normalised entropy of the last ${count(options.window)} impressions, ${name}`,
    subtitle: `predicted before learnt from; seed ${options.seed}`,
    x: 'requests',
    y: ['NE'],
    series: names.map(task => ({
      name: task,
      points: state.curve.flatMap(({ request, ne }) => (ne[task] == null ? [] : [[request, ne[task]!] as const])),
    })),
  })
  if (!hasCurve) process.stderr.write(`${curveHint}\n`)
  if (args.flag('json')) printJson(document)
  else {
    print(`the last ${counted(requests - countedFrom, 'request')}, predicted before they were learnt from\n`)
    print(resultTable(done.counted, baselines))
    for (const line of notes(trainer)) print(`\n${line}`)
    const passes = counted(options.passes, 'pass', 'passes')
    print(`\n${passes}, ${clock(state.seconds)}; in ${out}: checkpoint/, report.json${hasCurve ? ', curve.svg' : ''}`)
  }
}
