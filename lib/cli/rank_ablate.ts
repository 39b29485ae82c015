import type { RankerShape } from '../train/rank_events.js'
import type { TaskMetrics } from '../train/rank_metrics.js'
import type { RankOptions } from '../train/rank_options.js'
import { RankTrainer } from '../train/rank_trainer.js'
import type { Args } from './args.js'
import { tensorOptions } from './device.js'
import { EXIT_INTERRUPTED, interruptible } from './interrupt.js'
import { counted, metric, print, printJson, table } from './output.js'
import { rankSetting, rankTasks, records } from './rank_setting.js'
import { train } from './rank_train.js'
import { makeFolder, provenance, writeReport } from './report.js'

interface Variant {
  name: string
  model?: Partial<RankerShape>
  options?: Partial<RankOptions>
}

// Every request is learnt from, and nothing stands beside the sequence model.
const plain: Partial<RankOptions> = { userRate: 0, learnEvery: 0, idRates: false }
const candidates: Partial<RankOptions> = { ...plain, supervise: 'candidates' }
const history: Partial<RankOptions> = { ...plain, supervise: 'history' }

/** What is changed in the preset, a variant a row. */
const variants: readonly Variant[] = [
  { name: 'the preset' },
  { name: 'interleaved, all positions', options: history },
  { name: 'interleaved, all positions, no time bias', options: history, model: { timeBias: false } },
  { name: 'interleaved, candidates only', options: candidates },
  { name: 'interleaved, candidates only, no time bias', options: candidates, model: { timeBias: false } },
  { name: 'additive, candidates only', options: candidates, model: { fusion: 'add' } },
  { name: 'additive, candidates only, no time bias', options: candidates, model: { fusion: 'add', timeBias: false } },
]

interface Row extends Variant {
  seconds: number
  steps: number
  counted: TaskMetrics
}

export function run(args: Args): Promise<number | undefined> {
  const out = args.required('out')
  const tensors = tensorOptions(args.text('device'))
  const { preset, model, options } = rankSetting(args)
  return interruptible(async signal => {
    await makeFolder(out)
    const reader = await records(args, signal)
    const { tasks, auxiliary } = rankTasks(args, preset, reader)
    const rows: Row[] = []
    for (const variant of variants) {
      process.stderr.write(`${variant.name}\n`)
      const trainer = new RankTrainer(reader, {
        ...{ model: { ...model, ...variant.model }, options: { ...options, ...variant.options }, tasks, tensors },
      })
      try {
        const done = await train(trainer, signal)
        if (!done) return EXIT_INTERRUPTED
        rows.push({ ...variant, seconds: done.seconds, steps: done.step, counted: done.counted })
      } finally {
        trainer.dispose()
      }
    }
    const { requests, name } = reader.manifest
    const document = {
      ...provenance('rank ablate'),
      ...{ preset: args.required('preset'), seed: options.seed ?? 0, options, model, auxiliary },
      ...{ records: { name, requests }, rows },
    }
    const text = ablationTable(rows, auxiliary)
    await writeReport(out, document, text)
    if (args.flag('json')) printJson(document)
    else print(`${text}\n\n${counted(rows.length, 'variant')}; in ${out}: report.json, report.txt`)
    return undefined
  })
}

function ablationTable(rows: readonly Row[], auxiliary: readonly string[]): string {
  const tasks = Object.keys(rows[0]!.counted).filter(task => !auxiliary.includes(task))
  const lines = tasks.flatMap(task =>
    rows.map(({ name, counted, seconds }) => {
      const own = counted[task]!
      const figures = 'ne' in own ? [metric(own.ne), metric(own.auc)] : [`MSE ${own.mse.toPrecision(4)}`, '']
      return [task, name, ...figures, seconds.toFixed(0)]
    }),
  )
  return table(['task', 'variant', 'NE', 'AUC', 'seconds'], lines, [0, 1])
}
