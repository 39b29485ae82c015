import { evaluate } from '../eval/evaluate.js'
import type { Args } from './args.js'
import { dataNotes, dataSummary, readData } from './data_source.js'
import { tensorOptions } from './device.js'
import { interruptible } from './interrupt.js'
import { counted, print, printJson } from './output.js'
import { Progress } from './progress.js'
import { filterText, metricsTable, provenance } from './report.js'
import { matchData, openModel } from './run_folder.js'

export function run(args: Args): Promise<number | undefined> {
  return interruptible(async signal => {
    const checkpoint = args.required('checkpoint')
    const loaded = await openModel(checkpoint, tensorOptions(args.text('device')))
    const { model, origin, spec } = loaded
    try {
      const dataset = await readData(args, signal)
      for (const note of dataNotes(dataset)) process.stderr.write(`note: ${note}\n`)
      matchData(loaded, dataset)
      const stage = (args.text('stage') ?? 'test') as 'test' | 'valid'
      const filterSeen = (args.text('filter-seen') ?? origin.options.filterSeen) as keyof typeof filterText
      const protocol = origin.options.part === 'paper' ? 'paper' : 'valid'
      const progress = new Progress(`evaluating on ${stage}`)
      const metrics = await evaluate(model, dataset, {
        ...{ stage, protocol, filterSeen, signal },
        onProgress: (done, total) => progress.update(done, total),
      }).finally(() => progress.clear())
      const path = args.required('data')
      if (args.flag('json')) {
        printJson({
          ...provenance('eval'),
          checkpoint,
          data: path,
          epoch: origin.epoch,
          stage,
          split: protocol,
          filterSeen,
          metrics,
        })
      } else {
        print(
          `${dataSummary(dataset)}\n${spec.kind} of epoch ${origin.epoch}, seed ${origin.options.seed}, split ${protocol}`,
        )
        if (protocol === 'paper') print('split paper: the epoch was chosen on test, so these numbers flatter')
        print(
          `${stage}: ${counted(metrics.users, 'user')}, ${counted(dataset.numItems, 'item')} ranked, ${filterText[filterSeen]}\n`,
        )
        print(metricsTable(metrics))
      }
    } finally {
      model.dispose()
    }
    return undefined
  })
}
