import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { DuckDBConnection } from '@duckdb/node-api'
import { HstuError } from '../errors.js'
import { dataError, throwIfAborted } from './files.js'

/** What is read of a DuckDBDataChunk; our own types, for users may not have the optional package's. */
export interface Chunk {
  readonly rowCount: number
  getColumnVector(column: number): { getItem(row: number): unknown }
  getRows(): unknown[][]
}

/** An in-memory DuckDB of our own, closed with everything it spilled when the callback ends. */
export interface Database {
  /** Where it spills; files here are removed with it. */
  readonly scratch: string
  /** Runs a statement that returns nothing. */
  run(sql: string): Promise<void>
  /** First row of a result; values as DuckDB's JSON form (64-bit integers are strings). */
  row(sql: string): Promise<Record<string, unknown> | null>
  /** One column of a small result. */
  column(sql: string): Promise<unknown[]>
  /** Calls `take` for each chunk of the result, in order, and waits for it. */
  chunks(sql: string, take: (chunk: Chunk) => void | Promise<void>): Promise<void>
}

/**
 * @param path  the file that errors are about
 * @param parent  of its scratch folder
 * @throws HstuError ERR_HSTU_DATA when `@duckdb/node-api` is not installed, and for what DuckDB finds wrong in the file;
 *   ERR_HSTU_ABORTED when `signal` fires.
 */
export async function withDatabase<T>(
  path: string,
  signal: AbortSignal | undefined,
  use: (database: Database) => Promise<T>,
  parent = tmpdir(),
): Promise<T> {
  const { DuckDBInstance } = await importDuckDB()
  throwIfAborted(signal)
  // DuckDB's own default is a folder `.tmp` in the working directory, which may not be ours to write to.
  const scratch = await mkdtemp(join(parent, 'hstu-data-'))
  try {
    const instance = await DuckDBInstance.create(':memory:', { temp_directory: scratch })
    const connection = await instance.connect()
    const onAbort = () => connection.interrupt()
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      return await use(wrap(connection, scratch, signal))
    } catch (error) {
      throwIfAborted(signal)
      throw error instanceof HstuError ? error : translate(path, error)
    } finally {
      signal?.removeEventListener('abort', onAbort)
      connection.closeSync()
      instance.closeSync()
    }
  } finally {
    await rm(scratch, { recursive: true, force: true })
  }
}

async function importDuckDB(): Promise<typeof import('@duckdb/node-api')> {
  try {
    return await import('@duckdb/node-api')
  } catch (cause) {
    const message = 'reading tables needs the optional package @duckdb/node-api: npm i @duckdb/node-api'
    throw new HstuError('ERR_HSTU_DATA', message, { cause })
  }
}

function wrap(connection: DuckDBConnection, scratch: string, signal: AbortSignal | undefined): Database {
  const database: Database = {
    scratch,
    async run(sql) {
      throwIfAborted(signal)
      await connection.run(sql)
    },
    async row(sql) {
      throwIfAborted(signal)
      const reader = await connection.runAndReadAll(sql)
      return reader.getRowObjectsJson()[0] ?? null
    },
    async column(sql) {
      const values: unknown[] = []
      await database.chunks(sql, chunk => {
        const vector = chunk.getColumnVector(0)
        for (let i = 0; i < chunk.rowCount; i++) values.push(vector.getItem(i))
      })
      return values
    },
    async chunks(sql, take) {
      throwIfAborted(signal)
      const result = await connection.stream(sql)
      for (;;) {
        const chunk = await result.fetchChunk()
        if (!chunk || chunk.rowCount === 0) return
        throwIfAborted(signal)
        await take(chunk)
      }
    },
  }
  return database
}

/** DuckDB's CSV errors name the line and what it expected, then a page of advice about its own options. */
function translate(path: string, error: unknown): HstuError {
  const text = error instanceof Error ? error.message : String(error)
  if (/^Out of Memory Error/.test(text)) {
    const message = `${path}: ${text.split('\n', 1)[0]}; give the database more, or use fewer threads`
    return new HstuError('ERR_HSTU_OUT_OF_MEMORY', message, { cause: error })
  }
  const line = /CSV Error on Line: (\d+)/.exec(text)
  const columns = /Expected Number of Columns: (\d+) Found: (\d+)/.exec(text)
  const at = line ? Number(line[1]) : null
  if (columns) return dataError(path, at, `expected ${columns[1]} columns, found ${columns[2]}`, { cause: error })
  if (/not utf-8|invalid unicode/i.test(text)) return dataError(path, at, 'expected UTF-8 text', { cause: error })
  if (/unterminated quote/i.test(text)) return dataError(path, at, 'expected a closing quote', { cause: error })
  if (/invalid state/i.test(text)) {
    return dataError(path, at, 'expected one kind of line end and well-formed quotes throughout', { cause: error })
  }
  return dataError(path, at, `cannot be read as a table: ${text.split('\n', 1)[0]}`, { cause: error })
}

/** A string literal. */
export function sqlString(value: string): string {
  return `'${value.replaceAll("'", "''")}'`
}

/** A file as DuckDB's readers take it; `*`, `?` and `[` in the name are meant literally. */
export function sqlPath(path: string): string {
  return sqlString(path.replace(/[*?[]/g, '[$&]'))
}

/** A quoted identifier. */
export function sqlName(name: string): string {
  return `"${name.replaceAll('"', '""')}"`
}

/** The file's lines as a table of one column `line`; NULL where a line is blank. The separator never occurs in text. */
export function sqlLines(path: string): string {
  return `read_csv(${sqlPath(path)}, delim='\u0001', header=false, auto_detect=false, quote='', escape='', columns={line:'VARCHAR'})`
}
