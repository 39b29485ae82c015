import { existsSync } from 'node:fs'
import { join } from 'node:path'
import type { SequenceDataset } from '../data/dataset.js'
import { HstuError } from '../errors.js'
import { evaluate } from '../eval/evaluate.js'
import type { Metrics } from '../eval/metrics.js'
import { computeDtype } from '../layers/precision.js'
import { saveCheckpoint } from '../train/checkpoint.js'
import { modelContent } from '../train/model_checkpoint.js'
import { preset } from '../train/presets.js'
import { type TrainEvent, Trainer } from '../train/trainer.js'
import { type Args, UsageError } from './args.js'
import { curveHint, writeCurve } from './curve.js'
import { dataNotes, dataSummary, readData } from './data_source.js'
import { tensorOptions } from './device.js'
import { EXIT_INTERRUPTED, interruptible } from './interrupt.js'
import { clock, compact, count, counted, metric, print, printJson } from './output.js'
import { commandLine } from './package.js'
import { Progress } from './progress.js'
import { filterText, makeFolder, metricsTable, provenance, writeReport } from './report.js'
import { explicitOptions, modelSpec, resumeOptions } from './settings.js'

export async function run(args: Args): Promise<number | undefined> {
  const options = explicitOptions(args)
  const device = tensorOptions(args.text('device'))
  if (options.precision) computeDtype(options.precision, device) // refused before the data is read
  const name = args.text('preset')
  if (!args.flag('resume') && name === undefined) throw new UsageError('--preset is required', args.command)
  const recipe = name === undefined ? null : preset(name)
  const out = args.text('out') ?? (name === undefined ? null : join('runs', name.replace('/', '-')))
  if (out === null) throw new UsageError('--resume needs the --out folder of the run', args.command)
  checkFolder(out, args.flag('resume'))
  const again = [
    ...args.argv.filter(word => word !== '--resume'),
    ...(args.text('out') ? [] : ['--out', out]),
    '--resume',
  ]

  return interruptible(
    async signal => {
      const dataset = await readData(args, signal)
      for (const note of dataNotes(dataset)) process.stderr.write(`note: ${note}\n`)
      const trainer = args.flag('resume')
        ? await resume(out, dataset, args)
        : new Trainer(dataset, {
            model: modelSpec(args, recipe!, dataset.numItems),
            options: { ...recipe!.train, ...options },
            folder: out,
            tensors: device,
          })
      try {
        await makeFolder(out) // a folder that cannot be is to fail before the work
        const finished = await train(trainer, signal)
        if (!finished) {
          process.stderr.write(
            `stopped at step ${trainer.state.step}; the checkpoint is in ${join(out, 'checkpoint')}\n`,
          )
          process.stderr.write(`to go on:  ${commandLine(again)}\n`)
          return EXIT_INTERRUPTED
        }
        const place = { out, preset: name ?? null, data: args.required('data') }
        const report = await testAndReport(trainer, place, signal)
        const hasCurve = await drawCurve(trainer, place)
        if (!hasCurve) process.stderr.write(`${curveHint}\n`)
        if (args.flag('json')) printJson(report)
        else printResult(trainer, report.test, place, hasCurve)
      } finally {
        trainer.dispose()
      }
      return undefined
    },
    () =>
      process.stderr.write(
        `interrupted; to go on:  ${commandLine(existsSync(join(out, 'checkpoint')) ? again : args.argv)}\n`,
      ),
  )
}

/** Where a run stands on disk and where it came from. */
interface Run {
  out: string
  preset: string | null
  data: string
}

/** @throws HstuError ERR_HSTU_INVALID_ARGUMENT: a run is never overwritten. */
function checkFolder(out: string, resuming: boolean): void {
  const held = ['checkpoint/manifest.json', 'best/manifest.json', 'report.json'].find(entry =>
    existsSync(join(out, entry)),
  )
  if (held && !resuming)
    throw new HstuError(
      'ERR_HSTU_INVALID_ARGUMENT',
      `${out} already holds a run (${held}): add --resume to go on with it, or name another folder with --out`,
    )
}

async function resume(out: string, dataset: SequenceDataset, args: Args): Promise<Trainer> {
  const explicit = explicitOptions(args)
  const { epochs, patience, checkpointEvery } = explicit
  const trainer = await Trainer.resume(out, dataset, {
    ...(epochs === undefined ? {} : { epochs }),
    ...(patience === undefined ? {} : { patience }),
    ...(checkpointEvery === undefined ? {} : { checkpointEvery }),
  })
  try {
    resumeOptions(explicit, trainer.options)
    const name = args.text('preset')
    if (name !== undefined) {
      const wanted = JSON.stringify(modelSpec(args, preset(name), dataset.numItems))
      if (wanted !== JSON.stringify(trainer.setting.model))
        throw new HstuError(
          'ERR_HSTU_INVALID_ARGUMENT',
          `${out}: the run trains another model than '${name}' as given here: ${JSON.stringify(trainer.setting.model)}`,
        )
    }
  } catch (error) {
    trainer.dispose()
    throw error
  }
  return trainer
}

/** Runs the trainer and tells about it. @returns whether it came to its end */
async function train(trainer: Trainer, signal: AbortSignal): Promise<boolean> {
  const progress = new Progress('training')
  const { epochs, part, evaluateEvery } = trainer.options
  let losses = 0
  let steps = 0
  try {
    for await (const event of trainer.run({ signal })) {
      if (event.type === 'start') progress.log(startLine(trainer, event))
      else if (event.type === 'step') {
        losses = 0.95 * losses + event.loss
        steps = 0.95 * steps + 1
        progress.start(`epoch ${event.epoch}/${epochs}`)
        const rate = `${compact(event.tokensPerSecond)} tokens/s`
        progress.update(
          ...([event.step, event.totalSteps] as const),
          `loss ${(losses / steps).toFixed(3)}  ${rate}  ETA ${clock(event.etaSeconds)}`,
        )
      } else if (event.type === 'evaluation') {
        const { loss, metrics } = event
        const [hr, ndcg] = [metric(metrics['hr@10']!), metric(metrics['ndcg@10']!)]
        progress.log(
          `epoch ${event.epoch}/${epochs}  loss ${loss.toFixed(4)}  ${part === 'paper' ? 'test' : 'valid'} HR@10 ${hr}  ` +
            `NDCG@10 ${ndcg}${event.best ? '  best' : ''}`,
        )
      } else if (event.type === 'interrupted') return false
      else if (event.type === 'done' && event.stoppedEarly)
        progress.log(`stopped early: no better NDCG@10 in ${trainer.options.patience} evaluations`)
    }
  } finally {
    progress.clear()
  }
  // Without an evaluation the trainer saves neither where it ended nor the model.
  if (evaluateEvery === 0 && trainer.setting.folder) {
    await trainer.save()
    const origin = { options: trainer.options, epoch: trainer.state.epoch, metrics: null }
    const content = modelContent(trainer.model, trainer.setting.model, trainer.dataset, origin)
    await saveCheckpoint(join(trainer.setting.folder, 'best'), trainer.state.step, content)
  }
  return true
}

function startLine(trainer: Trainer, event: TrainEvent & { type: 'start' }): string {
  const { options, setting } = trainer
  const begun = event.step > 0 ? `going on at step ${count(event.step)}: ` : ''
  return (
    `${dataSummary(trainer.dataset)}\n${begun}${setting.model.kind}, ${counted(event.parameters, 'parameter')}, ` +
    `${counted(event.users, 'user')} to train on, ${counted(options.epochs, 'epoch')} of ${counted(event.stepsPerEpoch, 'step')}, ` +
    `seed ${options.seed}${options.precision === 'float32' ? '' : `, ${options.precision}`}`
  )
}

async function testAndReport(trainer: Trainer, run: Run, signal: AbortSignal) {
  const { dataset, options, state, setting } = trainer
  const protocol = options.part === 'paper' ? 'paper' : 'valid'
  const progress = new Progress('testing')
  const test = await evaluate(trainer.model, dataset, {
    ...{ stage: 'test', protocol, filterSeen: options.filterSeen, signal },
    onProgress: (done, total) => progress.update(done, total),
  }).finally(() => progress.clear())
  const report = {
    ...provenance('train'),
    ...{ preset: run.preset, seed: options.seed, split: protocol, filterSeen: options.filterSeen },
    data: {
      path: run.data,
      name: dataset.name,
      users: dataset.numUsers,
      items: dataset.numItems,
      actions: dataset.items.length,
    },
    skippedUsers: dataset.stats.skippedUsers,
    model: setting.model,
    options,
    parameters: Object.values(trainer.model.parameters).reduce((sum, tensor) => sum + tensor.size, 0),
    ...{ epochs: state.epoch, steps: state.step, seconds: state.seconds },
    best: state.best && { ...state.best, chosenOn: protocol === 'paper' ? 'test' : 'valid' },
    test,
    history: state.history,
  }
  await writeReport(run.out, report)
  return report
}

function drawCurve(trainer: Trainer, run: Run): Promise<boolean> {
  const { history } = trainer.state
  const stage = trainer.options.part === 'paper' ? 'test' : 'validation'
  return writeCurve(join(run.out, 'curve.svg'), {
    title: `${run.preset ?? trainer.setting.model.kind} on ${trainer.dataset.name}`,
    subtitle: `seed ${trainer.options.seed}`,
    x: 'epoch',
    y: ['training loss', `${stage} NDCG@10`],
    series: [
      { name: 'training loss', points: history.map(({ epoch, loss }) => [epoch, loss]) },
      {
        name: `${stage} NDCG@10`,
        points: history.flatMap(({ epoch, metrics }) => (metrics ? [[epoch, metrics['ndcg@10']!] as const] : [])),
        axis: 1,
      },
    ],
  })
}

function printResult(trainer: Trainer, test: Metrics, run: Run, hasCurve: boolean): void {
  const { state, options, dataset } = trainer
  const paper = options.part === 'paper'
  if (state.best) {
    const ndcg = metric(state.best.metrics['ndcg@10']!)
    print(
      `best epoch ${state.best.epoch} of ${state.epoch}, chosen on ${paper ? 'TEST' : 'validation'} (NDCG@10 ${ndcg})`,
    )
    if (paper)
      print('split paper holds out no validation action: the best epoch was chosen on test, so these numbers flatter')
  } else print(`last of ${counted(state.epoch, 'epoch')}; none was evaluated`)
  print(
    `test: ${counted(test.users, 'user')}, ${counted(dataset.numItems, 'item')} ranked, ${filterText[options.filterSeen]}\n`,
  )
  print(metricsTable(test))
  print(
    `\n${clock(state.seconds)} of training; in ${run.out}: best/, checkpoint/, report.json${hasCurve ? ', curve.svg' : ''}`,
  )
}
