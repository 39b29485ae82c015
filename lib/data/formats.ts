import { basename } from 'node:path'
import { dataError, type FileKind } from './files.js'

/** Formats that `loadDataset` reads. */
export const DATASET_FORMATS = {
  recbole: 'RecBole .inter: tabs, typed header such as user_id:token item_id:token rating:float timestamp:float',
  'movielens-dat': 'MovieLens ratings.dat: user::item::rating::time, no header',
  'movielens-csv': 'MovieLens ratings.csv: header userId,movieId,rating,timestamp',
  'amazon-csv': 'Amazon ratings_*.csv: user,item,rating,time, no header',
  sequence: 'sequence file .txt: a line a user, "user item item ...", white space between',
  csv: 'any delimited text, with options.mapping',
  parquet: 'Parquet, with options.mapping',
  jsonl: 'JSON lines (.jsonl, .ndjson), with options.mapping',
} as const

export type DatasetFormat = keyof typeof DATASET_FORMATS

/** Which columns of a table hold what. A column is named as in the header, or by number from 0. */
export interface ColumnMapping {
  user: string | number
  item: string | number
  /** Seconds; Parquet timestamps are converted. Without it the order of the file is the order of the actions. */
  time?: string | number
  rating?: string | number
  /** Delimited text only; default a tab if the first line has tabs and no comma, else a comma. */
  delimiter?: string
  /** Delimited text only: whether the first line names the columns. Default: true if any column is given by name. */
  header?: boolean
  /** Delimited text only; default `"`. Empty for none. */
  quote?: string
}

/** The format by the file's name, by its first line where the name is silent. */
export function detectFormat(path: string, kind: FileKind, first: string | null, mapped: boolean): DatasetFormat {
  const name = basename(path)
    .toLowerCase()
    .replace(/\.(gz|zst)$/, '')
  const extension = name.slice(name.lastIndexOf('.') + 1)
  if (kind === 'parquet') return 'parquet'
  if (extension === 'jsonl' || extension === 'ndjson') return 'jsonl'
  if (extension === 'inter') return 'recbole'
  if (mapped) return 'csv'
  if (first !== null) {
    if (/^\w+:(token|float)(_seq)?\t/.test(first)) return 'recbole'
    if (/^[^:]+::[^:]+::[^:]+::[^:]+$/.test(first)) return 'movielens-dat'
    if (/^userid,movieid,/i.test(first)) return 'movielens-csv'
  }
  if (name === 'ratings.dat') return 'movielens-dat'
  if (name === 'ratings.csv') return 'movielens-csv'
  if (/^ratings_.*\.csv$/.test(name)) return 'amazon-csv'
  if (extension === 'txt' && first !== null && /^[^\s,;|"{]+([ \t]+[^\s,;|"{]+)+\s*$/.test(first)) return 'sequence'
  const known = Object.entries(DATASET_FORMATS).map(([format, text]) => `  ${format}: ${text}`)
  throw dataError(path, null, `the format is not known from the name or the first line. Formats:\n${known.join('\n')}`)
}
