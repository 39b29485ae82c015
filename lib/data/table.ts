import { HstuError } from '../errors.js'
import { type Database, sqlLines, sqlName, sqlPath, sqlString } from './duckdb.js'
import { dataError, quoted, splitFields } from './files.js'
import type { ColumnMapping, DatasetFormat } from './formats.js'

/** A table as SQL: `from` is a relation, the others are expressions over it. */
export interface TableSource {
  from: string
  user: string
  item: string
  /** Seconds as DOUBLE, NULL where it is no number. */
  time: string | null
  /** DOUBLE, NULL where it is no number. */
  rating: string | null
  /** The same as text, for messages. */
  text: { user: string; item: string; time: string; rating: string }
  /** How rows relate to lines of the file; null if it has none. `blank` is the condition for lines that give no row. */
  lines: { header: number; blank: string; json: boolean } | null
  warnings: string[]
}

/** Builds the SQL of a file in a tabular format. @throws HstuError ERR_HSTU_DATA naming the columns that exist. */
export async function tableSource(
  database: Database,
  path: string,
  format: DatasetFormat,
  first: string | null,
  mapping: ColumnMapping | undefined,
): Promise<TableSource> {
  const standard = STANDARD[format]
  const columns = mapping ?? standard
  if (!columns) {
    throw new HstuError(
      'ERR_HSTU_DATA',
      `${path}: format '${format}' needs options.mapping, for example { user: 'user_id', item: 'item_id' }`,
    )
  }
  if (format === 'parquet') return parquetSource(database, path, columns)
  if (first === null) throw dataError(path, null, 'no rows: the file has blank lines only')
  if (format === 'jsonl') return jsonSource(database, path, columns)
  return textSource(path, format, first, columns)
}

const STANDARD: Partial<Record<DatasetFormat, ColumnMapping>> = {
  recbole: { user: 'user_id', item: 'item_id', time: 'timestamp', rating: 'rating' },
  'movielens-dat': { user: 0, item: 1, rating: 2, time: 3 },
  'movielens-csv': { user: 'userId', item: 'movieId', rating: 'rating', time: 'timestamp' },
  'amazon-csv': { user: 0, item: 1, rating: 2, time: 3 },
}

function textSource(path: string, format: DatasetFormat, first: string, mapping: ColumnMapping): TableSource {
  const { delimiter, quote, header } = dialect(format, first, mapping)
  const fields = splitFields(first, delimiter, quote)
  const names = header ? fields.map(field => (format === 'recbole' ? field.replace(/:.*$/, '') : field).trim()) : null
  const width = STANDARD[format] && !header ? 4 : fields.length
  const find = (column: string | number, role: string) => findColumn(path, column, role, names, width)
  // A RecBole or MovieLens file may come without these two; a mapping that names them means them.
  const optional = (column: string | number | undefined, role: string) => {
    if (column === undefined) return null
    if (mapping === STANDARD[format] && names && !names.includes(String(column))) return null
    return find(column, role)
  }
  const user = find(mapping.user, 'user')
  const item = find(mapping.item, 'item')
  const time = optional(mapping.time, 'time')
  const rating = optional(mapping.rating, 'rating')
  const types = Array.from({ length: width }, (_, i) => `c${i}:'VARCHAR'`).join(',')
  const settings = `delim=${sqlString(delimiter)}, header=${header}, quote=${sqlString(quote)}, escape=${sqlString(quote)}`
  return {
    from: `read_csv(${sqlPath(path)}, auto_detect=false, ${settings}, columns={${types}})`,
    user: `c${user}`,
    item: `c${item}`,
    time: time === null ? null : `TRY_CAST(c${time} AS DOUBLE)`,
    rating: rating === null ? null : `TRY_CAST(c${rating} AS DOUBLE)`,
    text: { user: `c${user}`, item: `c${item}`, time: `c${time}`, rating: `c${rating}` },
    lines: { header: header ? 1 : 0, blank: 'line IS NULL', json: false },
    warnings: [],
  }
}

function dialect(format: DatasetFormat, first: string, mapping: ColumnMapping) {
  const named = [mapping.user, mapping.item, mapping.time, mapping.rating].some(column => typeof column === 'string')
  const guess = first.includes('\t') && !first.includes(',') ? '\t' : ','
  switch (format) {
    case 'recbole':
      return { delimiter: '\t', quote: '', header: true }
    case 'movielens-dat':
      return { delimiter: '::', quote: '', header: false }
    case 'movielens-csv':
      return { delimiter: ',', quote: '"', header: true }
    case 'amazon-csv':
      return { delimiter: ',', quote: '"', header: false }
    default:
      return { delimiter: mapping.delimiter ?? guess, quote: mapping.quote ?? '"', header: mapping.header ?? named }
  }
}

export function findColumn(
  path: string,
  column: string | number,
  role: string,
  names: string[] | null,
  width: number,
): number {
  const index = typeof column === 'number' ? column : names ? names.indexOf(column) : -1
  if (Number.isInteger(index) && index >= 0 && index < width) return index
  const exist = names
    ? `it has ${names.map(name => quoted(name)).join(', ')}`
    : `it has columns 0 .. ${width - 1}, no header`
  throw dataError(
    path,
    1,
    `no column ${typeof column === 'number' ? column : quoted(column)} for the ${role}: ${exist}`,
  )
}

async function parquetSource(database: Database, path: string, mapping: ColumnMapping): Promise<TableSource> {
  const from = `read_parquet(${sqlPath(path)})`
  const names = (await database.column(`SELECT column_name FROM (DESCRIBE SELECT * FROM ${from})`)).map(String)
  const types = (await database.column(`SELECT column_type FROM (DESCRIBE SELECT * FROM ${from})`)).map(String)
  const warnings: string[] = []
  const name = (index: number) => sqlName(names[index]!)
  const id = (column: string | number, role: string) => {
    const index = findColumn(path, column, role, names, names.length)
    if (/^(DOUBLE|FLOAT)$/.test(types[index]!)) {
      warnings.push(
        `${role} ids are ${types[index]} in the file: those beyond 2^53 may have been merged when it was written`,
      )
    }
    return `CAST(${name(index)} AS VARCHAR)`
  }
  const number = (column: string | number | undefined, role: string) => {
    if (column === undefined) return null
    const index = findColumn(path, column, role, names, names.length)
    const isTime = /^(TIMESTAMP|DATE)/.test(types[index]!)
    return {
      text: `CAST(${name(index)} AS VARCHAR)`,
      value: isTime ? `epoch(${name(index)})` : `TRY_CAST(${name(index)} AS DOUBLE)`,
    }
  }
  const user = id(mapping.user, 'user')
  const item = id(mapping.item, 'item')
  const time = number(mapping.time, 'time')
  const rating = number(mapping.rating, 'rating')
  return {
    from,
    user,
    item,
    time: time?.value ?? null,
    rating: rating?.value ?? null,
    text: { user, item, time: time?.text ?? 'NULL', rating: rating?.text ?? 'NULL' },
    lines: null,
    warnings,
  }
}

/** Lines are parsed one by one in SQL: DuckDB's own JSON reader counts lines wrongly and takes no row as malformed. */
async function jsonSource(database: Database, path: string, mapping: ColumnMapping): Promise<TableSource> {
  const blank = "line IS NULL OR trim(line) = ''"
  const from = `(SELECT TRY_CAST(line AS JSON) AS line FROM ${sqlLines(path)} WHERE NOT (${blank}))`
  const keys = await database.row(
    `SELECT CASE WHEN json_type(line) = 'OBJECT' THEN json_keys(line) END AS keys FROM ${from} LIMIT 1`,
  )
  const names = (keys?.keys ?? null) as string[] | null
  if (!names) throw dataError(path, 1, 'expected a JSON object a line')
  const field = (column: string | number, role: string) => {
    const found = names[findColumn(path, column, role, names, names.length)]!
    return `json_extract_string(line, ${sqlString(`/${found.replaceAll('~', '~0').replaceAll('/', '~1')}`)})`
  }
  const user = field(mapping.user, 'user')
  const item = field(mapping.item, 'item')
  const time = mapping.time === undefined ? null : field(mapping.time, 'time')
  const rating = mapping.rating === undefined ? null : field(mapping.rating, 'rating')
  return {
    from,
    user,
    item,
    time: time && `TRY_CAST(${time} AS DOUBLE)`,
    rating: rating && `TRY_CAST(${rating} AS DOUBLE)`,
    text: { user, item, time: time ?? 'NULL', rating: rating ?? 'NULL' },
    lines: { header: 0, blank, json: true },
    warnings: [],
  }
}
