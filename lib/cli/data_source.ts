import type { SequenceDataset } from '../data/dataset.js'
import { type ColumnMapping, type DatasetFormat, loadDataset } from '../data/load.js'
import { type Args, UsageError } from './args.js'
import { count, counted } from './output.js'
import { Progress } from './progress.js'

const ROLES = ['user', 'item', 'time', 'rating', 'delimiter', 'header', 'quote']

/** `user=person,item=3` as a mapping; a column of digits alone is one by number. */
function parseMapping(args: Args): ColumnMapping | undefined {
  const text = args.text('mapping')
  if (text === undefined) return undefined
  const mapping: Record<string, string | number | boolean> = {}
  for (const part of text.split(',')) {
    const at = part.indexOf('=')
    const [role, value] = [part.slice(0, at).trim(), part.slice(at + 1)]
    if (at < 1 || !ROLES.includes(role))
      throw new UsageError(
        `--mapping expects role=column with a role of ${ROLES.join(', ')}, got '${part}'`,
        args.command,
      )
    if (role === 'header') mapping.header = value !== 'false' && value !== 'no'
    else if (role === 'delimiter') mapping.delimiter = value === 'tab' || value === '\\t' ? '\t' : value
    else mapping[role] = role !== 'quote' && /^\d+$/.test(value) ? Number(value) : value
  }
  if (mapping.user === undefined || mapping.item === undefined)
    throw new UsageError(`--mapping needs a user and an item column, got '${text}'`, args.command)
  return mapping as unknown as ColumnMapping
}

/** Reads the file of a command with a `--data` option (or of the given path), telling how far it is. */
export async function readData(
  args: Args,
  signal: AbortSignal,
  path = args.required('data'),
): Promise<SequenceDataset> {
  const [times, format, mapping] = [args.text('times'), args.text('format') as DatasetFormat, parseMapping(args)]
  const minActions = args.integer('min-actions', 1)
  const progress = new Progress(`reading ${path}`)
  try {
    return await loadDataset(path, {
      ...{ signal, onProgress: ({ phase, rows, total }) => progress.update(rows, total, `${phase} ${count(rows)}`) },
      ...(times ? { times } : {}),
      ...(format ? { format } : {}),
      ...(mapping ? { mapping } : {}),
      ...(minActions ? { minActions } : {}),
    })
  } finally {
    progress.clear()
  }
}

/** What was left out and what looks odd, one line each. */
export function dataNotes({ stats }: SequenceDataset): string[] {
  const notes = [...stats.warnings]
  if (stats.skippedUsers > 0)
    notes.push(
      `${counted(stats.skippedUsers, 'user')} with fewer than ${stats.minActions} actions skipped ` +
        `(${counted(stats.skippedActions, 'action')})`,
    )
  return notes
}

export function dataSummary(dataset: SequenceDataset): string {
  const { name, numUsers, numItems, items } = dataset
  return `${name}: ${counted(numUsers, 'user')}, ${counted(numItems, 'item')}, ${counted(items.length, 'action')}`
}
