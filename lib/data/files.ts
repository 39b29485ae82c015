import { createReadStream } from 'node:fs'
import { open, stat } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import { HstuError } from '../errors.js'

/** An ERR_HSTU_DATA error about `path`, at 1-based `line` where one is to blame. */
export function dataError(path: string, line: number | null, message: string, options?: ErrorOptions): HstuError {
  return new HstuError('ERR_HSTU_DATA', `${path}${line === null ? '' : `:${line}`}: ${message}`, options)
}

/** @throws HstuError ERR_HSTU_ABORTED */
export function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw new HstuError('ERR_HSTU_ABORTED', 'reading the data was aborted', { cause: signal.reason })
}

/** What a file's first bytes say it is. */
export type FileKind = 'text' | 'compressed' | 'parquet'

/**
 * Looks at the file before anything parses it, for a parser's complaint about a directory or a picture helps nobody.
 *
 * @throws HstuError ERR_HSTU_DATA for a missing file, a directory, an empty file or a binary one.
 */
export async function probeFile(path: string): Promise<FileKind> {
  let size: number
  try {
    const info = await stat(path)
    if (!info.isFile())
      throw dataError(path, null, `expected a file, found ${info.isDirectory() ? 'a directory' : 'a device'}`)
    size = info.size
  } catch (error) {
    if (error instanceof HstuError) throw error
    const missing = (error as NodeJS.ErrnoException).code === 'ENOENT'
    throw dataError(path, null, missing ? 'no such file' : 'cannot be read', { cause: error })
  }
  if (size === 0) throw dataError(path, null, 'the file is empty: expected at least one row')
  const head = await readHead(path)
  if (head.length >= 4 && head.toString('latin1', 0, 4) === 'PAR1') return 'parquet'
  const gzip = head[0] === 0x1f && head[1] === 0x8b
  const zstd = head.length >= 4 && head.readUInt32LE(0) === 0xfd2fb528
  // DuckDB goes by the name, so only what is named so can be unpacked.
  if ((gzip && path.endsWith('.gz')) || (zstd && path.endsWith('.zst'))) return 'compressed'
  if (gzip || zstd) throw dataError(path, null, 'compressed data: expected a name that ends in .gz or .zst')
  if (head.includes(0)) throw dataError(path, null, 'expected text, found binary data (a zero byte near the start)')
  return 'text'
}

async function readHead(path: string): Promise<Buffer> {
  try {
    const file = await open(path)
    try {
      const { buffer, bytesRead } = await file.read(Buffer.alloc(4096), 0, 4096, 0)
      return buffer.subarray(0, bytesRead)
    } finally {
      await file.close()
    }
  } catch (error) {
    throw dataError(path, null, 'cannot be read', { cause: error })
  }
}

/**
 * Lines of a text file without their ends, the first without a byte order mark.
 *
 * @throws HstuError ERR_HSTU_DATA at the line that is not UTF-8: two ids that differ in undecodable bytes would
 *   otherwise become one.
 */
export async function* readLines(path: string, encoding: 'utf8' | 'latin1' = 'utf8'): AsyncGenerator<string> {
  const stream = createReadStream(path, { encoding, highWaterMark: 1 << 18 })
  const lines = createInterface({ input: stream, crlfDelay: Number.POSITIVE_INFINITY })
  let number = 0
  try {
    for await (const line of lines) {
      number++
      if (encoding === 'utf8' && line.includes('\ufffd')) throw dataError(path, number, 'expected UTF-8 text')
      yield number === 1 && line.charCodeAt(0) === 0xfeff ? line.slice(1) : line
    }
  } finally {
    lines.close()
    stream.destroy()
  }
}

/** A value from a file, short enough for a message. */
export function quoted(value: string | null): string {
  if (value === null || value === '') return 'nothing'
  return JSON.stringify(value.length > 60 ? `${value.slice(0, 57)}...` : value)
}

/** First line with anything on it, or null. */
export async function firstLine(path: string): Promise<string | null> {
  for await (const line of readLines(path)) if (line.trim() !== '') return line
  return null
}

/** Splits one line; `quote` encloses fields that contain the delimiter. */
export function splitFields(line: string, delimiter: string, quote = ''): string[] {
  if (quote === '' || !line.includes(quote)) return line.split(delimiter)
  const fields: string[] = []
  let at = 0
  for (;;) {
    let field = ''
    if (line.startsWith(quote, at)) {
      let end = line.indexOf(quote, at + 1)
      while (end >= 0 && line.startsWith(quote, end + 1)) end = line.indexOf(quote, end + 2)
      if (end < 0) end = line.length
      field = line.slice(at + 1, end).replaceAll(quote + quote, quote)
      at = end + 1
    }
    const next = line.indexOf(delimiter, at)
    fields.push(field + line.slice(at, next < 0 ? undefined : next))
    if (next < 0) return fields
    at = next + delimiter.length
  }
}
