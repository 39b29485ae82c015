import { sqlPath, withDatabase } from './duckdb.js'
import { dataError, firstLine, probeFile, quoted, readLines, splitFields } from './files.js'

/**
 * Titles by external item id, for showing recommendations to people.
 *
 * Reads RecBole `.item` (tabs, typed header; the column `movie_title`, `title` or `name`, else the first of type
 * `token_seq`), MovieLens `movies.dat` (`id::title::genres`, Latin-1) and `movies.csv` (`movieId,title,genres`).
 *
 * @throws HstuError ERR_HSTU_DATA with file and line for what is none of these.
 */
export async function loadItemTitles(
  path: string,
  options: { signal?: AbortSignal } = {},
): Promise<Map<string, string>> {
  if ((await probeFile(path)) !== 'text') throw dataError(path, null, 'expected plain text')
  if (/\.dat$/i.test(path)) return readDat(path)
  const first = await firstLine(path)
  if (first && /^movieId,title(,|$)/.test(first)) return readCsv(path, splitFields(first, ',').length, options.signal)
  if (first && /^[^\t]+:token(\t|$)/.test(first)) return readRecbole(path)
  throw dataError(path, 1, 'expected a RecBole .item file, a MovieLens movies.dat or a movies.csv')
}

async function readRecbole(path: string): Promise<Map<string, string>> {
  const titles = new Map<string, string>()
  let number = 0
  let columns = { id: 0, title: 0, width: 0 }
  for await (const line of readLines(path)) {
    number++
    if (line.trim() === '') continue
    const fields = line.split('\t')
    if (columns.width === 0) {
      columns = findTitle(path, fields)
      continue
    }
    if (fields.length !== columns.width) {
      throw dataError(path, number, `expected ${columns.width} columns, found ${fields.length}`)
    }
    titles.set(fields[columns.id]!, fields[columns.title]!)
  }
  return titles
}

function findTitle(path: string, header: string[]) {
  const names = header.map(field => field.split(':')[0]!)
  const id = names.indexOf('item_id')
  const named = ['movie_title', 'title', 'name'].map(name => names.indexOf(name)).find(index => index >= 0)
  const title = named ?? header.findIndex(field => field.endsWith(':token_seq'))
  if (id < 0 || title < 0) {
    throw dataError(
      path,
      1,
      `expected columns item_id and a title, found ${names.map(name => quoted(name)).join(', ')}`,
    )
  }
  return { id, title, width: header.length }
}

async function readDat(path: string): Promise<Map<string, string>> {
  const titles = new Map<string, string>()
  let number = 0
  for await (const line of readLines(path, 'latin1')) {
    number++
    if (line.trim() === '') continue
    const fields = line.split('::')
    if (fields.length < 3) throw dataError(path, number, `expected id::title::genres, found ${quoted(line)}`)
    // A title may hold the separator, ids and genres never do.
    titles.set(fields[0]!, fields.slice(1, -1).join('::'))
  }
  return titles
}

async function readCsv(path: string, width: number, signal: AbortSignal | undefined): Promise<Map<string, string>> {
  const types = Array.from({ length: width }, (_, i) => `c${i}:'VARCHAR'`).join(',')
  const sql = `SELECT c0, c1 FROM read_csv(${sqlPath(path)}, auto_detect=false, delim=',', header=true, quote='"', escape='"', columns={${types}})`
  return withDatabase(path, signal, async database => {
    const titles = new Map<string, string>()
    await database.chunks(sql, chunk => {
      const ids = chunk.getColumnVector(0)
      const names = chunk.getColumnVector(1)
      for (let i = 0; i < chunk.rowCount; i++) titles.set(String(ids.getItem(i)), String(names.getItem(i) ?? ''))
    })
    return titles
  })
}
