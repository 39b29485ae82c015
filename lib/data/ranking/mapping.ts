import { readFile } from 'node:fs/promises'
import { dirname, resolve } from 'node:path'
import { HstuError } from '../../errors.js'
import { quoted } from '../files.js'
import type { RequestSchema } from './schema.js'
import { parseTask } from './tasks.js'

/** A column by its name in the header, or by number from 0. */
export type Column = string | number

/** When a row has an action, or is an impression: always, or by the value of one column. */
export type Condition =
  | boolean
  | { column: Column; equals: string | number | readonly (string | number)[] }
  | { column: Column; atLeast?: number; atMost?: number }

/** One log, as files of one layout. */
export interface LogSource {
  /** Files, relative to the mapping file. */
  path: string | readonly string[]
  /** Default by the file's name and first bytes. */
  format?: 'csv' | 'parquet' | 'jsonl'
  delimiter?: string
  header?: boolean
  quote?: string
  /** May be left out of a log of late labels: its rows then join the requests by id. */
  user?: Column
  item: Column
  time: Column
  /** Default `'s'`; Parquet timestamps need none. */
  timeUnit?: 's' | 'ms' | 'us'
  /** Request (or session) id; by default a request is a user at one time. */
  request?: Column
  /** Which rows show an item, and so make it a candidate; default all of them. */
  impression?: Condition
  /** Action name -> which rows have it. */
  actions?: Readonly<Record<string, Condition>>
  /** Name of a numeric label -> its column; an empty field is no label. */
  values?: Readonly<Record<string, Column>>
  /** Name of a contextual feature of the request -> its column. */
  contextual?: Readonly<Record<string, Column>>
  /** Name of a slow-changing feature -> its column. */
  series?: Readonly<Record<string, Column>>
}

/** The mapping file of `hstu data prepare`, JSON: what the logs hold and how they become request records. */
export interface RequestMapping {
  name: string
  sources: readonly LogSource[]
  /** Such as `like = LIKE or BOOKMARK`, `long = watch >= 30 s`; see `parseTask`. */
  tasks: readonly string[]
  /** Entries kept of a history, the latest ones; default 1,024. */
  maxHistory?: number
  /** Most different items; default no bound. */
  maxItems?: number
  /** What items beyond `maxItems` become: an error (default), or number 0, counted. */
  overflow?: 'error' | 'unknown'
}

export const DEFAULT_MAX_HISTORY = 1024

const TOP = ['name', 'sources', 'tasks', 'maxHistory', 'maxItems', 'overflow']
const COLUMNS = ['user', 'item', 'time', 'request'] as const
const GROUPS = ['values', 'contextual', 'series'] as const
const SOURCE = ['path', 'format', 'delimiter', 'header', 'quote', 'timeUnit', 'impression', 'actions']
const NAME = /^[A-Za-z_][\w .-]{0,62}$/

/**
 * Reads a mapping file. Paths in it become absolute.
 * @throws HstuError ERR_HSTU_DATA naming the field that is missing, unknown or of the wrong kind.
 */
export async function readMapping(path: string): Promise<RequestMapping> {
  let text: string
  try {
    text = await readFile(path, 'utf8')
  } catch (cause) {
    const missing = (cause as NodeJS.ErrnoException).code === 'ENOENT'
    throw new HstuError('ERR_HSTU_DATA', `${path}: ${missing ? 'no such file' : 'cannot be read'}`, { cause })
  }
  let value: unknown
  try {
    value = JSON.parse(text)
  } catch (cause) {
    throw new HstuError('ERR_HSTU_DATA', `${path}: not a JSON document: ${(cause as Error).message}`, { cause })
  }
  const mapping = checkMapping(value, path)
  return { ...mapping, sources: mapping.sources.map(source => ({ ...source, path: absolute(source.path, path) })) }
}

const absolute = (paths: LogSource['path'], from: string) =>
  [paths].flat().map(path => resolve(dirname(from), path as string))

/**
 * Checks the shape of a mapping.
 * @param path what errors are about
 * @throws HstuError ERR_HSTU_DATA
 */
export function checkMapping(value: unknown, path: string): RequestMapping {
  const fail = (message: string): never => {
    throw new HstuError('ERR_HSTU_DATA', `${path}: ${message}`)
  }
  const object = (what: unknown, where: string): Record<string, unknown> =>
    typeof what === 'object' && what !== null && !Array.isArray(what)
      ? (what as Record<string, unknown>)
      : fail(`${where} must be an object, found ${quoted(JSON.stringify(what) ?? null)}`)
  const known = (what: Record<string, unknown>, names: readonly string[], where: string) => {
    for (const key of Object.keys(what))
      if (!names.includes(key)) fail(`${where} has an unknown field ${quoted(key)}; known are ${names.join(', ')}`)
  }
  const column = (what: unknown, where: string) => {
    const valid =
      typeof what === 'number' ? Number.isInteger(what) && what >= 0 : typeof what === 'string' && what !== ''
    if (!valid) fail(`${where} must name a column, by name or number, found ${quoted(JSON.stringify(what) ?? null)}`)
  }
  const named = (what: unknown, where: string, each: (value: unknown, where: string) => void) => {
    for (const [name, entry] of Object.entries(object(what, where))) {
      if (!NAME.test(name)) fail(`${where}: ${quoted(name)} is no name: letters, digits, blanks, _ - . are allowed`)
      each(entry, `${where}.${name}`)
    }
  }
  const condition = (what: unknown, where: string) => {
    if (typeof what === 'boolean') return
    const rule = object(what, where)
    known(rule, ['column', 'equals', 'atLeast', 'atMost'], where)
    column(rule.column, `${where}.column`)
    const scalar = (x: unknown) => typeof x === 'string' || typeof x === 'number'
    const { equals, atLeast, atMost } = rule
    if ((equals !== undefined) === (atLeast !== undefined || atMost !== undefined))
      fail(`${where} needs either equals, or atLeast and atMost or one of them`)
    if (equals !== undefined && !(Array.isArray(equals) ? equals.length > 0 && equals.every(scalar) : scalar(equals)))
      fail(`${where}.equals must be a string, a number or a list of them`)
    for (const [key, bound] of Object.entries({ atLeast, atMost }))
      if (bound !== undefined && !Number.isFinite(bound)) fail(`${where}.${key} must be a number`)
  }
  const positive = (what: unknown, where: string) => {
    if (what !== undefined && !(Number.isInteger(what) && (what as number) > 0))
      fail(`${where} must be a positive integer, found ${quoted(JSON.stringify(what))}`)
  }

  const top = object(value, 'the mapping')
  known(top, TOP, 'the mapping')
  if (typeof top.name !== 'string' || top.name === '') fail('name must be a string')
  if (!Array.isArray(top.sources) || top.sources.length === 0) fail('sources must be a list of at least one log')
  if (!Array.isArray(top.tasks) || top.tasks.length === 0) fail('tasks must be a list of at least one task')
  positive(top.maxHistory, 'maxHistory')
  positive(top.maxItems, 'maxItems')
  if (top.overflow !== undefined && !['error', 'unknown'].includes(top.overflow as string))
    fail("overflow must be 'error' or 'unknown'")
  ;(top.sources as unknown[]).forEach((entry, s) => {
    const where = `sources[${s}]`
    const source = object(entry, where)
    known(source, [...SOURCE, ...COLUMNS, ...GROUPS], where)
    const paths = [source.path].flat()
    if (paths.length === 0 || paths.some(one => typeof one !== 'string' || one === '')) fail(`${where}.path is missing`)
    for (const role of COLUMNS) {
      const optional = role === 'request' || (role === 'user' && source.request !== undefined)
      if (source[role] !== undefined || !optional) column(source[role], `${where}.${role}`)
    }
    if (source.format !== undefined && !['csv', 'parquet', 'jsonl'].includes(source.format as string))
      fail(`${where}.format must be csv, parquet or jsonl`)
    if (source.timeUnit !== undefined && !['s', 'ms', 'us'].includes(source.timeUnit as string))
      fail(`${where}.timeUnit must be s, ms or us`)
    if (source.impression !== undefined) condition(source.impression, `${where}.impression`)
    if (source.user === undefined && source.impression !== false)
      fail(`${where}.user is missing: only labels (impression: false) join by request id alone`)
    if (source.actions !== undefined) named(source.actions, `${where}.actions`, condition)
    for (const group of GROUPS) if (source[group] !== undefined) named(source[group], `${where}.${group}`, column)
  })
  const mapping = top as unknown as RequestMapping
  const schema = schemaOf(mapping)
  if (schema.actions.length > 31) fail(`${schema.actions.length} actions; at most 31 fit a mask`)
  mapping.tasks.forEach((text, k) => {
    if (typeof text !== 'string') fail(`tasks[${k}] must be a string such as "like = LIKE or BOOKMARK"`)
    parseTask(text, schema, `${path}: tasks[${k}]`)
  })
  return mapping
}

/** Names over all sources, in order of first appearance. */
export function schemaOf({ sources }: RequestMapping): RequestSchema {
  const names = (group: 'actions' | (typeof GROUPS)[number]) => [
    ...new Set(sources.flatMap(source => Object.keys(source[group] ?? {}))),
  ]
  return {
    actions: names('actions'),
    values: names('values'),
    contextual: names('contextual'),
    series: names('series'),
  }
}
