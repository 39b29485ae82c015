import { join } from 'node:path'
import { type BaselineReport, evaluateBaselines } from '../eval/ranking_baselines.js'
import type { BinaryMetrics } from '../eval/ranking_metrics.js'
import { evaluateDin } from '../train/din_baseline.js'
import type { RankEvent } from '../train/rank_events.js'
import type { TaskMetrics } from '../train/rank_metrics.js'
import type { RankTrainer } from '../train/rank_trainer.js'
import type { Args } from './args.js'
import { curveHint, writeCurve } from './curve.js'
import { tensorOptions } from './device.js'
import { clock, count, counted, metric, print, printJson, table } from './output.js'
import { notes, tableReport } from './rank_notes.js'
import { provenance, writeReport } from './report.js'

export type RankDone = RankEvent & { type: 'done' }

/** A row a task and model, the ranker last. @param auxiliary tasks that are learnt beside and not shown */
export function resultTable(
  ranker: TaskMetrics,
  baselines: readonly BaselineReport[] = [],
  auxiliary: readonly string[] = [],
): string {
  const row = (task: string, model: string, m: BinaryMetrics) => [
    ...[task, model, metric(m.ne), metric(m.auc), metric(m.gauc), m.calibration.toFixed(3), metric(m.baseRate)],
  ]
  const shown = Object.entries(ranker).filter(([task]) => !auxiliary.includes(task))
  const rows = shown.flatMap(([task, metrics]) =>
    'ne' in metrics
      ? [
          ...baselines
            .filter(other => other.task === task)
            .map(({ baseline, metrics }) => row(task, baseline, metrics)),
          row(task, 'GenerativeRanker', metrics),
        ]
      : [[task, 'GenerativeRanker', `MSE ${metrics.mse.toPrecision(4)}`, `MAE ${metrics.mae.toPrecision(4)}`]],
  )
  return table(['task', 'model', 'NE', 'AUC', 'GAUC', 'calibration', 'base rate'], rows, [0, 1])
}

/** What `--baselines` asks for, over the same counted part: 'online' (default), 'all' with DIN after one and after `DIN_PASSES`, 'none'. */
async function baselinesOf(trainer: RankTrainer, auxiliary: readonly string[], args: Args, signal: AbortSignal) {
  const which = args.text('baselines') ?? 'online'
  if (which === 'none') return []
  const { reader, options, countedFrom: from, end } = trainer
  const { gaucBy, seed } = options
  const tasks = trainer.tasks.filter(task => !auxiliary.includes(task.name))
  const stream = reader.batches({ batchSize: 2048, end, signal })
  const reports = await evaluateBaselines(stream, tasks, { from, gaucBy })
  if (which === 'all')
    for (const passes of [1, DIN_PASSES])
      reports.push(
        ...(await evaluateDin(reader, tasks, {
          ...{ from, end, passes, gaucBy, seed, signal, tensors: tensorOptions(args.text('device')) },
        })),
      )
  return reports
}

const DIN_PASSES = 3

/** Baselines, the document, its curve, and the table on the terminal. @param auxiliary names of tasks that are learnt beside */
export async function reportRank(
  trainer: RankTrainer,
  done: RankDone,
  auxiliary: readonly string[],
  args: Args,
  signal: AbortSignal,
): Promise<void> {
  const { reader, options, state, countedFrom, tasks, model, end } = trainer
  const out = args.required('out')
  const baselines = await baselinesOf(trainer, auxiliary, args, signal)
  const { requests, candidates, name } = reader.manifest
  const document = {
    ...provenance('rank train'),
    ...{ preset: args.required('preset'), seed: options.seed, options, model: model.config, auxiliary },
    records: { name, requests, candidates, countedFrom, end },
    ...{ steps: state.step, seconds: state.seconds, impressions: state.impressions },
    ...{ sparsity: trainer.sparsity, sampled: trainer.sampled, table: tableReport(trainer) },
    ...{ counted: done.counted, lifetime: done.lifetime, baselines, curve: state.curve },
  }
  const to = end < requests ? ` before ${end}` : ''
  const text = [
    `the last ${counted(end - countedFrom, 'request')}${to}, predicted before they were learnt from`,
    resultTable(done.counted, baselines, auxiliary),
    ...notes(trainer),
  ].join('\n\n')
  await writeReport(out, document, text)
  const names = tasks.flatMap(({ kind, name }) => (kind === 'binary' && !auxiliary.includes(name) ? [name] : []))
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
    print(text)
    const passes = counted(options.passes, 'pass', 'passes')
    const files = ['checkpoint/', 'report.json', 'report.txt', ...(hasCurve ? ['curve.svg'] : [])]
    print(`\n${passes}, ${clock(state.seconds)}; in ${out}: ${files.join(', ')}`)
  }
}
