import { readBundle } from '../serve/bundle.js'
import { type LoadMode, LoadSource, measureAlone, measureCapacity, offerLoad } from '../serve/load.js'
import { Ranker } from '../serve/ranker.js'
import type { Args } from './args.js'
import { engineOptions } from './engine_options.js'
import { interruptible } from './interrupt.js'
import { percent, print, printJson, table } from './output.js'
import { Progress } from './progress.js'
import { provenance } from './report.js'

const MODES = ['cold', 'hit', 'mixed'] as const satisfies readonly LoadMode[]
/** Offered, as shares of what the engine can do; the last one is an overload. */
const SHARES = [0.5, 0.8, 1, 10]

export function run(args: Args): Promise<number | undefined> {
  return interruptible(async signal => {
    const folder = args.required('bundle')
    const { vocabularies, manifest } = await readBundle(folder)
    const ranker = await Ranker.load(folder, engineOptions(args))
    const progress = new Progress('bench serve')
    try {
      const { schema, maxHistory, device, model } = ranker.info
      const setting = {
        ...{ items: vocabularies[1 + schema.contextual.length]!.ids, schema, seed: args.integer('seed') ?? 0 },
        ...{ users: args.integer('users', 1) ?? 1000, zipf: args.number('zipf') ?? 1 },
        ...{ history: args.integer('history', 1) ?? Math.floor(maxHistory / 2), growth: args.number('growth') ?? 2 },
        candidates: args.integer('candidates', 1) ?? 256,
      }
      const seconds = args.number('seconds') ?? 5
      const boundMs = args.number('bound') ?? 80
      const rate = args.number('rate')
      const steps = MODES.length * (1 + (rate === undefined ? SHARES.length : 1))
      let done = 0
      const rows = []
      const modes: Record<string, { latencyP50: number; overheadP50: number; capacity: number }> = {}
      for (const mode of MODES) {
        const source = new LoadSource(setting)
        if (mode !== 'cold') for (const request of source.everyone()) await ranker.rank(request)
        progress.update(done++, steps)
        const alone = await measureAlone(ranker, source, mode, 50)
        const capacity = await measureCapacity(ranker, source, mode, Math.min(seconds, 3))
        modes[mode] = { ...alone, capacity }
        for (const offered of rate === undefined ? SHARES.map(share => share * capacity) : [rate]) {
          if (signal.aborted) return 130
          progress.update(done++, steps)
          rows.push(await offerLoad(ranker, source, { mode, rate: offered, seconds, boundMs }))
        }
      }
      progress.clear()
      const { items: _, schema: __, ...load } = setting
      const stats = await ranker.stats()
      if (args.flag('json')) {
        printJson({
          ...provenance('bench serve'),
          folder,
          model,
          device,
          load: { ...load, seconds, boundMs },
          modes,
          rows,
          stats,
        })
        return undefined
      }
      print(
        `${manifest.type} ${model} on ${device}; ${setting.candidates} candidates, histories of about ${setting.history} rows\n`,
      )
      print(
        table(
          ['alone', 'p50 ms', 'overhead ms', 'capacity /s'],
          Object.entries(modes).map(([mode, { latencyP50, overheadP50, capacity }]) => [
            ...[mode, latencyP50.toFixed(2), overheadP50.toFixed(3), capacity.toFixed(1)],
          ]),
        ),
      )
      print()
      print(
        table(
          [
            'open loop',
            'offered /s',
            `in ${boundMs} ms /s`,
            'p50',
            'p90',
            'p99',
            'refused',
            'late',
            'refusal p99',
            'cached',
            'loop p99',
          ],
          rows.map(row => [
            ...[
              row.mode,
              row.rate.toFixed(1),
              row.goodput.toFixed(1),
              row.p50.toFixed(1),
              row.p90.toFixed(1),
              row.p99.toFixed(1),
            ],
            ...[percent(row.refused / Math.max(1, row.requests)), percent(row.late / Math.max(1, row.requests))],
            ...[row.refusalP99.toFixed(2), percent(row.cachedShare), row.eventLoopDelayP99.toFixed(1)],
          ]),
        ),
      )
      return undefined
    } finally {
      progress.clear()
      await ranker.close()
    }
  })
}
