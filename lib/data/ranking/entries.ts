import { HstuError } from '../../errors.js'
import type { Database } from '../duckdb.js'
import { MAX_PLAUSIBLE_SECONDS, MAX_SECONDS } from '../sequence_file.js'
import { groupColumns, type LoggedFile, logError } from './log.js'
import type { RequestMapping } from './mapping.js'
import type { RequestSchema } from './schema.js'

/** What `prepareRequests` left out or folded. */
export interface PrepareCounts {
  /** Rows of the logs. */
  rows: number
  /** Rows that equal another in every mapped column. */
  duplicates: number
  /** Rows of late labels whose request id is in no other log. */
  unknownRequests: number
  /** Requests in which nothing was shown: their events are history alone. */
  withoutCandidates: number
  /** Rows whose item is beyond `maxItems` (`overflow: 'unknown'`). */
  overflow: number
  /** Times with a fraction of a second, cut off. */
  fractions: number
}

/**
 * Checks the rows of `log`.
 * @throws HstuError ERR_HSTU_DATA at the first row that is not what it has to be, and for times of mixed units.
 */
export async function validateLog(
  database: Database,
  files: readonly LoggedFile[],
  schema: RequestSchema,
): Promise<{ rows: number; fractions: number }> {
  const wrong: Record<string, [string, Parameters<typeof logError>[3], string]> = {
    item: ["item_id IS NULL OR item_id = ''", 'item', 'an item id'],
    // In SQL NaN is greater than every number, so "not (abs <= limit)" catches it.
    time: [`t IS NULL OR NOT (abs(t) <= ${MAX_SECONDS})`, 'time', 'a time'],
    odd: ['odd', 'action', 'a number in every column that an action or impression compares'],
  }
  const [someUsers, noUsers] = [true, false].map(known =>
    files.filter(({ source }) => (source.user !== undefined) === known),
  )
  const rowsOf = (some: readonly LoggedFile[]) =>
    some.map(({ start, rows }) => `rowid BETWEEN ${start} AND ${start + rows - 1}`).join(' OR ') || 'false'
  wrong.user = [`(user_id IS NULL OR user_id = '') AND (${rowsOf(someUsers!)})`, 'user', 'a user id']
  if (noUsers!.length > 0) wrong.request = [`request_id IS NULL AND (${rowsOf(noUsers!)})`, 'value', 'a request id']
  groupColumns('v', schema.values).forEach((column, k) => {
    wrong[column] = [`NOT isfinite(${column})`, 'value', `a finite number or nothing as value '${schema.values[k]}'`]
  })
  const firsts = Object.entries(wrong).map(([name, [condition]]) => `min(rowid) FILTER (${condition}) AS "${name}"`)
  const found = await database.row(`SELECT count(*) AS rows, count(*) FILTER (t <> floor(t)) AS fractions,
    min(t) AS earliest, max(t) AS latest, bool_or(impression) AS shown, ${firsts.join(', ')} FROM log`)
  const bad = Object.keys(wrong)
    .filter(name => found![name] != null)
    .sort((a, b) => Number(found![a]) - Number(found![b]))[0]
  if (bad) throw await logError(database, files, Number(found![bad]), wrong[bad]![1], wrong[bad]![2])
  const [earliest, latest] = [Number(found!.earliest), Number(found!.latest)]
  // Times of one unit do not span a factor of 500 once they are years from 1970.
  const mixed = earliest > 0 && latest > 1e8 && latest > 500 * earliest
  if (mixed || latest > MAX_PLAUSIBLE_SECONDS) {
    const odd = latest > MAX_PLAUSIBLE_SECONDS ? `t > ${MAX_PLAUSIBLE_SECONDS}` : `t > 0 AND t < ${latest / 500}`
    const row = Number((await database.row(`SELECT min(rowid) AS n FROM log WHERE ${odd}`))!.n)
    const expected = mixed
      ? `times of one unit (the earliest is ${earliest} s, the latest ${latest} s)`
      : 'a time in seconds (timeUnit ms or us reads finer ones)'
    throw await logError(database, files, row, 'time', expected)
  }
  if (found!.shown !== true) throw new HstuError('ERR_HSTU_DATA', `${files[0]!.path}: no row is an impression`)
  return { rows: Number(found!.rows), fractions: Number(found!.fractions) }
}

/** Tables `users`, `items`, `feature_*`: `n` from 1 by first appearance in time, `id` as in the log. */
async function number(database: Database, table: string, column: string): Promise<number> {
  await database.run(`CREATE TABLE ${table} AS SELECT id, row_number() OVER (ORDER BY t, row) AS n FROM
    (SELECT ${column} AS id, min(t) AS t, min_by(row, (t, row)) AS row FROM joined WHERE ${column} IS NOT NULL GROUP BY 1)`)
  return Number((await database.row(`SELECT count(*) AS n FROM ${table}`))!.n)
}

/** Sizes of the vocabularies: numbers run from 1 to these. */
export interface VocabularySizes {
  users: number
  items: number
  contextual: number[]
  series: number[]
}

/**
 * From `log` to the tables
 * - `records` (q, request, request_id, u, t, key): requests in order; contextual numbers in `contextual`;
 * - `entries` (e, q, u, i, t, row, action, settled, impression, v..): one a request and item, and one more for what
 *   preceded the impression;
 * - `events` (e, t, row, action, v..): what those entries consist of that were acted on after they began;
 * - `taken` (e, action): actions on the entry's item before the entry, where there are any.
 */
export async function buildEntries(
  database: Database,
  mapping: RequestMapping,
  schema: RequestSchema,
  counts: PrepareCounts,
): Promise<VocabularySizes> {
  const [v, c, s] = [
    groupColumns('v', schema.values),
    groupColumns('c', schema.contextual),
    groupColumns('s', schema.series),
  ]
  const also = (columns: readonly string[], form = (x: string) => x) => columns.map(x => `, ${form(x)}`).join('')
  await joinLabels(database, counts)
  const users = await number(database, 'users', 'user_id')
  const items = await number(database, 'items', 'item_id')
  const numbered = async (columns: readonly string[]) => {
    const sizes: number[] = []
    for (const column of columns) sizes.push(await number(database, `feature_${column}`, column))
    return sizes
  }
  const sizes = { users, items, contextual: await numbered(c), series: await numbered(s) }
  if (mapping.maxItems !== undefined && items > mapping.maxItems) {
    if (mapping.overflow !== 'unknown')
      throw new HstuError(
        'ERR_HSTU_DATA',
        `${mapping.name}: ${items} items, more than maxItems ${mapping.maxItems}; overflow: 'unknown' makes the later ones 0`,
      )
    const beyond = `SELECT count(*) AS n FROM joined JOIN items ON id = item_id WHERE n > ${mapping.maxItems}`
    counts.overflow = Number((await database.row(beyond))!.n)
    await database.run(`DELETE FROM items WHERE n > ${mapping.maxItems}`)
    sizes.items = mapping.maxItems
  }
  // The number that an item of the log keeps, and the one that records show.
  await database.run(`CREATE TABLE known AS SELECT item_id AS id, row_number() OVER () AS j, coalesce(n, 0) AS i
    FROM (SELECT DISTINCT item_id FROM joined) LEFT JOIN items ON id = item_id`)
  await database.run(`CREATE TABLE keys AS SELECT k.*, n AS u, row_number() OVER () AS q
    FROM (SELECT DISTINCT user_id, request_id, second FROM joined) k JOIN users ON id = user_id`)
  await database.run(`CREATE TABLE placed AS SELECT row, q, u, j, i, floor(t)::BIGINT AS t, action, impression
      ${also(v)} ${also(c, x => `${x}.n AS ${x}`)} ${also(s, x => `${x}.n AS ${x}`)}
    FROM joined e JOIN keys k ON k.user_id = e.user_id AND k.request_id IS NOT DISTINCT FROM e.request_id
      AND k.second IS NOT DISTINCT FROM e.second
    JOIN known i ON i.id = item_id ${[...c, ...s].map(x => `LEFT JOIN feature_${x} ${x} ON ${x}.id = e.${x}`).join(' ')}`)
  await database.run('DROP VIEW joined; DROP TABLE log')
  // Apart from the joins, for both at once do not fit into memory.
  await database.run(
    'CREATE TABLE numbered AS SELECT min(row) AS row, count(*) AS copies, * EXCLUDE (row) FROM placed GROUP BY ALL',
  )
  await database.run('DROP TABLE placed')
  counts.duplicates = Number((await database.row('SELECT sum(copies - 1)::BIGINT AS n FROM numbered'))!.n)
  await buildRecords(database, c, counts)
  // What came before the item was shown is an entry of its own (phase 0).
  await database.run(`CREATE TABLE phased AS SELECT n.*, (shown IS NULL OR n.t >= shown) AS phase, shown FROM numbered n
    LEFT JOIN (SELECT q, j, min(t) AS shown FROM numbered WHERE impression GROUP BY ALL) USING (q, j)`)
  await database.run(`CREATE TABLE entries AS SELECT row_number() OVER () AS e, * FROM (
    SELECT q, u, j, i, phase, coalesce(min(shown) FILTER (phase), min(t)) AS t, min(row) AS row, bit_or(action) AS action,
      max(t) FILTER (action > 0 ${also(v, x => `${x} IS NOT NULL`).replaceAll(',', ' OR')}) AS settled,
      phase AND any_value(shown) IS NOT NULL AS impression ${also(v, x => `max_by(${x}, (t, row)) FILTER (${x} IS NOT NULL) AS ${x}`)}
    FROM phased GROUP BY q, u, j, i, phase)`)
  await database.run(`CREATE TABLE events AS SELECT e, p.t, p.row, p.action ${also(v, x => `p.${x}`)} FROM phased p
    JOIN (SELECT e, q, j, phase FROM entries WHERE settled > t) USING (q, j, phase)`)
  // Only items that a user comes back to were acted on before.
  await database.run('CREATE TABLE again AS SELECT u, j FROM entries GROUP BY u, j HAVING count(*) > 1')
  await database.run(`CREATE TABLE taken AS SELECT e, a.action FROM (SELECT e, u, j, t FROM entries SEMI JOIN again USING (u, j)) x
    ASOF JOIN (SELECT u, j, t, bit_or(action) OVER (PARTITION BY u, j ORDER BY t) AS action
      FROM numbered SEMI JOIN again USING (u, j) WHERE action > 0) a ON a.u = x.u AND a.j = x.j AND x.t > a.t`)
  await database.run('DROP TABLE phased')
  return sizes
}

/**
 * The view `joined`: `log` with late labels that have the user of their request; those of unknown requests are left out
 * and counted. A request without an id is a user at one `second`.
 */
async function joinLabels(database: Database, counts: PrepareCounts): Promise<void> {
  const late = 'SELECT request_id FROM log WHERE user_id IS NULL'
  await database.run(`CREATE TABLE owners AS SELECT request_id, min(user_id) AS user_id, count(DISTINCT user_id) AS n
    FROM log SEMI JOIN (${late}) USING (request_id) WHERE user_id IS NOT NULL GROUP BY request_id`)
  const double = await database.row('SELECT request_id, n FROM owners WHERE n > 1 LIMIT 1')
  if (double)
    throw new HstuError(
      'ERR_HSTU_DATA',
      `request id '${double.request_id}' has ${double.n} users, so labels cannot join it by id alone: map a user column`,
    )
  const left = await database.row(`SELECT count(*) AS n FROM (${late}) ANTI JOIN owners USING (request_id)`)
  counts.unknownRequests = Number(left!.n)
  await database.run(`CREATE VIEW joined AS WITH e AS NOT MATERIALIZED
      (SELECT *, rowid AS row, CASE WHEN request_id IS NULL THEN floor(t)::BIGINT END AS second FROM log)
    SELECT * FROM e WHERE user_id IS NOT NULL UNION ALL
    SELECT e.* REPLACE (o.user_id AS user_id) FROM e JOIN owners o USING (request_id) WHERE e.user_id IS NULL`)
}

async function buildRecords(database: Database, c: readonly string[], counts: PrepareCounts): Promise<void> {
  const features = c.map(x => `coalesce(min_by(${x}, (t, row)) FILTER (${x} IS NOT NULL), 0)`).join(', ')
  await database.run(`CREATE TABLE records AS SELECT q, (row_number() OVER (ORDER BY t, row) - 1)::INTEGER AS request,
      coalesce(request_id, user_id || '@' || second) AS request_id, n.u, t, 2 * t + 1 AS key, contextual
    FROM (SELECT q, u, min(t) FILTER (impression) AS t, min(row) AS row, [${features}]::BIGINT[] AS contextual
      FROM numbered GROUP BY q, u HAVING bool_or(impression)) n JOIN keys USING (q)`)
  const without = await database.row('SELECT (SELECT count(*) FROM keys) - (SELECT count(*) FROM records) AS n')
  counts.withoutCandidates = Number(without!.n)
}
