import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { readBundle } from '../serve/bundle.js'
import { type LoadMode, type LoadReport, LoadSource, measureAlone, measureCapacity, offerLoad } from '../serve/load.js'
import { Ranker } from '../serve/ranker.js'
import { type syntheticSizes, writeSyntheticBundle } from '../serve/synthetic.js'
import { type Args, UsageError } from './args.js'
import { engineOptions } from './engine_options.js'
import { interruptible } from './interrupt.js'
import { percent, print, printJson, table } from './output.js'
import { Progress } from './progress.js'
import { provenance } from './report.js'

const MODES = ['cold', 'hit', 'mixed'] as const satisfies readonly LoadMode[]
/** Of a mode: one request after the other, 32 at a time, and too many. */
interface ModeReport {
  latencyP50: number
  overheadP50: number
  overheadP99: number
  capacity: number
  underOverload: number | null
}

/** Offered, as shares of what the engine can do; the last one is an overload. */
const SHARES = [0.5, 0.8, 1, 10]

export async function run(args: Args): Promise<number | undefined> {
  const [bundle, synthetic] = [args.text('bundle'), args.text('synthetic')]
  if ((bundle === undefined) === (synthetic === undefined))
    throw new UsageError('bench serve takes --bundle or --synthetic', args.command)
  if (bundle !== undefined) return offer(args, bundle)
  const folder = await mkdtemp(join(tmpdir(), 'hstu-bench-'))
  try {
    await writeSyntheticBundle(folder, synthetic as keyof typeof syntheticSizes)
    return await offer(args, folder)
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}

/** Goodput of an overload as a share of the best of the other loads; null where there was no overload. */
function underOverload(rows: readonly LoadReport[]): number | null {
  if (rows.length < 2) return null
  return rows.at(-1)!.goodput / Math.max(...rows.slice(0, -1).map(({ goodput }) => goodput))
}

function offer(args: Args, folder: string): Promise<number | undefined> {
  return interruptible(async signal => {
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
      const rows: LoadReport[] = []
      const modes: Record<string, ModeReport> = {}
      for (const mode of MODES) {
        const source = new LoadSource(setting)
        if (mode !== 'cold') for (const request of source.everyone()) await ranker.rank(request)
        progress.update(done++, steps)
        const alone = await measureAlone(ranker, source, mode, { requests: 50, seconds: Math.min(seconds, 1) })
        const capacity = await measureCapacity(ranker, source, mode, Math.min(seconds, 3))
        const own: LoadReport[] = []
        for (const offered of rate === undefined ? SHARES.map(share => share * capacity) : [rate]) {
          if (signal.aborted) return 130
          progress.update(done++, steps)
          own.push(await offerLoad(ranker, source, { mode, rate: offered, seconds, boundMs }))
        }
        modes[mode] = { ...alone, capacity, underOverload: underOverload(own) }
        rows.push(...own)
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
          ['alone', 'p50 ms', 'overhead p50', 'p99', 'capacity /s', 'goodput at 10x'],
          Object.entries(modes).map(([mode, { latencyP50, overheadP50, overheadP99, capacity, underOverload }]) => [
            ...[mode, latencyP50.toFixed(2), overheadP50.toFixed(3), overheadP99.toFixed(3), capacity.toFixed(1)],
            underOverload === null ? '' : `${percent(underOverload)} of the peak`,
          ]),
        ),
      )
      print()
      print(
        table(
          [
            'open loop',
            'offered /s',
            'sent /s',
            `in ${boundMs} ms /s`,
            'p50',
            'p90',
            'p99',
            'refused',
            'late',
            'refusal p99',
            'cached',
            'sent late p99',
            'loop p99',
            'MiB more',
          ],
          rows.map(row => [
            ...[
              row.mode,
              row.rate.toFixed(1),
              (row.requests / row.seconds).toFixed(1),
              row.goodput.toFixed(1),
              row.p50.toFixed(1),
              row.p90.toFixed(1),
              row.p99.toFixed(1),
            ],
            ...[percent(row.refused / Math.max(1, row.requests)), percent(row.late / Math.max(1, row.requests))],
            ...[
              row.refusalP99.toFixed(2),
              percent(row.cachedShare),
              row.lagP99.toFixed(1),
              row.eventLoopDelayP99.toFixed(1),
              row.memoryGrowth.toFixed(0),
            ],
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
