import { join } from 'node:path'
import type { Database } from '../duckdb.js'
import { sqlName, sqlString } from '../duckdb.js'
import { groupColumns } from './log.js'
import { candidateValueColumn, historyValueColumn, type RequestSchema } from './schema.js'

/** Requests `first .. first + requests - 1` of one shard. */
export interface ShardPlan {
  first: number
  requests: number
  /** History entries and candidates in it. */
  entries: number
}

/** Entries a shard aims at: what a sort of its records needs in memory is this times about 50 bytes. */
const SHARD_ENTRIES = 1 << 21
/** Entries whose lists are built at once; list aggregates do not spill. */
const LIST_ENTRIES = 1 << 21

/**
 * Orders every user's entries and finds how much of them each request sees: tables `rows` (the series, `pos` from 0),
 * `seen` (request, first, until, supervised_from, candidates), `lists` (a user's series as lists).
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
      FROM entries x LEFT JOIN requests r USING (q)
      ASOF LEFT JOIN (SELECT u, j, t, bit_or(action) OVER (PARTITION BY u, j ORDER BY t) AS action FROM taken) k
        ON k.u = x.u AND k.j = x.j AND x.t > k.t
      ${changes.join(' ')})`)
  for (const table of ['entries', 'taken', 'numbered']) await database.run(`DROP TABLE ${table}`)
  // An auxiliary entry of the request's own second is known to it, a main one is not.
  await database.run(`CREATE TABLE seen AS SELECT request, first, until,
      greatest(0, coalesce(lag(until) OVER (PARTITION BY u ORDER BY request), 0) - first)::INTEGER AS supervised_from, candidates
    FROM (SELECT r.request, r.u, coalesce(n, 0)::INTEGER AS until, greatest(0, coalesce(n, 0) - ${maxHistory})::INTEGER AS first
      FROM requests r ASOF LEFT JOIN
        (SELECT u, 2 * t + (series = 0)::INTEGER AS key, max(pos) + 1 AS n FROM rows GROUP BY ALL) w
        ON w.u = r.u AND r.key > w.key)
    JOIN (SELECT request, count(*) AS candidates FROM rows WHERE request >= 0 GROUP BY request) USING (request)`)
  await buildLists(database, v, onProgress)
  const plans: ShardPlan[] = []
  const sql = `SELECT min(request)::INTEGER, count(*)::INTEGER, sum(n)::DOUBLE FROM
    (SELECT request, n, (sum(n) OVER (ORDER BY request) // ${SHARD_ENTRIES}) AS shard FROM
      (SELECT request, until - first + candidates AS n FROM seen)) GROUP BY shard ORDER BY shard`
  await database.chunks(sql, chunk => {
    for (const [first, requests, entries] of chunk.getRows() as number[][])
      plans.push({ first: first!, requests: requests!, entries: entries! })
  })
  return plans
}

async function buildLists(database: Database, v: readonly string[], onProgress: (done: number, total: number) => void) {
  const total = Number((await database.row('SELECT count(*) AS n FROM rows'))!.n)
  const parts = Math.ceil(total / LIST_ENTRIES)
  const list = (x: string, as: string) => `list(${x} ORDER BY pos) AS ${as}`
  const select = `SELECT u, ${[
    ...[list('i', 'items'), list('series', 'series'), list('t', 'times'), list('action', 'actions')],
    ...[list('taken', 'taken'), list('request', 'requests')],
    ...v.map(x => list(`coalesce(${x}, 'nan'::FLOAT)`, x)),
  ].join(', ')} FROM rows`
  for (let part = 0; part < parts; part++) {
    const into = part === 0 ? 'CREATE TABLE lists AS' : 'INSERT INTO lists'
    await database.run(`${into} ${select} WHERE u % ${parts} = ${part} GROUP BY u`)
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
  plan: ShardPlan,
  schema: RequestSchema,
): Promise<void> {
  const v = groupColumns('v', schema.values)
  const within = `request BETWEEN ${plan.first} AND ${plan.first + plan.requests - 1}`
  const span = await database.row(`SELECT min(t) AS first, max(t) AS last FROM requests WHERE ${within}`)
  const slice = (lists: string) => `list_slice(l.${lists}, s.first + 1, s.until)`
  const known = (lists: string, from: string) =>
    `CASE WHEN p.request IS NULL THEN ${slice(lists)} ELSE
      list_transform(${slice(lists)}, lambda x, n: coalesce(map_extract(p.${from}, s.first + n - 1)[1], x)) END`
  const pending = `CASE WHEN p.request IS NULL THEN list_resize([]::INTEGER[], s.until - s.first, 0) ELSE
    list_transform(range(s.first, s.until), lambda x: coalesce(map_extract(p.pending, x::INTEGER)[1], 0)::INTEGER) END`
  const values = schema.values.flatMap((name, k) => [
    `${known(`v${k}`, `v${k}`)} AS ${sqlName(historyValueColumn(name))}`,
    `c.v${k} AS ${sqlName(candidateValueColumn(name))}`,
  ])
  // Entries that were seen before a request of the shard and acted on at its time or later: what was known then.
  const late = `SELECT r.request, w.pos, coalesce(bit_or(x.action), 0)::INTEGER AS known,
      (w.action & ~coalesce(bit_or(x.action), 0))::INTEGER AS pending
      ${v.map(name => `, coalesce(max_by(x.${name}, (x.t, x.row)) FILTER (x.${name} IS NOT NULL), 'nan'::FLOAT) AS ${name}`).join('')}
    FROM (SELECT request, u, t FROM requests WHERE ${within}) r
    JOIN (SELECT * FROM rows WHERE settled > t AND settled >= ${span!.first} AND t < ${span!.last}) w
      ON w.u = r.u AND w.t < r.t AND w.settled >= r.t
    LEFT JOIN events x ON x.e = w.e AND x.t < r.t GROUP BY r.request, w.pos, w.action`
  const sql = `WITH late AS (${late}),
    p AS (SELECT request, map(list(pos), list(known)) AS known, map(list(pos), list(pending)) AS pending
      ${v.map(name => `, map(list(pos), list(${name})) AS ${name}`).join('')} FROM late GROUP BY request),
    c AS (SELECT request, list(i ORDER BY t, row) AS items, list(action ORDER BY t, row) AS actions, list(taken ORDER BY t, row) AS taken
      ${v.map(name => `, list(coalesce(${name}, 'nan'::FLOAT) ORDER BY t, row) AS ${name}`).join('')}
      FROM rows WHERE ${within} GROUP BY request)
    SELECT r.request, r.request_id, r.u AS user, r.t AS time, r.contextual, s.first AS history_start,
      ${slice('items')} AS history_item, ${slice('series')} AS history_series, ${slice('times')} AS history_time,
      ${known('actions', 'known')} AS history_action, ${slice('taken')} AS history_taken, ${pending} AS history_pending,
      ${slice('requests')} AS history_request, s.supervised_from,
      c.items AS candidate_item, c.actions AS candidate_action, c.taken AS candidate_taken ${values.map(x => `, ${x}`).join('')}
    FROM lists l JOIN (SELECT * FROM requests WHERE ${within}) r ON l.u = r.u
    JOIN (SELECT * FROM seen WHERE ${within}) s ON s.request = r.request JOIN c ON c.request = r.request
    LEFT JOIN p ON p.request = r.request ORDER BY r.request`
  await database.run(
    `SET disabled_optimizers = 'join_order,build_side_probe_side'; COPY (${sql}) TO ${sqlString(join(folder, file))} (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 2048)`,
  )
}
