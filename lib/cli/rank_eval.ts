import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { RequestReader } from '../data/ranking/reader.js'
import { RankTrainer } from '../train/rank_trainer.js'
import { type Args, UsageError } from './args.js'
import { interruptible } from './interrupt.js'
import { counted, print, printJson } from './output.js'
import { resultTable } from './rank_report.js'
import { provenance } from './report.js'

export function run(args: Args): Promise<number | undefined> {
  return interruptible(async signal => {
    const checkpoint = args.required('checkpoint')
    const own = join(checkpoint, 'requests')
    const folder = args.text('requests') ?? (existsSync(own) ? own : null)
    if (folder === null) throw new UsageError(`${checkpoint} has no records of its own: give --requests`, args.command)
    const reader = await RequestReader.open(folder)
    const trainer = await RankTrainer.resume(checkpoint, reader)
    try {
      const { pass, cursor } = trainer.state
      const { requests } = reader.manifest
      const learnt = pass > 0 ? Math.max(cursor, trainer.countedFrom) : cursor
      const first = args.integer('from') ?? (learnt < requests ? learnt : trainer.countedFrom)
      const metrics = await trainer.evaluate({ first, signal })
      if (args.flag('json')) {
        printJson({
          ...provenance('rank eval'),
          checkpoint,
          step: trainer.state.step,
          first,
          requests,
          learnt,
          metrics,
        })
        return undefined
      }
      print(
        `requests ${first} to ${requests - 1} (${counted(requests - first, 'request')}), none learnt from on the way`,
      )
      if (first < learnt) print(`the run has learnt from those before ${learnt}: the figures flatter`)
      print(`\n${resultTable(metrics)}`)
    } finally {
      trainer.dispose()
    }
    return undefined
  })
}
