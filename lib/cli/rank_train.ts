import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { HstuError } from '../errors.js'
import { RankTrainer } from '../train/rank_trainer.js'
import type { Args } from './args.js'
import { tensorOptions } from './device.js'
import { EXIT_INTERRUPTED, interruptible } from './interrupt.js'
import { clock, compact, count, counted } from './output.js'
import { commandLine } from './package.js'
import { Progress } from './progress.js'
import { type RankDone, reportRank } from './rank_report.js'
import { rankSetting, rankTasks, records } from './rank_setting.js'
import { makeFolder } from './report.js'

export function run(args: Args): Promise<number | undefined> {
  const [out, resuming] = [args.required('out'), args.flag('resume')]
  const device = tensorOptions(args.text('device'))
  const { preset, model, options } = rankSetting(args)
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
      const { tasks, auxiliary } = rankTasks(args, preset, reader)
      const trainer = resuming
        ? await RankTrainer.resume(out, reader)
        : new RankTrainer(reader, {
            ...{ model, options, tasks, folder: out, tensors: device },
          })
      try {
        const done = await train(trainer, signal)
        if (!done) {
          process.stderr.write(`stopped at step ${trainer.state.step}; to go on:  ${commandLine(again)}\n`)
          return EXIT_INTERRUPTED
        }
        await reportRank(trainer, done, auxiliary, args, signal)
      } finally {
        trainer.dispose()
      }
      return undefined
    },
    () => process.stderr.write(`interrupted; to go on:  ${commandLine(again)}\n`),
  )
}

/** Runs the trainer and tells about it. @returns null where it was interrupted */
export async function train(trainer: RankTrainer, signal: AbortSignal): Promise<RankDone | null> {
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
