import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { RequestManifest } from '../data/ranking/manifest.js'
import { type RequestMapping, readMapping } from '../data/ranking/mapping.js'
import { type PrepareProgress, prepareRequests } from '../data/ranking/prepare.js'
import { rankingPreset } from '../data/ranking/presets.js'
import { type SyntheticLogOptions, syntheticMapping, writeSyntheticLog } from '../data/ranking/synthetic.js'
import { type Args, UsageError } from './args.js'
import { interruptible } from './interrupt.js'
import { count, counted, print, printJson } from './output.js'
import { Progress } from './progress.js'

export const SYNTHETIC = 'ranking/synthetic'
const SIZES = ['users', 'items', 'categories', 'days', 'candidates', 'seed']

export function run(args: Args): Promise<number | undefined> {
  const [file, preset, data] = [args.text('mapping'), args.text('preset'), args.text('data')]
  if ((file === undefined) === (preset === undefined))
    throw new UsageError('either --mapping or --preset says what the logs hold', args.command)
  if ((preset !== undefined && preset !== SYNTHETIC) !== (data !== undefined))
    throw new UsageError('--data names the folder of a preset with files, and goes with nothing else', args.command)
  if (preset !== SYNTHETIC && args.list('set').length > 0)
    throw new UsageError(`--set goes with --preset ${SYNTHETIC}`, args.command)
  return interruptible(async signal => {
    const progress = new Progress('preparing')
    const scratch = preset === SYNTHETIC ? await mkdtemp(join(tmpdir(), 'hstu-synthetic-')) : null
    try {
      const { mapping, oracleNe } = scratch
        ? await synthetic(join(scratch, 'log.csv'), args, signal, progress)
        : { mapping: file === undefined ? rankingPreset(preset!, data!) : await readMapping(file), oracleNe: null }
      const maxHistory = args.integer('max-history', 1)
      const memoryLimit = args.text('memory')
      const manifest = await prepareRequests(maxHistory === undefined ? mapping : { ...mapping, maxHistory }, {
        ...{ out: args.required('out'), replace: args.flag('replace'), signal },
        ...(memoryLimit === undefined ? {} : { memoryLimit }),
        onProgress: stage => show(progress, stage),
      })
      progress.clear()
      if (args.flag('json')) printJson(oracleNe === null ? manifest : { ...manifest, oracleNe })
      else printSummary(manifest, args.required('out'), oracleNe)
      return undefined
    } finally {
      progress.clear()
      if (scratch) await rm(scratch, { recursive: true, force: true })
    }
  })
}

const PHASES: Record<PrepareProgress['phase'], string> = {
  read: 'reading the logs',
  join: 'joining events to requests',
  sequences: "ordering the users' series",
  write: 'writing shards',
}

function show(progress: Progress, { phase, done, total }: PrepareProgress): void {
  progress.start(PHASES[phase])
  progress.update(done, total)
}

async function synthetic(
  path: string,
  args: Args,
  signal: AbortSignal,
  progress: Progress,
): Promise<{ mapping: RequestMapping; oracleNe: number }> {
  const sizes: Record<string, number> = {}
  for (const [key, value] of args.pairs('set')) {
    if (!SIZES.includes(key)) throw new UsageError(`--set knows ${SIZES.join(', ')}, got '${key}'`, args.command)
    sizes[key] = Number(value)
  }
  const options: SyntheticLogOptions = { ...sizes, signal }
  const { oracleNe } = await writeSyntheticLog(path, {
    ...options,
    onProgress: (day, days) => {
      progress.start('generating the stream')
      progress.update(day, days)
    },
  })
  return { mapping: syntheticMapping(path), oracleNe }
}

function printSummary(manifest: RequestManifest, out: string, oracleNe: number | null): void {
  const { requests, candidates, sizes, shards, counts } = manifest
  print(
    `${manifest.name}: ${counted(requests, 'request')}, ${counted(candidates, 'candidate')} in ${counted(shards.length, 'shard')}`,
  )
  print(`${counted(sizes.users, 'user')}, ${counted(sizes.items, 'item')}, ${counted(counts.rows, 'event')} read`)
  for (const line of countNotes(counts)) print(`note: ${line}`)
  if (oracleNe !== null)
    print(`LIKE: the true probabilities have NE ${oracleNe.toFixed(4)} on the last fifth of the days`)
  print(`written to ${out}; hstu data inspect ${out} tells more`)
}

/** What was left out or folded, one line each. */
export function countNotes(counts: RequestManifest['counts']): string[] {
  const notes: [number, string][] = [
    [counts.duplicates, 'events equal another in every mapped column and count once'],
    [counts.unknownRequests, 'labels of unknown requests skipped'],
    [counts.withoutCandidates, 'requests without candidates skipped; their events are history'],
    [counts.overflow, 'events of items beyond maxItems: the items are 0'],
    [counts.fractions, 'times with a fraction of a second, cut off'],
  ]
  return notes.filter(([n]) => n > 0).map(([n, text]) => `${count(n)} ${text}`)
}
