import { type Database, sqlLines, sqlName, sqlPath, sqlString } from '../duckdb.js'
import { dataError, firstLine, probeFile, quoted, splitFields } from '../files.js'
import { findColumn } from '../table.js'
import type { Column, Condition, LogSource } from './mapping.js'
import type { RequestSchema } from './schema.js'

/** One file of a log as SQL: `from` is a relation, `text` gives a column of it as VARCHAR. */
interface LogTable {
  from: string
  text: (column: Column, role: string) => string
  /** Seconds as DOUBLE, NULL where it is no number; `unit` of them make a second. */
  time: (column: Column, unit: number) => string
  lines: { header: number; blank: string; json: boolean } | null
}

/** A file that was appended to the table `log`: its rows are `start .. start + rows - 1`. */
export interface LoggedFile {
  path: string
  source: LogSource
  table: LogTable
  start: number
  rows: number
}

const UNITS = { s: 1, ms: 1e3, us: 1e6 }

/** Columns of `log` after the fixed ones: `v0..` values, `c0..` contextual, `s0..` series. */
export const groupColumns = (letter: string, names: readonly string[]) => names.map((_, k) => `${letter}${k}`)

export async function createLog(database: Database, schema: RequestSchema): Promise<void> {
  const many = (letter: string, names: readonly string[], type: string) =>
    groupColumns(letter, names).map(name => `, ${name} ${type}`)
  await database.run(`CREATE TABLE log (user_id VARCHAR, item_id VARCHAR, t DOUBLE, request_id VARCHAR, action INTEGER,
    impression BOOLEAN, odd BOOLEAN ${[
      ...many('v', schema.values, 'FLOAT'),
      ...many('c', schema.contextual, 'VARCHAR'),
      ...many('s', schema.series, 'VARCHAR'),
    ].join('')})`)
}

/** Appends a file to `log`, in the order of its rows. @throws HstuError ERR_HSTU_DATA */
export async function appendFile(
  database: Database,
  path: string,
  source: LogSource,
  schema: RequestSchema,
  start: number,
): Promise<LoggedFile> {
  const table = await logTable(database, path, source)
  const text = (column: Column | undefined, role: string) => (column === undefined ? 'NULL' : table.text(column, role))
  // Thresholds on text that is no number are neither met nor missed.
  const odd: string[] = []
  const condition = (rule: Condition, role: string): string => {
    if (typeof rule === 'boolean') return String(rule)
    const value = table.text(rule.column, role)
    if ('equals' in rule) return `coalesce(${value} IN (${[rule.equals].flat().map(x => sqlString(String(x)))}), false)`
    const number = `TRY_CAST(${value} AS DOUBLE)`
    odd.push(`(${value} <> '' AND coalesce(NOT isfinite(${number}), true))`)
    const bounds = [
      ...(rule.atLeast === undefined ? [] : [`${number} >= ${rule.atLeast}`]),
      ...(rule.atMost === undefined ? [] : [`${number} <= ${rule.atMost}`]),
    ]
    return `coalesce(${bounds.join(' AND ')}, false)`
  }
  const bits = schema.actions.flatMap((name, bit) => {
    const rule = source.actions?.[name]
    return rule === undefined ? [] : [`CASE WHEN ${condition(rule, `action ${name}`)} THEN ${2 ** bit} ELSE 0 END`]
  })
  const impression = condition(source.impression ?? true, 'impression')
  const values = schema.values.map(name => {
    const column = source.values?.[name]
    if (column === undefined) return 'NULL'
    const value = table.text(column, `value ${name}`)
    return `CASE WHEN ${value} <> '' THEN coalesce(TRY_CAST(${value} AS FLOAT), 'nan'::FLOAT) END`
  })
  const features = (group: 'contextual' | 'series') =>
    schema[group].map(name => {
      const column = source[group]?.[name]
      return column === undefined ? 'NULL' : `nullif(${table.text(column, `${group} ${name}`)}, '')`
    })
  const columns = [
    source.user === undefined ? 'NULL' : text(source.user, 'user'),
    text(source.item, 'item'),
    table.time(source.time, UNITS[source.timeUnit ?? 's']),
    `nullif(${text(source.request, 'request')}, '')`,
    bits.join(' + ') || '0',
    impression,
    odd.join(' OR ') || 'false',
    ...values,
    ...features('contextual'),
    ...features('series'),
  ]
  await database.run(`INSERT INTO log SELECT ${columns.join(', ')} FROM ${table.from}`)
  const total = await database.row('SELECT count(*) AS n FROM log')
  const rows = Number(total!.n) - start
  if (rows === 0) throw dataError(path, null, 'no rows: expected at least one event')
  return { path, source, table, start, rows }
}

async function logTable(database: Database, path: string, source: LogSource): Promise<LogTable> {
  const kind = await probeFile(path)
  const name = path.toLowerCase().replace(/\.(gz|zst)$/, '')
  const format = source.format ?? (kind === 'parquet' ? 'parquet' : /\.(jsonl|ndjson)$/.test(name) ? 'jsonl' : 'csv')
  if ((format === 'parquet') !== (kind === 'parquet'))
    throw dataError(path, null, `expected ${format}, found ${kind === 'parquet' ? 'Parquet' : 'text'}`)
  if (format === 'parquet') return parquetLog(database, path)
  const first =
    kind === 'text'
      ? await firstLine(path)
      : (((await database.column(`SELECT line FROM ${sqlLines(path)} WHERE trim(line) <> '' LIMIT 1`))[0] ?? null) as
          | string
          | null)
  if (first === null) throw dataError(path, null, 'no rows: the file has blank lines only')
  return format === 'jsonl' ? jsonLog(database, path) : textLog(path, source, first)
}

function textLog(path: string, source: LogSource, first: string): LogTable {
  const { quote = '"', header = true, delimiter = first.includes('\t') && !first.includes(',') ? '\t' : ',' } = source
  const fields = splitFields(first, delimiter, quote)
  // RecBole's headers give the type behind a colon.
  const names = header ? fields.map(field => field.replace(/:(token|float)(_seq)?$/, '').trim()) : null
  const find = (column: Column, role: string) => `c${findColumn(path, column, role, names, fields.length)}`
  const types = fields.map((_, i) => `c${i}:'VARCHAR'`).join(',')
  const settings = `delim=${sqlString(delimiter)}, header=${header}, quote=${sqlString(quote)}, escape=${sqlString(quote)}`
  return {
    from: `read_csv(${sqlPath(path)}, auto_detect=false, ${settings}, columns={${types}})`,
    text: find,
    time: (column, unit) => `TRY_CAST(${find(column, 'time')} AS DOUBLE) / ${unit}`,
    lines: { header: header ? 1 : 0, blank: 'line IS NULL', json: false },
  }
}

async function parquetLog(database: Database, path: string): Promise<LogTable> {
  const from = `read_parquet(${sqlPath(path)})`
  const described = (what: string) => database.column(`SELECT ${what} FROM (DESCRIBE SELECT * FROM ${from})`)
  const [names, types] = [(await described('column_name')).map(String), (await described('column_type')).map(String)]
  const find = (column: Column, role: string) => findColumn(path, column, role, names, names.length)
  return {
    from,
    text: (column, role) => {
      const at = find(column, role)
      if (/^(DOUBLE|FLOAT)$/.test(types[at]!) && /^(user|item|request)$/.test(role))
        throw dataError(
          path,
          null,
          `the ${role} ids are ${types[at]}, which merges those beyond 2^53: write integers or text`,
        )
      return `CAST(${sqlName(names[at]!)} AS VARCHAR)`
    },
    time: (column, unit) => {
      const at = find(column, 'time')
      const name = sqlName(names[at]!)
      return /^(TIMESTAMP|DATE)/.test(types[at]!) ? `epoch(${name})` : `TRY_CAST(${name} AS DOUBLE) / ${unit}`
    },
    lines: null,
  }
}

/** Lines are parsed one by one: see `table.ts`. Keys are those of the first line. */
async function jsonLog(database: Database, path: string): Promise<LogTable> {
  const blank = "line IS NULL OR trim(line) = ''"
  const from = `(SELECT TRY_CAST(line AS JSON) AS line FROM ${sqlLines(path)} WHERE NOT (${blank}))`
  const found = await database.row(
    `SELECT CASE WHEN json_type(line) = 'OBJECT' THEN json_keys(line) END AS keys FROM ${from} LIMIT 1`,
  )
  const names = (found?.keys ?? null) as string[] | null
  if (!names) throw dataError(path, 1, 'expected a JSON object a line')
  const text = (column: Column, role: string) => {
    const key = names[findColumn(path, column, role, names, names.length)]!
    return `json_extract_string(line, ${sqlString(`/${key.replaceAll('~', '~0').replaceAll('/', '~1')}`)})`
  }
  return {
    from,
    text,
    time: (column, unit) => `TRY_CAST(${text(column, 'time')} AS DOUBLE) / ${unit}`,
    lines: { header: 0, blank, json: true },
  }
}

/** The error about row `row` of `log`. It reads the file again, which only ever happens once. */
export async function logError(
  database: Database,
  files: readonly LoggedFile[],
  row: number,
  role: 'user' | 'item' | 'time' | 'value' | 'action',
  expected: string,
): Promise<Error> {
  const { path, source, table, start } = files.findLast(file => file.start <= row)!
  const local = row - start
  const show = role === 'user' || role === 'item' || role === 'time' ? source[role] : undefined
  const found =
    show === undefined
      ? null
      : await database.row(`SELECT * FROM (SELECT ${table.text(show, role === 'time' ? 'time' : 'shown')} AS value,
          row_number() OVER () AS n FROM ${table.from}) WHERE n = ${local + 1}`)
  const text = show === undefined ? '' : `, found ${quoted(found?.value == null ? null : String(found.value))}`
  const message = `expected ${expected}${text}`
  if (!table.lines) return dataError(path, null, `row ${local + 1}: ${message}`)
  const line = await database.row(`SELECT * FROM (SELECT row_number() OVER () AS n, line FROM ${sqlLines(path)})
    WHERE NOT (${table.lines.blank}) ORDER BY n LIMIT 1 OFFSET ${local + table.lines.header}`)
  const malformed =
    table.lines.json &&
    !(await database.row(
      `SELECT 1 AS ok WHERE json_type(TRY_CAST(${sqlString(String(line?.line ?? ''))} AS JSON)) = 'OBJECT'`,
    ))
  if (malformed) return dataError(path, Number(line?.n), `expected a JSON object, found ${quoted(String(line?.line))}`)
  return dataError(path, line ? Number(line.n) : local + 1, message)
}
