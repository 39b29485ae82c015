import { join } from 'node:path'
import type { Database } from '../duckdb.js'
import { sqlName, sqlString } from '../duckdb.js'
import { groupColumns } from './log.js'
import { candidateValueColumn, historyValueColumn, type RequestSchema } from './schema.js'

/** Requests `first .. first + requests - 1` of one shard. */
export interface ShardPlan {
  first: number
  requests: number
  /** Times of the first and last of them. */
  earliest: number
  latest: number
}

/** Entries a shard aims at: what a sort of its records needs in memory is this times about 60 bytes. */
const SHARD_ENTRIES = 1 << 22
/** Entries whose lists are built at once; list aggregates do not spill. */
const LIST_ENTRIES = 1 << 21

/**
 * Orders every user's entries and finds how much of them each request sees: tables
 * - `rows`: the series, `pos` from 0 within the user's;
 * - `requests` (request, request_id, u, t, contextual, first, until, supervised_from, candidates), in order: the record's
 *   history is `pos` first .. until - 1;
 * - `unsettled`: entries that were acted on after they began, one row an event of theirs;
 * - `series.lists`: see {@link buildLists}.
 */
export async function buildSeries(
  database: Database,
  schema: RequestSchema,
  maxHistory: number,
  onProgress: (done: number, total: number) => void,
): Promise<ShardPlan[]> {
  const v = groupColumns('v', schema.values)
  const also = (form: (x: string) => string) => v.map(x => `, ${form(x)}`).join('')
  const changes = schema.series.map(
    (_, k) => `UNION ALL SELECT NULL, u, s${k}, ${k + 1}, t, 0, 0, NULL, -1, row ${also(() => 'NULL')} FROM
      (SELECT u, t, row, s${k}, lag(s${k}) OVER (PARTITION BY u ORDER BY t, row) AS before FROM numbered WHERE s${k} IS NOT NULL)
      WHERE s${k} IS DISTINCT FROM before`,
  )
  await database.run(`CREATE TABLE rows AS SELECT e, u, i, series::UTINYINT AS series, t, action, taken, settled, request ${also(x => x)},
      row, (row_number() OVER (PARTITION BY u ORDER BY t, series = 0, row, series) - 1)::INTEGER AS pos
    FROM (SELECT e, x.u, i, 0 AS series, x.t, x.action, coalesce(k.action, 0) AS taken, settled,
        CASE WHEN impression THEN coalesce(r.request, -1) ELSE -1 END AS request, x.row ${also(x => `x.${x}`)}
      FROM entries x LEFT JOIN records r USING (q) LEFT JOIN taken k USING (e)
      ${changes.join(' ')})`)
  for (const table of ['entries', 'taken', 'numbered']) await database.run(`DROP TABLE ${table}`)
  await database.run(`CREATE TABLE unsettled AS SELECT w.u, pos, w.t, settled, w.action AS total,
      x.t AS acted, x.row, x.action ${also(x => `x.${x}`)} FROM rows w JOIN events x USING (e) ORDER BY settled`)
  // An auxiliary entry of the request's own second is known to it, a main one is not.
  await database.run(`CREATE TABLE requests AS SELECT request, request_id, u, t, contextual, first, until,
      greatest(0, coalesce(lag(until) OVER (PARTITION BY u ORDER BY request), 0) - first)::INTEGER AS supervised_from, candidates
    FROM (SELECT r.*, coalesce(n, 0)::INTEGER AS until, greatest(0, coalesce(n, 0) - ${maxHistory})::INTEGER AS first
      FROM records r ASOF LEFT JOIN
        (SELECT u, 2 * t + (series = 0)::INTEGER AS key, max(pos) + 1 AS n FROM rows GROUP BY ALL) w
        ON w.u = r.u AND r.key > w.key)
    JOIN (SELECT request, count(*) AS candidates FROM rows WHERE request >= 0 GROUP BY request) USING (request)
    ORDER BY request`)
  for (const table of ['records', 'events']) await database.run(`DROP TABLE ${table}`)
  await buildLists(database, v, maxHistory, onProgress)
  const plans: ShardPlan[] = []
  const sql = `SELECT min(request)::INTEGER, count(*)::INTEGER, min(t)::DOUBLE, max(t)::DOUBLE FROM
    (SELECT request, t, (sum(until - first + candidates) OVER (ORDER BY request) // ${SHARD_ENTRIES}) AS shard FROM requests)
    GROUP BY shard ORDER BY shard`
  await database.chunks(sql, chunk => {
    for (const [first, requests, earliest, latest] of chunk.getRows() as number[][])
      plans.push({ first: first!, requests: requests!, earliest: earliest!, latest: latest! })
  })
  return plans
}

/** Rows of `from` as one a group, its columns as lists; one sort a group, whatever their number. */
function gather(from: string, by: string, order: string, columns: Record<string, string>): string {
  const fields = Object.entries(columns).map(([name, x]) => `${name}: ${x}`)
  const lists = Object.keys(columns).map(name => `list_transform(x, lambda e: e.${name}) AS ${name}`)
  return `SELECT ${by}, ${lists.join(', ')} FROM
    (SELECT ${by}, list({${fields.join(', ')}} ORDER BY ${order}) AS x FROM ${from} GROUP BY ALL)`
}

/** A value of history or candidates: NaN where absent. */
const orNaN = (x: string) => `coalesce(${x}, 'nan'::FLOAT)`

/**
 * `series.lists`: the users' series as lists, one row a block. Block b of a user begins at pos b H, H = `maxHistory`, and
 * has up to 2 H entries, so that the history of any request lies in one: the block of its first entry. Requests
 * `earliest .. latest` read it. The row groups are small, for they are what threads share and what a shard skips.
 */
async function buildLists(
  database: Database,
  v: readonly string[],
  maxHistory: number,
  onProgress: (done: number, total: number) => void,
) {
  const file = sqlString(join(database.scratch, 'series.db'))
  await database.run(`ATTACH ${file} AS series (ROW_GROUP_SIZE 2048)`)
  await database.run(`CREATE TABLE blocks AS SELECT u, first // ${maxHistory} AS block, min(request) AS earliest,
    max(request) AS latest FROM requests GROUP BY ALL`)
  const total = Number((await database.row('SELECT count(*) AS n FROM rows'))!.n)
  const parts = Math.ceil(total / LIST_ENTRIES)
  const values = Object.fromEntries(v.map(x => [x, orNaN(x)]))
  const columns = {
    items: 'i',
    series: 'series',
    times: 't',
    actions: 'action',
    taken: 'taken',
    requests: 'request',
    ...values,
  }
  for (let part = 0; part < parts; part++) {
    const from = `(SELECT *, pos // ${maxHistory} AS block FROM rows UNION ALL
        SELECT *, pos // ${maxHistory} - 1 FROM rows WHERE pos >= ${maxHistory})
      JOIN (SELECT * FROM blocks WHERE (u + block) % ${parts} = ${part}) USING (u, block)`
    const into = part === 0 ? 'CREATE TABLE series.lists AS' : 'INSERT INTO series.lists'
    await database.run(`${into} ${gather(from, 'u, block, earliest, latest', 'pos', columns)} ORDER BY earliest`)
    onProgress(part + 1, parts)
  }
}

/**
 * The records of one shard, as `COPY` writes them; see `REQUEST_COLUMNS`. Joins run as written, tables of the shard on
 * the right: the users' lists stream by and are never hashed, for that would need them all in memory.
 */
export async function writeShard(
  database: Database,
  folder: string,
  file: string,
  { first, requests, earliest, latest }: ShardPlan,
  schema: RequestSchema,
  maxHistory: number,
): Promise<void> {
  const last = first + requests - 1
  const v = groupColumns('v', schema.values)
  const also = (form: (x: string) => string) => v.map(x => `, ${form(x)}`).join('')
  // What was known of entries that a request of the shard saw before they were settled.
  const late = `SELECT *, (total & ~known)::INTEGER AS pending FROM
    (SELECT request, pos, total, coalesce(bit_or(action) FILTER (acted < r.t), 0)::INTEGER AS known
      ${also(x => `${orNaN(`max_by(${x}, (acted, row)) FILTER (${x} IS NOT NULL AND acted < r.t)`)} AS ${x}`)}
    FROM unsettled w JOIN r ON w.u = r.u AND w.t < r.t AND w.settled >= r.t AND w.pos >= r.first
    WHERE settled >= ${earliest} AND w.t < ${latest} GROUP BY request, pos, total)`
  const maps = ['known', 'pending', ...v].map(x => `map(list(pos), list(${x})) AS ${x}`)
  const candidates = {
    items: 'i',
    actions: 'action',
    taken: 'taken',
    ...Object.fromEntries(v.map(x => [x, orNaN(x)])),
  }
  const slice = (list: string, from = 'r.first', to = 'r.until') =>
    `list_slice(l.${list}, ${from} - start + 1, ${to} - start)`
  // Entries from this pos on, the first that was not settled, are looked up.
  const tail = 'coalesce(p.pos, r.until)'
  const known = (list: string, map: string) => `${slice(list, 'r.first', tail)} ||
    list_transform(${slice(list, tail)}, lambda x, n: coalesce(map_extract(p.${map}, ${tail} + n - 1)[1], x))`
  const pending = `list_resize([]::INTEGER[], ${tail} - r.first, 0) ||
    list_transform(range(${tail}, r.until), lambda x: coalesce(map_extract(p.pending, x::INTEGER)[1], 0))`
  const values = schema.values.flatMap((name, k) => [
    `${known(`v${k}`, `v${k}`)} AS ${sqlName(historyValueColumn(name))}`,
    `c.v${k} AS ${sqlName(candidateValueColumn(name))}`,
  ])
  const sql = `WITH r AS (SELECT *, first // ${maxHistory} AS block FROM requests WHERE request BETWEEN ${first} AND ${last}),
    late AS (${late}),
    p AS (SELECT request, min(pos) AS pos, ${maps.join(', ')} FROM late GROUP BY request),
    c AS (${gather(`rows WHERE request BETWEEN ${first} AND ${last}`, 'request', 't, row', candidates)})
    SELECT r.request, r.request_id, r.u AS user, r.t AS time, r.contextual, r.first AS history_start,
      ${slice('items')} AS history_item, ${slice('series')} AS history_series, ${slice('times')} AS history_time,
      ${known('actions', 'known')} AS history_action, ${slice('taken')} AS history_taken, ${pending} AS history_pending,
      ${slice('requests')} AS history_request, r.supervised_from,
      c.items AS candidate_item, c.actions AS candidate_action, c.taken AS candidate_taken ${values.map(x => `, ${x}`).join('')}
    FROM (SELECT *, block * ${maxHistory} AS start FROM series.lists WHERE earliest <= ${last} AND latest >= ${first}) l
    JOIN r ON l.u = r.u AND l.block = r.block JOIN c ON c.request = r.request LEFT JOIN p ON p.request = r.request
    ORDER BY r.request`
  await database.run(`SET disabled_optimizers = 'join_order,build_side_probe_side'`)
  await database.run(
    `COPY (${sql}) TO ${sqlString(join(folder, file))} (FORMAT parquet, PARQUET_VERSION v2, COMPRESSION zstd, ROW_GROUP_SIZE 2048)`,
  )
}
