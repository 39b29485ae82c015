import { basename } from 'node:path'
import { check } from '../errors.js'
import type { SequenceDataset } from './dataset.js'
import { type Database, sqlLines, sqlString, withDatabase } from './duckdb.js'
import { dataError, firstLine, probeFile, quoted } from './files.js'
import { type ColumnMapping, type DatasetFormat, detectFormat } from './formats.js'
import { fractionWarning, loadSequenceFile, MAX_PLAUSIBLE_SECONDS, MAX_SECONDS, unitWarning } from './sequence_file.js'
import { type TableSource, tableSource } from './table.js'

export { type ColumnMapping, DATASET_FORMATS, type DatasetFormat } from './formats.js'
export { loadItemTitles } from './titles.js'

/** How far loading has come. */
export interface LoadProgress {
  /** `read`: parsing the file; `sort`: numbering and ordering; `fetch`: copying out. */
  phase: 'read' | 'sort' | 'fetch'
  rows: number
  /** Rows in all; null while that is not known. */
  total: number | null
}

export interface LoadOptions {
  /** Default: by the file's name, by its first line where the name is silent. */
  format?: DatasetFormat
  /** Sequence files: a file of the same lines with a time in place of each item. */
  times?: string
  /** Which columns hold what, for tables that are in none of the standard layouts. */
  mapping?: ColumnMapping
  /** Users with fewer actions are skipped and counted; default 3 (one each to train from, validate and test on). */
  minActions?: number
  /** Order of a user's actions of equal time. `'stable'`, the only choice, keeps that of the file. */
  tieBreak?: 'stable'
  /** Default: the file's name without its extension. */
  name?: string
  signal?: AbortSignal
  onProgress?: (progress: LoadProgress) => void
}

/**
 * Reads users' actions from a file in one of {@link DATASET_FORMATS}, plain or, tables, compressed (`.gz`, `.zst`).
 *
 * Rows of tables are ordered by user, time, row of the file; sequence files keep their order. Ids are text throughout,
 * so 64-bit ids stay exact. Times are whole seconds; fractions are cut off after sorting and give a warning.
 *
 * Tables are read by the optional package `@duckdb/node-api`, in memory with spilling to the system's temporary folder.
 *
 * @throws HstuError ERR_HSTU_DATA naming file, 1-based line and what was expected: no such file, a directory, binary or
 *   empty file, a line of too few or too many columns, a time or rating that is not a finite number, an empty id, a
 *   mapped column that does not exist, a times file that disagrees with its sequence file, a second line for a user, no
 *   user with `minActions` actions, `@duckdb/node-api` missing. Lines are counted as rows where a quoted field contains
 *   a line end. ERR_HSTU_ABORTED when `signal` fires. ERR_HSTU_INVALID_ARGUMENT for options that contradict each other.
 */
export async function loadDataset(path: string, options: LoadOptions = {}): Promise<SequenceDataset> {
  const { mapping, minActions = 3, signal, onProgress } = options
  check(
    Number.isInteger(minActions) && minActions >= 1,
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `minActions must be a positive integer, got ${minActions}`,
  )
  const name = options.name ?? basename(path).replace(/(\.[^.]+?)(\.gz|\.zst)?$/, '')
  const kind = await probeFile(path)
  const first = kind === 'text' ? await firstLine(path) : null
  if (kind === 'text' && first === null) throw dataError(path, null, 'no rows: the file has blank lines only')
  // What is compressed cannot be looked into before the database runs, and is never a sequence file.
  const early =
    options.format ?? (kind === 'compressed' ? null : detectFormat(path, kind, first, mapping !== undefined))
  check(
    options.times === undefined || early === 'sequence',
    'ERR_HSTU_INVALID_ARGUMENT',
    () => `options.times goes with a sequence file; ${path} is read as '${early}'`,
  )
  if (early === 'sequence') {
    const onRows = (rows: number) => onProgress?.({ phase: 'read', rows, total: null })
    return loadSequenceFile(path, { times: options.times, minActions, name, signal, onRows })
  }
  return withDatabase(path, signal, async database => {
    const head = kind === 'compressed' ? await firstPackedLine(database, path) : first
    const format = early ?? detectFormat(path, kind, head, mapping !== undefined)
    const source = await tableSource(database, path, format, head, mapping)
    return readTable(database, path, source, { name, minActions, onProgress })
  })
}

async function firstPackedLine(database: Database, path: string): Promise<string | null> {
  const [line] = await database.column(`SELECT line FROM ${sqlLines(path)} WHERE trim(line) <> '' LIMIT 1`)
  return line === undefined ? null : String(line)
}

async function readTable(
  database: Database,
  path: string,
  source: TableSource,
  options: { name: string; minActions: number; onProgress?: (progress: LoadProgress) => void },
): Promise<SequenceDataset> {
  const { name, minActions, onProgress } = options
  const hasTime = source.time !== null
  const hasRating = source.rating !== null
  onProgress?.({ phase: 'read', rows: 0, total: null })
  // Filled in the order of the file, so that rowid is the file's row.
  await database.run(`CREATE TABLE actions AS SELECT ${source.user} AS user_id, ${source.item} AS item_id,
    ${source.time ?? 'NULL::DOUBLE'} AS t, ${source.rating ?? 'NULL::DOUBLE'} AS r FROM ${source.from}`)
  const { rows, warnings } = await validate(database, path, source)
  onProgress?.({ phase: 'sort', rows, total: rows })

  await database.run(`CREATE TABLE users AS SELECT user_id, n, row_number() OVER (ORDER BY first) - 1 AS u FROM
    (SELECT user_id, count(*) AS n, min(rowid) AS first FROM actions GROUP BY user_id) WHERE n >= ${minActions}`)
  await database.run(`CREATE TABLE items AS SELECT item_id, row_number() OVER (ORDER BY first) AS i FROM
    (SELECT item_id, min(a.rowid) AS first FROM actions a SEMI JOIN users USING (user_id) GROUP BY item_id)`)
  const userIds = (await database.column('SELECT user_id FROM users ORDER BY u')) as string[]
  if (userIds.length === 0) throw dataError(path, null, `no user has ${minActions} actions or more (minActions)`)
  const itemIds = ['', ...((await database.column('SELECT item_id FROM items ORDER BY i')) as string[])]
  const totals = await database.row(`SELECT (SELECT count(DISTINCT user_id) FROM actions) AS users,
    (SELECT sum(n) FROM users)::BIGINT AS kept`)
  const kept = Number(totals!.kept)
  check(kept < 2 ** 31, 'ERR_HSTU_DATA', () => `${path}: ${kept} actions, more than 2^31 - 1`)

  const offsets = new Int32Array(userIds.length + 1)
  const items = new Int32Array(kept)
  const times = hasTime ? new BigInt64Array(kept) : null
  const ratings = hasRating ? new Float32Array(kept) : null
  let outOfOrder = 0
  let at = 0
  let lastUser = -1
  let lastRow = 0
  const sql = `SELECT u::INTEGER, i::INTEGER, a.rowid::INTEGER, floor(t)::BIGINT, r::FLOAT
    FROM actions a JOIN users USING (user_id) JOIN items USING (item_id)
    ORDER BY u, ${hasTime ? 't, ' : ''}a.rowid`
  await database.chunks(sql, chunk => {
    const count = chunk.rowCount
    // The typed arrays behind the vectors: not in the package's types, but a value at a time costs ten times as much.
    const vector = (column: number) => (chunk.getColumnVector(column) as unknown as { items: unknown }).items
    const users = vector(0) as Int32Array
    const fileRows = vector(2) as Int32Array
    items.set((vector(1) as Int32Array).subarray(0, count), at)
    times?.set((vector(3) as BigInt64Array).subarray(0, count), at)
    ratings?.set((vector(4) as Float32Array).subarray(0, count), at)
    for (let k = 0; k < count; k++) {
      if (users[k] !== lastUser) lastUser = users[k]!
      else if (fileRows[k]! < lastRow) outOfOrder++
      lastRow = fileRows[k]!
      offsets[lastUser + 1]!++
    }
    at += count
    onProgress?.({ phase: 'fetch', rows: at, total: kept })
  })
  for (let u = 0; u < userIds.length; u++) offsets[u + 1]! += offsets[u]!
  return {
    name,
    numUsers: userIds.length,
    numItems: itemIds.length - 1,
    userIds,
    itemIds,
    offsets,
    items,
    times,
    ratings,
    stats: {
      rows,
      skippedUsers: Number(totals!.users) - userIds.length,
      skippedActions: rows - kept,
      outOfOrder,
      minActions,
      warnings: [...source.warnings, ...warnings],
    },
  }
}

/** @throws HstuError ERR_HSTU_DATA at the first row whose values are not what they have to be. */
async function validate(
  database: Database,
  path: string,
  source: TableSource,
): Promise<{ rows: number; warnings: string[] }> {
  // In SQL NaN is greater than every number, so "not (abs <= limit)" catches it.
  const wrong = {
    user: "user_id IS NULL OR user_id = ''",
    item: "item_id IS NULL OR item_id = ''",
    time: source.time === null ? 'false' : `t IS NULL OR NOT (abs(t) <= ${MAX_SECONDS})`,
    rating: source.rating === null ? 'false' : 'r IS NULL OR NOT (abs(r) <= 3.4e38)',
  }
  const firsts = Object.entries(wrong).map(
    ([role, condition]) => `min(rowid) FILTER (WHERE ${condition}) AS ${role}_row`,
  )
  const summary = await database.row(`SELECT count(*) AS rows, count(*) FILTER (WHERE t <> floor(t)) AS fractions,
    max(t) AS latest, ${firsts.join(', ')} FROM actions`)
  const rows = Number(summary!.rows)
  if (rows === 0) throw dataError(path, null, 'no rows: expected at least one action')
  let bad: { role: keyof typeof wrong; row: number } | null = null
  for (const role of Object.keys(wrong) as (keyof typeof wrong)[]) {
    const row = summary![`${role}_row`]
    if (row !== null && (bad === null || Number(row) < bad.row)) bad = { role, row: Number(row) }
  }
  if (bad) throw await badValue(database, path, source, bad.role, bad.row)
  const warnings: string[] = []
  const fractions = Number(summary!.fractions)
  if (fractions > 0) warnings.push(fractionWarning(fractions))
  const latest = Number(summary!.latest ?? 0)
  if (latest > MAX_PLAUSIBLE_SECONDS) warnings.push(unitWarning(latest))
  return { rows, warnings }
}

const EXPECTED = {
  user: 'a user id',
  item: 'an item id',
  time: 'a time in seconds',
  rating: 'a finite number as rating',
}

/** Reads the file again, which only ever happens once: rows are not lines where the file has blank ones. */
async function badValue(
  database: Database,
  path: string,
  source: TableSource,
  role: keyof typeof EXPECTED,
  row: number,
) {
  const found = await database.row(`SELECT * FROM (SELECT ${source.text[role]} AS value, row_number() OVER () AS n
    FROM ${source.from}) WHERE n = ${row + 1}`)
  const value = found?.value === null || found?.value === undefined ? null : String(found.value)
  const message = `expected ${EXPECTED[role]}, found ${quoted(value)}`
  if (!source.lines) return dataError(path, null, `row ${row + 1}: ${message}`)
  const line = await database.row(`SELECT * FROM (SELECT row_number() OVER () AS n, line FROM ${sqlLines(path)})
    WHERE NOT (${source.lines.blank}) ORDER BY n LIMIT 1 OFFSET ${row + source.lines.header}`)
  const text = String(line?.line ?? '')
  if (
    source.lines.json &&
    !(await database.row(`SELECT 1 AS ok WHERE json_type(TRY_CAST(${sqlString(text)} AS JSON)) = 'OBJECT'`))
  ) {
    return dataError(path, Number(line?.n), `expected a JSON object, found ${quoted(text)}`)
  }
  return dataError(path, line ? Number(line.n) : row + 1, message)
}
